//! Attention of new tokens of several sequences over a paged KV cache (grouped heads, causal): o = softmax(q kᵀ / √D) v, where a
//! token sees what its sequence has cached and itself.
//!
//! A pass writes keys and values of its tokens to their slots and attends, layer by layer ([`Slots`]). Of few tokens, reading the
//! cache is what this costs, so keys and values may be kept in f16, and each is read once for all query heads that share it. A long
//! context is cut into runs of [`RUN`] keys that threads work on independently; their partial results are merged in order
//! ("Flash-Decoding for long-context inference", Dao et al., 2023), so the result does not depend on the number of threads, nor on
//! the other sequences. Many tokens of a prompt attend as in training, over keys and values that are gathered from their pages.

pub use crate::contract::{Chunk, PAGE};
use crate::contract::{Heads, Segment};
use crate::cpu::matmul::FEW_ROWS;
use crate::cpu::view::Shared;
use crate::cuda::attention_paged as gpu;
use crate::kv::{Element, HostPages, Layers, PagedCache, RUN};
use crate::ops::attention;
use crate::tensor::Tensor;
use crate::{cpu, team};

/// What the tokens of a pass read and write of a cache, with buffers that are kept from pass to pass. On a GPU its tables lie at one
/// address as long as they fit, so that a pass can be captured ([`crate::Recorded`]).
#[derive(Debug, Default)]
pub struct Slots {
    chunks: Vec<Chunk>,
    device: gpu::Tables,
    /// For each run of keys, key/value head, query row and head of the group: D sums, then maximum and total.
    partial: Vec<f32>,
    /// Keys and values of one sequence (on a GPU of all), gathered.
    k: Tensor,
    v: Tensor,
    lse: Tensor,
}

impl Slots {
    /// Sets the `chunks` of a pass, whose rows follow each other.
    ///
    /// # Panics
    /// When a sequence has fewer pages than its tokens need, or a page is not of `cache`.
    pub fn set(&mut self, cache: &PagedCache, chunks: Vec<Chunk>) {
        let mut next = 0;
        for chunk in &chunks {
            let fits = chunk.num_keys() <= chunk.pages.len() * PAGE;
            let known = chunk.pages.iter().all(|page| (*page as usize) < cache.num_pages());
            assert!(fits && known && chunk.rows.start == next, "{chunk:?} of {cache:?}");
            next = chunk.rows.end;
        }
        if let Layers::Device(layers) = &cache.layers {
            self.device.set(layers, &chunks, cache.heads);
        }
        self.chunks = chunks;
    }

    /// Whether the pass can be captured: there is a kernel that reads the pages of all its sequences.
    pub fn can_be_captured(&self) -> bool {
        self.device.reads_pages()
    }

    /// What the launches of a pass depend on: equal keys, equal launches.
    pub fn key(&self) -> impl Iterator<Item = u64> {
        self.device.key()
    }

