//! Launchers of the choice of rows; contract in `ops/rows.rs`.

use super::arguments::{argument, row_threads};
use super::gpu::{Arg, Buffer, Gpu};
use super::kernels::{Module, Source};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `y` [N, d] = rows `index` [N] of `x`.
pub(crate) fn gather(gpu: &Arc<Gpu>, x: &Tensor, index: &[u32], y: &mut Tensor) {
    y.resize_like(x, &[index.len(), x.cols()]);
    rows(gpu, x, index, y, false);
}

/// Rows `index` [N] of `y` = `x` [N, d].
pub(crate) fn scatter(gpu: &Arc<Gpu>, x: &Tensor, index: &[u32], y: &mut Tensor) {
    rows(gpu, x, index, y, true);
}

fn rows(gpu: &Arc<Gpu>, x: &Tensor, index: &[u32], y: &Tensor, scatter: bool) {
    rows_at(gpu, x, &gpu.table(index), index.len(), y, scatter);
}

/// The first `num` rows that `index` lists.
pub(crate) fn rows_at(gpu: &Gpu, x: &Tensor, index: &Buffer, num: usize, y: &Tensor, scatter: bool) {
    let (element, d) = (x.dtype(), x.cols());
    assert!(d.is_multiple_of(16 / element.bytes()), "rows of {d} elements");
    let [d, scatter] = [d as u32, scatter.into()].map(Arg::U32);
    let args = [argument(x, element), Arg::Buffer(index, 0), argument(y, element), d, scatter];
    gpu.launch_row(Module::new(Source::Rows, element), "rows_gather", (num as u32, row_threads(x), 0), &args);
}
