//! AdamW; contract in `ops/adamw.rs`.

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
