//! What data preparation can be told. All defaults are in the one `Default` here.
use crate::{
    Error, Result, RowFormat, RowOptions, Split,
    clean::{CleanOptions, Cleaner},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which tokens of a conversation or of a prompt with its completion are trained. Plain text is always trained whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "TrainOnName", into = "TrainOnName")]
#[schemars(with = "TrainOnName")]
pub enum TrainOn {
    /// What the assistant says and the completions, each with the token that ends it.
    #[default]
    Completions,
    /// Of a conversation only the assistant's last turn; of a prompt and its completion the completion.
    Last,
    /// Everything.
    All,
    /// What these roles say, each turn with the token that ends it.
    Roles(Vec<String>),
}

/// [`TrainOn`] as it is written: a name, or a list of roles.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum TrainOnName {
    Name(String),
    Roles(Vec<String>),
}

impl TryFrom<TrainOnName> for TrainOn {
    type Error = String;

    fn try_from(name: TrainOnName) -> Result<Self, String> {
        Ok(match name {
            TrainOnName::Name(name) => match &name[..] {
                "completions" => Self::Completions,
                "last" => Self::Last,
                "all" => Self::All,
                _ => {
                    return Err(format!(
                        "train_on is {name:?}; it must be \"completions\", \"last\", \"all\", or a list of roles such as \
                         [\"assistant\"]"
                    ));
                }
            },
            TrainOnName::Roles(roles) if roles.is_empty() => {
                return Err("train_on is an empty list, so that nothing would be trained; name roles".into());
            }
            TrainOnName::Roles(roles) => Self::Roles(roles),
        })
    }
}

impl From<TrainOn> for TrainOnName {
    fn from(train_on: TrainOn) -> Self {
        match train_on {
            TrainOn::Completions => Self::Name("completions".into()),
            TrainOn::Last => Self::Name("last".into()),
            TrainOn::All => Self::Name("all".into()),
            TrainOn::Roles(roles) => Self::Roles(roles),
        }
    }
}

/// What becomes of a row with more tokens than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Plain text is split, everything else truncated.
    #[default]
    Auto,
    /// Consecutive windows of `max_length`, each a document of its own.
    Split,
    /// The first `max_length` tokens; the rest is lost.
    Truncate,
    /// The row is left out.
    Drop,
}

/// What makes a row of a `.txt` file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TextRows {
    /// The whole file is one document.
    #[default]
    File,
    /// Blank lines separate documents.
    Paragraph,
    /// Every line that is not blank is a document.
    Line,
}

/// What becomes of a row that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// Everything stops, and the row is named.
    #[default]
    Error,
    /// It is left out, counted and kept in `rejects.jsonl`.
    Skip,
}

/// What rows with a better and a worse answer are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preferences {
    /// Nothing: they are refused.
    #[default]
    Refuse,
    /// The chosen answer is trained on; of KTO rows those that were liked.
    Chosen,
}

/// Where rows come from and how they become blocks of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PrepareOptions {
    /// Files, folders or glob patterns to train on.
    pub train: Vec<String>,
    /// The same for validation. When given, no validation rows are taken out of `train`.
    pub validation: Vec<String>,
    /// The same for the final test. When given, no test rows are taken out of `train`.
    pub test: Vec<String>,
    /// Part of the `train` rows set aside for validation, 0 to 1.
    pub validation_fraction: f64,
    /// Part of the `train` rows set aside for the final test, 0 to 1.
    pub test_fraction: f64,
    /// A key of the rows: all rows with the same value go to the same split (an author, a document).
    pub group_by: Option<String>,
    /// A key of the rows: each of its values is set aside in the same proportion (a label).
    pub stratify_by: Option<String>,
    /// Changes which rows are set aside.
    pub split_seed: u64,
    /// Longest block, in tokens.
    pub max_length: usize,
    /// What becomes of rows longer than `max_length`.
    pub overlong: Overlong,
    /// Whether several documents share a block (attention stays inside each).
    pub packing: bool,
    /// Which tokens are trained: `completions` (what the assistant says), `last` (only its last turn), `all`, or a list of
    /// roles such as `["assistant", "tool"]`. Plain text is always trained whole.
    pub train_on: TrainOn,
    /// A prompt made of the keys of each row, such as `"Review: {text}\nSentiment:"`; `{{` and `}}` are braces.
    pub template: Option<String>,
    /// With `template`: what is to be learned, made in the same way.
    pub completion: String,
    /// With `template`: examples that stand before every prompt, each with the keys that the templates name.
    pub few_shot: Vec<BTreeMap<String, String>>,
    /// What makes a row of a `.txt` file.
    pub text_rows: TextRows,
    /// The format of rows with keys; detected when absent.
    pub row_format: Option<RowFormat>,
    /// Other names of keys: `columns = { prompt = "question", completion = "answer" }`. `role` and `content` map the keys of
    /// messages.
    pub columns: BTreeMap<String, String>,
    /// Other names of roles: `roles = { Kunde = "user" }`. Those of sharegpt are known.
    pub roles: BTreeMap<String, String>,
    /// What text files are written in: `utf-8`, `auto` (UTF-8, and Windows-1252 in lines where that does not fit), or another
    /// encoding by name. UTF-16 is told by its mark.
    pub encoding: String,
    /// Longest row, in bytes.
    pub max_row_bytes: usize,
    /// What becomes of rows that cannot be used: `error` stops at the first, `skip` counts them and writes them to
    /// `rejects.jsonl` beside the prepared data.
    pub on_bad_row: OnBadRow,
    /// What preference and KTO rows are for: `refuse`, or `chosen` to train on the better answers as on any others.
    pub preferences: Preferences,
    /// Cleaning, duplicates and leakage.
    pub clean: CleanOptions,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            validation: Vec::new(),
            test: Vec::new(),
            validation_fraction: 0.01,
            test_fraction: 0.0,
            group_by: None,
            stratify_by: None,
            split_seed: 0,
            max_length: 1024,
            overlong: Overlong::Auto,
            packing: true,
            train_on: TrainOn::Completions,
            template: None,
            completion: " {label}".into(),
            few_shot: Vec::new(),
            text_rows: TextRows::File,
            row_format: None,
            columns: BTreeMap::new(),
            roles: BTreeMap::new(),
            encoding: "utf-8".into(),
            max_row_bytes: 16 << 20,
            on_bad_row: OnBadRow::Error,
            preferences: Preferences::Refuse,
            clean: CleanOptions::default(),
        }
    }
}

