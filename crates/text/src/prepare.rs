//! From files to a folder of token blocks: `train.shard`, `validation.shard`, `test.shard` and `prepared.json`.
//!
//! A folder is keyed by a hash of everything that its content follows from: the bytes and names of the files, the
//! tokenizer, the chat template, the options and the format version. With the same key and sound files nothing is done.
use crate::{
    ChatTemplate, Error, PrepareOptions, Result, Row, Sample, Split, Tokenizer, atomic, pack,
    row::{self, RowOptions},
    sample::{self, RowCounts},
    shard, source, split,
    tokenizer::hex,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Rows are tokenised in groups of about this many bytes of text: enough to keep all cores busy, little to hold at once.
const GROUP_BYTES: usize = 16 << 20;

/// How far the preparation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrepareProgress {
    /// The files are being looked at.
    Reading {
        /// Files done.
        files_done: usize,
        /// Of these.
        files: usize,
    },
    /// Rows are being turned into tokens.
    Tokenizing {
        /// Bytes of the files done.
        bytes_done: u64,
        /// Of these.
        bytes: u64,
        /// Tokens so far.
        tokens: u64,
    },
    /// Blocks are being packed and written.
    Writing {
        /// Of this split.
        split: Split,
    },
}

/// What a split holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitReport {
    /// What happened to the rows.
    #[serde(flatten)]
    pub counts: RowCounts,
    /// Documents: rows, or parts of rows that were split.
    pub documents: usize,
    /// Tokens in all blocks.
    pub tokens: usize,
    /// Tokens whose loss counts.
    pub trained_tokens: usize,
    /// UTF-8 bytes of the trained text.
    pub bytes: usize,
    /// Blocks.
    pub blocks: usize,
    /// SHA-256 (hex) of the split's file.
    pub sha256: String,
}

/// What was prepared, as `prepared.json` says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the format of the folder.
    pub format_version: u32,
    /// SHA-256 (hex) of everything that the content follows from.
    pub key: String,
    /// [`Tokenizer::fingerprint`] of the tokenizer it was prepared with.
    pub tokenizer: String,
    /// The options it was prepared with.
    pub options: PrepareOptions,
    /// Trained on.
    pub train: SplitReport,
    /// Looked at while training.
    pub validation: SplitReport,
    /// Looked at once, at the end.
    pub test: SplitReport,
    /// Whether the folder was already there. Not stored.
    #[serde(skip)]
    pub reused: bool,
}

/// Name of the file with the [`Report`] inside a prepared folder.
pub const REPORT: &str = "prepared.json";

impl Report {
    /// Reads the report of a prepared folder.
    ///
    /// # Errors
    /// A folder that was not prepared, or by a program of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(REPORT);
        let bytes = fs::read(&path).map_err(|e| Error::io("cannot read prepared data", &path, e))?;
        let report: Self = serde_json::from_slice(&bytes)
            .map_err(|e| Error::Input(format!("{}: {e}; prepare the data again", path.display())))?;
        if report.format_version != shard::FORMAT_VERSION {
            return Err(Error::Input(format!(
                "{}: format version {}, this program reads version {}; prepare the data again",
                path.display(),
                report.format_version,
                shard::FORMAT_VERSION
            )));
        }
        Ok(report)
    }

    /// The report of one split.
    pub fn split(&self, split: Split) -> &SplitReport {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }

    fn split_mut(&mut self, split: Split) -> &mut SplitReport {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
            Split::Test => &mut self.test,
        }
    }
}

/// One data file: where it goes, and what it held when the key was made.
struct Input {
    path: PathBuf,
    /// The split that all its rows go to, or none when the hash of each row decides.
    split: Option<Split>,
    bytes: u64,
    digest: [u8; 32],
}

