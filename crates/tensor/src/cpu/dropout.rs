//! Dropout kernels; contract in `ops/dropout.rs`.

use crate::rng::philox;
use rayon::prelude::*;

const CHUNK: usize = 4096;

/// Calls `f(i, scale)` with the factor of element `first + i`: 0 where dropped, `keep` elsewhere.
#[inline(always)]
fn factors(len: usize, first: usize, p: f32, seed: u64, stream: u64, mut f: impl FnMut(usize, f32)) {
    let keep = 1.0 / (1.0 - p);
    let threshold = (p as f64 * (1u64 << 32) as f64) as u32;
    let key = [seed as u32, (seed >> 32) as u32];
    for block in 0..len.div_ceil(4) {
        let counter = (first / 4 + block) as u64;
        let words = philox([counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32], key);
        for (j, word) in words.into_iter().enumerate().take(len - 4 * block) {
            f(4 * block + j, if word < threshold { 0.0 } else { keep });
        }
    }
}

pub(crate) fn forward(x: &[f32], p: f32, seed: u64, stream: u64, y: &mut [f32]) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (y, x))| {
        factors(y.len(), chunk * CHUNK, p, seed, stream, |i, factor| y[i] = x[i] * factor);
    });
}

pub(crate) fn backward(d_y: &[f32], p: f32, seed: u64, stream: u64, d_x: &mut [f32]) {
    d_x.par_chunks_mut(CHUNK).zip(d_y.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (d_x, d_y))| {
        factors(d_x.len(), chunk * CHUNK, p, seed, stream, |i, factor| d_x[i] += d_y[i] * factor);
    });
}
