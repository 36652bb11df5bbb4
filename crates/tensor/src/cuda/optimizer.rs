//! Launchers of AdamW and of the gradient norm; contracts in `ops/adamw.rs`, `ops/adamw_8bit.rs` and `ops/grad_norm.rs`.

use super::arguments::{argument, argument_at, blocks};
use super::gpu::{Arg, Gpu, Launch};
use super::kernels::{Module, Source};
use crate::contract::{Factors, Step};
use crate::dtype::Dtype;
use crate::moments::{BLOCK, tables};
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

const THREADS: u32 = 256;
const MOST_BLOCKS: u32 = 4096;
/// Partial sums of a tensor's squares.
const PARTS: usize = 256;

fn factors<'a>(step: &Step) -> [Arg<'a>; 9] {
    Factors::new(step).values().map(Arg::F32)
}

/// Elements `range` of the weights and, for bf16, of what rounding left of them, and of the gradient.
fn weights<'a>(value: &'a Tensor, low: Option<&'a Tensor>, grad: &'a Tensor, range: &Range<usize>) -> [Arg<'a>; 3] {
    let (element, at) = (value.dtype(), range.start);
    assert_eq!(low.map(|l| (l.len(), l.dtype())), (element == Dtype::BF16).then_some((value.len(), Dtype::BF16)));
    assert!(range.end <= value.len() && value.len() == grad.len(), "{range:?} of {value:?} and {grad:?}");
    let low = low.map_or(Arg::Null, |low| argument_at(low, Dtype::BF16, at));
    [argument_at(value, element, at), low, argument_at(grad, Dtype::F32, at)]
}

/// Updates elements `range`; `moments` are theirs, the first and the second.
pub(crate) fn update(
    gpu: &Gpu,
    value: &mut Tensor,
    low: Option<&mut Tensor>,
    grad: &Tensor,
    range: Range<usize>,
    moments: [Arg<'_>; 2],
    step: &Step,
) {
    let n = range.len();
    let args: Vec<Arg<'_>> = weights(value, low.as_deref(), grad, &range)
        .into_iter()
        .chain(moments)
        .chain([Arg::U64(n as u64)])
        .chain(factors(step))
        .collect();
    gpu.launch(&Launch {
        module: Module::new(Source::Optimizer, value.dtype()),
        kernel: "adamw",
        grid: [blocks(n, THREADS).min(MOST_BLOCKS), 1, 1],
        block: THREADS,
        shared: 0,
        args: &args,
    });
}

/// Updates elements `range`, which begins with a block; `moments` are theirs: codes and scales of the first, of the second's root.
pub(crate) fn update_8bit(
    gpu: &Arc<Gpu>,
    value: &mut Tensor,
    low: Option<&mut Tensor>,
    grad: &Tensor,
    range: Range<usize>,
    moments: [Arg<'_>; 4],
    step: &Step,
) {
    let n = range.len();
    let tables = gpu.table(&tables().map(f32::to_bits));
    let args: Vec<Arg<'_>> = weights(value, low.as_deref(), grad, &range)
        .into_iter()
        .chain(moments)
        .chain([Arg::Buffer(&tables, 0), Arg::U64(n as u64)])
        .chain(factors(step))
        .collect();
    gpu.launch(&Launch {
        module: Module::new(Source::Optimizer, value.dtype()),
        kernel: "adamw_8bit",
        grid: [blocks(n, BLOCK as u32), 1, 1],
        block: BLOCK as u32,
        shared: 4 * (1024 + BLOCK / 32),
        args: &args,
    });
}

/// Bytes of the partial sums of `tensors` tensors.
pub(super) fn norm_bytes(tensors: usize) -> usize {
    8 * PARTS * tensors
}

/// Σ x² of each tensor, in an order that depends on sizes only; waits for the device once.
pub(crate) fn sums_of_squares(gpu: &Arc<Gpu>, tensors: &[&Tensor]) -> Vec<f64> {
    let parts = gpu.allocate(norm_bytes(tensors.len()));
    parts.fill(0, parts.bytes());
    for (i, x) in tensors.iter().enumerate() {
        gpu.launch(&Launch {
            module: Module::new(Source::Optimizer, Dtype::F32),
            kernel: "sum_of_squares",
            grid: [blocks(x.len(), THREADS).min(PARTS as u32), 1, 1],
            block: THREADS,
            shared: 8 * THREADS as usize / 32,
            args: &[argument(x, Dtype::F32), Arg::Buffer(&parts, 8 * PARTS * i), Arg::U64(x.len() as u64)],
        });
    }
    let mut sums = vec![0.0f64; PARTS * tensors.len()];
    parts.read(0, bytemuck::cast_slice_mut(&mut sums));
    sums.chunks(PARTS).map(|parts| parts.iter().sum()).collect()
}
