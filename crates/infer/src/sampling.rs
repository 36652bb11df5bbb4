//! How the next token is chosen.

use serde::{Deserialize, Serialize};
use tunesmith_model::{Error, Result};
use tunesmith_tensor::ops::sample::{Choice, Draw};
use tunesmith_tensor::rng::Rng;

/// How the next token is chosen. Names and meanings are those of Hugging Face's `generation_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// `false` takes the most likely token (greedy).
    pub do_sample: bool,
    /// Divides the logits; below 1 sharpens.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 = all.
    pub top_k: usize,
    /// Only the smallest set of tokens whose probabilities sum to at least this.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the most likely one.
    pub min_p: f32,
    /// Above 1 makes tokens that already occurred less likely (Keskar et al., "CTRL", 2019).
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { do_sample: false, temperature: 1.0, top_k: 50, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks every number.
    ///
    /// # Errors
    /// Names the field, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let bad = |field: &str, value: f32, allowed: &str| {
            Err(Error::Input(format!("{field} = {value} is not allowed; it must be {allowed}")))
        };
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return bad("temperature", self.temperature, "above 0 (for the most likely token choose greedy)");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition_penalty", self.repetition_penalty, "above 0 (1 = off)");
        }
        Ok(())
    }

    /// The defaults a model brings: fields of its generation_config.json over [`Sampling::default`].
    ///
    /// # Errors
    /// When a field has the wrong type.
    pub fn from_generation_config(config: Option<&serde_json::Value>) -> Result<Self> {
        let Some(config) = config else { return Ok(Self::default()) };
        // A field that is null means "not set".
        let mut set = config.clone();
        if let Some(object) = set.as_object_mut() {
            object.retain(|_, value| !value.is_null());
        }
        serde_json::from_value(set).map_err(|e| Error::Input(format!("generation_config.json: {e}")))
    }
}

/// Says how tokens are chosen, one after the other, from a random stream of its own.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    rng: Rng,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// As [`Sampling::check`].
    pub fn new(options: Sampling) -> Result<Self> {
        options.check()?;
        let rng = Rng::new(options.seed, 0);
        Ok(Self { options, rng })
    }

    /// How the next token is chosen after `history` (prompt and what was generated); takes a number from the random stream where it is
    /// drawn.
    pub(crate) fn choice<'h>(&mut self, history: &'h [u32]) -> Choice<'h> {
        let Sampling { do_sample, temperature, top_k, top_p, min_p, repetition_penalty, .. } = self.options;
        let draw = do_sample.then(|| Draw { temperature, top_k, top_p, min_p, uniform: self.rng.uniform_f64() });
        Choice { repetition_penalty, history, draw }
    }

    /// Goes on in the random stream by what `num_tokens` tokens take from it.
    pub fn skip(&mut self, num_tokens: usize) {
        for _ in 0..num_tokens {
            self.choice(&[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_tensor::ops::sample::{Scratch, row};

    fn next(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> u32 {
        row(logits, &sampler.choice(history), &mut Scratch::default())
    }

    fn shares(options: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[next(&mut sampler, logits, &[]) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        let sample = Sampling { do_sample: true, ..Sampling::default() };
        for (got, want) in shares(sample.clone(), &logits).iter().zip([0.5, 0.3, 0.15, 0.05]) {
            assert!((got - want).abs() < 0.02, "{got} {want}");
        }
        let two = shares(Sampling { top_k: 2, ..sample.clone() }, &logits);
        assert!((two[0] - 0.625).abs() < 0.02 && two[2] == 0.0);
        let nucleus = shares(Sampling { top_p: 0.7, ..sample.clone() }, &logits);
        assert!(nucleus[1] > 0.3 && nucleus[2] == 0.0);
        let likely = shares(Sampling { min_p: 0.4, ..sample.clone() }, &logits);
        assert!(likely[1] > 0.3 && likely[2] == 0.0);
        let sharp = shares(Sampling { temperature: 0.01, ..sample }, &logits);
        assert!(sharp[0] > 0.9999);
    }

    #[test]
    fn greedy_and_penalty() {
        let mut greedy = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(next(&mut greedy, &[1.0, 3.0, 3.0, -1.0], &[]), 1);
        let options = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut penalised = Sampler::new(options).unwrap();
        assert_eq!(next(&mut penalised, &[1.0, 3.0, 2.0, -1.0], &[1, 1]), 2);
        assert_eq!(next(&mut penalised, &[-1.0, -3.0, -1.5, -4.0], &[0]), 2);
    }

    #[test]
    fn config_and_bad_numbers() {
        let json = serde_json::json!({"temperature": 0.6, "top_p": 0.9, "top_k": null, "eos_token_id": [1, 2]});
        let options = Sampling::from_generation_config(Some(&json)).unwrap();
        assert_eq!((options.temperature, options.top_p, options.top_k), (0.6, 0.9, 50));
        assert!(Sampling::from_generation_config(Some(&serde_json::json!({"top_k": "x"}))).is_err());
        for bad in [
            Sampling { temperature: 0.0, ..Sampling::default() },
            Sampling { top_p: 1.5, ..Sampling::default() },
            Sampling { min_p: -0.1, ..Sampling::default() },
            Sampling { repetition_penalty: f32::NAN, ..Sampling::default() },
        ] {
            assert!(bad.check().unwrap_err().to_string().contains("is not allowed"));
        }
    }
}
