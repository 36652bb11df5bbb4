//! Weights as small integers with a scale for each block, laid out for integer dot products, and activations quantised
//! to multiply them.
//!
//! An element of row n is w = d · c + m, where c is a signed code of 8 bits (or 4), and d and m (optional) belong to a
//! block of [`PackedInt::block_len`] consecutive elements of the row. Activations are x ≈ s · a with codes a in
//! −127..=127 and a scale s = max |x| / 127 of their own for each token and block, so that an outlier spoils its block
//! only. Then
//!
//! y[t, n] = Σ_b d[n, b] · s[t, b] · Σ_k c[n, k] · a[t, k] + m[n, b] · s[t, b] · Σ_k a[t, k]
//!
//! with exact integer sums inside a block and f32 across blocks. Nothing but the rounding of activations (and of
//! weights that were not integers before) separates this from the f32 product.
//!
//! Layout: rows in groups of 16; a group is a sequence of lines of 64 bytes, four consecutive elements of each of its
//! 16 rows, so that one 512-bit register of weights meets four broadcast activations. Codes are stored as c + 128, or
//! two per byte: the low halves of a line are the line before, the high halves the line after.

use crate::cpu::int8::{Output, Rows, Weights, products};
use crate::cpu::int8_rows::quantize_row;
use crate::cpu::int8_tile::{GROUP, Level, QuantizedRow};
use crate::cpu::rows_per_task;
use crate::cpu::view::Shared;
use crate::{contract::Store, quant::BlockType, tensor::Tensor};
use bytemuck::{Pod, Zeroable};
use half::f16;
use rayon::prelude::*;

/// Elements of a block in the GGUF formats.
pub const GGUF_BLOCK: usize = 32;

/// A cache line of codes, so that no register load crosses two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// How codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codes {
    /// One per byte, c + 128.
    Bytes,
    /// Two per byte, c + `zero`.
    Nibbles { zero: u8 },
}

/// A weight matrix [out, in] of block-wise scaled integers. See the module's comment.
#[derive(Clone)]
pub struct PackedInt {
    rows: usize,
    cols: usize,
    block_len: usize,
    blocks: usize,
    kind: Codes,
    /// Power of two that all scales are multiplied with: f16 has few exponents.
    unit: f32,
    codes: Vec<Line>,
    /// [groups, blocks, 16].
    scales: Vec<f16>,
    /// [groups, blocks, 16].
    minima: Option<Vec<f16>>,
}

/// Activations [T, in], quantised for products with [`PackedInt`] weights of the same block length. Buffers are reused.
#[derive(Debug, Default)]
pub struct Int8Rows {
    count: usize,
    cols: usize,
    blocks: usize,
    block_len: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    offsets: Vec<i32>,
    sums: Vec<f32>,
}

impl Int8Rows {
    /// Quantises `x` [T, in] in blocks of `block_len` elements; the last block of a row may be shorter.
    ///
    /// Infinities and NaN become the scale of their block, and so reach every product.
    ///
    /// # Panics
    /// When `block_len` is not a multiple of 32.
    pub fn quantize(&mut self, x: &Tensor, block_len: usize) {
        self.quantize_rows(x.data(), x.cols(), block_len);
    }

    /// As [`Int8Rows::quantize`] for rows of `cols` elements that lie one after the other.
    pub fn quantize_rows(&mut self, x: &[f32], cols: usize, block_len: usize) {
        self.quantize_at(Level::best(), x, cols, block_len);
    }