/// Prepares `options`' data in `folder`, unless the folder already holds exactly that and its files are sound.
/// `progress` is called now and then.
///
/// # Errors
/// Options out of range; unreadable or wrong data, named by file and line; a split to train on without rows; a folder
/// that cannot be written.
pub fn prepare(
    folder: &Path,
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Report> {
    options.check()?;
    let inputs = inputs(options, progress)?;
    let key = key(options, tokenizer, template, &inputs)?;
    if let Some(report) = reusable(folder, &key)? {
        return Ok(report);
    }
    let mut report = Report {
        format_version: shard::FORMAT_VERSION,
        key: hex(&key),
        tokenizer: tokenizer.fingerprint()?,
        options: options.clone(),
        train: SplitReport::default(),
        validation: SplitReport::default(),
        test: SplitReport::default(),
        reused: false,
    };
    let samples = tokenize(options, tokenizer, template, &inputs, &mut report, progress)?;
    for split in Split::ALL {
        let own = !match split {
            Split::Train => &options.train,
            Split::Validation => &options.validation,
            Split::Test => &options.test,
        }
        .is_empty();
        if own && samples[split as usize].is_empty() {
            return Err(nothing_in(split, options, &report));
        }
    }
    for (split, samples) in Split::ALL.into_iter().zip(&samples) {
        progress(PrepareProgress::Writing { split });
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.ids.len()).collect();
        let plan = pack::plan(&lengths, options.max_length, options.packing);
        let path = folder.join(shard::file_name(split));
        shard::write(&path, key, options.max_length, samples, &plan)?;
        let part = report.split_mut(split);
        part.documents = samples.len();
        part.tokens = lengths.iter().sum();
        part.trained_tokens = samples.iter().map(Sample::num_trained).sum();
        part.bytes = samples.iter().map(|sample| sample.bytes).sum();
        part.blocks = plan.len();
        part.sha256 = hex(&digest(&path)?.1);
    }
    let json = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::Failure(format!("the report of prepared data does not serialise: {e}")))?;
    atomic::write_file(&folder.join(REPORT), |w| writeln!(w, "{json}"))?;
    Ok(report)
}

/// The samples of the first rows to train on, for a look at what is trained: up to `n` rows.
///
/// # Errors
/// As [`prepare`], for the files and rows looked at.
pub fn first_samples(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    n: usize,
) -> Result<Vec<Sample>> {
    options.check()?;
    let (sample_options, fractions) = (options.into(), options.fractions());
    let mut found = Vec::new();
    for path in source::files(&options.train)? {
        for row in row::read_file(&path, row_options(options))? {
            if found.len() >= n {
                return Ok(found);
            }
            if split::assign(&row.content_hash()?, options.split_seed, fractions.0, fractions.1) == Split::Train {
                found.extend(sample::samples(&row, tokenizer, template, &sample_options)?.0);
            }
        }
    }
    found.truncate(n);
    Ok(found)
}

fn row_options(options: &PrepareOptions) -> RowOptions {
    RowOptions { text_rows: options.text_rows, format: options.row_format }
}

fn inputs(options: &PrepareOptions, progress: &mut dyn FnMut(PrepareProgress)) -> Result<Vec<Input>> {
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
        let (bytes, digest) = digest(&path)?;
        inputs.push(Input { path, split, bytes, digest });
    }
    progress(PrepareProgress::Reading { files_done: files, files });
    Ok(inputs)
}

