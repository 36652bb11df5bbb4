//! Launchers of attention; contract in `ops/attention.rs`. Tables of tiles are made here and sent once for all layers.

use super::arguments::argument;
use super::gpu::{Arg, Buffer, Gpu, Launch};
use super::kernels::{Module, Source};
use crate::contract::{Heads, Qkv, Segment};
use crate::{dtype::Dtype, tensor::Tensor};
use std::sync::Arc;

/// Rows of a tile of queries or keys.
const TILE: usize = 64;
const THREADS: u32 = 128;
/// Largest head of the f32 kernels.
const LARGEST_HEAD: usize = 256;

/// Why there is no kernel for heads of this size; `None` where there is one.
pub(super) fn unsupported(element: Dtype, head_dim: usize) -> Option<String> {
    let sizes = Source::Attention.head_dims();
    match element {
        Dtype::F32 if head_dim <= LARGEST_HEAD => None,
        Dtype::F32 => Some(format!("head_dim is {head_dim}; the GPU's attention in f32 takes up to {LARGEST_HEAD}")),
        Dtype::BF16 if sizes.contains(&head_dim) => None,
        Dtype::BF16 => Some(format!("head_dim is {head_dim}; the GPU's attention in bf16 takes {sizes:?}; use f32")),
    }
}

/// The module for tensors of `element`.
///
/// # Panics
/// For sizes of heads that no module is built for.
fn module(element: Dtype, head_dim: usize) -> Module {
    if let Some(reason) = unsupported(element, head_dim) {
        panic!("{reason}");
    }
    match element {
        Dtype::F32 => Module::new(Source::AttentionF32, element),
        Dtype::BF16 => Module { source: Source::Attention, element, head_dim },
    }
}

/// Shared memory of `rows` rows of a head, none in f32.
fn rows_bytes(element: Dtype, rows: usize, head_dim: usize) -> usize {
    if element == Dtype::BF16 { rows * (head_dim + 8) * 2 } else { 0 }
}

/// Tiles of queries: first query, queries, first key, keys that the first query sees; those with most work first, so
/// that short ones fill the end.
fn query_tiles(segments: &[Segment]) -> Vec<[u32; 4]> {
    let mut tiles = Vec::new();
    for s in segments {
        for first in s.queries.clone().step_by(TILE) {
            let count = TILE.min(s.queries.end - first);
            let visible = s.keys.len() - s.queries.len() + first - s.queries.start + 1;
            tiles.push([first, count, s.keys.start, visible].map(|x| x as u32));
        }
    }
    tiles.sort_by_key(|t| std::cmp::Reverse(t[3]));
    tiles
}

/// Tiles of keys of documents: first key, keys, end of the document.
fn key_tiles(segments: &[Segment]) -> Vec<[u32; 4]> {
    let mut tiles = Vec::new();
    for s in segments {
        for first in s.keys.clone().step_by(TILE) {
            tiles.push([first, TILE.min(s.keys.end - first), s.keys.end, 0].map(|x| x as u32));
        }
    }
    tiles.sort_by_key(|t| std::cmp::Reverse(t[2] - t[0]));
    tiles
}

/// The part of a launch that all kernels share.
struct Call<'a> {
    gpu: &'a Arc<Gpu>,
    element: Dtype,
    heads: Heads,
}

impl Call<'_> {
    /// One block for each tile and head; sizes of heads and the scale follow `args`.
    fn launch(&self, kernel: &'static str, tiles: usize, num_heads: usize, shared: usize, args: &[Arg<'_>]) {
        let Heads { num_heads: all, num_kv_heads, head_dim } = self.heads;
        let sizes = [all, num_kv_heads, head_dim].map(|x| Arg::U32(x as u32));
        let args: Vec<Arg<'_>> = args.iter().copied().chain(sizes).chain([Arg::F32(self.heads.scale())]).collect();
        self.gpu.launch(&Launch {
            module: module(self.element, head_dim),
            kernel,
            grid: [tiles as u32, num_heads as u32, 1],
            block: THREADS,
            shared,
            args: &args,
        });
    }

    fn table(&self, tiles: &[[u32; 4]]) -> Arc<Buffer> {
        self.gpu.table(bytemuck::cast_slice(tiles))
    }
}

