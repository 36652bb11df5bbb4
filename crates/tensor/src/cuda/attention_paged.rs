//! Launchers of attention over a paged cache.

use super::arguments::argument;
use super::gpu::{Arg, Buffer, Gpu, Launch};
use super::kernels::{Module, Source};
use super::rows::rows_at;
use crate::contract::{Chunk, Heads};
use crate::tensor::Tensor;
use std::sync::Arc;

const THREADS: u32 = 128;
/// Keys of a block: short enough that a long context fills the device, long enough to be worth a block.
const RUN: usize = 256;
/// Query heads that may share a key/value head, and elements of a head.
const LARGEST: (usize, usize) = (8, 128);

/// New tokens of a sequence from which on tiles of queries are faster than a block for each.
const MOST_ROWS: usize = 16;

/// Runs of [`RUN`] keys for queries that see up to `most`: in steps, so that a growing context seldom changes the launch. Blocks
/// after the last key have nothing to do.
fn runs(most: usize) -> usize {
    most.div_ceil(RUN).next_multiple_of(4)
}

/// Bytes of the partial results of `rows` queries that see up to `num_keys` keys.
pub(super) fn parts_bytes(rows: usize, num_keys: usize, heads: Heads) -> usize {
    4 * rows * heads.num_heads * runs(num_keys) * (heads.head_dim + 2)
}

/// What a pass reads and writes of a cache, on the device.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    /// The slot of each new token.
    slots: Option<Buffer>,
    /// For each query where its block table begins in `pages` and how many keys it sees.
    queries: Option<Buffer>,
    pages: Option<Buffer>,
    /// The slots of all keys of all sequences, for kernels that cannot read pages.
    keys: Option<Buffer>,
    num_rows: usize,
    num_keys: usize,
    /// Most keys that a query sees.
    most: usize,
    reads_pages: bool,
}

/// Puts `values` into `table`, in the memory that it has where that is large enough.
fn fill(gpu: &Arc<Gpu>, table: &mut Option<Buffer>, values: &[u32]) {
    let bytes = size_of_val(values).next_power_of_two();
    let memory = table.take().filter(|memory| memory.bytes() >= bytes);
    table.insert(memory.unwrap_or_else(|| gpu.allocate(bytes))).write(0, bytemuck::cast_slice(values));
}

impl Tables {
    /// The tables of a pass of `chunks` over the cache whose layers are `layers`.
    pub(crate) fn set(&mut self, layers: &[(Tensor, Tensor)], chunks: &[Chunk], heads: Heads) {
        let Some(gpu) = layers.first().and_then(|(k, _)| k.gpu()) else { return };
        let few = chunks.iter().all(|chunk| chunk.rows.len() <= MOST_ROWS);
        self.reads_pages = few && heads.group() <= LARGEST.0 && heads.head_dim <= LARGEST.1;
        let (mut slots, mut queries, mut pages, mut keys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for chunk in chunks {
            slots.extend(chunk.slots(chunk.past));
            if self.reads_pages {
                let first = pages.len() as u32;
                queries.extend((chunk.past..chunk.num_keys()).flat_map(|before| [first, before as u32 + 1]));
                pages.extend_from_slice(&chunk.pages);
            } else {
                keys.extend(chunk.slots(0));
            }
        }
        self.num_rows = slots.len();
        self.num_keys = keys.len();
        self.most = chunks.iter().map(Chunk::num_keys).max().unwrap_or(0);
        fill(gpu, &mut self.slots, &slots);
        fill(gpu, &mut self.queries, &queries);
        fill(gpu, &mut self.pages, &pages);
        fill(gpu, &mut self.keys, &keys);
    }

    /// Whether [`Tables::attention`] takes the pass; others gather their keys and values.
    pub(crate) fn reads_pages(&self) -> bool {
        self.reads_pages
    }

    /// Where the tables are, and what launches over them depend on besides.
    pub(crate) fn key(&self) -> impl Iterator<Item = u64> {
        let tables = [&self.slots, &self.queries, &self.pages].into_iter().flatten().map(Buffer::address);
        tables.chain([self.num_rows as u64, runs(self.most) as u64])
    }

    /// Writes `k` and `v` [T, K·D] to the slots of the new tokens.
    pub(crate) fn write(&self, (all_k, all_v): &(Tensor, Tensor), k: &Tensor, v: &Tensor) {
        let (Some(slots), Some(gpu)) = (&self.slots, k.gpu()) else { panic!("no pass over a cache on a GPU was set") };
        for (new, all) in [(k, all_k), (v, all_v)] {
            rows_at(gpu, new, slots, self.num_rows, all, true);
        }
    }

    /// The rows of all keys of all sequences: `rows` [keys, K·D] from those of the cache.
    pub(crate) fn gather(&self, all: &Tensor, rows: &mut Tensor) {
        let (Some(keys), Some(gpu)) = (&self.keys, all.gpu()) else { panic!("no pass over a cache on a GPU was set") };
        rows.resize_like(all, &[self.num_keys, all.cols()]);
        rows_at(gpu, all, keys, self.num_keys, rows, false);
    }

    /// `o` [T, H·D] of `q` [T, H·D] over the pages of each query; contract in `ops/attention_paged.rs`.
    pub(crate) fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, o: &mut Tensor) {
        let (Some(queries), Some(pages), Some(gpu)) = (&self.queries, &self.pages, q.gpu()) else {
            panic!("no pass over a cache on a GPU was set")
        };
        let (rows, element, d) = (q.rows(), q.dtype(), heads.head_dim);
        assert_eq!(rows, self.num_rows, "{q:?}");
        o.resize_like(q, q.shape());
        let (runs, parts) = (runs(self.most), gpu.allocate(parts_bytes(rows, self.most, heads)));
        let module = Module::new(Source::AttentionPaged, element);
        let [q, k, v, o] = [q, k, v, o].map(|t| argument(t, element));
        let [run, all, kv, head] = [RUN, heads.num_heads, heads.num_kv_heads, d].map(|x| Arg::U32(x as u32));
        let [queries, pages, parts] = [queries, pages, &parts].map(|table| Arg::Buffer(table, 0));
        gpu.launch(&Launch {
            module,
            kernel: "attention_decode",
            grid: [runs, heads.num_kv_heads, rows].map(|x| x as u32),
            block: THREADS,
            shared: THREADS as usize / 32 * heads.group() * (d + 2) * 4,
            args: &[q, k, v, queries, pages, parts, run, all, kv, head, Arg::F32(heads.scale())],
        });
        let args = [parts, o, Arg::U32(runs as u32), head];
        gpu.launch_row(module, "attention_join", ((rows * heads.num_heads) as u32, THREADS, 0), &args);
    }
}
