//! What data preparation can be told, with all defaults. What goes together with what is in [`check`].
mod check;

use crate::{Result, RowFormat, Split};
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
    /// The chosen answer is trained on; of KTO rows the desirable ones.
    Chosen,
    /// Both answers are kept, and undesirable ones, for training on preferences.
    Keep,
}

/// How training rows are balanced by the values of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// Not at all.
    #[default]
    None,
    /// Rows of rare values are trained on several times.
    Oversample,
    /// Some rows of common values are left out.
    Undersample,
    /// The loss of rows of rare values counts more.
    LossWeight,
}

/// What becomes of rows that say the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Same {
    /// They stay.
    #[default]
    Keep,
    /// Rows are the same when they differ in case, punctuation and white space at most.
    Exact,
    /// Rows are also the same when most of their phrases are (MinHash; see `near_threshold`).
    Near,
}

/// Cleaning of rows. Everything is off, except that training rows which are also held out are removed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CleanOptions {
    /// Cut the licence before and after a text of Project Gutenberg.
    pub gutenberg: bool,
    /// Repair UTF-8 that was read as Windows-1252: "Ã©" becomes "é".
    pub mojibake: bool,
    /// Take out what is left of HTML: tags, comments, scripts; entities become characters. Not for code.
    pub html: bool,
    /// Take out control characters and invisible marks, except line ends and tabs.
    pub control_characters: bool,
    /// Unicode normal form C.
    pub unicode_nfc: bool,
    /// One blank between words, no blanks at the end of a line, at most one empty line.
    pub whitespace: bool,
    /// Write `[EMAIL]` for e-mail addresses.
    pub mask_emails: bool,
    /// Write `[PHONE]` for telephone numbers.
    pub mask_phones: bool,
    /// Keep only rows in these languages: codes such as "en" or "eng". Rows too short to tell stay.
    pub languages: Vec<String>,
    /// Remove rows with fewer characters.
    pub min_chars: usize,
    /// Remove rows with more characters; 0 = no limit.
    pub max_chars: usize,
    /// Remove rows in which more than this share of the runs of five words stood before; 1 = never.
    pub max_repetition: f64,
    /// Remove rows that say what an earlier row of the same split says.
    pub duplicates: Same,
    /// Remove training rows that say what a validation or test row says.
    pub leakage: Same,
    /// For `near`: share of runs of three words that two rows must have in common (Jaccard similarity), 0.6 to 1.
    pub near_threshold: f64,
}

impl Default for CleanOptions {
    fn default() -> Self {
        Self {
            gutenberg: false,
            mojibake: false,
            html: false,
            control_characters: false,
            unicode_nfc: false,
            whitespace: false,
            mask_emails: false,
            mask_phones: false,
            languages: Vec::new(),
            min_chars: 0,
            max_chars: 0,
            max_repetition: 1.0,
            duplicates: Same::Keep,
            leakage: Same::Exact,
            near_threshold: 0.8,
        }
    }
}

/// One of several data sets. What is not set is as `[data]` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataSource {
    /// What it is called in reports.
    pub name: String,
    /// Files, folders or glob patterns to train on.
    pub train: Vec<String>,
    /// The same for validation. When given, no validation rows are taken out of `train`.
    pub validation: Vec<String>,
    /// The same for the final test. When given, no test rows are taken out of `train`.
    pub test: Vec<String>,
    /// Factor on its share of an epoch.
    pub weight: f64,
    /// How often an epoch sees it when all weights and the temperature are 1; may be a fraction.
    pub epochs: f64,
    /// Which tokens are trained.
    pub train_on: Option<TrainOn>,
    /// How much the loss of other tokens counts.
    pub prompt_loss_weight: Option<f64>,
    /// A prompt made of the keys of each row; `""` = none.
    pub template: Option<String>,
    /// With `template`: what is to be learned.
    pub completion: Option<String>,
    /// With `template`: examples that stand before every prompt.
    pub few_shot: Option<Vec<BTreeMap<String, String>>>,
    /// What makes a row of a `.txt` file.
    pub text_rows: Option<TextRows>,
    /// The format of rows with keys.
    pub row_format: Option<RowFormat>,
    /// Other names of keys.
    pub columns: Option<BTreeMap<String, String>>,
    /// Other names of roles.
    pub roles: Option<BTreeMap<String, String>>,
    /// What text files are written in.
    pub encoding: Option<String>,
}

