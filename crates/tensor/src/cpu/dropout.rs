//! Dropout kernels; contract in `ops/dropout.rs`.

use crate::contract::Mask;
use crate::cpu::rows_per_task;
use crate::rng::philox;
use rayon::prelude::*;

/// Calls `f(i, factor)` with the factor of each element of row `row` of `cols` elements: 0 where dropped, 1 / (1 − p)
/// elsewhere.
#[inline(always)]
fn factors(row: u64, cols: usize, mask: Mask, mut f: impl FnMut(usize, f32)) {
    let (keep, threshold) = (mask.keep(), mask.threshold());
    let key = [mask.seed as u32, (mask.seed >> 32) as u32];
    let blocks = cols.div_ceil(4) as u64;
    for block in 0..blocks {
        let counter = row * blocks + block;
        let stream = mask.stream;
        let words = philox([counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32], key);
        let first = 4 * block as usize;
        for (j, word) in words.into_iter().enumerate().take(cols - first) {
            f(first + j, if word < threshold { 0.0 } else { keep });
        }
    }
}

pub(crate) fn forward(x: &[f32], cols: usize, mask: Mask, y: &mut [f32]) {
    apply(x, cols, mask, y, |y, x, factor| *y = x * factor);
}

pub(crate) fn backward(d_y: &[f32], cols: usize, mask: Mask, d_x: &mut [f32]) {
    apply(d_y, cols, mask, d_x, |d_x, d_y, factor| *d_x += d_y * factor);
}

fn apply(from: &[f32], cols: usize, mask: Mask, to: &mut [f32], f: impl Fn(&mut f32, f32, f32) + Sync) {
    let rows = rows_per_task(cols);
    (to.par_chunks_mut(rows * cols), from.par_chunks(rows * cols)).into_par_iter().enumerate().for_each(
        |(task, (to, from))| {
            for (i, (to, from)) in to.chunks_mut(cols).zip(from.chunks(cols)).enumerate() {
                let row = mask.first_row + (task * rows + i) as u64;
                factors(row, cols, mask, |j, factor| f(&mut to[j], from[j], factor));
            }
        },
    );
}
