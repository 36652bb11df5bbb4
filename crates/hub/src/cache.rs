//! The cache's mechanics: locks between processes, whole-or-nothing files, checksums and manifests.

use serde::{Deserialize, Serialize};
use sha1::Digest;
use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_files::{
    atomic::{self, create_folder},
    hash::{hex, read_chunks, sha256_hex, sha256_of},
};

/// Wraps an I/O error that is never the user's mistake, a missing file inside the cache included.
pub(crate) fn io_error(verb: &str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::own_io(verb, path, source)
}

/// The path made absolute without following links.
pub(crate) fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(io_error("cannot find the absolute path of", &path))
}

/// Removes a file or a link, dangling ones included; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", path)(error)),
        _ => Ok(()),
    }
}

/// An exclusive lock between processes; released when dropped, and by the system when the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Option<File>,
}

impl Lock {
    /// Takes the lock of `key` under the cache root, waiting for another process if need be (and saying so).
    pub(crate) fn acquire(cache: &Path, key: &str, progress: &mut Observer<'_>) -> Result<Self> {
        let folder = cache.join("locks");
        create_folder(&folder)?;
        let path = folder.join(format!("{}.lock", file_name_of(key)));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("cannot open the lock file", &path))?;
        let locked = match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                let what = format!("waiting for another process that fetches {key}");
                progress(Progress::bytes(&what, 0, None));
                file.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
        };
        match locked {
            Ok(()) => Ok(Self { _file: Some(file) }),
            // Some network file systems have no locks. Every write is still whole or nothing, so two processes can only
            // do the same work twice.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(Self { _file: None }),
            Err(error) => Err(io_error("cannot lock", &path)(error)),
        }
    }
}

/// `key` as one file name: readable, and unlike for unlike keys.
pub(crate) fn file_name_of(key: &str) -> String {
    let readable: String =
        key.chars().take(80).map(|c| if c.is_ascii_alphanumeric() || "._-=".contains(c) { c } else { '-' }).collect();
    format!("{readable}-{}", &sha256_hex(key)[..8])
}

/// The name that git gives to a file's content, which the hub uses as ETag of small files: SHA-1 of a header and the bytes.
pub(crate) fn git_blob_of(path: &Path) -> Result<String> {
    let size = fs::metadata(path).map_err(io_error("cannot read", path))?.len();
    let mut digest = sha1::Sha1::new();
    digest.update(format!("blob {size}\0"));
    read_chunks(path, |chunk| digest.update(chunk))?;
    Ok(hex(&digest.finalize()))
}

/// One cached file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Path below the manifest's folder, with forward slashes.
    pub(crate) path: String,
    /// Bytes.
    pub(crate) size: u64,
    /// SHA-256 in hexadecimal; absent where the hub gave another kind of checksum.
    pub(crate) sha256: Option<String>,
    /// Time of the last change when the checksum was last known to hold, in nanoseconds since 1970.
    pub(crate) modified_ns: u64,
}

impl Entry {
    /// Describes a file as it is now.
    pub(crate) fn of(folder: &Path, path: String, sha256: Option<String>) -> Result<Self> {
        let (size, modified_ns) = size_and_time(&folder.join(&path))?;
        Ok(Self { path, size, sha256, modified_ns })
    }
}

fn size_and_time(path: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(path).map_err(io_error("cannot read", path))?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok((metadata.len(), modified.and_then(|time| u64::try_from(time.as_nanos()).ok()).unwrap_or(0)))
}

/// What one fetch put into the cache. Written last, so that its presence means that the fetch was complete.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// What was fetched, as a spec.
    pub(crate) source: String,
    /// Its files.
    pub(crate) files: Vec<Entry>,
}

impl Manifest {
    /// Reads a manifest; one that is missing or unreadable counts as absent (its files are then fetched again).
    pub(crate) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes it, whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Failure(format!("cannot write {}: {error}", path.display())))?;
        atomic::write(path, text)
    }

    /// True if every file is there as it was. Sizes and times are looked at each time; a file whose time differs is
    /// hashed once, and the manifest at `path` then takes the new time.
    pub(crate) fn holds(&mut self, folder: &Path, path: &Path) -> Result<bool> {
        let mut touched = false;
        for entry in &mut self.files {
            let file = folder.join(&entry.path);
            let Ok((size, modified_ns)) = size_and_time(&file) else { return Ok(false) };
            if size != entry.size {
                return Ok(false);
            }
            if modified_ns != entry.modified_ns {
                if entry.sha256.is_some() && entry.sha256 != Some(sha256_of(&file)?) {
                    return Ok(false);
                }
                entry.modified_ns = modified_ns;
                touched = true;
            }
        }
        if touched {
            // A cache that cannot be written (a read-only share) still serves: the next call hashes again.
            let _ = self.write(path);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread, time::Duration};

    #[test]
    fn the_name_of_a_blob_is_the_one_that_git_gives() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin`
        assert_eq!(git_blob_of(&file).unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }

    #[test]
    fn a_manifest_notices_change_and_forgives_a_touch() {
        let folder = tempfile::tempdir().unwrap();
        let (file, manifest) = (folder.path().join("f"), folder.path().join("m.json"));
        fs::write(&file, "one").unwrap();
        let entry = Entry::of(folder.path(), "f".into(), Some(sha256_of(&file).unwrap())).unwrap();
        Manifest { source: "s".into(), files: vec![entry] }.write(&manifest).unwrap();
        let holds = || Manifest::read(&manifest).unwrap().holds(folder.path(), &manifest).unwrap();
        assert!(holds());

        let later = fs::metadata(&file).unwrap().modified().unwrap() + Duration::from_secs(9);
        File::options().write(true).open(&file).unwrap().set_modified(later).unwrap();
        let before = Manifest::read(&manifest).unwrap().files[0].modified_ns;
        assert!(holds());
        assert_eq!(
            Manifest::read(&manifest).unwrap().files[0].modified_ns,
            before + 9_000_000_000,
            "the new time is kept"
        );

        fs::write(&file, "two").unwrap();
        File::options().write(true).open(&file).unwrap().set_modified(later + Duration::from_secs(1)).unwrap();
        assert!(!holds(), "same size, other bytes");
        fs::write(&file, "longer").unwrap();
        assert!(!holds());
        fs::remove_file(&file).unwrap();
        assert!(!holds());
        fs::write(&manifest, "{").unwrap();
        assert!(Manifest::read(&manifest).is_none());
    }

    #[test]
    fn a_second_fetch_waits_for_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::acquire(folder.path(), "a/b", &mut |_| panic!("nobody to wait for")).unwrap();
        Lock::acquire(folder.path(), "a-b", &mut |_| panic!("another key is another lock")).unwrap();
        let (send, receive) = mpsc::channel();
        let root = folder.path().to_owned();
        let second = thread::spawn(move || {
            Lock::acquire(&root, "a/b", &mut |event| send.send(event.what.to_owned()).unwrap()).unwrap();
        });
        assert_eq!(receive.recv().unwrap(), "waiting for another process that fetches a/b");
        drop(first);
        second.join().unwrap();
    }
}