impl Default for DataSource {
    fn default() -> Self {
        Self {
            name: String::new(),
            train: Vec::new(),
            validation: Vec::new(),
            test: Vec::new(),
            weight: 1.0,
            epochs: 1.0,
            train_on: None,
            prompt_loss_weight: None,
            template: None,
            completion: None,
            few_shot: None,
            text_rows: None,
            row_format: None,
            columns: None,
            roles: None,
            encoding: None,
        }
    }
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
    /// Several data sets that are mixed, instead of `train`, `validation` and `test`.
    pub sources: Vec<DataSource>,
    /// How far the shares of `sources` are brought together: 1 = by size, higher = nearer to equal.
    pub mix_temperature: f64,
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
    /// Whether `train` is read as training goes on, instead of before it: for sources too large to prepare. Needs
    /// `max_steps`.
    pub streaming: bool,
    /// With `streaming`: documents among which the next one is drawn; 10,000 when absent, 1 = as they come.
    pub shuffle_buffer: Option<usize>,
    /// How training rows are balanced by the values of `balance_by`: `none`, `oversample` (rare ones are trained on
    /// several times), `undersample` (some of the common ones are left out), or `loss_weight` (the loss of rare ones
    /// counts more).
    pub balance: Balance,
    /// With `balance`: the key to balance by; `stratify_by`, else `label`, when absent.
    pub balance_by: Option<String>,
    /// With `balance`: the share that each value is to have, in any unit; equal ones when absent.
    pub balance_target: BTreeMap<String, f64>,
    /// Changes which rows are drawn.
    pub balance_seed: u64,
    /// Longest block, in tokens.
    pub max_length: usize,
    /// What becomes of rows longer than `max_length`.
    pub overlong: Overlong,
    /// Whether several documents share a block (attention stays inside each).
    pub packing: bool,
    /// Which tokens are trained: `completions` (what the assistant says), `last` (only its last turn), `all`, or a list
    /// of roles such as `["assistant", "tool"]`. Plain text is always trained whole.
    pub train_on: TrainOn,
    /// How much the loss of tokens that `train_on` leaves out counts in training, 0 to 1; what is trained counts 1.
    /// Held-out data is measured without them.
    pub prompt_loss_weight: f64,
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
    /// Other names of keys: `columns = { prompt = "question", completion = "answer" }`. `role` and `content` map the
    /// keys of messages.
    pub columns: BTreeMap<String, String>,
    /// Other names of roles: `roles = { Kunde = "user" }`. Those of sharegpt are known.
    pub roles: BTreeMap<String, String>,
    /// What text files are written in: `utf-8`, `auto` (UTF-8, and Windows-1252 in lines where that does not fit), or
    /// another encoding by name. UTF-16 is told by its mark.
    pub encoding: String,
    /// Longest row, in bytes.
    pub max_row_bytes: usize,
    /// What becomes of rows that cannot be used: `error` stops at the first, `skip` counts them and writes them to
    /// `rejects.jsonl` beside the prepared data.
    pub on_bad_row: OnBadRow,
    /// What preference and KTO rows are for: `refuse`, `chosen` to train on the better answers as on any others, or
    /// `keep` to prepare both sides of each pair, and answers with their judgement, for training on preferences.
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
            sources: Vec::new(),
            mix_temperature: 1.0,
            validation_fraction: 0.01,
            test_fraction: 0.0,
            group_by: None,
            stratify_by: None,
            split_seed: 0,
            streaming: false,
            shuffle_buffer: None,
            balance: Balance::None,
            balance_by: None,
            balance_target: BTreeMap::new(),
            balance_seed: 0,
            max_length: 1024,
            overlong: Overlong::Auto,
            packing: true,
            train_on: TrainOn::Completions,
            prompt_loss_weight: 0.0,
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

impl DataSource {
    /// The options under which this set alone would be prepared.
    fn options(&self, all: &PrepareOptions) -> PrepareOptions {
        fn or<T: Clone>(own: &Option<T>, given: &T) -> T {
            own.clone().unwrap_or_else(|| given.clone())
        }
        PrepareOptions {
            sources: Vec::new(),
            train: self.train.clone(),
            validation: self.validation.clone(),
            test: self.test.clone(),
            train_on: or(&self.train_on, &all.train_on),
            prompt_loss_weight: or(&self.prompt_loss_weight, &all.prompt_loss_weight),
            template: self.template.clone().or_else(|| all.template.clone()).filter(|template| !template.is_empty()),
            completion: or(&self.completion, &all.completion),
            few_shot: or(&self.few_shot, &all.few_shot),
            text_rows: or(&self.text_rows, &all.text_rows),
            row_format: self.row_format.or(all.row_format),
            columns: or(&self.columns, &all.columns),
            roles: or(&self.roles, &all.roles),
            encoding: or(&self.encoding, &all.encoding),
            ..all.clone()
        }
    }
}

/// The options of each data set: of the one that there is, or of each of several.
pub(crate) fn sources(options: &PrepareOptions) -> Vec<PrepareOptions> {
    match options.sources.is_empty() {
        true => vec![options.clone()],
        false => options.sources.iter().map(|source| source.options(options)).collect(),
    }
}

impl PrepareOptions {
    /// Whether blocks of `split` need weights: only what is trained on has any.
    pub(crate) fn is_weighted(&self, split: Split) -> bool {
        let weighted = || sources(self).iter().any(|source| source.prompt_loss_weight > 0.0);
        split == Split::Train && (self.balance == Balance::LossWeight || weighted())
    }

