//! Read-only memory-mapped files.

use memmap2::Mmap;
use std::{fs::File, io, ops::Deref, ops::Range, path::Path};

/// The bytes of a file, mapped into memory and read only when touched.
///
/// The mapping shows the file as it is on the disk: whoever changes or truncates the file while it is mapped breaks
/// the reader. Files of this program are replaced by renaming, never rewritten in place, which leaves a mapping intact.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// Whatever the operating system says; [`io::ErrorKind::InvalidInput`] when `path` is a folder, pipe or device.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> io::Result<Self> {
        // Asked before opening, since opening a pipe waits for a writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is private to this value and read-only, and its pages stay valid until it is dropped. What
        // remains is another process shortening or rewriting the file meanwhile; every reader of the bytes treats them
        // as untrusted, so changed content cannot break memory safety here, and shortening ends the process (SIGBUS).
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(map))
    }

    /// Gives the memory of the bytes in `range` back: they count as this process's no longer, and are read again when
    /// they are touched again. Whoever has copied or dequantised a part of a large file calls this, or the file stays
    /// in memory beside the copy.
    ///
    /// # Panics
    /// When `range` reaches past the end of the file.
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.0.len(), "{range:?} of {} bytes", self.0.len());
        if range.is_empty() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the mapping is read-only and backed by a file, so a page that is dropped comes back with the same
            // bytes; nothing was written that could be lost. That the advice may fail only costs memory.
            let _ =
                unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared<T: Send + Sync>(_: &T) {}

    #[test]
    fn maps_its_own_source() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mapped.rs");
        let map = MappedFile::open(&path).unwrap();
        shared(&map);
        assert_eq!(&map[..], std::fs::read(&path).unwrap());
    }

    #[test]
    fn released_bytes_come_back() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mapped.rs");
        let map = MappedFile::open(&path).unwrap();
        let before = map.to_vec();
        map.release(0..map.len());
        map.release(5..5);
        map.release(3..100);
        assert_eq!(&map[..], before);
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let path = std::env::temp_dir().join(format!("tunesmith-empty-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let map = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(map.is_empty());
    }

    #[test]
    fn folders_and_missing_files_are_errors() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(MappedFile::open(folder).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(MappedFile::open(&folder.join("no-such-file")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
