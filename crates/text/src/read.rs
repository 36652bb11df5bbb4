//! Files into rows as they stand there, one after the other, in bounded memory: what a row means is
//! [`row`](crate::row)'s business.
mod columnar;
mod delimited;
mod json;
mod text;
mod value;

use crate::{
    Result, RowOptions, input,
    source::{self, DataFile, Kind},
};
use serde_json::{Map, Value};
use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
};

/// One row as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RawRow {
    /// The line it begins at, or its number in a columnar file; from 1.
    pub(crate) line: usize,
    /// About how many bytes it takes.
    pub(crate) bytes: usize,
    pub(crate) content: Raw,
}

/// The content of a row. JSON is parsed later, on all cores.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Raw {
    Text(String),
    Json(String),
    Fields(Map<String, Value>),
    /// What is wrong with it.
    Bad(String),
}

impl RawRow {
    fn new(line: usize, content: Raw) -> Self {
        let bytes = match &content {
            Raw::Text(text) | Raw::Json(text) => text.len(),
            Raw::Fields(fields) => fields.iter().map(|(key, value)| key.len() + size(value)).sum(),
            Raw::Bad(_) => 0,
        };
        Self { line, bytes, content }
    }
}

impl fmt::Display for Raw {
    /// The row as text, as far as it is known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Json(text) => f.write_str(text),
            Self::Fields(fields) => f.write_str(&Value::Object(fields.clone()).to_string()),
            Self::Bad(_) => Ok(()),
        }
    }
}

fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + size(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

/// The rows of a file, in order. After an error there are no more.
pub(crate) type RawRows = Box<dyn Iterator<Item = Result<RawRow>> + Send>;

/// Opens a file. `read` counts bytes of the file as they are read, for a progress bar.
///
/// # Errors
/// A file that cannot be read, of an unknown kind, or without a usable header.
pub(crate) fn open(data: &DataFile, options: &RowOptions, read: &Arc<AtomicU64>) -> Result<RawRows> {
    let (path, limit) = (data.shown().to_owned(), options.max_row_bytes);
    let kind = source::kind(&path)?.0;
    let input = || input::open(data, options.encoding, read);
    match kind {
        Kind::Parquet | Kind::Arrow => columnar::open(&path, kind, options, read),
        Kind::Text => Ok(text::open(path.clone(), input()?, options.text_rows, limit)),
        Kind::JsonLines | Kind::Json => json::open(path.clone(), input()?, limit),
        Kind::Csv | Kind::Tsv => delimited::open(path.clone(), input()?, kind, limit),
    }
}

/// Rows by a function that gives the next one, until it gives none or fails.
fn rows(mut next: impl FnMut() -> Result<Option<RawRow>> + Send + 'static) -> RawRows {
    let mut ended = false;
    Box::new(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let row = next().transpose();
        ended = !matches!(row, Some(Ok(_)));
        row
    }))
}

#[cfg(test)]
mod tests;
