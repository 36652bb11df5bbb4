//! What data preparation can be told. All defaults are in the one `Default` here.
use crate::{
    DataSource, Error, Result, RowFormat, RowOptions, Split,
    clean::{CleanOptions, Cleaner, Same},
    mix,
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
    /// Both answers are kept, and those that were not liked, for training on preferences.
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
    /// Several data sets that are mixed, in the place of `train`, `validation` and `test`.
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
    /// Whether `train` is read as training goes on, instead of before it: for sources too large to prepare. Needs `max_steps`.
    pub streaming: bool,
    /// With `streaming`: documents among which the next one is drawn; 10,000 when absent, 1 = as they come.
    pub shuffle_buffer: Option<usize>,
    /// How training rows are balanced by the values of `balance_by`: `none`, `oversample` (rare ones are trained on several
    /// times), `undersample` (some of the common ones are left out), or `loss_weight` (the loss of rare ones counts more).
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
    /// Which tokens are trained: `completions` (what the assistant says), `last` (only its last turn), `all`, or a list of
    /// roles such as `["assistant", "tool"]`. Plain text is always trained whole.
    pub train_on: TrainOn,
    /// How much the loss of tokens that `train_on` leaves out counts in training, 0 to 1; what is trained counts 1. Held-out data
    /// is measured without them.
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
    /// What preference and KTO rows are for: `refuse`, `chosen` to train on the better answers as on any others, or `keep` to
    /// prepare both sides of each pair, and answers with their judgement, for training on preferences.
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

impl PrepareOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The first value out of range, with its name and the range.
    pub fn check(&self) -> Result<()> {
        if self.train.is_empty() && self.sources.is_empty() {
            return Err(Error::Input("train names no data: give at least one file, folder or pattern".into()));
        }
        check_fractions(self)?;
        mix::check(self)?;
        if !(2..=u32::MAX as usize).contains(&self.max_length) {
            let value = self.max_length;
            return Err(Error::Input(format!("max_length is {value}; at least 2 tokens are needed to train on")));
        }
        check_prompt_loss_weight(self)?;
        if let (Some(group), Some(label)) = (&self.group_by, &self.stratify_by) {
            return Err(Error::Input(format!(
                "group_by = {group:?} and stratify_by = {label:?} cannot both be kept; take one out"
            )));
        }
        if self.preferences == Preferences::Keep {
            let wrong = |name: &str, value: &str, why: &str| {
                Error::Input(format!("{name} = {value} and preferences = \"keep\" do not go together: {why}"))
            };
            for source in mix::sources(self) {
                if matches!(source.train_on, TrainOn::All | TrainOn::Roles(_)) {
                    return Err(wrong("train_on", "\"all\" or roles", "answers are compared, and nothing else"));
                }
                if source.prompt_loss_weight > 0.0 {
                    let weight = source.prompt_loss_weight.to_string();
                    return Err(wrong("prompt_loss_weight", &weight, "answers are compared, and nothing else"));
                }
                if source.template.is_some() {
                    return Err(wrong("template", "...", "a prompt template makes prompts with one completion"));
                }
            }
            if self.overlong == Overlong::Split {
                return Err(wrong(
                    "overlong",
                    "\"split\"",
                    "the parts of an answer cannot be compared; truncate or drop",
                ));
            }
        }
        if self.balance == Balance::None {
            let set = [("balance_by", self.balance_by.is_some()), ("balance_target", !self.balance_target.is_empty())];
            if let Some((name, _)) = set.into_iter().find(|(_, set)| *set) {
                return Err(Error::Input(format!(
                    "{name} is set, but balance is not; set balance = \"oversample\", \"undersample\" or \"loss_weight\""
                )));
            }
        }
        if let Some((name, share)) = self.balance_target.iter().find(|(_, share)| !(**share > 0.0 && share.is_finite()))
        {
            return Err(Error::Input(format!("balance_target.{name} is {share}; a share must be above 0")));
        }
        self.check_streaming()?;
        if self.max_row_bytes == 0 {
            return Err(Error::Input("max_row_bytes is 0; it must be at least the size of the longest row".into()));
        }
        Cleaner::new(&self.clean)?;
        RowOptions::of(self).map(drop)
    }

    /// Whether blocks of `split` need weights: only what is trained on has any.
    pub(crate) fn is_weighted(&self, split: Split) -> bool {
        let weighted = || mix::sources(self).iter().any(|source| source.prompt_loss_weight > 0.0);
        split == Split::Train && (self.balance == Balance::LossWeight || weighted())
    }

    /// Tokens of the longest block: room for two answers where both are kept.
    pub(crate) fn block_length(&self) -> usize {
        match self.preferences {
            Preferences::Keep => 2 * self.max_length,
            Preferences::Refuse | Preferences::Chosen => self.max_length,
        }
    }

    /// Whether everything that is asked for can be done while the data is read.
    fn check_streaming(&self) -> Result<()> {
        if !self.streaming {
            return match self.shuffle_buffer {
                None => Ok(()),
                Some(_) => {
                    Err(Error::Input("shuffle_buffer is set, but streaming is not; set streaming = true".into()))
                }
            };
        }
        if self.shuffle_buffer == Some(0) {
            return Err(Error::Input("shuffle_buffer is 0; 1 takes the rows as they come".into()));
        }
        let (validation, test) = self.fractions();
        let held_out = "rows are not known beforehand, so none is set aside; name files in validation or test, and set the \
                        fraction to 0";
        let whole = "it needs all rows before the first is trained on";
        let near = "it would remember every row; \"exact\" compares with the held-out rows alone";
        for (set, name, why) in [
            (validation > 0.0, "validation_fraction", held_out),
            (test > 0.0, "test_fraction", held_out),
            (self.group_by.is_some(), "group_by", held_out),
            (self.stratify_by.is_some(), "stratify_by", held_out),
            (self.balance != Balance::None, "balance", whole),
            (!self.sources.is_empty(), "sources", whole),
            (self.preferences == Preferences::Keep, "preferences = \"keep\"", "training on pairs reads prepared data"),
            (self.clean.duplicates != Same::Keep, "clean.duplicates", "it would remember every row"),
            (self.clean.leakage == Same::Near, "clean.leakage = \"near\"", near),
            (self.clean.gutenberg, "clean.gutenberg", whole),
        ] {
            if set {
                return Err(Error::Input(format!("{name} does not go together with streaming = true: {why}")));
            }
        }
        Ok(())
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

/// Whether something is left to train on.
pub(crate) fn check_fractions(options: &PrepareOptions) -> Result<()> {
    for (name, value) in
        [("validation_fraction", options.validation_fraction), ("test_fraction", options.test_fraction)]
    {
        if !(0.0..1.0).contains(&value) {
            return Err(Error::Input(format!("{name} is {value}; it must be at least 0 and below 1")));
        }
    }
    let (validation, test) = options.fractions();
    if validation + test >= 1.0 {
        return Err(Error::Input(format!(
            "validation_fraction {validation} and test_fraction {test} leave nothing to train on; \
             their sum must be below 1"
        )));
    }
    Ok(())
}

/// Whether there are tokens that the weight can mean.
pub(crate) fn check_prompt_loss_weight(options: &PrepareOptions) -> Result<()> {
    let weight = options.prompt_loss_weight;
    if !(0.0..=1.0).contains(&weight) {
        return Err(Error::Input(format!("prompt_loss_weight is {weight}; it must be from 0 to 1")));
    }
    if weight > 0.0 && options.train_on == TrainOn::All {
        return Err(Error::Input(format!(
            "prompt_loss_weight is {weight}, but train_on = \"all\" leaves no token out; take one of the two away"
        )));
    }
    Ok(())
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
        let stream = |o: &mut PrepareOptions| (o.streaming, o.validation_fraction) = (true, 0.0);
        assert_eq!(check(stream), Ok(()));
        assert!(check(|o| o.streaming = true).unwrap_err().starts_with("validation_fraction does not go together"));
        assert!(check(|o| o.shuffle_buffer = Some(5)).unwrap_err().contains("streaming is not"));
        for (change, named) in [
            ((|o| o.shuffle_buffer = Some(0)) as fn(&mut PrepareOptions), "shuffle_buffer is 0"),
            (|o| o.group_by = Some("a".into()), "group_by"),
            (|o| o.balance = Balance::LossWeight, "balance"),
            (|o| o.clean.duplicates = Same::Exact, "clean.duplicates"),
            (|o| o.clean.leakage = Same::Near, "clean.leakage"),
        ] {
            let mut options = PrepareOptions { train: vec!["x".into()], ..PrepareOptions::default() };
            stream(&mut options);
            change(&mut options);
            let text = options.check().unwrap_err().to_string();
            assert!(text.starts_with(named), "{text}");
        }
        let keep = |o: &mut PrepareOptions| o.preferences = Preferences::Keep;
        assert_eq!(check(keep), Ok(()));
        for (change, named) in [
            ((|o| o.train_on = TrainOn::All) as fn(&mut PrepareOptions), "train_on"),
            (|o| o.prompt_loss_weight = 0.5, "prompt_loss_weight = 0.5"),
            (|o| o.overlong = Overlong::Split, "overlong = \"split\""),
            (|o| o.template = Some("{x}".into()), "template"),
        ] {
            let mut options = PrepareOptions { train: vec!["x".into()], ..PrepareOptions::default() };
            keep(&mut options);
            change(&mut options);
            let text = options.check().unwrap_err().to_string();
            assert!(text.starts_with(named) && text.contains("preferences = \"keep\""), "{text}");
        }
        assert!(check(|o| o.prompt_loss_weight = 1.5).unwrap_err().contains("prompt_loss_weight is 1.5"));
        assert!(check(|o| o.prompt_loss_weight = f64::NAN).unwrap_err().contains("from 0 to 1"));
        let all = |o: &mut PrepareOptions| (o.prompt_loss_weight, o.train_on) = (0.5, TrainOn::All);
        assert!(check(all).unwrap_err().contains("leaves no token out"));
        assert!(
            check(|o| o.balance_by = Some("x".into())).unwrap_err().contains("balance_by is set, but balance is not")
        );
        let share = |o: &mut PrepareOptions| {
            (o.balance, o.balance_target) = (Balance::Oversample, [("a".to_owned(), 0.0)].into());
        };
        assert!(check(share).unwrap_err().contains("balance_target.a is 0"));
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
