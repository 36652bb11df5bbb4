//! Launchers of the embedding; contract in `ops/embedding.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu};
use super::kernels::{Module, Source};
use super::{dequantize, rows};
use crate::{device::Device, dtype::Dtype, tensor::Tensor, weight::Weight};
use std::sync::Arc;

/// `x` [T, d] = rows `ids` of `table`.
pub(crate) fn forward(gpu: &Arc<Gpu>, table: &Weight, ids: &[u32], x: &mut Tensor) {
    match table {
        Weight::Dense(table) => rows::gather(gpu, table, ids, x),
        Weight::Device(table) => {
            x.resize_on(&Device::Cuda(gpu.clone()), table.element(), &[ids.len(), table.shape()[1]]);
            dequantize::listed_rows(gpu, table, ids, x);
        }
        Weight::Packed(_) | Weight::Int8(_) => panic!("a weight in {} is not on the GPU", table.encoding()),
    }
}

/// Row `r` of `d_table` (f32) += row `t` of `d_x` for each (r, t) of `pairs`, which rise in t.
pub(crate) fn backward(gpu: &Arc<Gpu>, d_x: &Tensor, mut pairs: Vec<(u32, u32)>, d_table: &mut Tensor) {
    pairs.sort_by_key(|(row, _)| *row);
    let mut groups: Vec<[u32; 3]> = Vec::new();
    for ((row, _), i) in pairs.iter().zip(0..) {
        match groups.last_mut() {
            Some([same, _, end]) if same == row => *end = i + 1,
            _ => groups.push([*row, i, i + 1]),
        }
    }
    let order: Vec<u32> = pairs.iter().map(|(_, t)| *t).collect();
    let (table, order) = (gpu.table(bytemuck::cast_slice(&groups)), gpu.table(&order));
    let element = d_x.dtype();
    let args = [
        argument(d_x, element),
        Arg::Buffer(&table, 0),
        Arg::Buffer(&order, 0),
        argument(d_table, Dtype::F32),
        Arg::U32(d_x.cols() as u32),
    ];
    let module = Module::new(Source::Embedding, element);
    gpu.launch_row(module, "embedding_gradient", (groups.len() as u32, 256, 0), &args);
}
