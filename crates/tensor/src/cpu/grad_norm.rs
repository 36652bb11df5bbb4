//! Norm of gradients; contract in `ops/grad_norm.rs`.

use crate::cpu::simd::multiversion;
use rayon::prelude::*;

const CHUNK: usize = 16 * 1024;

/// Σ x² in f64 over chunks of fixed size, added up in order.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(chunk_sum_of_squares).collect();
    parts.iter().sum()
}

multiversion! {
    fn chunk_sum_of_squares(x: &[f32]) -> f64 {
        let mut sums = [0.0f64; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for c in chunks {
            for i in 0..16 {
                sums[i] += c[i] as f64 * c[i] as f64;
            }
        }
        sums.iter().sum::<f64>() + rest.iter().map(|x| *x as f64 * *x as f64).sum::<f64>()
    }
}
