//! Products of int8 activations with packed integer weights; contract and layout in `packed_int.rs`.
//!
//! Work is cut into strips of rows and of 16-column groups; a strip goes through the inner dimension in chunks that
//! stay in L1, and each chunk in register tiles. The sum of an output element over the blocks has one order, whatever
//! the strips, the number of rows and the number of threads.

use crate::cpu::int8_tile::{GROUP, Level, STRIP_GROUPS, Tile};
use crate::cpu::simd::multiversion;
use crate::cpu::view::{Shared, threads};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{int8_avx2, int8_avx512};
use crate::team;
use half::f16;

/// Elements of the inner dimension that a strip takes at a time, so that the codes of its columns stay in L1.
const CHUNK: usize = 512;

/// Rows of a strip.
const STRIP_ROWS: usize = 256;

/// Up to this many rows the weights are streamed once from memory, one group after the other.
const FEW_ROWS: usize = 4;

/// Groups of a strip when there are few rows, at most.
const FEW_ROWS_GROUPS: usize = 8;

/// Products with fewer multiplications than this are not worth waking another thread.
const SERIAL: usize = 1 << 17;

/// Borrowed parts of packed weights.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    /// Output columns.
    pub columns: usize,
    /// Blocks along the inner dimension.
    pub blocks: usize,
    /// Elements of a block: a multiple of 32.
    pub block_len: usize,
    /// One byte per code (signed code + 128), or two codes per byte.
    pub codes: &'a [u8],
    /// For two codes per byte: what is subtracted from a code.
    pub nibble_zero: Option<u8>,
    /// [groups, blocks, 16].
    pub scales: &'a [f16],
    /// [groups, blocks, 16].
    pub minima: Option<&'a [f16]>,
    /// Factor on all scales, a power of two.
    pub unit: f32,
}

impl Weights<'_> {
    pub(crate) fn groups(&self) -> usize {
        self.columns.div_ceil(GROUP)
    }

    /// Bytes of the codes of one block of one group.
    fn block_bytes(&self) -> usize {
        self.block_len * GROUP / if self.nibble_zero.is_some() { 2 } else { 1 }
    }
}

/// Borrowed int8 activations: `count` rows of `blocks` blocks.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub count: usize,
    pub blocks: usize,
    pub block_len: usize,
    /// [count, blocks · block_len].
    pub codes: &'a [i8],
    /// [count, blocks].
    pub scales: &'a [f32],
    /// [count, blocks]: −128 · the sum of a block's codes, which takes the 128 out of the weights' codes.
    pub offsets: &'a [i32],
    /// [count, blocks]: scale · the sum of a block's codes, which the minima multiply.
    pub sums: &'a [f32],
}

/// Where a product goes: rows of `weights.columns` elements.
pub(crate) struct Output<'a> {
    pub weights: Weights<'a>,
    pub y: Shared,
    pub accumulate: bool,
}

/// A rectangle of one output: rows and groups.
#[derive(Clone, Copy)]
struct Strip {
    row: usize,
    num_rows: usize,
    group: usize,
    num_groups: usize,
}

/// How one output is cut.
struct Cut {
    rows: usize,
    groups: usize,
    /// Strips that cover the groups.
    across: usize,
    /// All strips.
    count: usize,
}

impl Cut {
    fn new(num_rows: usize, num_groups: usize) -> Self {
        let (rows, groups) = if num_rows <= FEW_ROWS {
            // Long strips: a thread reads one stretch of memory. Not too long, so that threads end together.
            (num_rows, num_groups.div_ceil(threads() * 4).clamp(1, FEW_ROWS_GROUPS))
        } else {
            // Rows are cut finer when there are too few columns to keep all threads busy.
            let across = num_groups.div_ceil(STRIP_GROUPS);
            let wanted = (threads() * 4).div_ceil(across);
            let rows = num_rows.div_ceil(wanted).next_multiple_of(4).min(STRIP_ROWS);
            (rows, STRIP_GROUPS)
        };
        let across = num_groups.div_ceil(groups);
        Self { rows, groups, across, count: across * num_rows.div_ceil(rows) }
    }

