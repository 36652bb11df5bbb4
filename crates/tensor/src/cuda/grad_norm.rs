//! Launcher of the gradient norm; contract in `ops/grad_norm.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::{dtype::Dtype, tensor::Tensor};
use std::sync::Arc;

const THREADS: u32 = 256;
/// Partial sums of a tensor's squares.
const PARTS: usize = 256;

/// Bytes of the partial sums of `tensors` tensors.
pub(super) fn norm_bytes(tensors: usize) -> usize {
    8 * PARTS * tensors
}

/// Σ x² of each tensor, in an order that depends on sizes only; waits for the device once.
pub(crate) fn sums_of_squares(gpu: &Arc<Gpu>, tensors: &[&Tensor]) -> Vec<f64> {
    let parts = gpu.allocate(norm_bytes(tensors.len()));
    parts.fill(0, parts.bytes());
    for (i, x) in tensors.iter().enumerate() {
        let args = [argument(x, Dtype::F32), Arg::Buffer(&parts, 8 * PARTS * i), Arg::U64(x.len() as u64)];
        let grid = (blocks(x.len(), THREADS).min(PARTS as u32), THREADS, 8 * THREADS as usize / 32);
        gpu.launch_row(Module::new(Source::GradNorm, Dtype::F32), "sum_of_squares", grid, &args);
    }
    let mut sums = vec![0.0f64; PARTS * tensors.len()];
    parts.read(0, bytemuck::cast_slice_mut(&mut sums));
    sums.chunks(PARTS).map(|parts| parts.iter().sum()).collect()
}
