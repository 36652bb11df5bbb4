//! Special tokens, and the JSON files of a tokenizer's folder that name them.
use crate::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// The texts of a tokenizer's special tokens, as a chat template sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpecialTokens {
    /// Beginning of a text.
    #[serde(rename = "bos_token", skip_serializing_if = "Option::is_none")]
    pub bos: Option<String>,
    /// End of a text, or of a turn.
    #[serde(rename = "eos_token", skip_serializing_if = "Option::is_none")]
    pub eos: Option<String>,
    /// Padding. Never used to decide what is trained: it is often the same token as `eos`.
    #[serde(rename = "pad_token", skip_serializing_if = "Option::is_none")]
    pub pad: Option<String>,
    /// Unknown.
    #[serde(rename = "unk_token", skip_serializing_if = "Option::is_none")]
    pub unk: Option<String>,
}

/// A JSON object from a file that may be missing.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(Error::io("cannot read", path, error)),
    };
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::Input(format!("{}: a JSON object is expected here: {e}", path.display())))
}

/// A special token is written as a string or as an object with its `content`.
pub(crate) fn token_text(config: &Map<String, Value>, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}