    fn strip(&self, i: usize, num_rows: usize, num_groups: usize) -> Strip {
        let (row, group) = (i / self.across * self.rows, i % self.across * self.groups);
        Strip { row, num_rows: self.rows.min(num_rows - row), group, num_groups: self.groups.min(num_groups - group) }
    }
}

/// Multiplies `x` with the weights of every output, as one parallel pass with kernels of `level`.
///
/// # Panics
/// When block lengths or counts differ, or an output's buffer is too small.
pub(crate) fn products(level: Level, x: Rows<'_>, outputs: &[Option<Output<'_>>]) {
    if x.count == 0 {
        return;
    }
    let mut work = 0;
    for output in outputs.iter().flatten() {
        let w = &output.weights;
        assert_eq!((w.blocks, w.block_len), (x.blocks, x.block_len), "weights and activations have different blocks");
        work += x.count * w.columns * w.blocks * w.block_len;
    }
    let cut = |o: &Output<'_>| Cut::new(x.count, o.weights.groups());
    let total: usize = outputs.iter().flatten().map(|o| cut(o).count).sum();
    let run = |mut i: usize| {
        for output in outputs.iter().flatten() {
            let cut = cut(output);
            if i < cut.count {
                return run_strip(level, x, output, cut.strip(i, x.count, output.weights.groups()));
            }
            i -= cut.count;
        }
    };
    if work <= SERIAL {
        (0..total).for_each(run);
    } else {
        team::for_each(total, run);
    }
}

/// Everything that `strip` covers.
fn run_strip(level: Level, x: Rows<'_>, output: &Output<'_>, strip: Strip) {
    // Codes of two per byte that the kernel does not read itself are spread out chunk by chunk.
    match output.weights.nibble_zero.filter(|_| x.count > FEW_ROWS || !level.reads_nibbles()) {
        Some(zero) => spread_strip(level, x, output, strip, zero),
        None => walk_strip(level, x, output, strip, None, &mut []),
    }
}

/// Its buffer would fill most of L1, so strips that need none have no part in it.
#[inline(never)]
fn spread_strip(level: Level, x: Rows<'_>, output: &Output<'_>, strip: Strip, zero: u8) {
    walk_strip(level, x, output, strip, Some(zero), &mut [0; CHUNK * GROUP * STRIP_GROUPS]);
}

fn walk_strip(level: Level, x: Rows<'_>, output: &Output<'_>, strip: Strip, spread: Option<u8>, buffer: &mut [u8]) {
    let w = &output.weights;
    let (tile_rows, tile_groups) = level.tile();
    let streaming = x.count <= FEW_ROWS;
    let chunk_blocks = if streaming && spread.is_none() { w.blocks } else { (CHUNK / w.block_len).max(1) };
    let tile_groups = if streaming { 1 } else { tile_groups };
    let group_bytes = w.blocks * w.block_bytes();
    let mut first = strip.group;
    while first < strip.group + strip.num_groups {
        let num_groups = tile_groups.min(strip.group + strip.num_groups - first);
        for block in (0..w.blocks).step_by(chunk_blocks) {
            let blocks = chunk_blocks.min(w.blocks - block);
            let start = first * group_bytes + block * w.block_bytes();
            let (codes, codes_stride) = match spread {
                Some(zero) => {
                    let bytes = blocks * w.block_bytes();
                    for g in 0..num_groups {
                        let packed = &w.codes[start + g * group_bytes..][..bytes];
                        spread_nibbles(packed, 128 - zero, &mut buffer[g * 2 * bytes..][..2 * bytes]);
                    }
                    (&*buffer, 2 * bytes)
                }
                None => (&w.codes[start..], group_bytes),
            };
            let scale = (first * w.blocks + block) * GROUP;
            for row in (strip.row..strip.row + strip.num_rows).step_by(tile_rows) {
                let tile = Tile {
                    num_rows: tile_rows.min(strip.row + strip.num_rows - row),
                    num_groups,
                    blocks,
                    steps: w.block_len / 4,
                    codes,
                    codes_stride,
                    scales: &w.scales[scale..],
                    minima: w.minima.map(|m| &m[scale..]),
                    scales_stride: w.blocks * GROUP,
                    x: &x.codes[(row * x.blocks + block) * x.block_len..],
                    x_stride: x.blocks * x.block_len,
                    x_scales: &x.scales[row * x.blocks + block..],
                    x_offsets: &x.offsets[row * x.blocks + block..],
                    x_sums: &x.sums[row * x.blocks + block..],
                    x_blocks: x.blocks,
                    unit: w.unit,
                    y: output.y,
                    y_start: row * w.columns + first * GROUP,
                    y_stride: w.columns,
                    width: (num_groups * GROUP).min(w.columns - first * GROUP),
                    accumulate: output.accumulate || block > 0,
                };
                run_tile(level, &tile, w.nibble_zero.filter(|_| spread.is_none()));
            }
        }
        first += num_groups;
    }
}

