//! The loop of generation for many prompts at once.

use super::{FinishReason, Sampler, check_prompt};
use crate::{Adapter, Error, Llama, Result, Workspace};
use std::ops::ControlFlow;
use tunesmith_tensor::ops::sample::{self, Scratch};

/// What a caller of [`generate_together`] ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The sequence of the token that it was shown.
    This,
    /// Everything.
    All,
}

/// A sequence that is being continued.
struct Active {
    /// Number of its prompt.
    number: usize,
    /// Its place in the cache.
    place: usize,
    /// Prompt and what was generated.
    history: Vec<u32>,
    ended: bool,
}

/// Continues each of `prompts` as [`generate`](super::generate) does, up to `places` of them in one pass: a prompt begins as soon as
/// a place is free. Each has a sampler of its own, so what one becomes does not depend on the others, up to the rounding of
/// products of other sizes. `on_token` sees the number of the prompt and each new token but the end token that stops.
///
/// Returns for each prompt the new tokens (an end token that stopped it included) and why it ended.
///
/// # Errors
/// When a prompt is empty, has an id outside the vocabulary, or does not fit into the context, or the device fails.
///
/// # Panics
/// When there are not as many samplers as prompts, or no place.
pub fn generate_together(
    model: &Llama,
    adapter: Option<&Adapter>,
    prompts: &[&[u32]],
    samplers: &mut [Sampler],
    end_tokens: &[u32],
    max_new_tokens: usize,
    places: usize,
    ws: &mut Workspace,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<End>,
) -> Result<Vec<(Vec<u32>, FinishReason)>> {
    assert!(samplers.len() == prompts.len() && places > 0, "{} samplers, {places} places", samplers.len());
    let context = model.config.max_position_embeddings;
    for (i, prompt) in prompts.iter().enumerate() {
        check_prompt(model, prompt, 0, context).map_err(|e| match e {
            Error::Input(what) if prompts.len() > 1 => Error::Input(format!("prompt {}: {what}", i + 1)),
            other => other,
        })?;
    }
    let mut results = vec![(Vec::new(), FinishReason::Length); prompts.len()];
    if max_new_tokens == 0 || prompts.is_empty() {
        return Ok(results);
    }
    let limit = |prompt: &[u32]| prompt.len().saturating_add(max_new_tokens).min(context);
    let places = places.min(prompts.len());
    let capacity = prompts.iter().map(|p| limit(p)).max().unwrap_or(0);
    let mut sequences = model.new_sequences(places, capacity);
    let mut free: Vec<usize> = (0..places).rev().collect();
    let (mut waiting, mut active) = (prompts.iter().enumerate(), Vec::<Active>::new());
    let mut scratch = Scratch::default();
    loop {
        // New prompts first, on their own; then a token of every sequence.
        let begun = active.len();
        while !free.is_empty()
            && let Some((number, prompt)) = waiting.next()
            && let Some(place) = free.pop()
        {
            active.push(Active { number, place, history: prompt.to_vec(), ended: false });
        }
        let first = if active.len() > begun { begun } else { 0 };
        let fed = &active[first..];
        if fed.is_empty() {
            return Ok(results);
        }
        let parts: Vec<_> = fed.iter().map(|a| (a.place, &a.history[sequences.len(a.place)..])).collect();
        let logits = model.feed(&parts, adapter, &mut sequences, ws);
        let choices: Vec<_> = fed.iter().map(|a| samplers[a.number].choice(&a.history)).collect();
        let tokens = sample::rows(logits, &choices, &mut scratch);
        // A device that has failed gives logits that mean nothing.
        model.device().synchronize().map_err(|e| Error::Failure(e.to_string()))?;
        let mut all_end = false;
        for (a, next) in active[first..].iter_mut().zip(tokens) {
            a.history.push(next);
            let prompt = prompts[a.number];
            let reason = if end_tokens.contains(&next) {
                FinishReason::Stop
            } else if let ControlFlow::Break(end) = on_token(a.number, next) {
                all_end |= end == End::All;
                FinishReason::Caller
            } else if a.history.len() - prompt.len() == max_new_tokens || sequences.len(a.place) == limit(prompt) {
                FinishReason::Length
            } else {
                continue;
            };
            results[a.number] = (a.history.split_off(prompt.len()), reason);
            sequences.clear(a.place);
            free.push(a.place);
            a.ended = true;
        }
        active.retain(|a| !a.ended);
        if all_end {
            for a in active {
                results[a.number] = (a.history[prompts[a.number].len()..].to_vec(), FinishReason::Caller);
            }
            waiting.for_each(|(number, _)| results[number].1 = FinishReason::Caller);
            return Ok(results);
        }
    }
}
