//! Linear layers with dense and packed weights; contract in `ops/linear.rs`.

use crate::contract::{Adapter, Store};
use crate::cpu::matmul::{FEW_ROWS, Term, gemm, gemm_sum, matmul_nt, matmul_nt_by_row};
use crate::cpu::rows_per_task;
use crate::cpu::view::View;
use crate::tensor::Tensor;
use crate::weight::{Packed, Weight};
use rayon::prelude::*;
use std::cell::Cell;

/// Elements of a packed weight that are dequantised at a time (4 MiB of f32).
pub const PANEL: usize = 1 << 20;

thread_local! {
    /// The dequantised panel, kept between products. Taken out while it is in use: a thread that waits for others may
    /// begin another product meanwhile.
    static DEQUANTIZED: Cell<Vec<f32>> = Cell::default();
}

/// Calls `f(first row, rows, dequantised rows)` for one panel of `w` after the other.
fn panels(w: &Packed, mut f: impl FnMut(usize, usize, &[f32])) {
    let [rows, cols] = w.shape();
    let step = (PANEL / cols.max(1)).max(1).min(rows);
    let mut panel = DEQUANTIZED.take();
    panel.resize(panel.len().max(step * cols), 0.0);
    for first in (0..rows).step_by(step.max(1)) {
        let count = step.min(rows - first);
        let panel = &mut panel[..count * cols];
        w.dequantize_rows_parallel(first..first + count, panel);
        f(first, count, panel);
    }
    DEQUANTIZED.set(panel);
}

/// `ops::linear::forward` over rows that lie one after the other in `x` and `y`.
pub(crate) fn forward(x: &[f32], w: &Weight, alpha: f32, adapter: Option<Adapter<'_>>, y: &mut [f32], store: Store) {
    let (n, k) = (w.rows(), w.cols());
    let (m, accumulate) = (x.len() / k.max(1), store == Store::Accumulate);
    assert!(alpha == 1.0 || !matches!(w, Weight::Int8(_)), "int8 products have no factor");
    if m <= FEW_ROWS {
        match w {
            Weight::Dense(w) => matmul_nt((m, n, k), y, accumulate, alpha, x, w.data()),
            Weight::Packed(w) => {
                matmul_nt_by_row((m, n, k), y, accumulate, alpha, x, |j, row| w.dequantize_rows(j..j + 1, row));
            }
            Weight::Device(_) => panic!("a weight on a GPU times a tensor on the CPU"),
            Weight::Int8(w) => w.forward(x, y, store),
        }
        if let Some(Adapter { inner, outer, scale }) = adapter {
            matmul_nt((m, n, inner.cols()), y, true, scale, inner.data(), outer.data());
        }
        return;
    }
    let mut columns = |first: usize, count: usize, panel: &[f32]| {
        let own = Term { a: View::rows(x, k), b: View::rows(panel, k).t(), k, alpha };
        let y = &mut y[first..];
        match adapter {
            None => gemm_sum((m, count), y, n, accumulate, &[own]),
            Some(Adapter { inner, outer, scale }) => {
                let r = inner.cols();
                let b = View::rows(&outer.data()[first * r..], r).t();
                let added = Term { a: View::rows(inner.data(), r), b, k: r, alpha: scale };
                gemm_sum((m, count), y, n, accumulate, &[own, added]);
            }
        }
    };
    match w {
        Weight::Dense(w) => columns(0, n, w.data()),
        Weight::Packed(w) => panels(w, columns),
        Weight::Device(_) => panic!("a weight on a GPU times a tensor on the CPU"),
        Weight::Int8(w) => {
            w.forward(x, y, store);
            if let Some(Adapter { inner, outer, scale }) = adapter {
                matmul_nt((m, n, inner.cols()), y, true, scale, inner.data(), outer.data());
            }
        }
    }
}

/// `ops::linear::input_gradient` over rows that lie one after the other in `d_y` and `d_x`.
pub(crate) fn input_gradient(
    d_y: &[f32],
    w: &Weight,
    alpha: f32,
    adapter: Option<Adapter<'_>>,
    d_x: &mut [f32],
    store: Store,
) {
    let (k, n) = (w.rows(), w.cols());
    let m = d_y.len() / k.max(1);
    assert!(alpha == 1.0 || !matches!(w, Weight::Int8(_)), "int8 products have no factor");
    let mut rows = |first: usize, count: usize, panel: &[f32]| {
        let a = View { data: &d_y[first..], row_stride: k, col_stride: 1 };
        let own = Term { a, b: View::rows(panel, n), k: count, alpha };
        let accumulate = store == Store::Accumulate || first > 0;
        match adapter.filter(|_| first == 0) {
            None => gemm_sum((m, n), d_x, n, accumulate, &[own]),
            Some(Adapter { inner, outer, scale }) => {
                let r = inner.cols();
                let (a, b) = (View::rows(inner.data(), r), View::rows(outer.data(), n));
                gemm_sum((m, n), d_x, n, accumulate, &[own, Term { a, b, k: r, alpha: scale }]);
            }
        }
    };
    match w {
        Weight::Dense(w) => rows(0, k, w.data()),
        Weight::Packed(w) => panels(w, rows),
        Weight::Device(_) => panic!("a weight on a GPU times a tensor on the CPU"),
        Weight::Int8(w) => {
            w.input_gradient(d_y, d_x, store);
            if let Some(Adapter { inner, outer, scale }) = adapter {
                let (a, b) = (View::rows(inner.data(), inner.cols()), View::rows(outer.data(), n));
                gemm((m, n, inner.cols()), d_x, n, true, scale, a, b);
            }
        }
    }
}

/// `ops::linear::matmul_weight_gradient` over rows that lie one after the other.
pub(crate) fn weight_gradient(d_y: &[f32], x: &[f32], alpha: f32, d_w: &mut Tensor) {
    let (m, n) = (d_w.rows(), d_w.cols());
    let k = x.len() / n.max(1);
    let (a, b) = (View::rows(d_y, m).t(), View::rows(x, n));
    gemm((m, n, k), d_w.data_mut(), n, true, alpha, a, b);
}

/// Adds `bias` [out] to each row of `y`.
pub(crate) fn add_bias(bias: &[f32], y: &mut [f32]) {
    let n = bias.len();
    y.par_chunks_mut(rows_per_task(n) * n).for_each(|rows| {
        for row in rows.chunks_exact_mut(n) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    });
}

/// `sums` [out] += the column sums of `x`, row after row.
pub(crate) fn column_sums(x: &[f32], sums: &mut [f32]) {
    for row in x.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}
