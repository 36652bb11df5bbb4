//! From files to a folder of token blocks: `train.shard`, `validation.shard`, `test.shard` and `prepared.json`.
//!
//! Rows are read twice, in groups, so that memory does not grow with the data: [`scan`] looks at all of them and decides
//! what becomes of each, [`emit`] tokenises those that stay and packs them into blocks.
//!
//! A folder is keyed by a hash of everything that its content follows from: the bytes and names of the files, the
//! tokenizer, the chat template, the options and the format version. With the same key and sound files nothing is done.
mod balance;
mod doctor;
mod emit;
mod files;
mod lengths;
mod scan;
mod streaming;
mod train_tokenizer;

use crate::{
    ChatTemplate, CleanReport, Error, PrepareOptions, Result, Side, SourceReport, Split, Tokenizer, clean::Cleaner,
    sample::RowCounts, shard,
};
use files::Input;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, path::Path};
use tunesmith_files::{
    Blame, atomic,
    hash::{hex, sha256, sha256_of},
};

pub use balance::Balanced;
pub use doctor::{Check, Diagnosis, Finding, examine};
pub use lengths::{LengthClass, Lengths};
pub use scan::{FileReport, KeyReport};
pub use streaming::{BlockStream, StreamCounts};
pub use train_tokenizer::{TokenizerOptions, TrainedTokenizer, train_tokenizer};

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
    /// All rows are being looked at.
    Scanning {
        /// Bytes of the files done.
        bytes_done: u64,
        /// Of these.
        bytes: u64,
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
    /// Words are being counted for a new tokenizer.
    Learning {
        /// Bytes of the files done.
        bytes_done: u64,
        /// Of these.
        bytes: u64,
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
    /// Further tokens whose loss counts in training, less than that of trained ones.
    pub weighted_tokens: usize,
    /// UTF-8 bytes of the trained text.
    pub bytes: usize,
    /// Documents by what they are to training on preferences; nothing where that was not asked for.
    pub sides: BTreeMap<Side, usize>,
    /// Blocks.
    pub blocks: usize,
    /// Rows by the value that they are balanced or stratified by, else by their `label`; before balancing.
    pub values: BTreeMap<String, usize>,
    /// Different values that rows are grouped by.
    pub groups: usize,
    /// Rows of the largest of these groups.
    pub largest_group: usize,
    /// Rows by their number of tokens, before anything was cut off.
    pub lengths: Lengths,
    /// Rows by what is to be learned from them, where that is one of a few short texts: what a label is, whatever it is called.
    pub completions: Option<BTreeMap<String, usize>>,
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
    /// What made the tokens: [`Self::BULK`], or why it was the `tokenizers` crate.
    #[serde(default)]
    pub encoder: String,
    /// The options it was prepared with.
    pub options: PrepareOptions,
    /// Trained on.
    pub train: SplitReport,
    /// Looked at while training.
    pub validation: SplitReport,
    /// Looked at once, at the end.
    pub test: SplitReport,
    /// What the files hold.
    pub files: Vec<FileReport>,
    /// Rows left out because they could not be used; they are in `rejects.jsonl`.
    pub rejected_rows: usize,
    /// What cleaning did.
    pub clean: CleanReport,
    /// The data sets that are mixed, in the order of their blocks; empty when there is only one.
    pub sources: Vec<SourceReport>,
    /// What balancing made of the training rows, by value.
    pub balance: BTreeMap<String, Balanced>,
    /// Whether the folder was already there. Not stored.
    #[serde(skip)]
    pub reused: bool,
}

/// Name of the file with the [`Report`] inside a prepared folder.
pub const REPORT: &str = "prepared.json";

/// Name of the file with the rows that could not be used, inside a prepared folder.
pub const REJECTS: &str = "rejects.jsonl";

impl Report {
    /// [`Self::encoder`] when this program's own encoder made the tokens (see [`Tokenizer::for_bulk`]).
    pub const BULK: &str = "tunesmith";

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

    /// What is uneven in the data, in sentences.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let values = &self.train.values;
        let most = values.iter().max_by_key(|(_, rows)| **rows);
        if let (Some((most, many)), Some((least, few))) = (most, values.iter().min_by_key(|(_, rows)| **rows))
            && *many > 10 * few
            && self.balance.is_empty()
        {
            warnings.push(format!(
                "{most} has {many} rows to train on and {least} only {few}; a model learns little of what is rare. \
                 balance = \"oversample\" or \"loss_weight\" evens it out"
            ));
        }
        for split in [Split::Validation, Split::Test] {
            let unknown: Vec<&str> = self
                .split(split)
                .values
                .keys()
                .filter(|value| !values.contains_key(*value))
                .map(String::as_str)
                .collect();
            if !unknown.is_empty() && !values.is_empty() {
                warnings.push(format!("{split} has rows of {}, which no row to train on is of", unknown.join(", ")));
            }
        }
        let (groups, largest, rows) = (self.train.groups, self.train.largest_group, self.train.counts.rows);
        if groups > 1 && 2 * largest > rows {
            warnings.push(format!(
                "one of {groups} groups has {largest} of {rows} rows to train on; what is learned is mostly that group's"
            ));
        }
        warnings
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
    let sets = files::data_sets(options)?;
    let mut inputs = files::inputs(&sets, progress)?;
    let key = key(options, tokenizer, template, &inputs)?;
    // What is read as training goes on is not looked at now.
    inputs.retain(|input| input.digest.is_some());
    if let Some(report) = reusable(folder, &key)? {
        return Ok(report);
    }
    let encoder = tokenizer.for_bulk().map_or_else(str::to_owned, |()| Report::BULK.to_owned());
    let scan = scan::scan(options, &sets, &inputs, progress)?;
    let mut report = Report {
        format_version: shard::FORMAT_VERSION,
        key: hex(&key),
        tokenizer: tokenizer.fingerprint()?,
        encoder,
        options: options.clone(),
        train: SplitReport::default(),
        validation: SplitReport::default(),
        test: SplitReport::default(),
        files: scan.files,
        rejected_rows: 0,
        clean: scan.clean,
        sources: Vec::new(),
        balance: scan.balance.values,
        reused: false,
    };
    for (split, share) in Split::ALL.into_iter().zip(scan.shares) {
        let part = report.split_mut(split);
        (part.values, part.groups, part.largest_group) = (share.values, share.groups, share.largest_group);
    }
    let cleaner = Cleaner::new(&options.clean)?;
    let (copies, weights) = (&scan.balance.copies, &scan.balance.weights);
    let job =
        emit::Job { folder, options, sets: &sets, tokenizer, template, cleaner, inputs: &inputs, key, copies, weights };
    emit::emit(&job, &scan.fates, &mut report, progress)?;
    let json = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::Failure(format!("the report of prepared data does not serialise: {e}")))?;
    atomic::write(&folder.join(REPORT), json + "\n")?;
    Ok(report)
}

