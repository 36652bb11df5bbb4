//! Choosing the next token from logits: the most likely one, or a draw among the most likely ones.
//!
//! A draw takes the tokens in the order of falling logits (equals: rising ids), cuts the list off behind the first k (`top_k`), the
//! first that together reach a share of the probability of these (`top_p`; Holtzman et al., "The curious case of neural text
//! degeneration", 2020) and the last that is likely enough beside the first (`min_p`), and takes the one at which the sum of
//! probabilities passes `uniform` times that of all that are left. A GPU does the same in fixed point (2⁻⁴⁰ of the most likely
//! token): for the same logits it draws the same token, but where the number falls onto the border between two.

pub use crate::contract::{Choice, Draw};
use crate::cuda;
use crate::tensor::Tensor;

/// Buffers, kept from call to call.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    maxima: Vec<f32>,
    pub(crate) candidates: Vec<(u32, f32)>,
}

/// A token for each row of `logits` [T, V]; what the rows hold afterwards is not defined.
///
/// # Panics
/// When there are not as many `choices` as rows, V is 0, or an id of a history is not below V.
pub fn rows(logits: &mut Tensor, choices: &[Choice<'_>], scratch: &mut Scratch) -> Vec<u32> {
    assert_eq!(logits.rows(), choices.len(), "a choice for each row of {logits:?}");
    assert!(logits.cols() > 0, "no logits");
    if let Some(gpu) = logits.gpu().cloned() {
        return cuda::sample::rows(&gpu, logits, choices);
    }
    choices.iter().enumerate().map(|(t, choice)| row(logits.row(t), choice, scratch)).collect()
}

/// A token for the one row `logits` [V] of the processor.
///
/// # Panics
/// As [`rows`].
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    pub(crate) const ALL: Draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };

    fn choose(logits: &[f32], draw: Draw) -> u32 {
        let choice = Choice { repetition_penalty: 1.0, history: &[], draw: Some(draw) };
        row(logits, &choice, &mut Scratch::default())
    }

    #[test]
    fn numbers_fall_where_probabilities_say() {
        let logits = [0.15f32, 0.5, 0.05, 0.3].map(f32::ln);
        let at = |uniform, draw: Draw| choose(&logits, Draw { uniform, ..draw });
        // In the order of probabilities: token 1 up to 0.5, token 3 up to 0.8, token 0 up to 0.95, token 2.
        let steps = [0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96].map(|u| at(u, ALL));
        assert_eq!(steps, [1, 1, 3, 3, 0, 0, 2]);
        let two = Draw { top_k: 2, ..ALL };
        assert_eq!([0.62, 0.63, 0.999].map(|u| at(u, two)), [1, 3, 3]);
        assert_eq!(at(0.999, Draw { top_p: 0.7, ..ALL }), 3);
        assert_eq!(at(0.999, Draw { min_p: 0.4, ..ALL }), 3);
        assert_eq!(at(0.999, Draw { temperature: 0.01, ..ALL }), 1);
    }

    #[test]
    fn the_floor_keeps_the_most_likely_in_their_order() {
        let mut rng = Rng::new(5, 0);
        for n in [70, 1000, 5000] {
            // Coarse values: many ties.
            let logits: Vec<f32> = (0..n).map(|_| (rng.normal() * 8.0).round() / 4.0).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            assert_eq!(largest(&logits), order[0] as u32);
            for k in [1, 2, 20, n - 1] {
                let mut scratch = Scratch::default();
                let draw = Some(Draw { top_k: k, ..ALL });
                row(&logits, &Choice { repetition_penalty: 1.0, history: &[], draw }, &mut scratch);
                let kept: Vec<usize> = scratch.candidates.iter().map(|(id, _)| *id as usize).collect();
                assert_eq!(kept, order[..k]);
            }
        }
    }

    #[test]
    fn the_first_of_the_largest_and_penalties() {
        let mut logits = Tensor::from_slice(&[2, 4], &[1.0, 3.0, 3.0, -1.0, -5.0, -7.0, -5.0, -6.0]);
        let greedy = Choice { repetition_penalty: 1.0, history: &[], draw: None };
        assert_eq!(rows(&mut logits, &[greedy; 2], &mut Scratch::default()), [1, 0]);
        // What occurred twice is made less likely once.
        let penalised = |history| Choice { repetition_penalty: 2.0, history, draw: None };
        let choices = [penalised(&[1, 1]), penalised(&[0])];
        assert_eq!(rows(&mut logits, &choices, &mut Scratch::default()), [2, 2]);
    }
}
