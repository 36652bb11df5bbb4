//! Text generation, one token at a time: sampling from logits and the loop around it.

use crate::{Error, KvCache, Llama, Result, Workspace};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
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

/// Draws tokens; keeps its random stream and buffers.
#[derive(Debug)]
pub struct Sampler {
    options: Sampling,
    rng: Rng,
    candidates: Vec<(u32, f32)>,
    logits: Vec<f32>,
    maxima: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// As [`Sampling::check`].
    pub fn new(options: Sampling) -> Result<Self> {
        options.check()?;
        let rng = Rng::new(options.seed, 0);
        Ok(Self { options, rng, candidates: Vec::new(), logits: Vec::new(), maxima: Vec::new() })
    }

    /// The next token for `logits` [V] after `history` (prompt and what was generated).
    pub fn next(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let options = &self.options;
        if !options.do_sample && options.repetition_penalty == 1.0 {
            return argmax(logits);
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        if options.repetition_penalty != 1.0 {
            for id in history {
                let raw = logits[*id as usize];
                let penalty = options.repetition_penalty;
                self.logits[*id as usize] = if raw > 0.0 { raw / penalty } else { raw * penalty };
            }
        }
        if !options.do_sample {
            return argmax(&self.logits);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        self.logits.iter_mut().for_each(|l| *l /= options.temperature);
        let floor = floor_of_top(options.top_k, &self.logits, &mut self.maxima);
        candidates.extend((0..).zip(self.logits.iter().copied()).filter(|(_, l)| l.is_nan() || *l >= floor));
        // Ties in the order of ids, so that the draw is the same everywhere.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if options.top_k > 0 && options.top_k < candidates.len() {
            candidates.select_nth_unstable_by(options.top_k - 1, order);
            candidates.truncate(options.top_k);
        }
        candidates.sort_unstable_by(order);
        let largest = candidates[0].1;
        let mut total = 0.0f64;
        for (_, logit) in candidates.iter_mut() {
            *logit = (*logit - largest).exp();
            total += *logit as f64;
        }
        let mut keep = candidates.len();
        if options.top_p < 1.0 {
            let mut sum = 0.0;
            keep = 1 + candidates
                .iter()
                .take_while(|(_, p)| {
                    sum += *p as f64;
                    sum < options.top_p as f64 * total
                })
                .count();
            keep = keep.min(candidates.len());
        }
        // After the shift by the largest logit, the most likely token weighs exactly 1.
        keep = keep.min(candidates.iter().take_while(|(_, p)| *p >= options.min_p).count().max(1));
        let total: f64 = candidates[..keep].iter().map(|(_, p)| *p as f64).sum();
        let mut left = self.rng.uniform_f64() * total;
        for (id, p) in &candidates[..keep] {
            left -= *p as f64;
            if left < 0.0 {
                return *id;
            }
        }
        candidates[keep - 1].0
    }
}

/// A number that at least `k` of `logits` reach and few others do, so that not all need sorting: the k-th largest of the
/// maxima of short pieces. −∞ when there are not enough pieces, or for k = 0.
fn floor_of_top(k: usize, logits: &[f32], maxima: &mut Vec<f32>) -> f32 {
    maxima.clear();
    maxima.extend(
        logits.chunks(64).map(|piece| piece.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })),
    );
    if k == 0 || k > maxima.len() {
        return f32::NEG_INFINITY;
    }
    *maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// The index of the largest element, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    // The maximum first, in lanes that vectorise: one pass over a vocabulary for every token.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (pieces, rest) = logits.as_chunks::<32>();
    let mut lanes = [f32::NEG_INFINITY; 32];
    for piece in pieces {
        for (lane, x) in lanes.iter_mut().zip(piece) {
            *lane = larger(*lane, *x);
        }
    }
    let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, x| larger(m, *x));
    logits.iter().position(|x| *x == largest).unwrap_or(0) as u32
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token.
    Stop,
    /// As many tokens as were asked for, or the context is full.
    Length,
    /// The caller's callback said so (a stop string, an interruption).
    Caller,
}

/// Generates after `prompt`, whose first `cache.len()` tokens are in `cache` already, until an end token,
/// `max_new_tokens`, or until `on_token` breaks. `on_token` sees each new token but not the end token that stops.
///
/// Returns the new tokens (an end token that stopped it included) and why it ended.
///
/// # Errors
/// When the prompt is empty, has an id outside the vocabulary, or does not fit into the context.
pub fn generate(
    model: &Llama,
    prompt: &[u32],
    cache: &mut KvCache,
    sampler: &mut Sampler,
    end_tokens: &[u32],
    max_new_tokens: usize,
    ws: &mut Workspace,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<(Vec<u32>, FinishReason)> {
    let vocab = model.config.vocab_size;
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::Input(format!("token {id} of the prompt is outside the model's vocabulary of {vocab}")));
    }
    if prompt.len() <= cache.len() {
        return Err(Error::Input("there is nothing to continue: the prompt is empty".into()));
    }
    if prompt.len() >= cache.capacity() {
        return Err(Error::Input(format!(
            "the prompt has {} tokens, and only {} fit into the context with at least one new token; shorten it",
            prompt.len(),
            cache.capacity() - 1
        )));
    }
    let mut history = prompt.to_vec();
    // A device that has failed gives logits that mean nothing.
    let healthy = || model.device().synchronize().map_err(|e| Error::Failure(e.to_string()));
    let mut logits = model.decode(&prompt[cache.len()..], cache, ws);
    healthy()?;
    for i in 0..max_new_tokens {
        let next = sampler.next(logits, &history);
        history.push(next);
        if end_tokens.contains(&next) {
            return Ok((history.split_off(prompt.len()), FinishReason::Stop));
        }
        if on_token(next).is_break() {
            return Ok((history.split_off(prompt.len()), FinishReason::Caller));
        }
        if i + 1 == max_new_tokens || cache.len() == cache.capacity() {
            break;
        }
        logits = model.decode(&[next], cache, ws);
        healthy()?;
    }
    Ok((history.split_off(prompt.len()), FinishReason::Length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(options: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.next(logits, &[]) as usize] += 1.0 / 20_000.0;
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
    fn the_floor_keeps_the_most_likely_in_their_order() {
        let mut rng = Rng::new(5, 0);
        for n in [70, 1000, 5000] {
            // Coarse values: many ties.
            let logits: Vec<f32> = (0..n).map(|_| (rng.normal() * 8.0).round() / 4.0).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            assert_eq!(argmax(&logits), order[0] as u32);
            for k in [1, 2, 20, n - 1] {
                let sampling = Sampling { do_sample: true, top_k: k, ..Sampling::default() };
                let mut sampler = Sampler::new(sampling).unwrap();
                sampler.next(&logits, &[]);
                let kept: Vec<usize> = sampler.candidates.iter().map(|(id, _)| *id as usize).collect();
                assert_eq!(kept, order[..k]);
            }
        }
    }

    #[test]
    fn greedy_and_penalty() {
        let mut greedy = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(greedy.next(&[1.0, 3.0, 3.0, -1.0], &[]), 1);
        let options = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut penalised = Sampler::new(options).unwrap();
        assert_eq!(penalised.next(&[1.0, 3.0, 2.0, -1.0], &[1, 1]), 2);
        assert_eq!(penalised.next(&[-1.0, -3.0, -1.5, -4.0], &[0]), 2);
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
