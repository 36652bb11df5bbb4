//! The KV cache: keys and values of all layers in pages of [`PAGE`] tokens. Which pages belong to a sequence, in which order, is
//! its block table, which whoever hands out pages keeps ("PagedAttention", Kwon et al., 2023).

use crate::contract::{Heads, PAGE};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};
use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use std::marker::PhantomData;

/// Keys of which one task makes a partial result.
pub(crate) const RUN: usize = 256;

/// Pages that a CPU allocates at a time.
const SLAB: usize = 16;

/// A number as a cache of the CPU keeps it.
pub(crate) trait Element: Pod + Send + Sync {
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

/// The pages of one layer in host memory: for each key/value head slabs of [`SLAB`] pages, first the keys of each, [D, PAGE], then
/// the values, [PAGE, D], so that consecutive pages lie as one sequence would without pages. Slabs are allocated as they are written.
pub(crate) struct HostPages<E> {
    slabs: Vec<Vec<Vec<Line>>>,
    elements: PhantomData<E>,
}

impl<E: Element> HostPages<E> {
    /// Keys [D, PAGE] and values [PAGE, D] of a head in `page`.
    ///
    /// # Panics
    /// When the page was never written.
    pub(crate) fn page(&self, page: u32, head: usize, heads: Heads) -> (&[E], &[E]) {
        let (slab, page, len) = (page as usize / SLAB, page as usize % SLAB, PAGE * heads.head_dim);
        let elements: &[E] = bytemuck::cast_slice(&self.slabs[head][slab]);
        (&elements[page * len..(page + 1) * len], &elements[(SLAB + page) * len..(SLAB + page + 1) * len])
    }

    /// Writes `k` and `v` [T, K·D] as the tokens from `first` on of a sequence with these `pages`.
    fn write(&mut self, heads: Heads, first: usize, pages: &[u32], k: &[f32], v: &[f32]) {
        let (cols, d) = (heads.kv_cols(), heads.head_dim);
        let (num_tokens, len) = (k.len() / cols, PAGE * d);
        let write_head = |(head, slabs): (usize, &mut Vec<Vec<Line>>)| {
            for i in 0..num_tokens {
                let (page, lane) = (pages[(first + i) / PAGE] as usize, (first + i) % PAGE);
                let (slab, page) = (page / SLAB, page % SLAB);
                if slabs.len() <= slab {
                    slabs.resize_with(slab + 1, Vec::new);
                }
                if slabs[slab].is_empty() {
                    slabs[slab] = bytemuck::zeroed_vec((2 * SLAB * len * size_of::<E>()).div_ceil(size_of::<Line>()));
                }
                let elements: &mut [E] = bytemuck::cast_slice_mut(&mut slabs[slab]);
                let columns = i * cols + head * d..i * cols + (head + 1) * d;
                let keys = &mut elements[page * len..(page + 1) * len];
                E::narrow(&k[columns.clone()], |at, part| {
                    part.iter().enumerate().for_each(|(i, x)| keys[(at + i) * PAGE + lane] = *x);
                });
                let value = &mut elements[(SLAB + page) * len + lane * d..][..d];
                E::narrow(&v[columns], |at, part| value[at..at + part.len()].copy_from_slice(part));
            }
        };
        if num_tokens < PAGE {
            self.slabs.iter_mut().enumerate().for_each(write_head);
        } else {
            self.slabs.par_iter_mut().enumerate().for_each(write_head);
        }
    }

    /// The first tokens of a sequence with these `pages` as rows of `k` and `v` [tokens, K·D].
    pub(crate) fn read(&self, heads: Heads, pages: &[u32], k: &mut [f32], v: &mut [f32]) {
        let (cols, d) = (heads.kv_cols(), heads.head_dim);
        let rows = k.par_chunks_mut(PAGE * cols).zip(v.par_chunks_mut(PAGE * cols));
        rows.zip(pages).for_each(|((k, v), page)| {
            let num_rows = k.len() / cols;
            for head in 0..heads.num_kv_heads {
                let (keys, values) = self.page(*page, head, heads);
                let mut line = [0.0; PAGE];
                for (i, lanes) in keys.chunks_exact(PAGE).enumerate() {
                    E::widen(lanes, &mut line);
                    for (t, x) in line[..num_rows].iter().enumerate() {
                        k[t * cols + head * d + i] = *x;
                    }
                }
                for (row, value) in v.chunks_exact_mut(cols).zip(values.chunks_exact(d)) {
                    E::widen(value, &mut row[head * d..(head + 1) * d]);
                }
            }
        });
    }