fn key(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    inputs: &[Input],
) -> Result<[u8; 32]> {
    let inputs: Vec<_> = inputs.iter().map(|input| (input.name.to_string(), input.split, input.identity())).collect();
    // A template that tells the date renders the same row differently tomorrow, so the date belongs to the key.
    let template = template.map(|template| (template.source(), template.date()));
    let parts =
        (shard::FORMAT_VERSION, options, tokenizer.fingerprint()?, tokenizer.special_tokens(), template, inputs);
    let bytes = serde_json::to_vec(&parts)
        .map_err(|e| Error::Failure(format!("the key of the prepared data does not serialise: {e}")))?;
    Ok(sha256(bytes))
}

/// The report of `folder`, if it holds what `key` stands for and every file is as it was written.
fn reusable(folder: &Path, key: &[u8; 32]) -> Result<Option<Report>> {
    let mut report = match Report::read(folder) {
        Ok(report) if report.key == hex(key) => report,
        Err(error) if error.blame() == Blame::Machine => return Err(error),
        _ => return Ok(None),
    };
    for split in Split::ALL {
        let path = folder.join(shard::file_name(split));
        match sha256_of(&path) {
            Ok(digest) if digest == report.split(split).sha256 => {}
            Err(error) if error.blame() == Blame::Machine => return Err(error),
            _ => return Ok(None),
        }
    }
    report.reused = true;
    Ok(Some(report))
}

fn nothing_in(split: Split, options: &PrepareOptions, report: &Report) -> Error {
    let places = options.places(split).join(", ");
    let held_out = report.validation.counts.rows + report.test.counts.rows;
    let removed: usize = report.clean.removed.values().sum();
    Error::Input(match report.split(split).counts {
        RowCounts { rows: 0, .. } if removed > 0 => {
            let reasons: Vec<_> =
                report.clean.removed.iter().map(|(reason, rows)| format!("{rows} {}", reason.words())).collect();
            format!("{split}: no row of {places} is left after cleaning; removed were {}", reasons.join(", "))
        }
        RowCounts { rows: 0, .. } if report.rejected_rows > 0 => {
            format!("{split}: no row of {places} can be used; {} were rejected", report.rejected_rows)
        }
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
