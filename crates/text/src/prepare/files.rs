//! The files of a preparation, and their rows in groups.
use crate::{
    Error, PrepareOptions, PrepareProgress, Result, RowOptions, Split, options,
    read::{self, RawRow},
    source::{self, DataFile},
    tokenizer::hex,
};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::SystemTime,
};

/// Rows are worked on in groups of about this many bytes: enough to keep all cores busy, little to hold at once.
const GROUP_BYTES: usize = 8 << 20;

/// What else a row takes while it is worked on, so that a group of short rows stays small too.
const ROW_BYTES: usize = 64;

/// One data file: where it goes, and what it held when the key was made.
pub(super) struct Input {
    /// The data set that it belongs to.
    pub(super) source: usize,
    pub(super) file: DataFile,
    pub(super) name: Arc<str>,
    /// The split that all its rows go to, or none when each row is decided upon.
    pub(super) split: Option<Split>,
    /// Bytes to read, of the file or of its part of an archive.
    pub(super) bytes: u64,
    /// Of the file or of the archive that holds it; none of one that is read as training goes on.
    pub(super) digest: Option<[u8; 32]>,
    size: u64,
    modified: Option<SystemTime>,
}

impl Input {
    /// What stands for the content in a key: its hash, or size and time where it is not read beforehand.
    pub(super) fn identity(&self) -> String {
        match &self.digest {
            Some(digest) => hex(digest),
            None => {
                let since = self.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
                format!("{} bytes, {} ns", self.bytes, since.map_or(0, |since| since.as_nanos()))
            }
        }
    }

    /// Whether the file is still as it was when the key was made, as far as its size and time tell.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let metadata = metadata(self.file.path())?;
        if (metadata.len(), metadata.modified().ok()) == (self.size, self.modified) {
            return Ok(());
        }
        Err(Error::Input(format!(
            "{}: the file changed while it was read; try again when nothing writes to it",
            self.file.path().display()
        )))
    }
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::metadata(path).map_err(|e| Error::io("cannot read", path, e))
}

/// A data set with what its files are read by.
pub(super) struct DataSet {
    pub(super) options: PrepareOptions,
    pub(super) rows: RowOptions,
}

/// The one data set that there is, or each of several.
pub(super) fn data_sets(options: &PrepareOptions) -> Result<Vec<DataSet>> {
    let sources = options::sources(options).into_iter();
    sources.map(|options| Ok(DataSet { rows: RowOptions::of(&options)?, options })).collect()
}

/// The files of all data sets, one set after the other.
pub(super) fn inputs(sets: &[DataSet], progress: &mut dyn FnMut(PrepareProgress)) -> Result<Vec<Input>> {
    let mut found: Vec<(usize, DataFile, Option<Split>)> = Vec::new();
    let mut seen: HashMap<(PathBuf, Option<String>), (usize, Split)> = HashMap::new();
    for (set, DataSet { options, .. }) in sets.iter().enumerate() {
        let (validation, test) = options.fractions();
        let whole = if validation + test > 0.0 { None } else { Some(Split::Train) };
        for (places, split) in [
            (&options.train, whole),
            (&options.validation, Some(Split::Validation)),
            (&options.test, Some(Split::Test)),
        ] {
            for file in source::files(places)? {
                let path = file.path();
                let path = fs::canonicalize(path).map_err(|e| Error::io("cannot read", path, e))?;
                let identity = (path, file.member().map(|member| member.name.clone()));
                let now = split.unwrap_or(Split::Train);
                let Some((other, earlier)) = seen.insert(identity, (set, now)) else {
                    found.push((set, file, split));
                    continue;
                };
                let shown = file.shown().display();
                return Err(Error::Input(match earlier == now && other != set {
                    true => format!("{shown} is given in two sources; set epochs or weight to have it seen more often"),
                    false => {
                        format!("{shown} is given for {earlier} and for {now}; held-out data must not be trained on")
                    }
                }));
            }
        }
    }
    let files = found.len();
    let mut inputs: Vec<Input> = Vec::with_capacity(files);
    for (files_done, (source, file, split)) in found.into_iter().enumerate() {
        progress(PrepareProgress::Reading { files_done, files });
        let metadata = metadata(file.path())?;
        let streamed = split == Some(Split::Train) && sets[source].options.streaming;
        // The members of an archive follow one another.
        let digest = match inputs.last().filter(|before| before.file.path() == file.path()).map(|before| before.digest)
        {
            _ if streamed => None,
            Some(Some(before)) => Some(before),
            _ => Some(digest(file.path())?),
        };
        inputs.push(Input {
            source,
            name: file.shown().display().to_string().into(),
            split,
            bytes: file.member().map_or(metadata.len(), |member| member.packed),
            digest,
            size: metadata.len(),
            modified: metadata.modified().ok(),
            file,
        });
    }
    progress(PrepareProgress::Reading { files_done: files, files });
    Ok(inputs)
}

