//! How files become rows.
use super::{RowFormat, format, prompt::PromptTemplate};
use crate::{
    Error, Result,
    input::Encoding,
    options::{Balance, PrepareOptions, TextRows},
};
use std::collections::BTreeMap;

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
