//! What a preparation says of itself: how far it is, and what it made.
use crate::{
    CleanReport, Error, Preference, PrepareOptions, Result, RowFormat, SourceReport, Split, prepare::Lengths,
    sample::RowCounts,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Counted up whenever the same input would give another folder.
pub const FORMAT_VERSION: u32 = 4;

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
    /// Rows are being tokenised.
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
    #[serde(rename = "sides")]
    pub preferences: BTreeMap<Preference, usize>,
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
    /// Rows by what is to be learned from them, where that is one of a few short texts: what a label is, whatever it is
    /// called.
    pub completions: Option<BTreeMap<String, usize>>,
    /// SHA-256 (hex) of the split's file.
    pub sha256: String,
}

/// What balancing makes of the training rows of one value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balanced {
    /// Rows that there are.
    pub rows: usize,
    /// Rows that are drawn, copies included.
    pub drawn: usize,
    /// How much the loss of each counts.
    pub weight: f32,
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file, as it was named.
    pub file: String,
    /// The split that it was given for.
    pub split: Option<Split>,
    /// The format of its rows; none when there are none.
    pub format: Option<RowFormat>,
    /// Rows, usable or not.
    pub rows: usize,
    /// Rows that cannot be used.
    pub bad_rows: usize,
    /// What is known of each key, the first hundred of them; empty for plain text.
    pub keys: BTreeMap<String, KeyReport>,
}

/// What is known of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyReport {
    /// Rows that have it.
    pub rows: usize,
    /// Of these, rows in which it has no value.
    pub null: usize,
    /// What its values are: "a string", "a list", ...
    pub types: BTreeSet<String>,
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
        if report.format_version != FORMAT_VERSION {
            return Err(Error::Input(format!(
                "{}: format version {}, this program reads version {}; prepare the data again",
                path.display(),
                report.format_version,
                FORMAT_VERSION
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

    pub(crate) fn split_mut(&mut self, split: Split) -> &mut SplitReport {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
            Split::Test => &mut self.test,
        }
    }
}
