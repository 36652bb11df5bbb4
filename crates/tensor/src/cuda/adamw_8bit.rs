//! Launcher of AdamW with moments of 8 bits; contract in `ops/adamw_8bit.rs`.

use super::adamw::{numbers, weights};
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::moments::{BLOCK, tables};
use crate::{contract::Step, tensor::Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Updates elements `range`, which begins with a block; `moments` are theirs: codes and scales of the first, of the
/// second's root.
pub(crate) fn update(
    gpu: &Arc<Gpu>,
    value: &mut Tensor,
    residual: Option<&mut Tensor>,
    grad: &Tensor,
    range: Range<usize>,
    moments: [Arg<'_>; 4],
    step: &Step,
) {
    let n = range.len();
    let tables = gpu.table(&tables().map(f32::to_bits));
    let weights = weights(value, residual.as_deref(), grad, &range).into_iter();
    let args = weights.chain(moments).chain([Arg::Buffer(&tables, 0)]).chain(numbers(n, step));
    let grid = (blocks(n, BLOCK as u32), BLOCK as u32, 4 * (1024 + BLOCK / 32));
    gpu.launch_row(Module::new(Source::Adamw8bit, value.dtype()), "adamw_8bit", grid, &args.collect::<Vec<_>>());
}
