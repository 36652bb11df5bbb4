//! Files of data inside a `.zip` archive, read where they stand: nothing is unpacked to a disk, so names cannot lead
//! out of anything.
//!
//! What an archive says of sizes is bounded before anything is read, and held against what comes: members that overlap,
//! of which each for itself would be harmless, count together.
use super::{DataFile, EXPANSION, EXPANSION_FREE, Kind, kind, known_endings};
use crate::{Error, Result};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Take},
    path::{Path, PathBuf},
    sync::Arc,
};
use zip::CompressionMethod;

/// Members of an archive: more make a list longer than the data.
const MOST: usize = 100_000;

/// A file in an archive.
#[derive(Debug)]
pub(crate) struct Member {
    /// Path inside the archive.
    pub(crate) name: String,
    /// Where its bytes begin in the archive.
    start: u64,
    /// Bytes in the archive.
    pub(crate) packed: u64,
    /// Bytes unpacked.
    size: u64,
    crc32: u32,
    is_deflated: bool,
}

/// Whether `path` is to be looked into.
pub(super) fn is_archive(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("zip"))
}

/// The files of data in the archive at `path`, by name. Names that begin with a dot are left out, and `.json` files
/// where there are others, as in a folder.
///
/// # Errors
/// An archive that is damaged, holds no data, or holds data that cannot be read from inside it: with a password,
/// compressed in another way than by deflate, in columns. More than it may grow to.
pub(super) fn members(path: &Path) -> Result<Vec<DataFile>> {
    let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
    let damaged = |error: zip::result::ZipError| wrong(format!("the archive is damaged: {error}"));
    let file = File::open(path).map_err(|e| Error::io("cannot read", path, e))?;
    let archive_bytes = file.metadata().map_err(|e| Error::io("cannot read", path, e))?.len();
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    if archive.len() > MOST {
        return Err(wrong(format!("{} files are in this archive, more than {MOST}; unpack it first", archive.len())));
    }
    let (mut found, mut names) = (Vec::new(), HashSet::new());
    let mut total = 0_u64;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        let is_hidden = name.split(['/', '\\']).any(|part| part.starts_with('.') || part == "__MACOSX");
        let Some((kind, _)) = kind(Path::new(&name)).ok().filter(|_| entry.is_file() && !is_hidden) else { continue };
        let refused = |why: &str| wrong(format!("{name} in this archive {why}; unpack it first"));
        if matches!(kind, Kind::Parquet | Kind::Arrow) {
            return Err(refused("has columns, which are not read out of an archive"));
        }
        if entry.encrypted() {
            return Err(refused("needs a password"));
        }
        let is_deflated = match entry.compression() {
            CompressionMethod::Stored => false,
            CompressionMethod::Deflated => true,
            other => return Err(refused(&format!("is compressed by {other}, and only deflate is read"))),
        };
        let start = entry.data_start().ok_or_else(|| wrong(format!("the archive is damaged: {name} has no place")))?;
        let member = Member {
            start,
            packed: entry.compressed_size(),
            size: entry.size(),
            crc32: entry.crc32(),
            is_deflated,
            name: name.clone(),
        };
        if !names.insert(name) {
            return Err(wrong(format!("{} is twice in this archive; unpack it first", member.name)));
        }
        if start.checked_add(member.packed).is_none_or(|end| end > archive_bytes) {
            return Err(wrong(format!("the archive is damaged or cut off: {} lies outside of it", member.name)));
        }
        total = total.saturating_add(member.size);
        found.push((kind, member));
    }
    if total > EXPANSION_FREE && total > archive_bytes.saturating_mul(EXPANSION) {
        return Err(wrong(format!(
            "{archive_bytes} bytes would become {total}, more than {EXPANSION} times as many, as with a decompression bomb; \
             unpack it and give the result if it is what you want"
        )));
    }
    if found.iter().any(|(kind, _)| *kind != Kind::Json) {
        found.retain(|(kind, _)| *kind != Kind::Json);
    }
    if found.is_empty() {
        return Err(wrong(format!("no file of data in this archive ({})", known_endings())));
    }
    found.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
    Ok(found.into_iter().map(|(_, member)| DataFile::in_archive(path, member)).collect())
}

impl Member {
    /// Its bytes, unpacked. `archive` is the archive's file.
    pub(crate) fn open<R: BufRead + Seek + Send + 'static>(&self, mut archive: R) -> io::Result<Box<dyn Read + Send>> {
        archive.seek(SeekFrom::Start(self.start))?;
        let packed: Take<R> = archive.take(self.packed);
        let inner: Box<dyn Read + Send> = match self.is_deflated {
            true => Box::new(flate2::bufread::DeflateDecoder::new(packed)),
            false => Box::new(packed),
        };
        Ok(Box::new(Checked { inner, left: self.size, crc: flate2::Crc::new(), crc32: self.crc32 }))
    }
}

