//! Rows of data: plain text, prompts with completions, conversations, preferences, labelled texts.
//!
//! The keys of a row say its [`RowFormat`]; all rows of a file must be of one. Other keys are allowed and ignored, unless
//! they look like a slip of the pen.
mod convert;
mod format;
mod prompt;

use crate::{
    Error, Message, Result,
    input::Encoding,
    options::{Balance, PrepareOptions, TextRows},
    read::{Raw, RawRow},
    source,
};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use tunesmith_files::hash::sha256;

pub use format::RowFormat;
use prompt::PromptTemplate;

/// What is said: plain text, or messages.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Turns {
    /// Plain text.
    Text(String),
    /// Messages in order.
    Messages(Vec<Message>),
}

/// What a row says.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RowKind {
    /// Plain text.
    Text(String),
    /// A text and how it goes on.
    PromptCompletion {
        /// Given.
        prompt: String,
        /// To be learned.
        completion: String,
    },
    /// A conversation.
    Messages {
        /// The messages in order.
        messages: Vec<Message>,
        /// Index of the first message that may be trained: 0, or the number of messages in the prompt.
        trained_from: usize,
        /// Tool definitions for the template.
        tools: Option<Value>,
    },
    /// Two answers to one prompt, one of them better. Text or messages, all three of one sort.
    Preference {
        /// Given.
        prompt: Turns,
        /// The better answer.
        chosen: Turns,
        /// The worse answer.
        rejected: Turns,
        /// Tool definitions for the template.
        tools: Option<Value>,
    },
    /// An answer that was liked or not (KTO). Both of one sort.
    Judged {
        /// Given.
        prompt: Turns,
        /// The answer.
        completion: Turns,
        /// Whether it was liked.
        label: bool,
        /// Tool definitions for the template.
        tools: Option<Value>,
    },
    /// Something to be classified.
    Labelled {
        /// What is classified.
        text: Turns,
        /// The name of its class.
        label: String,
    },
}

/// One row with the place it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it says.
    pub kind: RowKind,
    /// The file it came from, as it was named.
    pub file: Arc<str>,
    /// The line it begins at, or its number in a columnar file; from 1.
    pub line: usize,
}

impl Row {
    /// SHA-256 of what the row says, wherever it stands: equal rows have equal hashes.
    ///
    /// # Errors
    /// The row does not serialise, which none that was read does.
    pub fn content_hash(&self) -> Result<[u8; 32]> {
        let bytes =
            serde_json::to_vec(&self.kind).map_err(|e| Error::Failure(format!("a row does not serialise: {e}")))?;
        Ok(sha256(bytes))
    }
}

/// Where a row stands, as errors name it: "FILE, line 3", or "FILE, row 3" in a columnar file.
pub(crate) fn place(file: &str, line: usize) -> String {
    let unit = if source::is_columnar(file) { "row" } else { "line" };
    format!("{file}, {unit} {line}")
}

/// How files become rows.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOptions {
    /// What makes a row of a `.txt` file.
    pub text_rows: TextRows,
    /// The format of rows with keys; detected when absent.
    pub format: Option<RowFormat>,
    /// For each key that this program knows the one that the files have in its place.
    pub columns: BTreeMap<String, String>,
    /// For each role that the files name the one that it means.
    pub roles: BTreeMap<String, String>,
    /// What the bytes of the files mean.
    pub encoding: Encoding,
    /// Longest row, in bytes.
    pub max_row_bytes: usize,
    /// The key that rows are grouped or stratified by, and the option that names it.
    pub(crate) split_key: Option<(&'static str, String)>,
    /// The key that rows are counted and balanced by, and the option that names it, if one does.
    pub(crate) value_key: (Option<&'static str>, String),
    /// Makes prompts of the keys of a row.
    pub(crate) template: Option<PromptTemplate>,
}

impl RowOptions {
    /// Those of a preparation.
    ///
    /// # Errors
    /// An encoding that is not known, or a mapping of something that is not known.
    pub fn of(options: &PrepareOptions) -> Result<Self> {
        if let Some(key) = options.columns.keys().find(|key| !format::is_key(key)) {
            let known = format::keys().collect::<Vec<_>>().join(", ");
            return Err(Error::Input(format!("columns.{key}: there is no such key; known are {known}")));
        }
        Ok(Self {
            text_rows: options.text_rows,
            format: options.row_format,
            columns: options.columns.clone(),
            roles: options.roles.clone(),
            encoding: Encoding::parse(&options.encoding)?,
            max_row_bytes: options.max_row_bytes,
            split_key: match (&options.group_by, &options.stratify_by) {
                (Some(key), _) => Some(("group_by", key.clone())),
                (None, Some(key)) => Some(("stratify_by", key.clone())),
                (None, None) => None,
            },
            value_key: match (options.balance, &options.stratify_by) {
                (Balance::None, Some(key)) => (Some("stratify_by"), key.clone()),
                (Balance::None, None) => (None, "label".into()),
                _ => {
                    let (option, key) = options.balance_key();
                    (Some(option), key.to_owned())
                }
            },
            template: PromptTemplate::of(options)?,
        })
    }

    /// Whether the values of `column` matter.
    pub(crate) fn reads(&self, column: &str) -> bool {
        format::is_key(column)
            || self.columns.values().any(|found| found == column)
            || self.split_key.as_ref().is_some_and(|(_, key)| key == column)
            || self.value_key.1 == column
            || self.template.as_ref().is_some_and(|template| template.names(column))
    }
}

/// A row that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadRow {
    pub(crate) line: usize,
    pub(crate) what: String,
    /// The row as the file has it, as far as it is known.
    pub(crate) content: String,
}

