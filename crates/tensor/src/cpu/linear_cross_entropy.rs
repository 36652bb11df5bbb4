//! Softmax cross-entropy over one chunk of logits; contract in `ops/linear_cross_entropy.rs`.

use crate::cpu::simd::{exp, max, multiversion, reduce2};
use rayon::prelude::*;

/// Turns each row of `logits` [n, vocab] into its loss and, when `scale` is given, into the gradient times `scale` and
/// the row's weight, where there are `weights` [n].
pub(crate) fn rows(
    logits: &mut [f32],
    vocab: usize,
    targets: &[u32],
    smoothing: f32,
    scale: Option<f32>,
    weights: Option<&[f32]>,
    loss: &mut [f32],
) {
    (logits.par_chunks_mut(vocab), targets, loss).into_par_iter().enumerate().for_each(|(n, (row, target, loss))| {
        let scale = scale.map(|scale| scale * weights.map_or(1.0, |weights| weights[n]));
        *loss = one_row(row, *target as usize, smoothing, scale);
    });
}

multiversion! {
    fn one_row(row: &mut [f32], target: usize, smoothing: f32, scale: Option<f32>) -> f32 {
        let vocab = row.len() as f32;
        let largest = max(row);
        let target_logit = row[target];
        // Sums of 49,152 positive numbers: partial sums of a thousand in f32, the total in f64.
        let mut sum = 0.0f64;
        let mut mean = 0.0f64;
        for part in row.chunks_mut(1024) {
            if smoothing > 0.0 {
                mean += reduce2(part, part, |a, _| a) as f64;
            }
            for x in part.iter_mut() {
                *x = exp(*x - largest);
            }
            sum += reduce2(part, part, |a, _| a) as f64;
        }
        let log_sum = sum.ln() + largest as f64;
        let nll = log_sum - target_logit as f64;
        let smooth = if smoothing > 0.0 { log_sum - mean / vocab as f64 } else { 0.0 };
        if let Some(scale) = scale {
            let factor = (scale as f64 / sum) as f32;
            let uniform = scale * smoothing / vocab;
            for x in row.iter_mut() {
                *x = *x * factor - uniform;
            }
            row[target] -= scale * (1.0 - smoothing);
        }
        ((1.0 - smoothing as f64) * nll + smoothing as f64 * smooth) as f32
    }
}
