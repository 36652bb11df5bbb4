//! Launcher of AdamW; contract in `ops/adamw.rs`.

use super::arguments::argument_at;
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::contract::{Factors, Step};
use crate::{dtype::Dtype, tensor::Tensor};
use std::ops::Range;

const THREADS: u32 = 256;
const MOST_BLOCKS: u32 = 4096;

/// Elements `range` of the weights and, for bf16, of what rounding left of them, and of the gradient.
pub(super) fn weights<'a>(
    value: &'a Tensor,
    residual: Option<&'a Tensor>,
    grad: &'a Tensor,
    range: &Range<usize>,
) -> [Arg<'a>; 3] {
    let (element, at) = (value.dtype(), range.start);
    assert_eq!(residual.map(|l| (l.len(), l.dtype())), (element == Dtype::BF16).then_some((value.len(), Dtype::BF16)));
    assert!(range.end <= value.len() && value.len() == grad.len(), "{range:?} of {value:?} and {grad:?}");
    let residual = residual.map_or(Arg::Null, |residual| argument_at(residual, Dtype::BF16, at));
    [argument_at(value, element, at), residual, argument_at(grad, Dtype::F32, at)]
}

/// The numbers of an update, last among a kernel's arguments: elements, then factors.
pub(super) fn numbers<'a>(n: usize, step: &Step) -> impl Iterator<Item = Arg<'a>> {
    [Arg::U64(n as u64)].into_iter().chain(Factors::new(step).values().map(Arg::F32))
}

/// Updates elements `range`; `moments` are theirs, the first and the second.
pub(crate) fn update(
    gpu: &Gpu,
    value: &mut Tensor,
    residual: Option<&mut Tensor>,
    grad: &Tensor,
    range: Range<usize>,
    moments: [Arg<'_>; 2],
    step: &Step,
) {
    let n = range.len();
    let weights = weights(value, residual.as_deref(), grad, &range);
    let args: Vec<Arg<'_>> = weights.into_iter().chain(moments).chain(numbers(n, step)).collect();
    let grid = (blocks(n, THREADS).min(MOST_BLOCKS), THREADS, 0);
    gpu.launch_row(Module::new(Source::Adamw, value.dtype()), "adamw", grid, &args);
}
