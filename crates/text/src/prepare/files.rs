//! The files of a preparation, and their rows in groups.
use super::PrepareProgress;
use crate::{
    Error, PrepareOptions, Result, RowOptions, Split,
    read::{self, RawRow},
    source,
};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

/// Rows are worked on in groups of about this many bytes: enough to keep all cores busy, little to hold at once.
const GROUP_BYTES: usize = 8 << 20;

/// What else a row takes while it is worked on, so that a group of short rows stays small too.
const ROW_BYTES: usize = 64;

/// One data file: where it goes, and what it held when the key was made.
pub(super) struct Input {
    pub(super) path: PathBuf,
    pub(super) name: Arc<str>,
    /// The split that all its rows go to, or none when each row is decided upon.
    pub(super) split: Option<Split>,
    pub(super) bytes: u64,
    pub(super) digest: [u8; 32],
    modified: Option<SystemTime>,
}

impl Input {
    /// Whether the file is still as it was when the key was made, as far as its size and time tell.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let metadata = metadata(&self.path)?;
        if (metadata.len(), metadata.modified().ok()) == (self.bytes, self.modified) {
            return Ok(());
        }
        Err(Error::Input(format!(
            "{}: the file changed while it was read; try again when nothing writes to it",
            self.path.display()
        )))
    }
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::metadata(path).map_err(|e| Error::io("cannot read", path, e))
}

pub(super) fn inputs(options: &PrepareOptions, progress: &mut dyn FnMut(PrepareProgress)) -> Result<Vec<Input>> {
    let (validation, test) = options.fractions();
    let whole = if validation + test > 0.0 { None } else { Some(Split::Train) };
    let mut paths: Vec<(PathBuf, Option<Split>)> = Vec::new();
    let mut seen: HashMap<PathBuf, Option<Split>> = HashMap::new();
    for (places, split) in
        [(&options.train, whole), (&options.validation, Some(Split::Validation)), (&options.test, Some(Split::Test))]
    {
        for path in source::files(places)? {
            let identity = fs::canonicalize(&path).map_err(|e| Error::io("cannot read", &path, e))?;
            if let Some(earlier) = seen.insert(identity, split) {
                return Err(Error::Input(format!(
                    "{} is given for {} and for {}; held-out data must not be trained on",
                    path.display(),
                    earlier.unwrap_or(Split::Train),
                    split.unwrap_or(Split::Train)
                )));
            }
            paths.push((path, split));
        }
    }
    let files = paths.len();
    let mut inputs = Vec::with_capacity(files);
    for (files_done, (path, split)) in paths.into_iter().enumerate() {
        progress(PrepareProgress::Reading { files_done, files });
        let metadata = metadata(&path)?;
        inputs.push(Input {
            name: path.display().to_string().into(),
            split,
            bytes: metadata.len(),
            digest: digest(&path)?,
            modified: metadata.modified().ok(),
            path,
        });
    }
    progress(PrepareProgress::Reading { files_done: files, files });
    Ok(inputs)
}

/// SHA-256 of a file.
pub(super) fn digest(path: &Path) -> Result<[u8; 32]> {
    let cannot = |error| Error::io("cannot read", path, error);
    let mut hasher = HashWriter(Sha256::new());
    io::copy(&mut File::open(path).map_err(cannot)?, &mut hasher).map_err(cannot)?;
    Ok(hasher.0.finalize().into())
}

struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A row with its place among all rows of all files.
pub(super) struct Numbered {
    /// Index of its file.
    pub(super) input: usize,
    /// Index among all rows.
    pub(super) index: usize,
    pub(super) raw: RawRow,
}

/// Hands all rows of all files to `work`, in order and in groups, with the number of bytes read so far. Small files share
/// a group.
pub(super) fn for_each_group(
    inputs: &[Input],
    options: &RowOptions,
    work: &mut dyn FnMut(Vec<Numbered>, u64) -> Result<()>,
) -> Result<()> {
    let read = Arc::new(AtomicU64::new(0));
    let (mut group, mut waiting, mut index) = (Vec::new(), 0, 0);
    for (input, file) in inputs.iter().enumerate() {
        for raw in read::open(&file.path, options, &read)? {
            // What stands before an error is worked on first: of several wrong rows the first is the one reported.
            let raw = match raw {
                Ok(raw) => raw,
                Err(error) => {
                    work(std::mem::take(&mut group), read.load(Ordering::Relaxed))?;
                    return Err(error);
                }
            };
            waiting += raw.bytes + ROW_BYTES;
            group.push(Numbered { input, index, raw });
            index += 1;
            if waiting >= GROUP_BYTES {
                waiting = 0;
                work(std::mem::take(&mut group), read.load(Ordering::Relaxed))?;
            }
        }
    }
    work(group, read.load(Ordering::Relaxed))
}
