//! Matrix products of linear layers; contract in `ops/linear.rs`. An adapter's product is added to the layer's where that lies
//! (`beta` = 1); a quantised weight is decoded a tile of rows at a time into memory that is used again, or multiplied as it is where
//! few rows go through it.

use super::{Buffer, Gemm, Gpu, Matrix, buffer, dequantize};
use crate::ops::linear::{Adapter, Into};
use crate::{Dtype, Tensor, Weight};
use std::sync::Arc;

/// Elements of a quantised weight that are decoded at a time: large enough for whole products, small beside the weights.
pub(super) const TILE: usize = 1 << 25;

/// The rows of a matrix tensor.
pub(crate) fn matrix(tensor: &Tensor) -> Matrix<'_> {
    Matrix::new(buffer(tensor), tensor.dtype(), tensor.cols())
}

/// Factor on what is there.
pub(crate) fn beta(into: Into) -> f32 {
    if into == Into::Accumulate { 1.0 } else { 0.0 }
}

/// Calls `f(first row, rows, decoded rows)` for the whole of a dense weight, or tile by tile.
fn tiles(gpu: &Arc<Gpu>, w: &Weight, element: Dtype, mut f: impl FnMut(usize, usize, Matrix<'_>)) {
    let (rows, cols) = (w.rows(), w.cols());
    match w {
        Weight::Dense(w) => f(0, rows, matrix(w)),
        Weight::Device(w) => {
            let step = (TILE / cols.max(1)).max(1).min(rows);
            let tile: Buffer = gpu.allocate(step * cols * element.bytes());
            for first in (0..rows).step_by(step.max(1)) {
                let count = step.min(rows - first);
                dequantize::rows(gpu, w, first, count, &tile, element);
                f(first, count, Matrix::new(&tile, element, cols));
            }
        }
        Weight::Packed(_) | Weight::Int8(_) => panic!("a weight in {} is not on the GPU", w.encoding()),
    }
}

/// `y` [T, out] from row `first` on = or += `alpha` x wᵀ + the adapter's product, for `rows` rows of x from row `first_x` on.
pub(crate) fn forward(
    gpu: &Arc<Gpu>,
    x: Matrix<'_>,
    rows: usize,
    w: &Weight,
    alpha: f32,
    adapter: Option<Adapter<'_>>,
    y: Matrix<'_>,
    into: Into,
) {
    let (k, element) = (w.cols(), x.dtype);
    match w {
        Weight::Device(w) if rows <= dequantize::MOST_ROWS => {
            dequantize::multiply(gpu, w, x, rows, alpha, y, into == Into::Accumulate);
        }
        _ => tiles(gpu, w, element, |first, count, tile| {
            let c = y.at(y.offset + first);
            gpu.gemm(&Gemm { m: rows, n: count, k, alpha, a: x, b: tile.t(), beta: beta(into), c });
        }),
    }
    if let Some(Adapter { inner, outer, scale }) = adapter {
        let (n, k) = (w.rows(), inner.cols());
        gpu.gemm(&Gemm { m: rows, n, k, alpha: scale, a: matrix(inner), b: matrix(outer).t(), beta: 1.0, c: y });
    }
}

/// `d_x` [T, in] = or += `alpha` d_y w + the adapter's product.
pub(crate) fn input_gradient(
    gpu: &Arc<Gpu>,
    d_y: Matrix<'_>,
    rows: usize,
    w: &Weight,
    alpha: f32,
    adapter: Option<Adapter<'_>>,
    d_x: Matrix<'_>,
    into: Into,
) {
    let n = w.cols();
    tiles(gpu, w, d_y.dtype, |first, count, tile| {
        let beta = if first > 0 { 1.0 } else { beta(into) };
        let a = d_y.at(d_y.offset + first);
        gpu.gemm(&Gemm { m: rows, n, k: count, alpha, a, b: tile, beta, c: d_x });
    });
    if let Some(Adapter { inner, outer, scale }) = adapter {
        let k = inner.cols();
        gpu.gemm(&Gemm { m: rows, n, k, alpha: scale, a: matrix(inner), b: matrix(outer), beta: 1.0, c: d_x });
    }
}

/// `d_w` [out, in] += `alpha` d_yᵀ x over `rows` rows.
pub(crate) fn weight_gradient(gpu: &Gpu, d_y: Matrix<'_>, x: Matrix<'_>, rows: usize, alpha: f32, d_w: &mut Tensor) {
    let (m, n) = (d_w.rows(), d_w.cols());
    gpu.gemm(&Gemm { m, n, k: rows, alpha, a: d_y.t(), b: x, beta: 1.0, c: matrix(d_w) });
}