/// Holds what comes against the size and the checksum that the archive says.
struct Checked {
    inner: Box<dyn Read + Send>,
    left: u64,
    crc: flate2::Crc,
    crc32: u32,
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let damaged = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let count = self.inner.read(buffer)?;
        if count as u64 > self.left {
            return damaged("more bytes than the archive says");
        }
        self.left -= count as u64;
        self.crc.update(&buffer[..count]);
        match (count, self.left) {
            (0, 1..) if !buffer.is_empty() => damaged("fewer bytes than the archive says"),
            (0, 0) if !buffer.is_empty() && self.crc.sum() != self.crc32 => damaged("the checksum is wrong"),
            _ => Ok(count),
        }
    }
}

impl DataFile {
    fn in_archive(archive: &Path, member: Member) -> Self {
        // Only shown: a name that begins with a slash must not take the place of the archive's.
        let shown = PathBuf::from(format!("{}/{}", archive.display(), member.name));
        Self { path: archive.to_owned(), member: Some(Arc::new(member)), shown }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::files;
    use std::io::Write;
    use zip::write::SimpleFileOptions;

    fn archive(path: &Path, entries: &[(&str, &[u8])], method: CompressionMethod) {
        let mut writer = zip::ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in entries {
            writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    fn listed(path: &Path) -> Result<Vec<DataFile>> {
        files(&[path.display().to_string()])
    }

    fn refusal(path: &Path) -> String {
        match listed(path) {
            Err(Error::Input(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    fn unpacked(file: &DataFile) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let member = file.member.as_ref().unwrap();
        member.open(BufReader::new(File::open(&file.path).unwrap()))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn files_of_data_are_found_and_read_where_they_stand() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.ZIP");
        let entries: [(&str, &[u8]); 6] = [
            ("sub/b.jsonl", b"{\"text\": \"b\"}\n"),
            ("a.csv", b"text\na\n"),
            ("info.json", b"{}"),
            ("README.md", b"x"),
            ("__MACOSX/a.csv", b"x"),
            (".hidden/c.txt", b"x"),
        ];
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            archive(&path, &entries, method);
            let found = listed(&path).unwrap();
            let names: Vec<_> = found.iter().map(|file| file.shown().strip_prefix(folder.path()).unwrap()).collect();
            assert_eq!(names, [Path::new("data.ZIP/a.csv"), Path::new("data.ZIP/sub/b.jsonl")]);
            assert_eq!(unpacked(&found[1]).unwrap(), entries[0].1);
        }
        archive(&path, &[("only.json", b"[]")], CompressionMethod::Stored);
        assert_eq!(listed(&path).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.zip");
        archive(&path, &[("notes.md", b"x")], CompressionMethod::Stored);
        assert!(refusal(&path).contains("no file of data in this archive (.txt"));
        archive(&path, &[("a.parquet", b"x")], CompressionMethod::Stored);
        assert!(refusal(&path).contains("a.parquet in this archive has columns"));
        std::fs::write(&path, b"PK no archive").unwrap();
        assert!(refusal(&path).contains("the archive is damaged"));
        archive(&path, &[("a.txt", &[b'x'; 1000])], CompressionMethod::Stored);
        let whole = std::fs::read(&path).unwrap();
        let mut locked = whole.clone();
        // The bit for a password, in the header of the file and in the list.
        let listed_at = whole.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        (locked[6], locked[listed_at + 8]) = (1, 1);
        std::fs::write(&path, &locked).unwrap();
        assert!(refusal(&path).contains("needs a password"));
        std::fs::write(&path, &whole[..500]).unwrap();
        assert!(refusal(&path).contains("damaged"));
    }

    #[test]
    fn damage_is_noticed_and_sizes_are_held_against_what_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.zip");
        archive(&path, &[("a.txt", b"some words")], CompressionMethod::Stored);
        let whole = std::fs::read(&path).unwrap();
        let at = whole.windows(10).position(|bytes| bytes == b"some words").unwrap();
        let mut other = whole.clone();
        other[at] ^= 1;
        std::fs::write(&path, &other).unwrap();
        let error = unpacked(&listed(&path).unwrap()[0]).unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error}");
        let listed_at = whole.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        for (size, says) in [(9, "more bytes"), (11, "fewer bytes")] {
            let mut other = whole.clone();
            // The size unpacked, in the list.
            other[listed_at + 24] = size;
            std::fs::write(&path, &other).unwrap();
            let error = unpacked(&listed(&path).unwrap()[0]).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn bombs_are_refused_before_anything_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.zip");
        let zeros = vec![0; 100 << 20];
        archive(&path, &[("a.txt", &zeros), ("b.txt", &zeros), ("c.txt", &zeros)], CompressionMethod::Deflated);
        assert!(refusal(&path).contains("decompression bomb"));
        archive(&path, &[("a.txt", &zeros)], CompressionMethod::Deflated);
        assert_eq!(listed(&path).unwrap().len(), 1);
    }
}
