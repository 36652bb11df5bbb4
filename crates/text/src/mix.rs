//! Several data sets mixed: each with its own files, mapping and template, and its share of an epoch.
//!
//! Every set is packed into blocks of its own, and an epoch draws blocks of each: with n_s blocks, e_s epochs and weight w_s, the
//! share of set s is p_s = w_s · (e_s n_s)^(1/T) / Σ, and an epoch of Σ e_s n_s blocks has round(p_s Σ e n) of them. So with
//! temperature T = 1 and weights of 1 each set is seen e_s times an epoch; a higher temperature brings the shares nearer to each other
//! (Arivazhagan et al. 2019, arXiv:1907.05019); a weight multiplies the share.
use crate::{
    Error, PrepareOptions, Result, RowFormat, RowOptions, TextRows, TrainOn,
    options::{check_fractions, check_prompt_loss_weight},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

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

/// Checks what belongs to mixing.
///
/// # Errors
/// The first value out of range, with its name.
pub(crate) fn check(options: &PrepareOptions) -> Result<()> {
    if !(options.mix_temperature > 0.0 && options.mix_temperature.is_finite()) {
        let value = options.mix_temperature;
        return Err(Error::Input(format!("mix_temperature is {value}; it must be above 0 (1 = shares by size)")));
    }
    if options.sources.is_empty() {
        return match options.mix_temperature == 1.0 {
            true => Ok(()),
            false => Err(Error::Input("mix_temperature is set, but there are no [[data.sources]] to mix".into())),
        };
    }
    for (name, places) in [("train", &options.train), ("validation", &options.validation), ("test", &options.test)] {
        if !places.is_empty() {
            return Err(Error::Input(format!(
                "{name} and sources are both given; files to mix stand in [[data.sources]], so move these into one"
            )));
        }
    }
    let mut names = HashSet::new();
    for (index, source) in options.sources.iter().enumerate() {
        let name = &source.name;
        if name.is_empty() {
            return Err(Error::Input(format!("sources: the {}. has no name; reports need one", index + 1)));
        }
        if !names.insert(name) {
            return Err(Error::Input(format!("sources: two are called {name:?}; give each a name of its own")));
        }
        let within = |error: Error| match error {
            Error::Input(what) => Error::Input(format!("source {name:?}: {what}")),
            other => other,
        };
        if source.train.is_empty() {
            return Err(Error::Input(format!("source {name:?}: train names no data: give at least one file")));
        }
        for (field, value) in [("weight", source.weight), ("epochs", source.epochs)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Input(format!("source {name:?}: {field} is {value}; it must be above 0")));
            }
        }
        let own = source.options(options);
        check_fractions(&own).and_then(|()| check_prompt_loss_weight(&own)).map_err(within)?;
        RowOptions::of(&own).map_err(within)?;
    }
    Ok(())
}

/// What a data set holds to train on, and how much of it an epoch draws.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// Rows.
    pub rows: usize,
    /// Documents.
    pub documents: usize,
    /// Tokens.
    pub tokens: usize,
    /// Tokens whose loss counts fully.
    pub trained_tokens: usize,
    /// Blocks, which follow those of the sets before it.
    pub blocks: usize,
    /// Blocks that an epoch draws.
    pub blocks_per_epoch: usize,
}

/// Fills in how many blocks of each set an epoch draws, at least one.
pub(crate) fn plan(reports: &mut [SourceReport], options: &PrepareOptions) {
    let sizes = || reports.iter().zip(&options.sources).map(|(report, source)| report.blocks as f64 * source.epochs);
    let epoch: f64 = sizes().sum();
    let pulls: Vec<f64> = sizes()
        .zip(&options.sources)
        .map(|(size, source)| source.weight * size.powf(1.0 / options.mix_temperature))
        .collect();
    let total: f64 = pulls.iter().sum();
    for (report, pull) in reports.iter_mut().zip(pulls) {
        report.blocks_per_epoch = ((pull / total * epoch).round() as usize).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_epoch(sizes: &[usize], change: impl FnOnce(&mut PrepareOptions)) -> Vec<usize> {
        let mut options = PrepareOptions { sources: vec![DataSource::default(); sizes.len()], ..Default::default() };
        change(&mut options);
        let mut reports: Vec<_> =
            sizes.iter().map(|&blocks| SourceReport { blocks, ..SourceReport::default() }).collect();
        plan(&mut reports, &options);
        reports.into_iter().map(|report| report.blocks_per_epoch).collect()
    }

    #[test]
    fn shares_follow_from_sizes_epochs_weights_and_temperature() {
        assert_eq!(per_epoch(&[100, 10], |_| ()), [100, 10]);
        assert_eq!(per_epoch(&[100, 10], |o| o.sources[1].epochs = 3.5), [100, 35]);
        // Twice the odds: 2 · 10 against 100, of 110 blocks.
        assert_eq!(per_epoch(&[100, 10], |o| o.sources[1].weight = 2.0), [92, 18]);
        // The square roots of 100 and 25 are as 2 to 1.
        assert_eq!(per_epoch(&[100, 25], |o| o.mix_temperature = 2.0), [83, 42]);
        assert_eq!(per_epoch(&[100, 10], |o| o.mix_temperature = 1e9), [55, 55]);
        assert_eq!(per_epoch(&[1000, 1], |o| o.sources[1].weight = 1e-9), [1001, 1]);
    }

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
    fn mistakes_name_the_source() {
        let refusal = |change: fn(&mut PrepareOptions)| {
            let source =
                |name: &str| DataSource { name: name.into(), train: vec!["x".into()], ..DataSource::default() };
            let mut options = PrepareOptions { sources: vec![source("a"), source("b")], ..PrepareOptions::default() };
            assert!(options.check().is_ok());
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(refusal(|o| o.sources[1].name = "a".into()).contains("two are called \"a\""));
        assert!(refusal(|o| o.sources[1].name.clear()).contains("the 2. has no name"));
        assert!(refusal(|o| o.sources[1].weight = 0.0).contains("source \"b\": weight is 0"));
        assert!(refusal(|o| o.sources[0].epochs = f64::NAN).contains("source \"a\": epochs is NaN"));
        assert!(refusal(|o| o.sources[0].train.clear()).contains("source \"a\": train names no data"));
        assert!(refusal(|o| o.sources[0].encoding = Some("klingon".into())).contains("source \"a\": "));
        assert!(
            refusal(|o| o.sources[0].prompt_loss_weight = Some(2.0)).contains("source \"a\": prompt_loss_weight is 2")
        );
        assert!(refusal(|o| o.mix_temperature = 0.0).contains("mix_temperature is 0"));
        assert!(refusal(|o| o.train.push("y".into())).contains("train and sources are both given"));
        assert!(
            refusal(|o| (o.sources, o.train, o.mix_temperature) = (vec![], vec!["x".into()], 2.0))
                .contains("no [[data.sources]]")
        );
    }
}
