//! Matrix products of linear layers; contract in `ops/linear.rs`. An adapter's product comes first and the layer's own
//! is added to it (`beta` = 1). The own product reads what is there while its sums are being made, so that the adapter
//! costs no pass over the output but the writing of its own product; and what is rounded to bf16 between the two is the
//! smaller one. A quantised weight is dequantised a tile of rows at a time into memory that is reused, or multiplied as
//! it is where few rows go through it.

use super::arguments::argument;
use super::dequantize;
use super::gemm::{Gemm, Matrix};
use super::gpu::{Arg, Buffer, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::contract::{Adapter, Store};
use crate::{dtype::Dtype, tensor::Tensor, weight::Weight};
use std::sync::Arc;

/// Elements of a quantised weight that are dequantised at a time: large enough for whole products, small beside the
/// weights.
pub(super) const TILE: usize = 1 << 25;

/// The rows of a matrix tensor.
pub(crate) fn matrix(tensor: &Tensor) -> Matrix<'_> {
    Matrix::new(tensor.device_buffer(), tensor.dtype(), tensor.cols())
}

/// Factor on what is there.
pub(crate) fn beta(store: Store) -> f32 {
    if store == Store::Accumulate { 1.0 } else { 0.0 }
}

/// Calls `f(first row, rows, dequantised rows)` for the whole of a dense weight, or tile by tile.
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

/// `y` [T, out] from row `first` on = or += `alpha` x wᵀ + the adapter's product, for `rows` rows of x from row
/// `first_x` on.
pub(crate) fn forward(
    gpu: &Arc<Gpu>,
    x: Matrix<'_>,
    rows: usize,
    w: &Weight,
    alpha: f32,
    adapter: Option<Adapter<'_>>,
    y: Matrix<'_>,
    store: Store,
) {
    let (k, element) = (w.cols(), x.dtype);
    let store = adapted(gpu, rows, w.rows(), adapter, |outer| outer.t(), y, store);
    match w {
        Weight::Device(w) if rows <= dequantize::MOST_ROWS => {
            dequantize::multiply(gpu, w, x, rows, alpha, y, store == Store::Accumulate);
        }
        _ => tiles(gpu, w, element, |first, count, tile| {
            let c = y.at(y.offset + first);
            gpu.gemm(&Gemm { m: rows, n: count, k, alpha, a: x, b: tile.t(), beta: beta(store), c });
        }),
    }
}

/// `c` [rows, n] = or += the adapter's product, `outer` as `transpose` gives it; what the layer's own product then does
/// to `c`.
fn adapted(
    gpu: &Gpu,
    rows: usize,
    n: usize,
    adapter: Option<Adapter<'_>>,
    transpose: impl FnOnce(Matrix<'_>) -> Matrix<'_>,
    c: Matrix<'_>,
    store: Store,
) -> Store {
    let Some(Adapter { inner, outer, scale }) = adapter else { return store };
    let (a, b) = (matrix(inner), transpose(matrix(outer)));
    gpu.gemm(&Gemm { m: rows, n, k: inner.cols(), alpha: scale, a, b, beta: beta(store), c });
    Store::Accumulate
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
    store: Store,
) {
    let n = w.cols();
    let store = adapted(gpu, rows, n, adapter, |outer| outer, d_x, store);
    tiles(gpu, w, d_y.dtype, |first, count, tile| {
        let beta = if first > 0 { 1.0 } else { beta(store) };
        let a = d_y.at(d_y.offset + first);
        gpu.gemm(&Gemm { m: rows, n, k: count, alpha, a, b: tile, beta, c: d_x });
    });
}

/// `d_w` [out, in] += `alpha` d_yᵀ x over `rows` rows.
pub(crate) fn weight_gradient(gpu: &Gpu, d_y: Matrix<'_>, x: Matrix<'_>, rows: usize, alpha: f32, d_w: &mut Tensor) {
    let (m, n) = (d_w.rows(), d_w.cols());
    gpu.gemm(&Gemm { m, n, k: rows, alpha, a: d_y.t(), b: x, beta: 1.0, c: matrix(d_w) });
}

/// Adds `bias` [d] to each row of `y` [T, d].
pub(crate) fn add_bias(gpu: &Gpu, bias: &Tensor, y: &mut Tensor) {
    let (element, n) = (y.dtype(), y.len());
    let args = [argument(bias, element), argument(y, element), Arg::U64(n as u64), Arg::U32(y.cols() as u32)];
    gpu.launch_threads(Module::new(Source::Linear, element), "add_bias", n, &args);
}

/// `sums` [d] (f32) += the column sums of `x` [T, d].
pub(crate) fn column_sums(gpu: &Gpu, x: &Tensor, sums: &mut Tensor) {
    let element = x.dtype();
    let [rows, cols] = [x.rows(), x.cols()].map(|n| Arg::U32(n as u32));
    let args = [argument(x, element), argument(sums, Dtype::F32), rows, cols];
    let grid = (blocks(x.cols(), 32), 1024, 4 * 1024);
    gpu.launch_row(Module::new(Source::Linear, element), "column_sums", grid, &args);
}