impl BadRow {
    pub(crate) fn error(&self, file: &str) -> Error {
        Error::Input(format!("{}{}", place(file, self.line), self.what))
    }
}

/// What a row that was read turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Understood {
    pub(crate) row: Row,
    pub(crate) format: RowFormat,
    /// What the row is grouped or stratified by.
    pub(crate) split_value: Option<String>,
    /// What the row is counted and balanced by.
    pub(crate) value: Option<String>,
}

/// Makes a row of what stands in `file`. `seen` is told about the keys and values, before they are mapped.
pub(crate) fn understand(
    raw: &RawRow,
    file: &Arc<str>,
    options: &RowOptions,
    seen: &mut dyn FnMut(&Map<String, Value>),
) -> Result<Understood, BadRow> {
    let bad = |what| BadRow { line: raw.line, what, content: raw.content.to_string() };
    let row = |kind| Row { kind, file: Arc::clone(file), line: raw.line };
    let mut fields = match &raw.content {
        Raw::Bad(what) => return Err(bad(format!(": {what}"))),
        Raw::Text(text) => {
            let (split_value, value) = values(&Map::new(), options).map_err(|what| bad(format!(": {what}")))?;
            let kind = RowKind::Text(text.clone());
            return Ok(Understood { row: row(kind), format: RowFormat::Text, split_value, value });
        }
        Raw::Fields(fields) => fields.clone(),
        Raw::Json(text) => match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(fields)) => fields,
            Ok(other) => return Err(bad(format!(": a row must be a JSON object, this is {}", kind_of(&other)))),
            Err(error) => {
                let what = error.to_string();
                let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
                let column = error.column();
                return Err(bad(format!(
                    ", column {column}: broken JSON: {what}; every row must be one complete JSON object"
                )));
            }
        },
    };
    seen(&fields);
    let understood = map_columns(&mut fields, options).and_then(|()| {
        let (split_value, value) = values(&fields, options)?;
        if let Some(template) = &options.template {
            let (prompt, completion) = template.fill(&fields)?;
            let kind = RowKind::PromptCompletion { prompt, completion };
            return Ok(Understood { row: row(kind), format: RowFormat::PromptCompletion, split_value, value });
        }
        let format = format::detect(&fields, options.format)?;
        Ok(Understood { row: row(convert::convert(fields, format, options)?), format, split_value, value })
    });
    understood.map_err(|what| bad(format!(": {what}")))
}

/// The value that a row is grouped or stratified by, where that was asked for, and the one that it is counted by.
fn values(fields: &Map<String, Value>, options: &RowOptions) -> Result<(Option<String>, Option<String>), String> {
    let split_value = match &options.split_key {
        Some((option, key)) => Some(value_of(fields, option, key)?),
        None => None,
    };
    let value = match &options.value_key {
        (Some(option), key) => Some(value_of(fields, option, key)?),
        // Nobody asked for it.
        (None, key) => value_of(fields, "", key).ok(),
    };
    Ok((split_value, value))
}

fn value_of(fields: &Map<String, Value>, option: &str, key: &str) -> Result<String, String> {
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
        Some(other) => Err(format!("{key:?}, which {option} names, is {}; text or a number is needed", kind_of(other))),
        None if fields.is_empty() => Err(format!("plain text has no {key:?}, which {option} names")),
        None => {
            let keys = quoted(fields.keys().map(String::as_str));
            Err(format!("there is no {key:?}, which {option} names; the keys are {keys}"))
        }
    }
}

fn map_columns(fields: &mut Map<String, Value>, options: &RowOptions) -> Result<(), String> {
    for (key, column) in options.columns.iter().filter(|(key, _)| !format::is_message_key(key)) {
        let Some(value) = fields.get(column).cloned() else {
            let keys = quoted(fields.keys().map(String::as_str));
            return Err(format!("there is no {column:?}, which columns.{key} names; the keys are {keys}"));
        };
        fields.insert(key.clone(), value);
    }
    Ok(())
}

/// The rows of one file as they come, without a look at the rest of it.
///
/// # Errors
/// An unreadable file; while reading, the first bad row with its place.
pub fn read_file(path: &Path, options: &RowOptions) -> Result<impl Iterator<Item = Result<Row>>> {
    let file: Arc<str> = path.display().to_string().into();
    let rows = crate::read::open(&path.to_owned().into(), options, &Arc::default())?;
    Ok(rows.map(move |raw| {
        let understood = understand(&raw?, &file, options, &mut |_| ());
        understood.map(|understood| understood.row).map_err(|bad| bad.error(&file))
    }))
}

fn quoted<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    keys.map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ")
}

pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
