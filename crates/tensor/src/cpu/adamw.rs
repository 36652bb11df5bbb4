//! AdamW and gradient-norm kernels; contracts in `ops/adamw.rs` and `ops/grad_norm.rs`.

use crate::contract::{Factors, Step};
use crate::cpu::simd::multiversion;
use rayon::prelude::*;

const CHUNK: usize = 16 * 1024;

pub(crate) fn update(value: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], step: &Step) {
    let factors = Factors::new(step);
    (value.par_chunks_mut(CHUNK), grad.par_chunks(CHUNK), m.par_chunks_mut(CHUNK), v.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(value, grad, m, v)| update_chunk(value, grad, m, v, &factors));
}

multiversion! {
    fn update_chunk(value: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], factors: &Factors) {
        for i in 0..value.len() {
            factors.apply(&mut value[i], grad[i], &mut m[i], &mut v[i]);
        }
    }
}

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
