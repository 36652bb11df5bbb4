//! Keys and values of one sequence in host memory, as f32 or f16; read by `ops/attention_decode.rs`.

use crate::{contract::Heads, tensor::Tensor};
use bytemuck::{Pod, Zeroable};
use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use std::marker::PhantomData;

/// Keys that stand side by side, element by element: the lanes of a 512-bit vector of f32.
pub(crate) const TILE: usize = 16;

/// Keys of which one task makes a partial result.
pub(crate) const RUN: usize = 256;

/// A number as a cache keeps it.
pub trait Element: Pod + Send + Sync {
    /// `x` as such numbers: calls `put` with pieces of them, in order, and where each begins.
    fn narrow(x: &[f32], put: impl FnMut(usize, &[Self]));

    /// `to[i]` = `from[i]`, exactly.
    fn widen(from: &[Self], to: &mut [f32]);

    /// This number, exactly.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    fn narrow(x: &[f32], mut put: impl FnMut(usize, &[f32])) {
        put(0, x);
    }

    fn widen(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

/// Elements that are converted at a time: the conversion is several times faster over a slice than one by one.
const CONVERT: usize = 64;

/// Numbers beyond ±65504 become ±65504.
impl Element for f16 {
    fn narrow(x: &[f32], mut put: impl FnMut(usize, &[f16])) {
        let (mut clamped, mut halves) = ([0.0; CONVERT], [f16::ZERO; CONVERT]);
        for (i, x) in x.chunks(CONVERT).enumerate() {
            for (to, x) in clamped.iter_mut().zip(x) {
                *to = x.clamp(-65504.0, 65504.0);
            }
            halves.convert_from_f32_slice(&clamped);
            put(i * CONVERT, &halves[..x.len()]);
        }
    }

    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        widen(self)
    }
}

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Keys and values of one layer for the tokens of one sequence, as numbers of type `E`. Memory grows with the tokens,
/// [`RUN`] at a time.
#[derive(Clone, Debug)]
pub struct KeyValues<E> {
    pub(crate) heads: Heads,
    pub(crate) per_head: Vec<HeadCache>,
    elements: PhantomData<E>,
}

/// The cache of one key/value head.
#[derive(Clone, Default)]
pub(crate) struct HeadCache {
    /// Keys: tiles of [`TILE`] tokens, each [D, TILE].
    k: Vec<Line>,
    /// Values: [tokens, D].
    v: Vec<Line>,
}

impl std::fmt::Debug for HeadCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeadCache({} bytes)", (self.k.len() + self.v.len()) * size_of::<Line>())
    }
}

impl HeadCache {
    pub(crate) fn k<E: Element>(&self) -> &[E] {
        bytemuck::cast_slice(&self.k)
    }

    pub(crate) fn v<E: Element>(&self) -> &[E] {
        bytemuck::cast_slice(&self.v)
    }
}

impl<E: Element> KeyValues<E> {
    /// An empty cache.
    pub fn new(heads: Heads) -> Self {
        Self { heads, per_head: vec![HeadCache::default(); heads.num_kv_heads], elements: PhantomData }
    }

    /// Writes `k` and `v` [T, K·D] as tokens `at..at + T`; what was there or after it is forgotten.
    ///
    /// # Panics
    /// When the tokens before `at` were never written.
    pub fn write(&mut self, at: usize, k: &Tensor, v: &Tensor) {
        let (num_tokens, d) = (k.rows(), self.heads.head_dim);
        assert!(k.shape() == v.shape() && k.cols() == self.heads.kv_cols(), "k {:?}, v {:?}", k.shape(), v.shape());
        assert!(at <= self.room(), "token {at} after {} that are there", self.room());
        let lines = ((at + num_tokens).next_multiple_of(RUN) * d * size_of::<E>()).div_ceil(size_of::<Line>());
        let write_head = |(head, cache): (usize, &mut HeadCache)| {
            for buffer in [&mut cache.k, &mut cache.v] {
                if lines > buffer.len() {
                    buffer.reserve_exact(lines - buffer.len());
                    buffer.resize(lines, Line::zeroed());
                }
            }
            let keys: &mut [E] = bytemuck::cast_slice_mut(&mut cache.k);
            let values: &mut [E] = bytemuck::cast_slice_mut(&mut cache.v);
            for t in 0..num_tokens {
                let token = at + t;
                let columns = head * d..(head + 1) * d;
                let (tile, lane) = (&mut keys[token / TILE * TILE * d..][..TILE * d], token % TILE);
                E::narrow(&k.row(t)[columns.clone()], |first, part| {
                    for (i, x) in part.iter().enumerate() {
                        tile[(first + i) * TILE + lane] = *x;
                    }
                });
                let row = &mut values[token * d..(token + 1) * d];
                E::narrow(&v.row(t)[columns], |first, part| row[first..first + part.len()].copy_from_slice(part));
            }
        };
        if num_tokens < TILE {
            self.per_head.iter_mut().enumerate().for_each(write_head);
        } else {
            self.per_head.par_iter_mut().enumerate().for_each(write_head);
        }
    }

    /// The first `num_tokens` keys and values as rows of `k` and `v` [at least `num_tokens`, K·D]; further rows stay.
    ///
    /// # Panics
    /// When there are not as many tokens or rows.
    pub fn read(&self, num_tokens: usize, k: &mut Tensor, v: &mut Tensor) {
        let (cols, d) = (self.heads.kv_cols(), self.heads.head_dim);
        assert!(num_tokens <= self.room() && k.rows().min(v.rows()) >= num_tokens, "{num_tokens} tokens");
        assert!(k.cols() == cols && v.cols() == cols);
        let (k, v) = (&mut k.data_mut()[..num_tokens * cols], &mut v.data_mut()[..num_tokens * cols]);
        let tiles = k.par_chunks_mut(TILE * cols).zip(v.par_chunks_mut(TILE * cols));
        tiles.enumerate().for_each(|(tile, (k, v))| {
            let num_rows = k.len() / cols;
            for (head, cache) in self.per_head.iter().enumerate() {
                let mut line = [0.0; TILE];
                for (i, lanes) in cache.k::<E>()[tile * TILE * d..][..TILE * d].chunks_exact(TILE).enumerate() {
                    E::widen(lanes, &mut line);
                    for (t, x) in line[..num_rows].iter().enumerate() {
                        k[t * cols + head * d + i] = *x;
                    }
                }
                let values = cache.v::<E>()[tile * TILE * d..].chunks_exact(d);
                for (row, value) in v.chunks_exact_mut(cols).zip(values) {
                    E::widen(value, &mut row[head * d..(head + 1) * d]);
                }
            }
        });
    }

    /// Tokens that fit into the memory held now.
    pub(crate) fn room(&self) -> usize {
        self.per_head.first().map_or(0, |cache| cache.k::<E>().len() / self.heads.head_dim)
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.per_head.iter().map(|cache| (cache.k.capacity() + cache.v.capacity()) * size_of::<Line>()).sum()
    }
}

/// f16 → f32 for finite numbers, in integer and float operations that vectorise on every target: the exponent moves by
/// 112, which multiplication does right for subnormal numbers too.
#[inline(always)]
fn widen(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            if x.is_finite() {
                assert_eq!(widen(x).to_bits(), x.to_f32().to_bits(), "{bits:x}");
            }
        }
    }
}