/// SHA-256 of a file.
pub(super) fn digest(path: &Path) -> Result<[u8; 32]> {
    let cannot = |error| Error::io("cannot read", path, error);
    let mut file = File::open(path).map_err(cannot)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(cannot(error)),
        }
    }
}

/// A row with its position among all rows of all files.
pub(super) struct Numbered {
    /// Index of its file.
    pub(super) input: usize,
    /// Index among all rows.
    pub(super) index: usize,
    pub(super) raw: RawRow,
}

/// Reads all rows of the files of a range, in order and in groups; small files share a group. `work` makes something of
/// each group, on all cores, while `take` takes what was made of the group before it, in order, and the next one is
/// read. After each, `progress` hears how many bytes have been read. `from` is the range and the number of its first
/// row; the number after the last row is returned.
///
/// # Errors
/// Those of reading and of `take`, whichever comes first in the order of the rows.
pub(super) fn for_each_group<T: Send>(
    inputs: &[Input],
    from: (Range<usize>, usize),
    sets: &[DataSet],
    work: &(dyn Fn(Vec<Numbered>) -> T + Sync),
    take: &mut (dyn FnMut(T) -> Result<()> + Send),
    progress: &mut dyn FnMut(u64),
) -> Result<usize> {
    thread::scope(|scope| {
        let (sender, groups) = mpsc::sync_channel(1);
        let reader = scope.spawn(move || {
            let read = Arc::new(AtomicU64::new(0));
            let send = |group| sender.send(Ok((group, read.load(Ordering::Relaxed)))).is_ok();
            read_groups(inputs, from, sets, &read, send).unwrap_or_else(|error| {
                // A receiver that is gone has an error of its own.
                let _ = sender.send(Err(error));
                0
            })
        });
        let mut made: Option<(T, u64)> = None;
        for group in groups {
            let before = made.take();
            let bytes_before = before.as_ref().map(|(_, bytes)| *bytes);
            let taken = || before.map_or(Ok(()), |(made, _)| take(made));
            match group {
                Ok((group, bytes)) => {
                    let (new, taken) = rayon::join(|| work(group), taken);
                    taken?;
                    made = Some((new, bytes));
                }
                // What stands before an error comes first: of several wrong rows the first is the one reported.
                Err(error) => return taken().and(Err(error)),
            }
            bytes_before.into_iter().for_each(&mut *progress);
        }
        if let Some((made, bytes)) = made {
            take(made)?;
            progress(bytes);
        }
        reader.join().map_err(|_| Error::Failure("the thread that reads the data failed".into()))
    })
}

/// Reads groups and hands them to `send` until that says no.
fn read_groups(
    inputs: &[Input],
    (which, mut index): (Range<usize>, usize),
    sets: &[DataSet],
    read: &Arc<AtomicU64>,
    send: impl Fn(Vec<Numbered>) -> bool,
) -> Result<usize> {
    let (mut group, mut waiting) = (Vec::new(), 0);
    for (input, file) in inputs.iter().enumerate().take(which.end).skip(which.start) {
        for raw in read::open(&file.file, &sets[file.source].rows, read)? {
            let raw = match raw {
                Ok(raw) => raw,
                Err(error) => {
                    send(group);
                    return Err(error);
                }
            };
            waiting += raw.bytes + ROW_BYTES;
            group.push(Numbered { input, index, raw });
            index += 1;
            if waiting >= GROUP_BYTES {
                waiting = 0;
                if !send(std::mem::take(&mut group)) {
                    return Ok(index);
                }
            }
        }
    }
    send(group);
    Ok(index)
}
