//! What data preparation can be told. All defaults are in the one `Default` here.
use crate::{Error, Result, RowFormat};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which tokens of a conversation or of a prompt with its completion are trained. Plain text is always trained whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// What the assistant says and the completions, each with the token that ends it.
    #[default]
    Completions,
    /// Everything.
    All,
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
    /// Changes which rows are set aside.
    pub split_seed: u64,
    /// Longest block, in tokens.
    pub max_length: usize,
    /// What becomes of rows longer than `max_length`.
    pub overlong: Overlong,
    /// Whether several documents share a block (attention stays inside each).
    pub packing: bool,
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// What makes a row of a `.txt` file.
    pub text_rows: TextRows,
    /// The format of JSON rows; detected when absent.
    pub row_format: Option<RowFormat>,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            validation: Vec::new(),
            test: Vec::new(),
            validation_fraction: 0.01,
            test_fraction: 0.0,
            split_seed: 0,
            max_length: 1024,
            overlong: Overlong::Auto,
            packing: true,
            train_on: TrainOn::Completions,
            text_rows: TextRows::File,
            row_format: None,
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
        Ok(())
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
