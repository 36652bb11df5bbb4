//! Writing a file so that a reader sees the old one or the new one, never a part.
use crate::{Error, Result};
use std::{
    fs::{self, File},
    io::{self, BufWriter},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// A file that is being written under a temporary name in the folder of `path`. When it is dropped before
/// [`Self::finish`], what was at `path` is untouched and the temporary file is gone.
#[derive(Debug)]
pub(crate) struct Pending {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl Pending {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let folder = folder(path);
        let cannot = |source| Error::Io { what: format!("cannot write {}", path.display()), source };
        fs::create_dir_all(folder).map_err(cannot)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".writing-");
        // A temporary file is private by default; what it becomes should be as readable as any other file of the user.
        #[cfg(unix)]
        let permissions = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(permissions);
        let temporary = builder.tempfile_in(folder).map_err(cannot)?;
        Ok(Self { path: path.to_owned(), writer: BufWriter::with_capacity(1 << 20, temporary) })
    }

    /// Writes through `fill`, naming the file when that fails.
    pub(crate) fn write(&mut self, fill: impl FnOnce(&mut BufWriter<NamedTempFile>) -> io::Result<()>) -> Result<()> {
        fill(&mut self.writer).map_err(|source| cannot_write(&self.path, source))
    }

    /// Syncs the file and gives it its name.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { path, writer } = self;
        let cannot = |source| cannot_write(&path, source);
        let temporary = writer.into_inner().map_err(|error| cannot(error.into_error()))?;
        temporary.as_file().sync_all().map_err(cannot)?;
        temporary.persist(&path).map_err(|error| cannot(error.error))?;
        // The rename itself lives in the folder; without this a power cut could undo it.
        #[cfg(unix)]
        File::open(folder(&path)).and_then(|folder| folder.sync_all()).map_err(cannot)?;
        Ok(())
    }
}

fn cannot_write(path: &Path, source: io::Error) -> Error {
    Error::Io { what: format!("cannot write {}", path.display()), source }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Writes `path` through `fill`: into a temporary file in the same folder, synced, then renamed over `path`. When
/// anything fails, what was at `path` before is untouched and the temporary file is gone.
pub(crate) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<NamedTempFile>) -> io::Result<()>,
) -> Result<()> {
    let mut pending = Pending::create(path)?;
    pending.write(fill)?;
    pending.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/file.txt");
        write_file(&path, |w| w.write_all(b"old")).unwrap();
        let result = write_file(&path, |w| {
            w.write_all(b"new")?;
            Err(std::io::Error::other("no space left on device"))
        });
        assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path().join("sub")).unwrap().count(), 1);
    }
}
