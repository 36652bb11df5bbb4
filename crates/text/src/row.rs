//! Rows of data: plain text, prompts with completions, and conversations, read from `.txt`, `.jsonl` and `.json` files.
//!
//! The keys of a JSON row say its format: `text`; `prompt` and `completion` (both strings, or both lists of messages);
//! `messages` (optional `tools`); `instruction` and `output` (optional `input`, `system`, `history`). All rows of a file
//! must be of one format; other keys are allowed and ignored, unless they look like a slip of the pen.
use crate::{Error, Message, Result, options::TextRows, source};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

/// The format of a JSON row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `text`.
    Text,
    /// `prompt`, `completion`.
    PromptCompletion,
    /// `messages`, optional `tools`.
    Messages,
    /// `instruction`, `output`, optional `input`, `system`, `history`.
    Alpaca,
}

impl RowFormat {
    const ALL: [Self; 4] = [Self::Text, Self::PromptCompletion, Self::Messages, Self::Alpaca];

    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::PromptCompletion => "prompt_completion",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
        }
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Messages => &["messages"],
            Self::Alpaca => &["instruction", "output"],
        }
    }

    fn optional(self) -> &'static [&'static str] {
        match self {
            Self::Text | Self::PromptCompletion => &[],
            Self::Messages => &["tools"],
            Self::Alpaca => &["input", "system", "history"],
        }
    }

    fn fits(self, row: &Map<String, Value>) -> bool {
        self.required().iter().all(|key| row.get(*key).is_some_and(|value| !value.is_null()))
    }

    fn describe(self) -> String {
        let required = self.required().join(" + ");
        match self.optional() {
            [] => required,
            optional => format!("{required} (optional {})", optional.join(", ")),
        }
    }
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
}

/// One row with the place it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it says.
    pub kind: RowKind,
    /// The file it came from, as it was named.
    pub file: Arc<str>,
    /// The line it begins at, from 1.
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
        Ok(Sha256::digest(bytes).into())
    }
}

/// How files become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowOptions {
    /// What makes a row of a `.txt` file.
    pub text_rows: TextRows,
    /// The format of JSON rows; detected when absent.
    pub format: Option<RowFormat>,
}

/// All rows of files, folders and patterns (see [`source::files`]).
///
/// # Errors
/// As [`read_file`]; no row at all is an error too.
pub fn read(places: &[String], options: RowOptions) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in source::files(places)? {
        rows.extend(read_file(&file, options)?);
    }
    if rows.is_empty() {
        return Err(Error::Input(format!("no rows: the data in {} is empty", places.join(", "))));
    }
    Ok(rows)
}

/// All rows of one file.
///
/// # Errors
/// An unreadable file; text that is not UTF-8 (byte offset); broken JSON (line, column); a row with the wrong keys or
/// values, or of another format than the rest of the file (line, keys).
pub fn read_file(path: &Path, options: RowOptions) -> Result<Vec<Row>> {
    let bytes = fs::read(path).map_err(|e| Error::io("cannot read", path, e))?;
    parse(path, bytes, options)
}

/// [`read_file`] of what was read from `path`.
pub(crate) fn parse(path: &Path, bytes: Vec<u8>, options: RowOptions) -> Result<Vec<Row>> {
    let name = path.display().to_string();
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::Input(format!("{name}: byte {at} is not valid UTF-8; save the file as UTF-8"))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let file: Arc<str> = name.into();
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("txt")) {
        return Ok(text_rows(text, &file, options.text_rows));
    }
    let mut reader = JsonRows { file: &file, format: options.format, rows: Vec::new(), formats: BTreeMap::new() };
    if text.trim_start().starts_with('[') {
        reader.list(text)?;
    } else {
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            reader.json(line, index + 1)?;
        }
    }
    reader.finish()
}

fn text_rows(text: &str, file: &Arc<str>, unit: TextRows) -> Vec<Row> {
    let row = |text: String, line: usize| Row { kind: RowKind::Text(text), file: Arc::clone(file), line };
    let numbered = text.lines().enumerate();
    match unit {
        TextRows::File if text.trim().is_empty() => Vec::new(),
        TextRows::File => vec![row(text.replace("\r\n", "\n"), 1)],
        TextRows::Line => {
            let lines = numbered.filter(|(_, line)| !line.trim().is_empty());
            lines.map(|(index, line)| row(line.to_owned(), index + 1)).collect()
        }
        TextRows::Paragraph => {
            let mut rows: Vec<Row> = Vec::new();
            let mut open = false;
            for (index, line) in numbered {
                if line.trim().is_empty() {
                    open = false;
                    continue;
                }
                match rows.last_mut() {
                    Some(Row { kind: RowKind::Text(text), .. }) if open => {
                        text.push('\n');
                        text.push_str(line);
                    }
                    _ => rows.push(row(line.to_owned(), index + 1)),
                }
                open = true;
            }
            rows
        }
    }
}

