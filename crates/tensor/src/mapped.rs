//! Read-only memory-mapped files.

use memmap2::Mmap;
use std::{fs::File, io, ops::Deref, path::Path};

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
