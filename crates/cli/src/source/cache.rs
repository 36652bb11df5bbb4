//! The cache's mechanics: locks between processes, whole-or-nothing files, checksums and manifests.

use super::Progress;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// Bytes read or written at a time.
pub(super) const CHUNK: usize = 1 << 20;

/// Wraps an I/O error that is never the user's mistake, a missing file inside the cache included.
pub(super) fn io_error(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("{verb} {}", path.display());
    move |source| Error::Io { what, source }
}

/// The path made absolute without following links.
pub(super) fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(io_error("cannot find the absolute path of", &path))
}

/// Creates a folder and its parents.
pub(super) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(io_error("cannot create the folder", path))
}

/// An exclusive lock between processes; released when dropped, and by the system when the process dies.
#[derive(Debug)]
pub(super) struct Lock {
    _file: Option<File>,
}

impl Lock {
    /// Takes the lock of `key` under the cache root, waiting for another process if need be (and saying so).
    pub(super) fn acquire(cache: &Path, key: &str, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Self> {
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
                progress(Progress { what: &what, done_bytes: 0, total_bytes: None });
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
pub(super) fn file_name_of(key: &str) -> String {
    let readable: String =
        key.chars().take(80).map(|c| if c.is_ascii_alphanumeric() || "._-=".contains(c) { c } else { '-' }).collect();
    format!("{readable}-{}", &hex(&Sha256::digest(key))[..8])
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a file.
pub(super) fn sha256_of(path: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    read_chunks(path, |chunk| digest.update(chunk))?;
    Ok(hex(&digest.finalize()))
}

/// The name that git gives to a file's content, which the hub uses as ETag of small files: SHA-1 of a header and the bytes.
pub(super) fn git_blob_of(path: &Path) -> Result<String> {
    let size = fs::metadata(path).map_err(io_error("cannot read", path))?.len();
    let mut digest = sha1::Sha1::new();
    digest.update(format!("blob {size}\0"));
    read_chunks(path, |chunk| digest.update(chunk))?;
    Ok(hex(&digest.finalize()))
}

fn read_chunks(path: &Path, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut file = File::open(path).map_err(io_error("cannot read", path))?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => take(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("cannot read", path)(error)),
        }
    }
}

/// Makes a rename in `folder` last through a power cut, where the system can.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|file| file.sync_all()).map_err(io_error("cannot sync", folder))?;
    }
    Ok(())
}

/// Writes a small file whole or not at all.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some(folder) = path.parent() else {
        return Err(Error::Failure(format!("{} is not a place for a file", path.display())));
    };
    create_folder(folder)?;
    let fail = || io_error("cannot write", path);
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail())?;
    file.write_all(bytes).map_err(fail())?;
    file.as_file().sync_all().map_err(fail())?;
    file.persist(path).map_err(|error| fail()(error.error))?;
    sync_folder(folder)
}

/// One cached file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Path below the manifest's folder, with forward slashes.
    pub(super) path: String,
    /// Bytes.
    pub(super) size: u64,
    /// SHA-256 in hexadecimal; absent where the hub gave another kind of checksum.
    pub(super) sha256: Option<String>,
    /// Time of the last change when the checksum was last known to hold, in nanoseconds since 1970.
    pub(super) modified_ns: u64,
}

impl Entry {
    /// Describes a file as it is now.
    pub(super) fn of(folder: &Path, path: String, sha256: Option<String>) -> Result<Self> {
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
pub(super) struct Manifest {
    /// What was fetched, as a spec.
    pub(super) source: String,
    /// Its files.
    pub(super) files: Vec<Entry>,
}

impl Manifest {
    /// Reads a manifest; one that is missing or unreadable counts as absent (its files are then fetched again).
    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes it, whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Failure(format!("cannot write {}: {error}", path.display())))?;
        write_atomically(path, &text)
    }

    /// True if every file is there as it was. Sizes and times are looked at each time; a file whose time differs is
    /// hashed once, and the manifest at `path` then takes the new time.
    pub(super) fn holds(&mut self, folder: &Path, path: &Path) -> Result<bool> {
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
    fn checksums_are_the_published_ones() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "hello\n").unwrap();
        // `printf 'hello\n' | sha256sum`, `printf 'hello\n' | git hash-object --stdin`
        assert_eq!(sha256_of(&file).unwrap(), "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
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
