//! AdamW and gradient-norm kernels; contracts in `ops/adamw.rs` and `ops/grad_norm.rs`.

use crate::cpu::simd::multiversion;
use crate::ops::adamw::Step;
use rayon::prelude::*;

const CHUNK: usize = 16 * 1024;

pub(crate) fn update(value: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], step: &Step) {
    (value.par_chunks_mut(CHUNK), grad.par_chunks(CHUNK), m.par_chunks_mut(CHUNK), v.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(value, grad, m, v)| update_chunk(value, grad, m, v, step));
}

multiversion! {
    fn update_chunk(value: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], step: &Step) {
        let (b1, b2) = (step.beta1 as f32, step.beta2 as f32);
        let (rest1, rest2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
        let decay = (1.0 - step.learning_rate * step.weight_decay) as f32;
        let rate = (step.learning_rate / (1.0 - step.beta1.powi(step.number as i32))) as f32;
        let root = (1.0 / (1.0 - step.beta2.powi(step.number as i32)).sqrt()) as f32;
        let (eps, scale) = (step.epsilon as f32, step.grad_scale as f32);
        for i in 0..value.len() {
            let g = grad[i] * scale;
            m[i] = b1 * m[i] + rest1 * g;
            v[i] = b2 * v[i] + rest2 * (g * g);
            value[i] = value[i] * decay - rate * m[i] / (v[i].sqrt() * root + eps);
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