/// `nibble_zero`: the codes are two per byte, with this zero.
#[allow(unsafe_code)]
fn run_tile(level: Level, tile: &Tile<'_>, nibble_zero: Option<u8>) {
    match level {
        // SAFETY: strips, and tiles inside a strip, cover different elements of the output.
        Level::Portable => unsafe { portable(tile) },
        // SAFETY: as above; levels other than `Portable` come from `Level::available`, which saw their features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { int8_avx2::tile(tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => unsafe { int8_avx2::tile_vnni(tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { int8_avx512::tile(tile, nibble_zero) },
    }
    debug_assert!(nibble_zero.is_none() || level.reads_nibbles());
}

multiversion! {
    /// Two codes per byte to one: of each 64 bytes the low halves, then the high halves, plus `bias`.
    fn spread_nibbles(packed: &[u8], bias: u8, out: &mut [u8]) {
        for (packed, out) in packed.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<128>().0) {
            for i in 0..64 {
                out[i] = (packed[i] & 15) + bias;
                out[64 + i] = (packed[i] >> 4) + bias;
            }
        }
    }
}

/// The kernel for CPUs without one of their own. Rounds products and sums separately, so that its sums may differ from
/// those of fused kernels in the last bits; the integers in them are the same.
///
/// # Safety
/// No other thread touches the tile's elements of the destination.
#[allow(unsafe_code)]
unsafe fn portable(t: &Tile<'_>) {
    t.check(1);
    for r in 0..t.num_rows {
        // SAFETY: the caller's promise.
        let row = unsafe { t.y_row(r) };
        for (g, y) in row.chunks_mut(GROUP).enumerate() {
            let mut sum = [0.0f32; GROUP];
            if t.accumulate {
                sum.iter_mut().zip(&*y).for_each(|(s, y)| *s = y / t.unit);
            }
            for b in 0..t.blocks {
                let x = &t.x[r * t.x_stride + b * t.steps * 4..][..t.steps * 4];
                let codes = &t.codes[g * t.codes_stride + b * t.steps * 64..][..t.steps * 64];
                let acc = portable_block(x, codes);
                let at = g * t.scales_stride + b * GROUP;
                let x_scale = t.x_scales[r * t.x_blocks + b];
                for (i, s) in sum.iter_mut().enumerate() {
                    *s += acc[i] as f32 * (t.scales[at + i].to_f32() * x_scale);
                }
                if let Some(minima) = t.minima {
                    let x_sum = t.x_sums[r * t.x_blocks + b];
                    for (i, s) in sum.iter_mut().enumerate() {
                        *s += minima[at + i].to_f32() * x_sum;
                    }
                }
            }
            y.iter_mut().zip(&sum).for_each(|(y, s)| *y = s * t.unit);
        }
    }
}

/// Σ (code − 128) · x for 16 columns of one block.
fn portable_block(x: &[i8], codes: &[u8]) -> [i32; GROUP] {
    let mut acc = [0i32; GROUP];
    for (x, codes) in x.as_chunks::<4>().0.iter().zip(codes.as_chunks::<64>().0) {
        for i in 0..GROUP {
            for j in 0..4 {
                acc[i] += i32::from(i16::from(codes[4 * i + j]) - 128) * i32::from(x[j]);
            }
        }
    }
    acc
}