impl PrepareOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The first value out of range, with its name and the range.
    pub fn check(&self) -> Result<()> {
        if self.train.is_empty() {
            return Err(Error::Input("train names no data: give at least one file, folder or pattern".into()));
        }
        for (name, value) in [("validation_fraction", self.validation_fraction), ("test_fraction", self.test_fraction)]
        {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::Input(format!("{name} is {value}; it must be at least 0 and below 1")));
            }
        }
        let (validation, test) = self.fractions();
        if validation + test >= 1.0 {
            return Err(Error::Input(format!(
                "validation_fraction {validation} and test_fraction {test} leave nothing to train on; \
                 their sum must be below 1"
            )));
        }
        if !(2..=u32::MAX as usize).contains(&self.max_length) {
            let value = self.max_length;
            return Err(Error::Input(format!("max_length is {value}; at least 2 tokens are needed to train on")));
        }
        if let (Some(group), Some(label)) = (&self.group_by, &self.stratify_by) {
            return Err(Error::Input(format!(
                "group_by = {group:?} and stratify_by = {label:?} cannot both be kept; take one out"
            )));
        }
        if self.max_row_bytes == 0 {
            return Err(Error::Input("max_row_bytes is 0; it must be at least the size of the longest row".into()));
        }
        Cleaner::new(&self.clean)?;
        RowOptions::of(self).map(drop)
    }

    /// The files, folders and patterns given for `split`.
    pub fn places(&self, split: Split) -> &[String] {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }

    /// The parts of `train` that go to validation and to test: 0 where files of their own are given.
    pub fn fractions(&self) -> (f64, f64) {
        let part = |own: &[String], fraction: f64| if own.is_empty() { fraction } else { 0.0 };
        (part(&self.validation, self.validation_fraction), part(&self.test, self.test_fraction))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let check = |change: fn(&mut PrepareOptions)| {
            let mut options = PrepareOptions { train: vec!["x".into()], ..PrepareOptions::default() };
            change(&mut options);
            options.check().map_err(|e| e.to_string())
        };
        assert_eq!(check(|_| ()), Ok(()));
        assert!(check(|o| o.train.clear()).unwrap_err().contains("train names no data"));
        assert!(check(|o| o.max_length = 1).unwrap_err().contains("max_length is 1"));
        assert!(check(|o| o.validation_fraction = f64::NAN).unwrap_err().contains("validation_fraction is NaN"));
        let keys = |o: &mut PrepareOptions| (o.group_by, o.stratify_by) = (Some("a".into()), Some("b".into()));
        assert!(check(keys).unwrap_err().contains("cannot both be kept"));
        assert!(check(|o| o.test_fraction = 1.0).unwrap_err().contains("test_fraction is 1"));
        let both = |o: &mut PrepareOptions| (o.validation_fraction, o.test_fraction) = (0.5, 0.5);
        assert!(check(both).unwrap_err().contains("leave nothing to train on"));
        assert!(
            check(|o| {
                (o.validation_fraction, o.test_fraction) = (0.5, 0.5);
                o.test = vec!["t".into()];
            })
            .is_ok()
        );
    }

    #[test]
    fn unknown_keys_are_refused_and_missing_ones_default() {
        let options: PrepareOptions = serde_json::from_str(r#"{"train": ["a"], "overlong": "drop"}"#).unwrap();
        assert_eq!((options.overlong, options.max_length), (Overlong::Drop, 1024));
        let text = serde_json::from_str::<PrepareOptions>(r#"{"trian": []}"#).unwrap_err().to_string();
        assert!(text.contains("trian") && text.contains("`train`"), "{text}");
    }
}
