//! What can be asked for together: every mistake in the options is found here, before anything is read.
use super::{Balance, Overlong, Preferences, PrepareOptions, Same, TrainOn, sources};
use crate::{Error, Result, RowOptions, clean::Cleaner};
use std::collections::HashSet;

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
        check_mix(self)?;
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
            for source in sources(self) {
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
}

/// Checks what belongs to mixing.
///
/// # Errors
/// The first value out of range, with its name.
fn check_mix(options: &PrepareOptions) -> Result<()> {
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

/// Whether something is left to train on.
fn check_fractions(options: &PrepareOptions) -> Result<()> {
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
fn check_prompt_loss_weight(options: &PrepareOptions) -> Result<()> {
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
    use crate::DataSource;

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
