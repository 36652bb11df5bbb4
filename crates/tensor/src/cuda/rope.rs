//! Launchers of the rotation; contract in `ops/rope.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu};
use super::kernels::{Module, Source};
use crate::{dtype::Dtype, tensor::Tensor};
use std::sync::Arc;

/// Fills `cos` and `sin` [positions, frequencies], which have their shapes already.
pub(crate) fn angles(gpu: &Arc<Gpu>, positions: &[u32], frequencies: &[f32], cos: &mut Tensor, sin: &mut Tensor) {
    let (tokens, half) = (positions.len(), frequencies.len());
    let positions = gpu.table(positions);
    let bits: Vec<u32> = frequencies.iter().map(|f| f.to_bits()).collect();
    let frequencies = gpu.table(&bits);
    let args = [
        Arg::Buffer(&positions, 0),
        Arg::Buffer(&frequencies, 0),
        argument(cos, Dtype::F32),
        argument(sin, Dtype::F32),
        Arg::U32(tokens as u32),
        Arg::U32(half as u32),
    ];
    gpu.launch_threads(Module::new(Source::Rope, Dtype::F32), "rope_angles", tokens * half, &args);
}

/// Rotates `x` [T, heads · D] in place; `direction` is 1 or −1.
pub(crate) fn rotate(gpu: &Gpu, x: &mut Tensor, cos: &Tensor, sin: &Tensor, direction: f32) {
    let (element, tokens, half) = (x.dtype(), x.rows(), cos.cols());
    let (width, heads) = (16 / element.bytes(), x.cols() / (2 * half));
    let pack = if half.is_multiple_of(width) { width } else { 1 };
    let args = [
        argument(x, element),
        argument(cos, Dtype::F32),
        argument(sin, Dtype::F32),
        Arg::F32(direction),
        Arg::U32(tokens as u32),
        Arg::U32(heads as u32),
        Arg::U32(half as u32),
        Arg::U32(pack as u32),
    ];
    gpu.launch_threads(Module::new(Source::Rope, element), "rope_rotate", tokens * heads * half / pack, &args);
}
