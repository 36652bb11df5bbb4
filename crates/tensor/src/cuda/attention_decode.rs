//! Launchers of attention over caches.

use super::arguments::argument;
use super::gpu::{Arg, Buffer, Gpu, Launch};
use super::kernels::{Module, Source};
use crate::contract::{Heads, Qkv, Segment};
use crate::tensor::Tensor;
use std::sync::Arc;

const THREADS: u32 = 128;
/// Keys of a block: short enough that a long context fills the device, long enough to be worth a block.
const CHUNK: usize = 256;
/// Query heads that may share a key/value head, and elements of a head.
const LARGEST: (usize, usize) = (8, 128);

/// New tokens of a sequence from which on tiles of queries are faster than a block for each.
const MOST_ROWS: usize = 16;

/// Whether these shapes have a kernel; others go through [`super::attention::forward`].
pub(crate) fn takes(segments: &[Segment], heads: Heads) -> bool {
    let few = segments.iter().all(|s| s.queries.len() <= MOST_ROWS);
    few && heads.group() <= LARGEST.0 && heads.head_dim <= LARGEST.1
}

/// Runs of [`CHUNK`] keys for queries that see up to `most`: in steps, so that a growing context seldom changes the
/// launch. Blocks after the last key have nothing to do.
fn chunks(most: usize) -> usize {
    most.div_ceil(CHUNK).next_multiple_of(4)
}

/// For each query the row of the first key that it sees and how many it sees.
fn query_rows(segments: &[Segment]) -> Vec<[u32; 2]> {
    let rows = segments.iter().flat_map(|s| {
        let hidden = s.queries.len();
        (1..=hidden).map(move |i| [s.keys.start, s.keys.len() - hidden + i].map(|x| x as u32))
    });
    rows.collect()
}

/// Bytes of the partial results of `rows` queries that see up to `num_keys` keys.
pub(super) fn parts_bytes(rows: usize, num_keys: usize, heads: Heads) -> usize {
    4 * rows * heads.num_heads * chunks(num_keys) * (heads.head_dim + 2)
}

/// What queries see of a cache, on the device.
#[derive(Debug)]
pub(crate) struct Seen {
    table: Buffer,
    rows: usize,
    most: usize,
}

impl Seen {
    /// What the queries of `segments` see, in the memory of `before` where that is large enough.
    pub(crate) fn new(gpu: &Arc<Gpu>, segments: &[Segment], before: Option<Self>) -> Self {
        let rows = query_rows(segments);
        let most = rows.iter().map(|[_, seen]| *seen as usize).max().unwrap_or(0);
        let table = before.map(|seen| seen.table).filter(|table| table.bytes() >= size_of_val(&rows[..]));
        let table = table.unwrap_or_else(|| gpu.allocate(size_of_val(&rows[..])));
        table.write(0, bytemuck::cast_slice(&rows));
        Self { table, rows: rows.len(), most }
    }

    /// Where the table is, and what a launch over it depends on besides.
    pub(crate) fn key(&self) -> [u64; 3] {
        [self.table.address(), self.rows as u64, chunks(self.most) as u64]
    }
}

/// `o` [T, H·D] of the queries of segments over their rows of k and v; contract in `ops/attention.rs`.
pub(crate) fn attention(gpu: &Arc<Gpu>, Qkv { q, k, v, segments, heads }: Qkv<'_>, o: &mut Tensor) {
    assert!(takes(segments, heads), "{heads:?}");
    let table = query_rows(segments);
    let most = table.iter().map(|[_, seen]| *seen as usize).max().unwrap_or(0);
    let table = gpu.table(bytemuck::cast_slice(&table));
    launch(gpu, (q, k, v), &table, most, heads, o);
}

/// As [`attention`], of queries that see what `seen` says.
pub(crate) fn attention_over(
    gpu: &Arc<Gpu>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seen: &Seen,
    heads: Heads,
    o: &mut Tensor,
) {
    assert_eq!(q.rows(), seen.rows, "{q:?}");
    launch(gpu, (q, k, v), &seen.table, seen.most, heads, o);
}

fn launch(
    gpu: &Arc<Gpu>,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    table: &Buffer,
    most: usize,
    heads: Heads,
    o: &mut Tensor,
) {
    let (rows, element, d) = (q.rows(), q.dtype(), heads.head_dim);
    o.resize_like(q, q.shape());
    let (chunks, parts) = (chunks(most), gpu.allocate(parts_bytes(rows, most, heads)));
    let module = Module::new(Source::AttentionDecode, element);
    let [q, k, v, o] = [q, k, v, o].map(|t| argument(t, element));
    let [chunk, all, kv, head] = [CHUNK, heads.num_heads, heads.num_kv_heads, d].map(|x| Arg::U32(x as u32));
    let (table, parts) = (Arg::Buffer(table, 0), Arg::Buffer(&parts, 0));
    gpu.launch(&Launch {
        module,
        kernel: "attention_decode",
        grid: [chunks, heads.num_kv_heads, rows].map(|x| x as u32),
        block: THREADS,
        shared: THREADS as usize / 32 * heads.group() * (d + 2) * 4,
        args: &[q, k, v, table, parts, chunk, all, kv, head, Arg::F32(heads.scale())],
    });
    let args = [parts, o, Arg::U32(chunks as u32), head];
    gpu.launch_row(module, "attention_join", ((rows * heads.num_heads) as u32, THREADS, 0), &args);
}