pub(crate) fn forward(gpu: &Arc<Gpu>, qkv: Qkv<'_>, o: &mut Tensor, lse: &mut Tensor) {
    let Qkv { q, k, v, segments, heads } = qkv;
    let element = q.dtype();
    o.resize_like(q, q.shape());
    lse.resize_on(&q.device(), Dtype::F32, &[q.rows(), heads.num_heads]);
    let tiles = query_tiles(segments);
    let call = Call { gpu, element, heads };
    let table = call.table(&tiles);
    let [q, k, v, o] = [q, k, v, o].map(|t| argument(t, element));
    let args = [q, k, v, Arg::Buffer(&table, 0), o, argument(lse, Dtype::F32)];
    let shared = rows_bytes(element, 5 * TILE, heads.head_dim);
    call.launch("attention_forward", tiles.len(), heads.num_heads, shared, &args);
}

/// Bytes of what each row of the backward pass has in common: one f32 per head.
pub(super) fn delta_bytes(rows: usize, heads: Heads) -> usize {
    4 * rows * heads.num_heads
}

/// Gradients have their shapes already.
pub(crate) fn backward(
    gpu: &Arc<Gpu>,
    qkv: Qkv<'_>,
    o: &Tensor,
    lse: &Tensor,
    d_o: &Tensor,
    [d_q, d_k, d_v]: [&mut Tensor; 3],
) {
    let Qkv { q, k, v, segments, heads } = qkv;
    let (element, head_dim) = (q.dtype(), heads.head_dim);
    let q_rows = q.rows();
    let rows = q_rows * heads.num_heads;
    let delta = gpu.allocate(delta_bytes(q_rows, heads));
    let [q, k, v, o, d_o, d_q, d_k, d_v] = [q, k, v, o, d_o, d_q, d_k, d_v].map(|t| argument(t, element));
    let (lse, delta) = (argument(lse, Dtype::F32), Arg::Buffer(&delta, 0));
    let args = [o, d_o, delta, Arg::U32(rows as u32), Arg::U32(head_dim as u32)];
    gpu.launch_threads(module(element, head_dim), "attention_delta", 32 * rows, &args);
    let call = Call { gpu, element, heads };
    let (keys, queries) = (key_tiles(segments), query_tiles(segments));
    let (key_table, query_table) = (call.table(&keys), call.table(&queries));
    let tile_q = if head_dim > 64 { TILE / 2 } else { TILE };
    let sums = if element == Dtype::BF16 { 8 * tile_q } else { 0 };
    let shared = rows_bytes(element, 2 * TILE + 2 * tile_q, head_dim) + sums;
    let args = [q, k, v, lse, delta, d_o, Arg::Buffer(&key_table, 0), d_k, d_v];
    call.launch("attention_backward_keys", keys.len(), heads.num_kv_heads, shared, &args);
    let shared = rows_bytes(element, 4 * TILE, head_dim);
    let args = [q, k, v, lse, delta, d_o, Arg::Buffer(&query_table, 0), d_q];
    call.launch("attention_backward_queries", queries.len(), heads.num_heads, shared, &args);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once() {
        let segments = Segment::documents(&[1, 64, 65, 200, 3]);
        let mut queries = vec![0; 333];
        let mut keys = vec![0; 333];
        for [first, count, key, visible] in query_tiles(&segments) {
            assert_eq!(first + 1, key + visible, "a document's first query sees one key");
            (first..first + count).for_each(|i| queries[i as usize] += 1);
        }
        for [first, count, end, _] in key_tiles(&segments) {
            assert!(count as usize <= TILE && first + count <= end);
            (first..first + count).for_each(|i| keys[i as usize] += 1);
        }
        assert!(queries.iter().chain(&keys).all(|n| *n == 1));
        // Behind a cache the first query sees what is cached, and itself.
        let cached = [Segment { queries: 0..70, keys: 10..110 }];
        assert_eq!(query_tiles(&cached), [[64, 6, 10, 95], [0, 64, 10, 31]]);
    }
}