/// The rows of one JSON file, with what is needed to say that they are not all of one format.
struct JsonRows<'a> {
    file: &'a Arc<str>,
    format: Option<RowFormat>,
    rows: Vec<Row>,
    /// Number of rows and first line of each format.
    formats: BTreeMap<RowFormat, (usize, usize)>,
}

impl JsonRows<'_> {
    /// One JSON list of rows, as many published data sets are.
    fn list(&mut self, text: &str) -> Result<()> {
        let items: Vec<&RawValue> =
            serde_json::from_str(text).map_err(|e| self.broken(&e, e.line(), "a list of rows is expected"))?;
        let (mut line, mut counted) = (1, 0);
        for item in items {
            // Where an item stands in the text tells its line.
            let start = item.get().as_ptr().addr() - text.as_ptr().addr();
            line += text[counted..start].bytes().filter(|&byte| byte == b'\n').count();
            counted = start;
            self.json(item.get(), line)?;
        }
        Ok(())
    }

    fn json(&mut self, text: &str, line: usize) -> Result<()> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| self.broken(&e, line, "every line must be one complete JSON object"))?;
        let Value::Object(row) = value else {
            return Err(self.wrong(line, format!("a row must be a JSON object, this is {}", kind_of(&value))));
        };
        let format = self.detect(&row, line)?;
        self.formats.entry(format).or_insert((0, line)).0 += 1;
        let kind = convert(row, format).map_err(|what| self.wrong(line, what))?;
        self.rows.push(Row { kind, file: Arc::clone(self.file), line });
        Ok(())
    }

    fn broken(&self, error: &serde_json::Error, line: usize, expected: &str) -> Error {
        let what = error.to_string();
        let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
        Error::Input(format!("{}, line {line}, column {}: broken JSON: {what}; {expected}", self.file, error.column()))
    }

    fn wrong(&self, line: usize, what: String) -> Error {
        Error::Input(format!("{}, line {line}: {what}", self.file))
    }

    fn detect(&self, row: &Map<String, Value>, line: usize) -> Result<RowFormat> {
        let keys = || quoted(row.keys().map(String::as_str));
        let candidates: Vec<_> = match self.format {
            Some(format) => vec![format],
            None => RowFormat::ALL.to_vec(),
        };
        let fitting: Vec<_> = candidates.iter().copied().filter(|format| format.fits(row)).collect();
        match fitting[..] {
            [format] => {
                let absent = [format.required(), format.optional()].concat();
                let absent: Vec<_> = absent.into_iter().filter(|key| !row.contains_key(*key)).collect();
                match slip(row, &absent) {
                    None => Ok(format),
                    Some((found, meant)) => Err(self.wrong(
                        line,
                        format!("the key {found:?} is not known; did you mean {meant:?}? Rename it or take it out"),
                    )),
                }
            }
            [] => {
                let known: Vec<_> = candidates.iter().flat_map(|f| [f.required(), f.optional()].concat()).collect();
                let absent: Vec<_> = known.into_iter().filter(|key| !row.contains_key(*key)).collect();
                let hint = slip(row, &absent).map_or_else(String::new, |(found, meant)| {
                    format!("; did you mean {meant:?} instead of {found:?}?")
                });
                let expected: Vec<_> = candidates.iter().map(|format| format.describe()).collect();
                let keys = if row.is_empty() { "there are no keys".into() } else { format!("the keys are {}", keys()) };
                Err(self.wrong(line, format!("{keys}; expected are {}{hint}", expected.join(", or "))))
            }
            _ => Err(self.wrong(
                line,
                format!(
                    "the keys {} fit several formats ({}); say which with row_format",
                    keys(),
                    fitting.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
                ),
            )),
        }
    }

    fn finish(self) -> Result<Vec<Row>> {
        if self.formats.len() > 1 {
            // The rarest format holds the rows that are out of place.
            let odd = self.formats.iter().min_by_key(|(_, (count, line))| (*count, std::cmp::Reverse(*line)));
            let line = odd.map_or(0, |(_, (_, line))| *line);
            let counts: Vec<_> = self
                .formats
                .iter()
                .map(|(format, (count, line))| format!("{count} of {} (first at line {line})", format.describe()))
                .collect();
            let what = format!(
                "the rows of a file must all have the same keys, but there are {}; put them into separate files",
                counts.join(", ")
            );
            return Err(self.wrong(line, what));
        }
        Ok(self.rows)
    }
}