/// Size and SHA-256 of a file.
fn digest(path: &Path) -> Result<(u64, [u8; 32])> {
    let cannot = |error| Error::io("cannot read", path, error);
    let mut hasher = HashWriter(Sha256::new());
    let bytes = io::copy(&mut File::open(path).map_err(cannot)?, &mut hasher).map_err(cannot)?;
    Ok((bytes, hasher.0.finalize().into()))
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

fn key(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    inputs: &[Input],
) -> Result<[u8; 32]> {
    let inputs: Vec<_> =
        inputs.iter().map(|input| (input.path.display().to_string(), input.split, hex(&input.digest))).collect();
    // A template that tells the date renders the same row differently tomorrow, so the date belongs to the key.
    let template = template.map(|template| (template.source(), template.date()));
    let parts =
        (shard::FORMAT_VERSION, options, tokenizer.fingerprint()?, tokenizer.special_tokens(), template, inputs);
    let bytes = serde_json::to_vec(&parts)
        .map_err(|e| Error::Failure(format!("the key of the prepared data does not serialise: {e}")))?;
    Ok(Sha256::digest(bytes).into())
}

/// The report of `folder`, if it holds what `key` stands for and every file is as it was written.
fn reusable(folder: &Path, key: &[u8; 32]) -> Result<Option<Report>> {
    let mut report = match Report::read(folder) {
        Ok(report) if report.key == hex(key) => report,
        Ok(_) | Err(Error::Input(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    for split in Split::ALL {
        let path = folder.join(shard::file_name(split));
        match digest(&path) {
            Ok((_, digest)) if hex(&digest) == report.split(split).sha256 => {}
            Ok(_) | Err(Error::Input(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    report.reused = true;
    Ok(Some(report))
}

fn tokenize(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    inputs: &[Input],
    report: &mut Report,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<[Vec<Sample>; 3]> {
    let sample_options = options.into();
    let (validation, test) = options.fractions();
    let bytes = inputs.iter().map(|input| input.bytes).sum();
    let (mut bytes_done, mut tokens, mut waiting) = (0_u64, 0_u64, 0);
    let mut samples: [Vec<Sample>; 3] = Default::default();
    let mut group: Vec<(Split, Row)> = Vec::new();
    for (index, input) in inputs.iter().enumerate() {
        let content = fs::read(&input.path).map_err(|e| Error::io("cannot read", &input.path, e))?;
        if Sha256::digest(&content)[..] != input.digest {
            return Err(Error::Input(format!(
                "{}: the file changed while it was read; try again when nothing writes to it",
                input.path.display()
            )));
        }
        waiting += content.len();
        for row in row::parse(&input.path, content, row_options(options))? {
            let split = match input.split {
                Some(split) => split,
                None => split::assign(&row.content_hash()?, options.split_seed, validation, test),
            };
            group.push((split, row));
        }
        bytes_done += input.bytes;
        // Small files share a group, so that a folder of many keeps all cores busy.
        if waiting < GROUP_BYTES && index + 1 < inputs.len() {
            continue;
        }
        waiting = 0;
        let done: Vec<_> = std::mem::take(&mut group)
            .par_iter()
            .map(|(split, row)| Ok((*split, sample::samples(row, tokenizer, template, &sample_options)?)))
            .collect();
        // In order, so that of several wrong rows the first is the one reported.
        for result in done {
            let (split, (made, counts)) = result?;
            report.split_mut(split).counts += counts;
            tokens += made.iter().map(|sample| sample.ids.len() as u64).sum::<u64>();
            samples[split as usize].extend(made);
        }
        progress(PrepareProgress::Tokenizing { bytes_done, bytes, tokens });
    }
    Ok(samples)
}

fn nothing_in(split: Split, options: &PrepareOptions, report: &Report) -> Error {
    let places = match split {
        Split::Train => &options.train,
        Split::Validation => &options.validation,
        Split::Test => &options.test,
    }
    .join(", ");
    let held_out = report.validation.counts.rows + report.test.counts.rows;
    Error::Input(match report.split(split).counts {
        RowCounts { rows: 0, .. } if split == Split::Train && held_out > 0 => format!(
            "nothing is left to train on: all {held_out} rows of {places} went to validation and test; give more rows, a \
             smaller validation_fraction or another split_seed"
        ),
        RowCounts { rows: 0, .. } => format!("{split}: no rows: the data in {places} is empty"),
        RowCounts { dropped_rows, .. } => format!(
            "{split}: all {dropped_rows} rows of {places} are longer than max_length {} and were left out; raise \
             max_length or set overlong = \"split\"",
            options.max_length
        ),
    })
}

#[cfg(test)]
mod tests;
