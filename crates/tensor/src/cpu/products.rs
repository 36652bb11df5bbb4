//! Products of one row with the rows of a weight; contract in `ops/products.rs`.

use crate::cpu::simd::{multiversion, reduce2};

multiversion! {
    /// `y[j]` = or += alpha · x · row j of `w` (rows as long as `x`).
    pub(crate) fn rows(x: &[f32], w: &[f32], alpha: f32, accumulate: bool, y: &mut [f32]) {
        for (y, w) in y.iter_mut().zip(w.chunks_exact(x.len())) {
            let product = alpha * reduce2(x, w, |a, b| a * b);
            *y = if accumulate { *y + product } else { product };
        }
    }
}