/// A key that is not known but nearly spells one that is missing.
fn slip<'a>(row: &'a Map<String, Value>, absent: &[&'static str]) -> Option<(&'a str, &'static str)> {
    let known = |key: &str| RowFormat::ALL.iter().any(|f| f.required().contains(&key) || f.optional().contains(&key));
    let near = |key: &str, wanted: &str| {
        let (key, limit) = (key.to_lowercase(), if wanted.len() > 4 { 2 } else { 1 });
        strsim::osa_distance(&key, wanted) <= limit
    };
    row.keys()
        .filter(|key| !known(key))
        .find_map(|key| absent.iter().find(|wanted| near(key, wanted)).map(|wanted| (key.as_str(), *wanted)))
}

fn quoted<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    keys.map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ")
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn convert(mut row: Map<String, Value>, format: RowFormat) -> Result<RowKind, String> {
    let mut take = |key: &str| row.remove(key).unwrap_or(Value::Null);
    Ok(match format {
        RowFormat::Text => RowKind::Text(string("text", take("text"))?),
        RowFormat::PromptCompletion => match (take("prompt"), take("completion")) {
            (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
                let mut messages = conversation("prompt", prompt)?;
                let trained_from = messages.len();
                messages.extend(conversation("completion", completion)?);
                RowKind::Messages { messages, trained_from, tools: None }
            }
            (Value::String(prompt), Value::String(completion)) => RowKind::PromptCompletion { prompt, completion },
            (prompt, completion) => {
                return Err(format!(
                    "\"prompt\" is {} and \"completion\" is {}; both must be strings, or both lists of messages",
                    kind_of(&prompt),
                    kind_of(&completion)
                ));
            }
        },
        RowFormat::Messages => {
            let tools = Some(take("tools")).filter(|tools| !tools.is_null());
            RowKind::Messages { messages: conversation("messages", take("messages"))?, trained_from: 0, tools }
        }
        RowFormat::Alpaca => {
            let mut messages = Vec::new();
            let mut optional = |key: &str| match take(key) {
                Value::Null => Ok(String::new()),
                value => string(key, value),
            };
            let system = optional("system")?;
            let (instruction, input, output) = (optional("instruction")?, optional("input")?, optional("output")?);
            if !system.is_empty() {
                messages.push(Message::new("system", system));
            }
            messages.extend(history(take("history"))?);
            let separator = if input.is_empty() { "" } else { "\n" };
            messages.push(Message::new("user", format!("{instruction}{separator}{input}")));
            messages.push(Message::new("assistant", output));
            RowKind::Messages { messages, trained_from: 0, tools: None }
        }
    })
}

fn string(key: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("{key:?} must be a string, this is {}", kind_of(&other))),
    }
}

fn conversation(key: &str, value: Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!("{key:?} must be a list of messages, this is {}", kind_of(&value)));
    };
    if items.is_empty() {
        return Err(format!("{key:?} is an empty list; at least one message is needed"));
    }
    let message = |(index, item)| {
        serde_json::from_value(item).map_err(|e| {
            format!("message {} of {key:?}: {e}; expected is {{\"role\": ..., \"content\": ...}}", index + 1)
        })
    };
    items.into_iter().enumerate().map(message).collect()
}

/// Earlier turns of an alpaca row: a list of [user, assistant] pairs.
fn history(value: Value) -> Result<Vec<Message>, String> {
    let wrong = || "\"history\" must be a list of [user, assistant] pairs of strings".to_owned();
    let pairs: Vec<(String, String)> = match value {
        Value::Null => Vec::new(),
        value => serde_json::from_value(value).map_err(|_| wrong())?,
    };
    Ok(pairs
        .into_iter()
        .flat_map(|(user, assistant)| [Message::new("user", user), Message::new("assistant", assistant)])
        .collect())
}

#[cfg(test)]
mod tests;
