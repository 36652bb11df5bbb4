//! RMSNorm kernels; contract in `ops/rmsnorm.rs`.

use crate::cpu::{
    rows_per_task,
    simd::{multiversion, reduce2, reduce3},
};
use rayon::prelude::*;

pub(crate) fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let d = weight.len();
    let rows = rows_per_task(d);
    (y.par_chunks_mut(rows * d), rstd.par_chunks_mut(rows), x.par_chunks(rows * d))
        .into_par_iter()
        .for_each(|(y, rstd, x)| forward_rows(x, weight, eps, y, rstd));
}

multiversion! {
    fn forward_rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
        let d = weight.len();
        for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
            let r = 1.0 / (reduce2(x, x, |a, b| a * b) / d as f32 + eps).sqrt();
            *rstd = r;
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = *x * r * *w;
            }
        }
    }
}

pub(crate) fn apply(x: &[f32], weight: &[f32], rstd: &[f32], y: &mut [f32]) {
    let d = weight.len();
    let rows = rows_per_task(d);
    (y.par_chunks_mut(rows * d), rstd.par_chunks(rows), x.par_chunks(rows * d))
        .into_par_iter()
        .for_each(|(y, rstd, x)| apply_rows(x, weight, rstd, y));
}

multiversion! {
    fn apply_rows(x: &[f32], weight: &[f32], rstd: &[f32], y: &mut [f32]) {
        let d = weight.len();
        for ((x, y), r) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = *x * *r * *w;
            }
        }
    }
}

pub(crate) fn backward(
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    d_y: &[f32],
    d_x: &mut [f32],
    d_weight: Option<&mut [f32]>,
) {
    let d = weight.len();
    let rows = rows_per_task(d);
    (d_x.par_chunks_mut(rows * d), d_y.par_chunks(rows * d), x.par_chunks(rows * d), rstd.par_chunks(rows))
        .into_par_iter()
        .for_each(|(d_x, d_y, x, rstd)| backward_rows(x, weight, rstd, d_y, d_x));
    if let Some(d_weight) = d_weight {
        // Strips of columns: each thread walks all rows of its strip, so the sum has one order.
        let strip = 64;
        d_weight.par_chunks_mut(strip).enumerate().for_each(|(s, out)| {
            backward_weight(x, rstd, d_y, d, s * strip, out);
        });
    }
}

multiversion! {
    fn backward_rows(x: &[f32], weight: &[f32], rstd: &[f32], d_y: &[f32], d_x: &mut [f32]) {
        let d = weight.len();
        for (((x, d_y), d_x), r) in x.chunks_exact(d).zip(d_y.chunks_exact(d)).zip(d_x.chunks_exact_mut(d)).zip(rstd) {
            let mean = reduce3(d_y, weight, x, |g, w, x| g * w * x) * r * r / d as f32;
            for (((d_x, g), w), x) in d_x.iter_mut().zip(d_y).zip(weight).zip(x) {
                *d_x += r * (g * w - x * mean);
            }
        }
    }
}

multiversion! {
    fn backward_weight(x: &[f32], rstd: &[f32], d_y: &[f32], d: usize, first: usize, out: &mut [f32]) {
        let n = out.len();
        for ((x, d_y), r) in x.chunks_exact(d).zip(d_y.chunks_exact(d)).zip(rstd) {
            for ((o, g), x) in out.iter_mut().zip(&d_y[first..first + n]).zip(&x[first..first + n]) {
                *o += g * x * r;
            }
        }
    }
}