    /// Writes `k` and `v` [T, K·D] of `layer` to the slots of the tokens.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn write(&self, cache: &mut PagedCache, layer: usize, k: &Tensor, v: &Tensor) {
        let cols = cache.heads.kv_cols();
        assert!(k.shape() == v.shape() && k.cols() == cols, "k {k:?}, v {v:?}");
        assert_eq!(k.rows(), self.chunks.last().map_or(0, |chunk| chunk.rows.end), "rows of k and tokens of the pass");
        if let Layers::Device(layers) = &mut cache.layers {
            return self.device.write(&layers[layer], k, v);
        }
        for Chunk { rows, past, pages } in &self.chunks {
            let new = rows.start * cols..rows.end * cols;
            cache.write_host(layer, *past, pages, &k.data()[new.clone()], &v.data()[new]);
        }
    }

    /// `o` [T, H·D] of `q` [T, H·D] over what is cached of `layer`, the tokens' own keys and values included. `new` are these as they
    /// were written, which chunks of more than a few rows need.
    ///
    /// # Panics
    /// When shapes do not fit, or `new` is missing.
    pub fn attend(
        &mut self,
        cache: &PagedCache,
        layer: usize,
        q: &Tensor,
        new: Option<(&Tensor, &Tensor)>,
        o: &mut Tensor,
    ) {
        assert_eq!(q.shape(), [self.chunks.last().map_or(0, |chunk| chunk.rows.end), cache.heads.q_cols()]);
        match &cache.layers {
            Layers::F32(layers) => self.attend_host(&layers[layer], cache.heads, q, new, o),
            Layers::F16(layers) => self.attend_host(&layers[layer], cache.heads, q, new, o),
            Layers::Device(layers) => self.attend_device(&layers[layer], cache.heads, q, new, o),
        }
    }

    fn attend_device(
        &mut self,
        (all_k, all_v): &(Tensor, Tensor),
        heads: Heads,
        q: &Tensor,
        new: Option<(&Tensor, &Tensor)>,
        o: &mut Tensor,
    ) {
        if self.device.reads_pages() {
            return self.device.attention(q, all_k, all_v, heads, o);
        }
        let segment = |keys: &mut usize, chunk: &Chunk| {
            let first = std::mem::replace(keys, *keys + chunk.num_keys());
            Some(Segment { queries: chunk.rows.clone(), keys: first..*keys })
        };
        let segments: Vec<Segment> = self.chunks.iter().scan(0, segment).collect();
        let (k, v) = match new.filter(|_| self.chunks.iter().all(|chunk| chunk.past == 0)) {
            Some(new) => new,
            None => {
                self.device.gather(all_k, &mut self.k);
                self.device.gather(all_v, &mut self.v);
                (&self.k, &self.v)
            }
        };
        attention::forward(q, k, v, &segments, heads, o, &mut self.lse);
    }

    fn attend_host<E: Element>(
        &mut self,
        layer: &HostPages<E>,
        heads: Heads,
        q: &Tensor,
        new: Option<(&Tensor, &Tensor)>,
        o: &mut Tensor,
    ) {
        o.resize(q.shape());
        let (q_cols, kv_cols) = (heads.q_cols(), heads.kv_cols());
        let (few, many): (Vec<&Chunk>, Vec<&Chunk>) =
            self.chunks.iter().partition(|chunk| chunk.rows.len() <= FEW_ROWS);
        for chunk in many {
            let Some((k, v)) = new else { panic!("keys and values of {chunk:?} are needed") };
            let (rows, num_keys) = (chunk.rows.clone(), chunk.num_keys());
            let [mut k, mut v] = [k, v].map(|new| &new.data()[rows.start * kv_cols..rows.end * kv_cols]);
            if chunk.past > 0 {
                let past = chunk.past * kv_cols;
                for (all, new) in [(&mut self.k, k), (&mut self.v, v)] {
                    all.resize(&[num_keys, kv_cols]);
                    all.data_mut()[past..].copy_from_slice(new);
                }
                let (past_k, past_v) = (&mut self.k.data_mut()[..past], &mut self.v.data_mut()[..past]);
                layer.read(heads, &chunk.pages, past_k, past_v);
                (k, v) = (self.k.data(), self.v.data());
            }
            self.lse.resize(&[rows.len(), heads.num_heads]);
            let segments = [Segment { queries: 0..rows.len(), keys: 0..num_keys }];
            let elements = rows.start * q_cols..rows.end * q_cols;
            let (q, o) = (&q.data()[elements.clone()], &mut o.data_mut()[elements]);
            cpu::attention::forward(q, k, v, &segments, heads, o, self.lse.data_mut());
        }
        few_rows(&few, layer, heads, q, o, &mut self.partial);
    }
}

