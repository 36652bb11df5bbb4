//! Launchers of attention over a cache and of greedy sampling.

use super::kernels::{Module, Source};
use super::{Arg, Gpu, Launch, argument};
use crate::ops::attention::Heads;
use crate::{Dtype, Tensor};
use std::sync::Arc;

const THREADS: u32 = 128;
/// Keys of a block: short enough that a long context fills the device, long enough to be worth a block.
const CHUNK: usize = 256;
/// Query heads that may share a key/value head, and elements of a head.
const LARGEST: (usize, usize) = (8, 128);

/// Tokens from which on tiles of queries are faster than a block for each.
const MOST_ROWS: usize = 16;

/// Whether this shape has a kernel; other shapes go through [`super::attention::forward`].
pub(crate) fn takes(rows: usize, heads: Heads) -> bool {
    rows <= MOST_ROWS && heads.group() <= LARGEST.0 && heads.head_dim <= LARGEST.1
}

/// `o` [T, H·D] of the last T tokens `q` over the first `num_keys` rows of `k` and `v`, theirs included.
pub(crate) fn attention(
    gpu: &Arc<Gpu>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    num_keys: usize,
    heads: Heads,
    o: &mut Tensor,
) {
    let (rows, element, d) = (q.rows(), q.dtype(), heads.head_dim);
    assert!(takes(rows, heads) && num_keys >= rows && k.rows().min(v.rows()) >= num_keys, "{heads:?}");
    o.resize_like(q, q.shape());
    let chunks = num_keys.div_ceil(CHUNK);
    let parts = gpu.allocate(4 * rows * heads.num_heads * chunks * (d + 2));
    let module = Module::new(Source::Decode, element);
    let [q, k, v, o] = [q, k, v, o].map(|t| argument(t, element));
    let [keys, chunk, all, kv, head] =
        [num_keys, CHUNK, heads.num_heads, heads.num_kv_heads, d].map(|x| Arg::U32(x as u32));
    gpu.launch(&Launch {
        module,
        kernel: "attention_decode",
        grid: [chunks, heads.num_kv_heads, rows].map(|x| x as u32),
        block: THREADS,
        shared: THREADS as usize / 32 * heads.group() * (d + 2) * 4,
        args: &[q, k, v, Arg::Buffer(&parts, 0), keys, chunk, all, kv, head, Arg::F32(heads.scale())],
    });
    gpu.launch(&Launch {
        module,
        kernel: "attention_join",
        grid: [(rows * heads.num_heads) as u32, 1, 1],
        block: THREADS,
        shared: 0,
        args: &[Arg::Buffer(&parts, 0), o, Arg::U32(chunks as u32), head],
    });
}

/// Index of the largest logit of each row of `logits` [T, V] (f32); waits for the device.
pub(crate) fn argmax(gpu: &Arc<Gpu>, logits: &Tensor) -> Vec<u32> {
    const BLOCK: u32 = 1024;
    let index = gpu.allocate(4 * logits.rows());
    gpu.launch(&Launch {
        module: Module::new(Source::Decode, Dtype::F32),
        kernel: "argmax",
        grid: [logits.rows() as u32, 1, 1],
        block: BLOCK,
        shared: 8 * BLOCK as usize,
        args: &[argument(logits, Dtype::F32), Arg::Buffer(&index, 0), Arg::U32(logits.cols() as u32)],
    });
    let mut found = vec![0u32; logits.rows()];
    index.read(0, bytemuck::cast_slice_mut(&mut found));
    found
}