    fn quantize_at(&mut self, level: Level, x: &[f32], cols: usize, block_len: usize) {
        assert!(block_len > 0 && block_len.is_multiple_of(32), "blocks of {block_len} elements");
        let count = x.len() / cols.max(1);
        let blocks = cols.div_ceil(block_len);
        self.resize(count, cols, block_len);
        if count == 0 || cols == 0 {
            return;
        }
        let (rows, padded) = (rows_per_task(cols), blocks * block_len);
        (
            x.par_chunks(rows * cols),
            self.codes.par_chunks_mut(rows * padded),
            self.scales.par_chunks_mut(rows * blocks),
            self.offsets.par_chunks_mut(rows * blocks),
            self.sums.par_chunks_mut(rows * blocks),
        )
            .into_par_iter()
            .for_each(|(x, codes, scales, offsets, sums)| {
                for (r, x) in x.chunks_exact(cols).enumerate() {
                    let part = r * blocks..(r + 1) * blocks;
                    let row = QuantizedRow {
                        codes: &mut codes[r * padded..(r + 1) * padded],
                        scales: &mut scales[part.clone()],
                        offsets: &mut offsets[part.clone()],
                        sums: &mut sums[part],
                    };
                    quantize_row(level, x, block_len, row);
                }
            });
    }

    /// Number of rows, T.
    pub fn rows(&self) -> usize {
        self.count
    }

    /// Number of elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values that the codes stand for: `out` [T, in].
    pub fn dequantize(&self, out: &mut Tensor) {
        out.resize(&[self.count, self.cols]);
        let padded = self.blocks * self.block_len;
        for t in 0..self.count {
            for (k, x) in out.row_mut(t).iter_mut().enumerate() {
                let scale = self.scales[t * self.blocks + k / self.block_len];
                *x = scale * f32::from(self.codes[t * padded + k]);
            }
        }
    }

    fn resize(&mut self, count: usize, cols: usize, block_len: usize) {
        let blocks = cols.div_ceil(block_len);
        (self.count, self.cols, self.blocks, self.block_len) = (count, cols, blocks, block_len);
        self.codes.resize(count * blocks * block_len, 0);
        self.scales.resize(count * blocks, 0.0);
        self.offsets.resize(count * blocks, 0);
        self.sums.resize(count * blocks, 0.0);
    }

    fn view(&self) -> Rows<'_> {
        Rows {
            count: self.count,
            blocks: self.blocks,
            block_len: self.block_len,
            codes: &self.codes,
            scales: &self.scales,
            offsets: &self.offsets,
            sums: &self.sums,
        }
    }
}

/// One product of several that share their activations: [`multiply`].
#[derive(Debug)]
pub struct Product<'a> {
    /// The weights [out, in].
    pub weights: &'a PackedInt,
    /// The destination [T, out].
    pub y: &'a mut [f32],
    /// Whether the product is added to what is there.
    pub store: Store,
}

