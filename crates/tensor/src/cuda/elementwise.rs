//! Launchers of operations that take elements or rows one by one.

use super::arguments::{argument, blocks, row_threads};
use super::dequantize;
use super::gpu::{Arg, Buffer, Gpu, Launch};
use super::kernels::{Module, Source};
use crate::contract::Mask;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::tensor::Tensor;
use crate::weight::Weight;
use std::sync::Arc;

const BLOCK: u32 = 256;

/// Blocks beyond this number add nothing: every thread goes on with what is left.
const MOST_BLOCKS: u32 = 8192;

/// A launch over `n` elements in packs of 16 bytes.
fn over_packs(gpu: &Gpu, element: Dtype, kernel: &'static str, n: usize, args: &[Arg<'_>]) {
    let width = 16 / element.bytes();
    let grid = [blocks(n.div_ceil(width), BLOCK).min(MOST_BLOCKS), 1, 1];
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel,
        grid,
        block: BLOCK,
        shared: 0,
        args,
    });
}

pub(crate) fn swiglu_forward(gpu: &Gpu, gate: &Tensor, up: &Tensor, y: &mut Tensor) {
    y.resize_like(gate, gate.shape());
    let (element, n) = (gate.dtype(), gate.len());
    let args = [argument(gate, element), argument(up, element), argument(y, element), Arg::U64(n as u64)];
    over_packs(gpu, element, "swiglu_forward", n, &args);
}

pub(crate) fn swiglu_backward(gpu: &Gpu, gate: &mut Tensor, up: &mut Tensor, d_y: &Tensor) {
    let (element, n) = (gate.dtype(), gate.len());
    let args = [argument(gate, element), argument(up, element), argument(d_y, element), Arg::U64(n as u64)];
    over_packs(gpu, element, "swiglu_backward", n, &args);
}

/// A launch with one thread for each of `n` things.
fn over_each(gpu: &Gpu, element: Dtype, kernel: &'static str, n: usize, args: &[Arg<'_>]) {
    let grid = [blocks(n, BLOCK), 1, 1];
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel,
        grid,
        block: BLOCK,
        shared: 0,
        args,
    });
}

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

/// Row `to[i]` of `y` = row `from[i]` of `x`.
pub(crate) fn copy_rows(gpu: &Arc<Gpu>, x: &Tensor, from: &[u32], y: &mut Tensor, to: &[u32]) {
    let (element, d) = (x.dtype(), x.cols());
    assert!(d.is_multiple_of(16 / element.bytes()) && y.dtype() == element, "rows of {d} elements");
    if from.is_empty() {
        return;
    }
    let (sources, targets) = (gpu.table(from), gpu.table(to));
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel: "copy_rows",
        grid: [from.len() as u32, 1, 1],
        block: row_threads(x),
        shared: 0,
        args: &[
            argument(x, element),
            Arg::Buffer(&sources, 0),
            argument(y, element),
            Arg::Buffer(&targets, 0),
            Arg::U32(d as u32),
        ],
    });
}

/// The first `num` rows that `index` lists.
pub(crate) fn rows_at(gpu: &Gpu, x: &Tensor, index: &Buffer, num: usize, y: &Tensor, scatter: bool) {
    let (element, d) = (x.dtype(), x.cols());
    assert!(d.is_multiple_of(16 / element.bytes()), "rows of {d} elements");
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel: "rows_gather",
        grid: [num as u32, 1, 1],
        block: row_threads(x),
        shared: 0,
        args: &[
            argument(x, element),
            Arg::Buffer(index, 0),
            argument(y, element),
            Arg::U32(d as u32),
            Arg::U32(scatter.into()),
        ],
    });
}

/// `x` [T, d] = rows `ids` of `table`.
pub(crate) fn embedding(gpu: &Arc<Gpu>, table: &Weight, ids: &[u32], x: &mut Tensor) {
    match table {
        Weight::Dense(table) => gather(gpu, table, ids, x),
        Weight::Device(table) => {
            x.resize_on(&Device::Cuda(gpu.clone()), table.element(), &[ids.len(), table.shape()[1]]);
            dequantize::listed_rows(gpu, table, ids, x);
        }
        Weight::Packed(_) | Weight::Int8(_) => panic!("a weight in {} is not on the GPU", table.encoding()),
    }
}

/// Row `r` of `d_table` (f32) += row `t` of `d_x` for each (r, t) of `rows`, which rise in t.
pub(crate) fn embedding_gradient(gpu: &Arc<Gpu>, d_x: &Tensor, mut rows: Vec<(u32, u32)>, d_table: &mut Tensor) {
    rows.sort_by_key(|(row, _)| *row);
    let mut groups: Vec<[u32; 3]> = Vec::new();
    for ((row, _), i) in rows.iter().zip(0..) {
        match groups.last_mut() {
            Some([same, _, end]) if same == row => *end = i + 1,
            _ => groups.push([*row, i, i + 1]),
        }
    }
    let order: Vec<u32> = rows.iter().map(|(_, t)| *t).collect();
    let (table, order) = (gpu.table(bytemuck::cast_slice(&groups)), gpu.table(&order));
    let element = d_x.dtype();
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel: "embedding_gradient",
        grid: [groups.len() as u32, 1, 1],
        block: 256,
        shared: 0,
        args: &[
            argument(d_x, element),
            Arg::Buffer(&table, 0),
            Arg::Buffer(&order, 0),
            argument(d_table, Dtype::F32),
            Arg::U32(d_x.cols() as u32),
        ],
    });
}

/// Adds `bias` [d] to each row of `y` [T, d].
pub(crate) fn add_bias(gpu: &Gpu, bias: &Tensor, y: &mut Tensor) {
    let (element, n) = (y.dtype(), y.len());
    let args = [argument(bias, element), argument(y, element), Arg::U64(n as u64), Arg::U32(y.cols() as u32)];
    over_each(gpu, element, "add_bias", n, &args);
}

/// `sums` [d] (f32) += the column sums of `x` [T, d].
pub(crate) fn column_sums(gpu: &Gpu, x: &Tensor, sums: &mut Tensor) {
    let element = x.dtype();
    gpu.launch(&Launch {
        module: Module::new(Source::Elementwise, element),
        kernel: "column_sums",
        grid: [blocks(x.cols(), 32), 1, 1],
        block: 1024,
        shared: 4 * 1024,
        args: &[argument(x, element), argument(sums, Dtype::F32), Arg::U32(x.rows() as u32), Arg::U32(x.cols() as u32)],
    });
}

/// `y` [T, d] = or += masked and rescaled `x`.
pub(crate) fn dropout(gpu: &Gpu, x: &Tensor, mask: Mask, y: &mut Tensor, add: bool) {
    if !add {
        y.resize_like(x, x.shape());
    }
    let element = x.dtype();
    let halves = |x: u64| [Arg::U32(x as u32), Arg::U32((x >> 32) as u32)];
    let ([key0, key1], [stream0, stream1]) = (halves(mask.seed), halves(mask.stream));
    let args = [
        argument(x, element),
        argument(y, element),
        Arg::U32(x.rows() as u32),
        Arg::U32(x.cols() as u32),
        Arg::U32(mask.threshold()),
        Arg::F32(mask.keep()),
        key0,
        key1,
        stream0,
        stream1,
        Arg::U64(mask.first_row),
        Arg::U32(add.into()),
    ];
    over_each(gpu, element, "dropout", x.rows() * x.cols().div_ceil(4), &args);
}
