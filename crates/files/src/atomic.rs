//! Writing files and folders so that a reader sees the old state or the new one, never a part of either, also after a
//! power cut: under a temporary name in the same folder, flushed to the disk, renamed.

use crate::{Error, Result};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};
use tempfile::{NamedTempFile, TempDir};

/// A file that is being written under a temporary name in the folder of its path. When it is dropped before
/// [`Self::finish`], what was at the path is untouched and the temporary file is gone.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Begins the file that will be at `path`; makes its folder if need be.
    ///
    /// # Errors
    /// [`Error::Io`] when nothing can be written there.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = folder_of(path);
        create_folder(folder)?;
        let file = builder(".writing-", 0o666).tempfile_in(folder).map_err(|e| cannot_write(path, e))?;
        Ok(Self { path: path.to_owned(), writer: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Writes through `fill`, naming the file when that fails.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn fill(&mut self, fill: impl FnOnce(&mut Self) -> io::Result<()>) -> Result<()> {
        fill(self).map_err(|e| cannot_write(&self.path, e))
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        let Self { path, writer } = self;
        let cannot = |source| cannot_write(&path, source);
        let file = writer.into_inner().map_err(|error| cannot(error.into_error()))?;
        file.as_file().sync_all().map_err(cannot)?;
        file.persist(&path).map_err(|error| cannot(error.error))?;
        sync_folder(folder_of(&path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.writer.seek(to)
    }
}

/// Puts `bytes` at `path`; makes its folder if need be.
///
/// # Errors
/// [`Error::Io`]; what was there before is then untouched.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_with(path, |file| file.fill(|file| file.write_all(bytes.as_ref())))
}

/// Puts at `path` what `fill` writes; makes its folder if need be.
///
/// # Errors
/// That of `fill`, and [`Error::Io`]; what was there before is then untouched.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut AtomicFile) -> Result<()>) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    fill(&mut file)?;
    file.finish()
}

/// A temporary folder in `parent`, whose name begins with `prefix`, to be renamed when what is in it is complete.
///
/// # Errors
/// [`Error::Io`].
pub fn temporary_folder(parent: &Path, prefix: &str) -> Result<TempDir> {
    let made = builder(prefix, 0o777).tempdir_in(parent);
    made.map_err(|e| Error::own_io("cannot create a temporary folder in", parent, e))
}

/// Creates a folder and its parents.
///
/// # Errors
/// [`Error::Io`].
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::own_io("cannot create the folder", path, e))
}

/// Flushes a file that was written by other means to the disk.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_file(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Error::own_io("cannot sync", path, e))
}

/// Flushes the names in `folder` to the disk, without which a power cut could undo a rename.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Only Unix lets a folder be opened, and only there the flush of a file leaves its name out.
    if cfg!(unix) { sync_file(folder) } else { Ok(()) }
}

/// The folder that `path` is in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary names are private by default. What gets its final name should be as readable as anything else of the
/// user: `mode`, less the umask.
fn builder(prefix: &str, mode: u32) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

fn cannot_write(path: &Path, source: io::Error) -> Error {
    Error::own_io("cannot write", path, source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/file.txt");
        write(&path, "old").unwrap();
        let result = write_with(&path, |file| {
            file.fill(|file| {
                file.write_all(b"new")?;
                Err(io::ErrorKind::StorageFull.into())
            })
        });
        assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path().join("sub")).unwrap().count(), 1);
        write(&path, "new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(write(&path.join("no"), "").unwrap_err().exit_code(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_written_has_the_permissions_of_any_other_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("plain"), "").unwrap();
        write(&at("ours"), "").unwrap();
        fs::create_dir(at("folder")).unwrap();
        let temporary = temporary_folder(folder.path(), ".new-").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&at("ours")), mode(&at("plain")));
        assert_eq!(mode(temporary.path()), mode(&at("folder")));
    }
}
