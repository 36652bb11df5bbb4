//! Tensors as arguments of kernels.

use super::gpu::Arg;
use crate::{dtype::Dtype, tensor::Tensor};

/// The start of a tensor that must be on a GPU in `dtype`.
pub(crate) fn argument(tensor: &Tensor, dtype: Dtype) -> Arg<'_> {
    argument_at(tensor, dtype, 0)
}

/// As [`argument`], from element `offset` on.
pub(crate) fn argument_at(tensor: &Tensor, dtype: Dtype, offset: usize) -> Arg<'_> {
    assert_eq!(tensor.dtype(), dtype, "{tensor:?} where {} is needed", dtype.name());
    Arg::Buffer(tensor.device_buffer(), offset * dtype.bytes())
}

/// Threads for a row of `x`: one for each 16 bytes, in whole warps, as many as are worth their reduction.
pub(super) fn row_threads(x: &Tensor) -> u32 {
    let packs = (x.cols() * x.dtype().bytes()).div_ceil(16);
    packs.next_multiple_of(32).clamp(32, 512) as u32
}