    fn bytes(&self) -> usize {
        self.slabs.iter().flatten().map(|slab| slab.capacity() * size_of::<Line>()).sum()
    }
}

/// Keys and values of every layer, in the precision that the cache was made for.
pub(crate) enum Layers {
    F32(Vec<HostPages<f32>>),
    F16(Vec<HostPages<f16>>),
    /// Rows [num_pages · PAGE, K·D] of keys and of values on a GPU, in the type of its activations.
    Device(Vec<(Tensor, Tensor)>),
}

/// A cache of `num_pages` pages, on one device.
pub struct PagedCache {
    pub(crate) heads: Heads,
    pub(crate) layers: Layers,
    num_pages: usize,
}

impl std::fmt::Debug for PagedCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PagedCache({} pages, {} bytes)", self.num_pages, self.bytes())
    }
}

/// No page of each layer.
fn empty<E>(heads: Heads, num_layers: usize) -> Vec<HostPages<E>> {
    let layer = |_| HostPages { slabs: vec![Vec::new(); heads.num_kv_heads], elements: PhantomData };
    (0..num_layers).map(layer).collect()
}

impl PagedCache {
    /// A cache on `device`: on the CPU in f32, so that generation computes what a pass over the complete text computes, in memory that
    /// is allocated as pages are written; on a GPU in `dtype`, in memory that is allocated at once.
    pub fn new(device: &Device, dtype: Dtype, heads: Heads, num_layers: usize, num_pages: usize) -> Self {
        if *device == Device::Cpu {
            return Self { heads, layers: Layers::F32(empty(heads, num_layers)), num_pages };
        }
        let rows = || {
            let mut rows = Tensor::default();
            rows.resize_on(device, dtype, &[num_pages * PAGE, heads.kv_cols()]);
            rows
        };
        Self { heads, layers: Layers::Device((0..num_layers).map(|_| (rows(), rows())).collect()), num_pages }
    }

    /// A cache on the CPU in f16: half the memory and half the reading, in the precision of weights of 8 bits.
    pub fn f16(heads: Heads, num_layers: usize, num_pages: usize) -> Self {
        Self { heads, layers: Layers::F16(empty(heads, num_layers)), num_pages }
    }

    /// Number of pages.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Adds pages until there are `num_pages`; what is cached stays.
    pub fn grow(&mut self, num_pages: usize) {
        if num_pages <= self.num_pages {
            return;
        }
        if let Layers::Device(layers) = &mut self.layers {
            for rows in layers.iter_mut().flat_map(|(k, v)| [k, v]) {
                let mut larger = Tensor::default();
                larger.resize_like(rows, &[num_pages * PAGE, rows.cols()]);
                larger.copy_rows(0, rows, rows.rows());
                *rows = larger;
            }
        }
        self.num_pages = num_pages;
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        match &self.layers {
            Layers::F32(layers) => layers.iter().map(HostPages::bytes).sum(),
            Layers::F16(layers) => layers.iter().map(HostPages::bytes).sum(),
            Layers::Device(layers) => layers.iter().map(|(k, v)| k.capacity_bytes() + v.capacity_bytes()).sum(),
        }
    }

    /// Where keys and values are on a GPU.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let device = if let Layers::Device(layers) = &self.layers { &layers[..] } else { &[] };
        device.iter().flat_map(|(k, v)| [k.address(), v.address()])
    }

    /// Writes rows `k` and `v` of one sequence to host memory.
    pub(crate) fn write_host(&mut self, layer: usize, first: usize, pages: &[u32], k: &[f32], v: &[f32]) {
        match &mut self.layers {
            Layers::F32(layers) => layers[layer].write(self.heads, first, pages, k, v),
            Layers::F16(layers) => layers[layer].write(self.heads, first, pages, k, v),
            Layers::Device(_) => panic!("the cache is on a GPU"),
        }
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
