//! Rotary embedding kernel; contract in `ops/rope.rs`.

use crate::cpu::{rows_per_task, simd::multiversion};
use rayon::prelude::*;

pub(crate) fn rotate(x: &mut [f32], cols: usize, head_dim: usize, cos: &[f32], sin: &[f32], direction: f32) {
    let rows = rows_per_task(cols);
    let half = head_dim / 2;
    (x.par_chunks_mut(rows * cols), cos.par_chunks(rows * half), sin.par_chunks(rows * half))
        .into_par_iter()
        .for_each(|(x, cos, sin)| rotate_rows(x, cols, half, cos, sin, direction));
}

multiversion! {
    fn rotate_rows(x: &mut [f32], cols: usize, half: usize, cos: &[f32], sin: &[f32], direction: f32) {
        for ((row, cos), sin) in x.chunks_exact_mut(cols).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let (s, x, y) = (s * direction, *a, *b);
                    *a = x * c - y * s;
                    *b = y * c + x * s;
                }
            }
        }
    }
}
