//! AdamW and gradient-norm kernels; contracts in `ops/adamw.rs` and `ops/grad_norm.rs`.

use crate::cpu::simd::multiversion;
use crate::ops::adamw::Step;
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

/// The numbers of a step as its elements need them.
pub(crate) struct Factors {
    betas: [f32; 2],
    rests: [f32; 2],
    decay: f32,
    rate: f32,
    root: f32,
    epsilon: f32,
    grad_scale: f32,
}

impl Factors {
    pub(crate) fn new(step: &Step) -> Self {
        Self {
            betas: [step.beta1 as f32, step.beta2 as f32],
            rests: [(1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32],
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            rate: (step.learning_rate / (1.0 - step.beta1.powi(step.number as i32))) as f32,
            root: (1.0 / (1.0 - step.beta2.powi(step.number as i32)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
            grad_scale: step.grad_scale as f32,
        }
    }

    /// All of them, in the order of their declaration, each of the two-element arrays one after the other.
    pub(crate) fn values(&self) -> [f32; 9] {
        let Self { betas: [b1, b2], rests: [r1, r2], decay, rate, root, epsilon, grad_scale } = *self;
        [b1, b2, r1, r2, decay, rate, root, epsilon, grad_scale]
    }

    /// Updates one weight and its moments.
    #[inline(always)]
    pub(crate) fn apply(&self, value: &mut f32, grad: f32, m: &mut f32, v: &mut f32) {
        let g = grad * self.grad_scale;
        *m = self.betas[0] * *m + self.rests[0] * g;
        *v = self.betas[1] * *v + self.rests[1] * (g * g);
        *value = *value * self.decay - self.rate * *m / (v.sqrt() * self.root + self.epsilon);
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
