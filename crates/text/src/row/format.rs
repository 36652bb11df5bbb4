//! Which format a row is in, by its keys.
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The format of a row with keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `text`.
    Text,
    /// `prompt`, `completion`.
    PromptCompletion,
    /// `messages` (of `role` and `content`), optional `tools`.
    Messages,
    /// `conversations` (of `from` and `value`), optional `system`, `tools`.
    Sharegpt,
    /// `instruction`, `output`, optional `input`, `system`, `history`.
    Alpaca,
    /// `chosen`, `rejected`, and a prompt: `prompt`, or `instruction`, or `messages`, or `conversations`, or what both
    /// begin with.
    Preference,
    /// `prompt`, `completion` and `label` (true or false); or an alpaca, messages or sharegpt row with `kto_tag`.
    Kto,
    /// `text` (or `messages`) and `label`.
    Classification,
}

use RowFormat::{Alpaca, Classification, Kto, Messages, Preference, PromptCompletion, Sharegpt, Text};

/// Keys of a message, which [`RowOptions::columns`](super::RowOptions) may map too.
const MESSAGE_KEYS: [&str; 2] = ["role", "content"];

impl RowFormat {
    const ALL: [Self; 8] = [Text, PromptCompletion, Messages, Sharegpt, Alpaca, Preference, Kto, Classification];

    /// The name, as `row_format` has it.
    pub fn name(self) -> &'static str {
        match self {
            Text => "text",
            PromptCompletion => "prompt_completion",
            Messages => "messages",
            Sharegpt => "sharegpt",
            Alpaca => "alpaca",
            Preference => "preference",
            Kto => "kto",
            Classification => "classification",
        }
    }

    /// Sets of keys of which a row needs one.
    fn required(self) -> &'static [&'static [&'static str]] {
        match self {
            Text => &[&["text"]],
            PromptCompletion => &[&["prompt", "completion"]],
            Messages => &[&["messages"]],
            Sharegpt => &[&["conversations"]],
            Alpaca => &[&["instruction", "output"]],
            Preference => &[&["chosen", "rejected"]],
            Kto => &[
                &["prompt", "completion", "label"],
                &["instruction", "output", "kto_tag"],
                &["messages", "kto_tag"],
                &["conversations", "kto_tag"],
            ],
            Classification => &[&["text", "label"], &["messages", "label"]],
        }
    }

    fn optional(self) -> &'static [&'static str] {
        match self {
            Text | PromptCompletion | Classification => &[],
            Messages => &["tools"],
            Sharegpt => &["system", "tools"],
            Alpaca => &["input", "system", "history"],
            Preference => {
                &["prompt", "instruction", "input", "system", "history", "messages", "conversations", "tools"]
            }
            Kto => &["input", "system", "history", "tools"],
        }
    }

    fn keys(self) -> impl Iterator<Item = &'static str> {
        self.required().iter().copied().flatten().chain(self.optional()).copied()
    }

    fn fits(self, row: &Map<String, Value>) -> bool {
        let there = |key: &&str| row.get(*key).is_some_and(|value| !value.is_null());
        let one = self.required().iter().any(|keys| keys.iter().all(there));
        // A prompt with a completion and some other label is no judgement.
        one && match self {
            Kto if !there(&"kto_tag") => row.get("label").is_some_and(|label| truth(label).is_some()),
            _ => true,
        }
    }

    /// Formats of which this one is a special case.
    fn includes(self) -> &'static [Self] {
        match self {
            Preference => &[Alpaca, Messages, Sharegpt],
            Kto => &[PromptCompletion, Alpaca, Messages, Sharegpt],
            Classification => &[Text, Messages],
            Text | PromptCompletion | Messages | Sharegpt | Alpaca => &[],
        }
    }

    /// The keys that it needs, for messages: the first set of them.
    pub(crate) fn describe(self) -> String {
        self.required().first().map_or_else(String::new, |keys| keys.join(" + "))
    }
}

/// True and false, as JSON and tables write them.
pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

/// All keys with a meaning.
pub(super) fn keys() -> impl Iterator<Item = &'static str> {
    let mut keys: Vec<_> = RowFormat::ALL.into_iter().flat_map(RowFormat::keys).chain(MESSAGE_KEYS).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
}

pub(super) fn is_key(key: &str) -> bool {
    RowFormat::ALL.into_iter().any(|format| format.keys().any(|known| known == key)) || is_message_key(key)
}

/// Whether `key` is one of a message, not of a row.
pub(super) fn is_message_key(key: &str) -> bool {
    MESSAGE_KEYS.contains(&key)
}

/// The format of `row`, `given` or by its keys.
pub(super) fn detect(row: &Map<String, Value>, given: Option<RowFormat>) -> Result<RowFormat, String> {
    let candidates = given.map_or(RowFormat::ALL.to_vec(), |format| vec![format]);
    let fitting: Vec<_> = candidates.iter().copied().filter(|format| format.fits(row)).collect();
    let special = |format: &RowFormat| !fitting.iter().any(|other| other.includes().contains(format));
    match fitting.iter().copied().filter(special).collect::<Vec<_>>()[..] {
        [format] => {
            let absent: Vec<_> = format.optional().iter().copied().filter(|key| !row.contains_key(*key)).collect();
            match typo(row, &absent) {
                None => Ok(format),
                Some((found, meant)) => {
                    Err(format!("the key {found:?} is not known; did you mean {meant:?}? Rename it or take it out"))
                }
            }
        }
        [] => {
            let absent: Vec<_> =
                candidates.iter().flat_map(|format| format.keys()).filter(|key| !row.contains_key(*key)).collect();
            let hint = typo(row, &absent)
                .map_or_else(String::new, |(found, meant)| format!("; did you mean {meant:?} instead of {found:?}?"));
            let expected: Vec<_> = candidates.iter().map(|format| format.describe()).collect();
            let keys = match row.is_empty() {
                true => "there are no keys".into(),
                false => format!("the keys are {}", quoted(row.keys().map(String::as_str))),
            };
            let way_out = if hint.is_empty() { "; name yours with columns = { prompt = \"...\" }" } else { "" };
            Err(format!("{keys}; expected are {}{hint}{way_out}", expected.join(", or ")))
        }
        ref several => Err(format!(
            "the keys {} fit several formats ({}); say which with row_format",
            quoted(row.keys().map(String::as_str)),
            several.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// A key that is not known but nearly spells one that is missing.
fn typo<'a>(row: &'a Map<String, Value>, absent: &[&'static str]) -> Option<(&'a str, &'static str)> {
    let near = |key: &str, wanted: &str| {
        let (key, limit) = (key.to_lowercase(), if wanted.len() > 4 { 2 } else { 1 });
        strsim::osa_distance(&key, wanted) <= limit
    };
    row.keys()
        .filter(|key| !is_key(key))
        .find_map(|key| absent.iter().find(|wanted| near(key, wanted)).map(|wanted| (key.as_str(), *wanted)))
}

/// Keys as messages list them.
pub(super) fn quoted<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    keys.map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ")
}

/// What a JSON value is, as messages say it.
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