/// y [T, out] = or += `x` [T, in] · weightsᵀ for each of `outputs`, all in one parallel pass.
///
/// A result depends neither on the number of threads nor on how many rows or outputs go together.
///
/// # Panics
/// When shapes or block lengths do not fit together.
pub fn multiply(x: &Int8Rows, outputs: &mut [Product<'_>]) {
    multiply_at(Level::best(), x, outputs);
}

fn multiply_at(level: Level, x: &Int8Rows, outputs: &mut [Product<'_>]) {
    let mut borrowed = [const { None }; 4];
    assert!(outputs.len() <= borrowed.len(), "{} products at once", outputs.len());
    for (slot, output) in borrowed.iter_mut().zip(&mut *outputs) {
        let Product { weights, y, store } = output;
        assert_eq!(weights.cols, x.cols, "x [{}, {}] against {weights:?}", x.count, x.cols);
        assert_eq!(y.len(), x.count * weights.rows, "{} rows of {weights:?}", x.count);
        let accumulate = *store == Store::Accumulate;
        *slot = Some(Output { weights: weights.view(), y: Shared::new(y), accumulate });
    }
    products(level, x.view(), &borrowed);
}

impl PackedInt {
    /// Quantises the `rows` rows of `cols` weights that `row` writes (given a row's number and where it goes), to 8
    /// bits with blocks of `block_len` elements: d = max |w| / 127.
    ///
    /// # Panics
    /// When `block_len` is not a multiple of 32.
    pub fn quantize(rows: usize, cols: usize, block_len: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self::quantize_groups(rows, cols, block_len, |first, group| {
            for (i, line) in group.chunks_exact_mut(cols).enumerate() {
                row(first + i, line);
            }
        })
    }

    /// Quantises `w` [rows, cols].
    pub fn from_tensor(w: &Tensor, block_len: usize) -> Self {
        Self::quantize(w.rows(), w.cols(), block_len, |i, row| row.copy_from_slice(w.row(i)))
    }

    /// Quantises the transpose of `w` [cols, rows], for the product d_y · w: blocks then lie along w's rows.
    pub fn from_transposed(w: &Tensor, block_len: usize) -> Self {
        let (rows, cols) = (w.cols(), w.rows());
        Self::quantize_groups(rows, cols, block_len, |first, group| {
            let count = group.len() / cols;
            for k in 0..cols {
                for (i, x) in w.row(k)[first..first + count].iter().enumerate() {
                    group[i * cols + k] = *x;
                }
            }
        })
    }

    /// `fill` writes up to 16 rows, from the given one on.
    fn quantize_groups(rows: usize, cols: usize, block_len: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut packed = Self::empty(rows, cols, block_len, Codes::Bytes, false);
        if rows == 0 || cols == 0 {
            return packed;
        }
        let (blocks, group_lines) = (packed.blocks, packed.group_lines());
        let groups = rows.div_ceil(GROUP);
        let largest = |first: usize, buffer: &mut Vec<f32>| {
            buffer.resize(GROUP.min(rows - first) * cols, 0.0);
            fill(first, buffer);
            buffer.iter().fold(0.0f32, |m, x| m.max(x.abs()))
        };
        let largest = (0..groups)
            .into_par_iter()
            .map_init(Vec::new, |buffer, g| largest(g * GROUP, buffer))
            .reduce(|| 0.0, f32::max);
        packed.unit = unit_for(largest / 127.0);
        let unit = packed.unit;
        (packed.codes.par_chunks_mut(group_lines), packed.scales.par_chunks_mut(blocks * GROUP))
            .into_par_iter()
            .enumerate()
            .for_each_init(Vec::new, |buffer, (g, (lines, scales))| {
                let first = g * GROUP;
                let count = GROUP.min(rows - first);
                buffer.resize(count * cols, 0.0);
                fill(first, buffer);
                let codes = bytemuck::cast_slice_mut::<Line, u8>(lines);
                for (lane, row) in buffer.chunks_exact(cols).enumerate() {
                    for (b, block) in row.chunks(block_len).enumerate() {
                        let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let d = f16::from_f32(largest / 127.0 / unit);
                        scales[b * GROUP + lane] = d;
                        let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / (d.to_f32() * unit) };
                        for (k, w) in block.iter().enumerate() {
                            let code = (w * inverse).round_ties_even().clamp(-127.0, 127.0);
                            Codes::Bytes.put(codes, b * block_len + k, lane, (code + 128.0) as u8);
                        }
                    }
                }
            });
        packed
    }

    /// Whether [`PackedInt::from_gguf`] takes blocks of `kind`.
    pub fn holds(kind: BlockType) -> bool {
        matches!(kind, BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0)
    }

    /// Repacks blocks of `kind` without changing a value: row i consists of the blocks that `row(i)` returns, so that
    /// rows may come in another order than in the file. Five-bit codes take a byte.
    ///
    /// # Panics
    /// When the kind is not one that [`PackedInt::holds`], `cols` is not a multiple of 32, or a row has the wrong
    /// length.
    pub fn from_gguf<'a>(kind: BlockType, rows: usize, cols: usize, row: impl Fn(usize) -> &'a [u8] + Sync) -> Self {
        assert!(Self::holds(kind) && cols.is_multiple_of(GGUF_BLOCK), "{} of {cols} columns", kind.name());
        let codes_kind = match kind {
            BlockType::Q4_0 => Codes::Nibbles { zero: 8 },
            BlockType::Q4_1 => Codes::Nibbles { zero: 0 },
            _ => Codes::Bytes,
        };
        let minima = matches!(kind, BlockType::Q4_1 | BlockType::Q5_1);
        let mut packed = Self::empty(rows, cols, GGUF_BLOCK, codes_kind, minima);
        if rows == 0 || cols == 0 {
            return packed;
        }
        let (blocks, group_lines) = (packed.blocks, packed.group_lines());
        // Without minima an empty piece for each group stands in.
        let mut none = vec![[]; rows.div_ceil(GROUP)];
        let minima: Vec<&mut [f16]> = match &mut packed.minima {
            Some(minima) => minima.chunks_mut(blocks * GROUP).collect(),
            None => none.iter_mut().map(|n: &mut [f16; 0]| &mut n[..]).collect(),
        };
        (packed.codes.par_chunks_mut(group_lines), packed.scales.par_chunks_mut(blocks * GROUP), minima)
            .into_par_iter()
            .enumerate()
            .for_each(|(g, (lines, scales, minima))| {
                let codes = bytemuck::cast_slice_mut::<Line, u8>(lines);
                for lane in 0..GROUP.min(rows - g * GROUP) {
                    let bytes = row(g * GROUP + lane);
                    assert_eq!(Some(bytes.len()), kind.bytes_for(cols), "row {} of {}", g * GROUP + lane, kind.name());
                    for (b, block) in bytes.chunks_exact(kind.block_bytes()).enumerate() {
                        let (d, m, values) = kind.codes(block);
                        scales[b * GROUP + lane] = d;
                        if let Some(slot) = minima.get_mut(b * GROUP + lane) {
                            *slot = m;
                        }
                        codes_kind.put_block(codes, b, lane, &values);
                    }
                }
            });
        packed
    }

    fn empty(rows: usize, cols: usize, block_len: usize, kind: Codes, minima: bool) -> Self {
        assert!(block_len > 0 && block_len.is_multiple_of(32) && block_len <= 512, "blocks of {block_len} elements");
        let blocks = cols.div_ceil(block_len);
        let groups = rows.div_ceil(GROUP);
        // A code of zero: rows and elements that fill up the last group and block add nothing.
        let line = match kind {
            Codes::Bytes => Line([128; 64]),
            Codes::Nibbles { zero } => Line([zero << 4 | zero; 64]),
        };
        let mut packed = Self {
            rows,
            cols,
            block_len,
            blocks,
            kind,
            unit: 1.0,
            codes: Vec::new(),
            scales: Vec::new(),
            minima: None,
        };
        packed.codes = vec![line; groups * packed.group_lines()];
        packed.scales = vec![f16::ZERO; groups * blocks * GROUP];
        packed.minima = minima.then(|| vec![f16::ZERO; groups * blocks * GROUP]);
        packed
    }

    /// Lines of codes of one group.
    fn group_lines(&self) -> usize {
        let lines = self.blocks * self.block_len / 4;
        if self.kind == Codes::Bytes { lines } else { lines / 2 }
    }

    /// Number of rows (out).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row (in).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements that share a scale; activations must be quantised in blocks of the same length.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        let halves = self.scales.len() + self.minima.as_ref().map_or(0, Vec::len);
        size_of_val(self.codes.as_slice()) + 2 * halves
    }

    /// `y` [T, out] = or += `x` [T, in] · selfᵀ; `x` is quantised into `buffer`.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn forward(&self, x: &Tensor, buffer: &mut Int8Rows, y: &mut Tensor, store: Store) {
        match store {
            Store::Overwrite => y.resize(&[x.rows(), self.rows]),
            Store::Accumulate => assert!(y.rows() == x.rows() && y.cols() == self.rows, "{y:?} += {x:?} {self:?}"),
        }
        buffer.quantize(x, self.block_len);
        multiply(buffer, &mut [Product { weights: self, y: y.data_mut(), store }]);
    }

    /// The exact values of `rows`, in f32: `out` [rows.len(), in].
    ///
    /// # Panics
    /// When `rows` reaches past the last one or `out` has another length.
    pub fn dequantize_rows(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.rows && out.len() == rows.len() * self.cols, "rows {rows:?} of {self:?}");
        if self.cols == 0 {
            return;
        }
        let group_lines = self.group_lines();
        rows.into_par_iter().zip(out.par_chunks_mut(self.cols)).for_each(|(row, out)| {
            let (group, lane) = (row / GROUP, row % GROUP);
            let codes = bytemuck::cast_slice::<Line, u8>(&self.codes[group * group_lines..(group + 1) * group_lines]);
            for (b, out) in out.chunks_mut(self.block_len).enumerate() {
                let at = (group * self.blocks + b) * GROUP + lane;
                let d = self.scales[at].to_f32() * self.unit;
                let m = self.minima.as_ref().map(|m| m[at].to_f32());
                for (k, w) in out.iter_mut().enumerate() {
                    let product = d * f32::from(self.kind.get(codes, b * self.block_len + k, lane));
                    *w = m.map_or(product, |m| product + m);
                }
            }
        });
    }

    pub(crate) fn view(&self) -> Weights<'_> {
        Weights {
            columns: self.rows,
            blocks: self.blocks,
            block_len: self.block_len,
            codes: bytemuck::cast_slice(&self.codes),
            nibble_zero: if let Codes::Nibbles { zero } = self.kind { Some(zero) } else { None },
            scales: &self.scales,
            minima: self.minima.as_deref(),
            unit: self.unit,
        }
    }
}

