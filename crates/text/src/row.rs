//! Rows of data: plain text, prompts with completions, conversations, preferences, labelled texts.
//!
//! The keys of a row say its [`RowFormat`]; all rows of a file must be of one. Other keys are allowed and ignored,
//! unless they look like a typo.
mod convert;
mod format;
mod options;
mod prompt;

use crate::{
    Error, Message, Result,
    read::{Raw, RawRow},
    source,
};
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::sync::Arc;

pub use format::RowFormat;
pub(crate) use format::kind_of;
use format::quoted;
pub use options::RowOptions;

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
    /// An answer that is desirable or not (KTO). Both of one sort.
    Judged {
        /// Given.
        prompt: Turns,
        /// The answer.
        completion: Turns,
        /// Whether it is desirable.
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
    /// SHA-256 of the content, independent of file and line: equal rows have equal hashes.
    ///
    /// # Errors
    /// The row does not serialise, which none that was read does.
    pub fn content_hash(&self) -> Result<[u8; 32]> {
        let bytes =
            serde_json::to_vec(&self.kind).map_err(|e| Error::Failure(format!("a row does not serialise: {e}")))?;
        Ok(Sha256::digest(bytes).into())
    }
}

/// Where a row stands, as errors name it: "FILE, line 3", or "FILE, row 3" in a columnar file.
pub(crate) fn place(file: &str, line: usize) -> String {
    let unit = if source::is_columnar(file) { "row" } else { "line" };
    format!("{file}, {unit} {line}")
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

#[cfg(test)]
mod tests;