/// Attention of a few tokens of each of `chunks` over their pages; writes their rows of `o`.
#[allow(unsafe_code)]
fn few_rows<E: Element>(
    chunks: &[&Chunk],
    layer: &HostPages<E>,
    heads: Heads,
    q: &Tensor,
    o: &mut Tensor,
    partial: &mut Vec<f32>,
) {
    let (d, group, num_kv_heads) = (heads.head_dim, heads.group(), heads.num_kv_heads);
    let record = group * (d + 2);
    // Each run of keys, with its first record: there is one for each key/value head and row.
    let (mut runs, mut num_records) = (Vec::new(), 0);
    for chunk in chunks {
        for first in (0..chunk.num_keys()).step_by(RUN) {
            runs.push((*chunk, first, num_records));
            num_records += num_kv_heads * chunk.rows.len();
        }
    }
    partial.resize(num_records * record, 0.0);
    let records = Shared::new(partial);
    team::for_each(runs.len() * num_kv_heads, |task| {
        let ((chunk, first, at), kv_head) = (runs[task / num_kv_heads], task % num_kv_heads);
        let (mut keys, mut values) = ([&[] as &[E]; RUN / PAGE], [&[] as &[E]; RUN / PAGE]);
        let run = first..chunk.num_keys().min(first + RUN);
        let pages = &chunk.pages[run.start / PAGE..run.end.div_ceil(PAGE)];
        for ((keys, values), page) in keys.iter_mut().zip(&mut values).zip(pages) {
            (*keys, *values) = layer.page(*page, kv_head, heads);
        }
        let num_rows = chunk.rows.len();
        for (i, row) in chunk.rows.clone().enumerate() {
            let seen = (chunk.past + i + 1).saturating_sub(first).min(RUN);
            let q = &q.row(row)[kv_head * group * d..(kv_head + 1) * group * d];
            // SAFETY: one record for each run, head and row, and no two of them overlap.
            let record = unsafe { records.slice((at + kv_head * num_rows + i) * record, record) };
            cpu::attention_paged::partial(q, &keys, &values, seen, heads.scale(), d, record);
        }
    });
    let mut rest = &runs[..];
    while let Some((chunk, ..)) = rest.first() {
        let (own, others) = rest.split_at(chunk.num_keys().div_ceil(RUN));
        let num_rows = chunk.rows.len();
        for (i, row) in chunk.rows.clone().enumerate() {
            for (kv_head, o) in o.row_mut(row).chunks_exact_mut(group * d).enumerate() {
                let at = own.iter().map(|(_, _, first)| (first + kv_head * num_rows + i) * record);
                cpu::attention_paged::merge(at.map(|at| &partial[at..at + record]), d, o);
            }
        }
        rest = others;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::forward as reference;
    use crate::rng::Rng;
    use crate::{Device, Dtype};
    use half::f16;
    use std::ops::Range;

    fn random(rng: &mut Rng, rows: usize, cols: usize) -> Tensor {
        Tensor::from_slice(&[rows, cols], &rng.normals(rows * cols, 1.0))
    }

    fn cut(x: &Tensor, rows: Range<usize>) -> Tensor {
        Tensor::from_slice(&[rows.len(), x.cols()], &x.data()[rows.start * x.cols()..rows.end * x.cols()])
    }

    fn cache(half: bool, heads: Heads, num_layers: usize, num_pages: usize) -> PagedCache {
        match half {
            true => PagedCache::f16(heads, num_layers, num_pages),
            false => PagedCache::new(&Device::Cpu, Dtype::F32, heads, num_layers, num_pages),
        }
    }

    /// As it comes back from a cache in f16.
    fn rounded(x: &Tensor) -> Tensor {
        let values: Vec<f32> = x.data().iter().map(|x| f16::from_f32(*x).to_f32()).collect();
        Tensor::from_slice(x.shape(), &values)
    }

    /// Sequences of (tokens before, new tokens) whose pages are dealt out in turn, in a cache whose pages held other numbers before.
    fn matches_the_training_kernel(half: bool, heads: Heads, sequences: &[(usize, usize)]) {
        let mut rng = Rng::new(31, 0);
        let num_pages = sequences.iter().map(|(past, new)| (past + new).div_ceil(PAGE)).max().unwrap();
        let mut cache = cache(half, heads, 2, num_pages * sequences.len());
        let mut slots = Slots::default();
        let pages =
            |i: usize| -> Vec<u32> { (0..num_pages).rev().map(|page| (page * sequences.len() + i) as u32).collect() };
        let all: Vec<[Tensor; 2]> = sequences
            .iter()
            .map(|(past, new)| [(); 2].map(|()| random(&mut rng, past + new, heads.kv_cols())))
            .collect();
        let mut chunks = Vec::new();
        for (i, (past, new)) in sequences.iter().enumerate() {
            let [k, v] = &all[i];
            let noise = random(&mut rng, num_pages * PAGE, heads.kv_cols());
            let whole = |rows, past| vec![Chunk { rows, past, pages: pages(i) }];
            slots.set(&cache, whole(0..num_pages * PAGE, 0));
            slots.write(&mut cache, 1, &noise, &noise);
            // What is cached comes in two pieces.
            for rows in [0..past / 3, past / 3..*past] {
                slots.set(&cache, whole(0..rows.len(), rows.start));
                slots.write(&mut cache, 1, &cut(k, rows.clone()), &cut(v, rows));
            }
            let first = chunks.last().map_or(0, |chunk: &Chunk| chunk.rows.end);
            chunks.push(Chunk { rows: first..first + new, past: *past, pages: pages(i) });
        }
        let rows = chunks.last().unwrap().rows.end;
        let q = random(&mut rng, rows, heads.q_cols());
        let [mut k, mut v] = [(); 2].map(|()| Tensor::zeros(&[rows, heads.kv_cols()]));
        for (chunk, kv) in chunks.iter().zip(&all) {
            for (to, from) in [&mut k, &mut v].into_iter().zip(kv) {
                to.copy_rows(chunk.rows.start, &cut(from, chunk.past..chunk.num_keys()), chunk.rows.len());
            }
        }
        slots.set(&cache, chunks.clone());
        slots.write(&mut cache, 1, &k, &v);
        let mut o = Tensor::default();
        slots.attend(&cache, 1, &q, Some((&k, &v)), &mut o);
        for (chunk, [k, v]) in chunks.iter().zip(&all) {
            let segments = [Segment { queries: 0..chunk.rows.len(), keys: 0..chunk.num_keys() }];
            let (mut want, mut lse) = (Tensor::default(), Tensor::default());
            let [mut k, mut v] = [k, v].map(|x| if half { rounded(x) } else { x.clone() });
            if !chunk.rows.len() <= FEW_ROWS {
                // New keys and values of a prompt are taken as they came.
                let own = chunk.past..chunk.num_keys();
                for (to, from) in [&mut k, &mut v].into_iter().zip(&all[0]) {
                    assert_eq!(sequences.len(), 1, "one sequence with a prompt");
                    to.copy_rows(own.start, &cut(from, own.clone()), own.len());
                }
            }
            reference(&cut(&q, chunk.rows.clone()), &k, &v, &segments, heads, &mut want, &mut lse);
            for (a, b) in cut(&o, chunk.rows.clone()).data().iter().zip(want.data()) {
                assert!((a - b).abs() < 2e-6, "{heads:?} {chunk:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn both_caches_match_the_training_kernel() {
        for half in [false, true] {
            for (num_heads, num_kv_heads, head_dim) in [(9, 3, 64), (4, 2, 6), (8, 1, 16), (5, 1, 80), (2, 2, 128)] {
                let heads = Heads { num_heads, num_kv_heads, head_dim };
                matches_the_training_kernel(half, heads, &[(0, 1), (14, 1), (13, 3), (255, 2), (256, 4), (699, 1)]);
                for prompt in [(0, 40), (33, 90)] {
                    matches_the_training_kernel(half, heads, &[prompt]);
                }
            }
        }
    }

    #[test]
    fn pages_may_be_written_again_and_hold_what_came_last() {
        let mut rng = Rng::new(32, 0);
        let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 24 };
        let [k, v] = [(); 2].map(|()| random(&mut rng, 300, 48));
        for half in [false, true] {
            let mut cache = cache(half, heads, 1, 19);
            assert_eq!(cache.bytes(), 0);
            let mut slots = Slots::default();
            let mut write = |at: usize, rows: Range<usize>| {
                slots.set(&cache, vec![Chunk { rows: 0..rows.len(), past: at, pages: (0..19).collect() }]);
                slots.write(&mut cache, 0, &cut(&k, rows.clone()), &cut(&v, rows));
            };
            write(0, 7..250);
            (0..240).chain(230..300).for_each(|token| write(token, token..token + 1));
            let [mut got_k, mut got_v] = [(); 2].map(|()| vec![0.0; 300 * 48]);
            let pages: Vec<u32> = (0..19).collect();
            match &cache.layers {
                Layers::F32(layers) => layers[0].read(heads, &pages, &mut got_k, &mut got_v),
                Layers::F16(layers) => layers[0].read(heads, &pages, &mut got_k, &mut got_v),
                Layers::Device(_) => unreachable!(),
            }
            let [k, v] = [&k, &v].map(|x| if half { rounded(x) } else { x.clone() });
            assert!(got_k == k.data() && got_v == v.data());
            assert_eq!(cache.bytes(), 2 * 2 * 512 * 24 * if half { 2 } else { 4 });
        }
    }

    #[test]
    fn what_is_too_large_for_f16_saturates() {
        let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 24 };
        let mut cache = PagedCache::f16(heads, 1, 1);
        cache.write_host(0, 0, &[0], &[1e9; 48], &[-1e9; 48]);
        let Layers::F16(layers) = &cache.layers else { unreachable!() };
        let (mut k, mut v) = ([0.0; 48], [0.0; 48]);
        layers[0].read(heads, &[0], &mut k, &mut v);
        assert_eq!((k[0], v[47]), (65504.0, -65504.0));
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let mut rng = Rng::new(33, 0);
        let heads = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 };
        let q = random(&mut rng, 2, heads.q_cols());
        let [k, v] = [(); 2].map(|()| random(&mut rng, 1000, heads.kv_cols()));
        let mut cache = PagedCache::f16(heads, 1, 63);
        let pages: Vec<u32> = (0..63).collect();
        cache.write_host(0, 0, &pages, k.data(), v.data());
        let results = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut o, mut slots) = (Tensor::default(), Slots::default());
            slots.set(&cache, vec![Chunk { rows: 0..2, past: 998, pages: pages.clone() }]);
            pool.install(|| team::scope(|| slots.attend(&cache, 0, &q, None, &mut o)));
            o
        });
        assert_eq!(results[0].data(), results[1].data());
    }
}
