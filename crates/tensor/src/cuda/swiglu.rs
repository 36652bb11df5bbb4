//! Launchers of SwiGLU; contract in `ops/swiglu.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::tensor::Tensor;

/// Threads of a block, and blocks beyond which every thread goes on with what is left.
const BLOCK: u32 = 256;
const MOST_BLOCKS: u32 = 8192;

/// A launch over tensors of one shape in packs of 16 bytes.
fn launch(gpu: &Gpu, kernel: &'static str, [a, b, c]: [&Tensor; 3]) {
    let (element, n) = (a.dtype(), a.len());
    let grid = blocks(n.div_ceil(16 / element.bytes()), BLOCK).min(MOST_BLOCKS);
    let args = [argument(a, element), argument(b, element), argument(c, element), Arg::U64(n as u64)];
    gpu.launch_row(Module::new(Source::Swiglu, element), kernel, (grid, BLOCK, 0), &args);
}

pub(crate) fn forward(gpu: &Gpu, gate: &Tensor, up: &Tensor, y: &mut Tensor) {
    y.resize_like(gate, gate.shape());
    launch(gpu, "swiglu_forward", [gate, up, y]);
}

pub(crate) fn backward(gpu: &Gpu, gate: &mut Tensor, up: &mut Tensor, d_y: &Tensor) {
    launch(gpu, "swiglu_backward", [gate, up, d_y]);
}
