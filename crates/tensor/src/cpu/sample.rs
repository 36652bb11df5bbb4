//! Choosing the next token; contract in `ops/sample.rs`.

use crate::contract::{Choice, Draw};

/// Buffers, kept from call to call.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    maxima: Vec<f32>,
    pub(crate) candidates: Vec<(u32, f32)>,
}

/// A token for the one row `logits` [V] in host memory.
///
/// # Panics
/// When an id of the history is not below V.
pub fn row(logits: &[f32], choice: &Choice<'_>, scratch: &mut Scratch) -> u32 {
    if choice.draw.is_none() && choice.repetition_penalty == 1.0 {
        return largest(logits);
    }
    let Scratch { logits: changed, maxima, candidates } = scratch;
    changed.clear();
    changed.extend_from_slice(logits);
    if choice.repetition_penalty != 1.0 {
        for id in choice.history {
            let (raw, penalty) = (logits[*id as usize], choice.repetition_penalty);
            changed[*id as usize] = if raw > 0.0 { raw / penalty } else { raw * penalty };
        }
    }
    let Some(draw) = choice.draw else { return largest(changed) };
    changed.iter_mut().for_each(|l| *l /= draw.temperature);
    candidates.clear();
    let floor = floor_of_top(draw.top_k, changed, maxima);
    candidates.extend((0..).zip(changed.iter().copied()).filter(|(_, l)| l.is_nan() || *l >= floor));
    drawn(&draw, candidates)
}

fn drawn(draw: &Draw, candidates: &mut Vec<(u32, f32)>) -> u32 {
    // Ties in the order of ids, so that the draw is the same everywhere.
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if draw.top_k > 0 && draw.top_k < candidates.len() {
        candidates.select_nth_unstable_by(draw.top_k - 1, order);
        candidates.truncate(draw.top_k);
    }
    candidates.sort_unstable_by(order);
    let largest = candidates[0].1;
    let mut total = 0.0f64;
    for (_, logit) in candidates.iter_mut() {
        *logit = (*logit - largest).exp();
        total += *logit as f64;
    }
    let mut keep = candidates.len();
    if draw.top_p < 1.0 {
        let mut sum = 0.0;
        let before = candidates.iter().take_while(|(_, p)| {
            sum += *p as f64;
            sum < draw.top_p as f64 * total
        });
        keep = (1 + before.count()).min(candidates.len());
    }
    // After the shift by the largest logit, the most likely token weighs exactly 1.
    keep = keep.min(candidates.iter().take_while(|(_, p)| *p >= draw.min_p).count().max(1));
    let total: f64 = candidates[..keep].iter().map(|(_, p)| *p as f64).sum();
    let mut left = draw.uniform * total;
    for (id, p) in &candidates[..keep] {
        left -= *p as f64;
        if left < 0.0 {
            return *id;
        }
    }
    candidates[keep - 1].0
}

/// A number that at least `k` of `logits` reach and few others do, so that not all need sorting: the k-th largest of
/// the maxima of short pieces. −∞ when there are not enough pieces, or for k = 0.
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
pub fn largest(logits: &[f32]) -> u32 {
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