    /// Tokens of the longest block: room for two answers where both are kept.
    pub(crate) fn block_length(&self) -> usize {
        match self.preferences {
            Preferences::Keep => 2 * self.max_length,
            Preferences::Refuse | Preferences::Chosen => self.max_length,
        }
    }

    /// The key that rows are balanced by, and the option that says so.
    pub(crate) fn balance_key(&self) -> (&'static str, &str) {
        match (&self.balance_by, &self.stratify_by) {
            (Some(key), _) => ("balance_by", key),
            (None, Some(key)) => ("stratify_by", key),
            (None, None) => ("balance", "label"),
        }
    }

    /// The files, folders and patterns given for `split`, by all sources.
    pub fn places(&self, split: Split) -> Vec<&str> {
        let own = [&self.train, &self.validation, &self.test];
        let sources = self.sources.iter().map(|source| [&source.train, &source.validation, &source.test]);
        std::iter::once(own).chain(sources).flat_map(|places| places[split as usize]).map(String::as_str).collect()
    }

    /// The same for all splits, list by list, to be changed.
    pub fn places_mut(&mut self) -> impl Iterator<Item = (Split, &mut Vec<String>)> {
        let own = [&mut self.train, &mut self.validation, &mut self.test];
        let sources = self.sources.iter_mut();
        let sources = sources.map(|source| [&mut source.train, &mut source.validation, &mut source.test]);
        std::iter::once(own).chain(sources).flat_map(|lists| Split::ALL.into_iter().zip(lists))
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
    fn a_source_has_its_own_mapping_and_else_that_of_all() {
        let source = DataSource {
            name: "a".into(),
            train: vec!["a.jsonl".into()],
            columns: Some([("text".into(), "body".into())].into()),
            train_on: Some(TrainOn::All),
            template: Some(String::new()),
            ..DataSource::default()
        };
        let options = PrepareOptions {
            sources: vec![source],
            template: Some("{x}".into()),
            encoding: "auto".into(),
            max_length: 64,
            ..PrepareOptions::default()
        };
        let own = &sources(&options)[0];
        assert_eq!((&own.train_on, own.max_length, &own.encoding[..]), (&TrainOn::All, 64, "auto"));
        assert_eq!((own.columns.get("text").map(String::as_str), &own.template), (Some("body"), &None));
        assert_eq!(sources(&PrepareOptions::default()), [PrepareOptions::default()]);
    }

    #[test]
    fn unknown_keys_are_refused_and_missing_ones_default() {
        let options: PrepareOptions = serde_json::from_str(r#"{"train": ["a"], "overlong": "drop"}"#).unwrap();
        assert_eq!((options.overlong, options.max_length), (Overlong::Drop, 1024));
        let text = serde_json::from_str::<PrepareOptions>(r#"{"trian": []}"#).unwrap_err().to_string();
        assert!(text.contains("trian") && text.contains("`train`"), "{text}");
    }
}