impl std::fmt::Debug for PackedInt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedInt[{}, {}] in {:?} of {}", self.rows, self.cols, self.kind, self.block_len)
    }
}

impl Codes {
    /// Stores a code (with its offset) as element `k` of row `lane` of a group.
    fn put(self, group: &mut [u8], k: usize, lane: usize, code: u8) {
        let (line, byte) = (k / 4, lane * 4 + k % 4);
        match self {
            Self::Bytes => group[line * 64 + byte] = code,
            Self::Nibbles { .. } => {
                let pair = &mut group[line / 2 * 64 + byte];
                *pair = if line % 2 == 0 { *pair & 0xf0 | code } else { *pair & 0x0f | code << 4 };
            }
        }
    }

    /// Stores the signed codes of block `b` of 32 elements of row `lane`, as [`Codes::put`] would one by one.
    fn put_block(self, group: &mut [u8], b: usize, lane: usize, values: &[i8; GGUF_BLOCK]) {
        let quads = values.as_chunks::<4>().0;
        match self {
            Self::Bytes => {
                let lines = group[b * GGUF_BLOCK * GROUP..].as_chunks_mut::<64>().0;
                for (line, quad) in lines.iter_mut().zip(quads) {
                    line.as_chunks_mut::<4>().0[lane] = quad.map(|code| (code as u8).wrapping_add(128));
                }
            }
            Self::Nibbles { zero } => {
                let lines = group[b * GGUF_BLOCK / 2 * GROUP..].as_chunks_mut::<64>().0;
                for (line, quads) in lines.iter_mut().zip(quads.as_chunks::<2>().0) {
                    let pair =
                        |i: usize| (quads[0][i] as u8).wrapping_add(zero) | (quads[1][i] as u8).wrapping_add(zero) << 4;
                    line.as_chunks_mut::<4>().0[lane] = std::array::from_fn(pair);
                }
            }
        }
    }

    /// The signed code that [`Codes::put`] stored.
    fn get(self, group: &[u8], k: usize, lane: usize) -> i16 {
        let (line, byte) = (k / 4, lane * 4 + k % 4);
        match self {
            Self::Bytes => i16::from(group[line * 64 + byte]) - 128,
            Self::Nibbles { zero } => {
                let pair = group[line / 2 * 64 + byte];
                i16::from(if line % 2 == 0 { pair & 15 } else { pair >> 4 }) - i16::from(zero)
            }
        }
    }
}

/// The power of two that brings scales up to `largest` near the top of what f16 holds, so that scales 2²⁸ times smaller
/// still have all its digits.
fn unit_for(largest: f32) -> f32 {
    if !(largest > 0.0 && largest.is_finite()) {
        return 1.0;
    }
    2.0f32.powi((largest.log2().floor() as i32 - 14).clamp(-126, 126))
}

#[cfg(test)]
#[path = "packed_int_tests.rs"]
mod tests;
