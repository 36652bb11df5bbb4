//! SwiGLU kernels; contract in `ops/swiglu.rs`.

use crate::cpu::simd::{exp, multiversion};
use rayon::prelude::*;

const CHUNK: usize = 4096;

pub(crate) fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    (y.par_chunks_mut(CHUNK), gate.par_chunks(CHUNK), up.par_chunks(CHUNK))
        .into_par_iter()
        .for_each(|(y, gate, up)| forward_chunk(gate, up, y));
}

multiversion! {
    fn forward_chunk(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}

pub(crate) fn backward(gate: &mut [f32], up: &mut [f32], d_y: &[f32]) {
    (gate.par_chunks_mut(CHUNK), up.par_chunks_mut(CHUNK), d_y.par_chunks(CHUNK))
        .into_par_iter()
        .for_each(|(gate, up, d_y)| backward_chunk(gate, up, d_y));
}

multiversion! {
    fn backward_chunk(gate: &mut [f32], up: &mut [f32], d_y: &[f32]) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d_y) {
            let (g, u) = (*gate, *up);
            let sigmoid = 1.0 / (1.0 + exp(-g));
            *up = d * g * sigmoid;
            *gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
    }
}
