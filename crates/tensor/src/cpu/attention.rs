//! Attention kernels that never hold more than one tile of scores; contract in `ops/attention.rs`.
//!
//! The online softmax of Dao et al., "FlashAttention" (2022): scores are made tile by tile, the running maximum and sum
//! of each row rescale what has been added up so far, and the backward pass recomputes each tile from the saved
//! log-sum-exp of its rows.
//!
//! Tiles are kept transposed, [keys, queries]: a row holds the scores of one key for [`LANES`] queries of one head,
//! side by side. So the softmax runs down the rows with nothing to add up across a vector, and every product is one of
//! `tile.rs` with both operands where they lie: k, v, q and d_o in the caller's memory, tiles as they were written.
//! Only the queries (and d_o) of a tile are transposed, once. Keys that no query of a strip sees are left out.

use crate::contract::{Heads, Qkv, Segment};
use crate::cpu::simd::{exp, multiversion};
use crate::cpu::tile::{Panels, product};
use crate::cpu::transpose::transpose;
use crate::cpu::view::{Shared, View};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::cell::{Cell, RefCell};

/// Queries of a tile, and keys of a tile: with q, d_o, k and v of its head, a tile's buffers fill a quarter of a 1 MiB
/// L2 cache. Keys are a multiple of the rows of a register tile.
const LANES: usize = 64;
const KEYS: usize = 96;

/// Queries that are cut off together at the diagonal.
const STRIP: usize = 32;

/// The backward pass cuts the queries of long documents until there are this many tasks, so that two heads on three
/// cores, say, leave none idle. A constant: sums must not depend on the number of threads.
const TASKS: usize = 12;

#[derive(Default)]
struct Tiles {
    q: Tensor,
    d_o: Tensor,
    scores: Tensor,
    d_scores: Tensor,
    out: Tensor,
}

thread_local! {
    /// Tiles of each thread, kept between calls.
    static TILES: RefCell<Tiles> = RefCell::default();
    /// Sums of tasks that share keys, kept between calls.
    static PARTIAL: Cell<Tensor> = Cell::default();
}

/// The queries of a tile: `rows` of them from `first` on in their segment, whose own keys begin after `cached` others.
#[derive(Clone, Copy)]
struct Queries {
    first: usize,
    rows: usize,
    cached: usize,
}

/// Some lanes of a tile and how many of the tile's keys at least one of them sees.
#[derive(Clone, Copy)]
struct Piece {
    lane: usize,
    lanes: usize,
    keys: usize,
}

impl Queries {
    fn new(segment: &Segment, first: usize) -> Self {
        let cached = segment.keys.len() - segment.queries.len();
        Self { first, rows: LANES.min(segment.queries.len() - first), cached }
    }

    /// How many keys of the segment query `lane` of the tile may see.
    fn seen(&self, lane: usize) -> usize {
        self.cached + self.first + lane + 1
    }

    /// The pieces of the tile of keys from `key` on: all lanes at once below the diagonal, strips of them on it.
    fn pieces(self, key: usize) -> impl Iterator<Item = Piece> {
        let strip = if self.seen(0) >= key + KEYS { LANES } else { STRIP };
        (0..self.rows).step_by(strip).filter_map(move |lane| {
            let lanes = strip.min(self.rows - lane);
            let keys = self.seen(lane + lanes - 1).saturating_sub(key).min(KEYS);
            (keys > 0).then_some(Piece { lane, lanes, keys })
        })
    }
}

#[allow(unsafe_code)]
pub(crate) fn forward(qkv: Qkv<'_>, o: &mut [f32], lse: &mut [f32]) {
    let Qkv { segments, heads, .. } = qkv;
    let [q, k, v] = [qkv.q, qkv.k, qkv.v].map(Tensor::data);
    let (q_cols, kv_cols, hd) = (heads.q_cols(), heads.kv_cols(), heads.head_dim);
    let mut tasks = Vec::new();
    for segment in segments {
        for head in 0..heads.num_heads {
            for first in (0..segment.queries.len()).step_by(LANES) {
                tasks.push((segment, head, first));
            }
        }
    }
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    tasks.into_par_iter().with_max_len(1).for_each(|(segment, head, first)| {
        TILES.with_borrow_mut(|tiles| {
            let queries = Queries::new(segment, first);
            let rows = queries.rows;
            let row0 = segment.queries.start + first;
            let at = row0 * q_cols + head * hd;
            let [q_tile, out] = [&mut tiles.q, &mut tiles.out].map(|t| {
                t.resize(&[hd, LANES]);
                t.data_mut()
            });
            transpose((rows, hd), &q[at..], q_cols, q_tile, LANES);
            tiles.scores.resize(&[KEYS, LANES]);
            let scores = tiles.scores.data_mut();
            let (mut largest, mut total) = ([f32::NEG_INFINITY; LANES], [0.0; LANES]);
            let mut factors = [0.0; LANES];
            for key in (0..queries.seen(rows - 1)).step_by(KEYS) {
                let kv_at = (segment.keys.start + key) * kv_cols + head / heads.group() * hd;
                let (k_tile, v_tile) = (View::rows(&k[kv_at..], kv_cols), View::rows(&v[kv_at..], kv_cols));
                for Piece { lane, lanes, keys } in queries.pieces(key) {
                    let q_part = Panels::rows(&q_tile[lane..], LANES);
                    product((keys, lanes, hd), &mut scores[lane..], LANES, false, heads.scale(), k_tile, q_part);
                    for lane in (lane..lane + lanes).step_by(STRIP) {
                        // Key `j` of the tile is hidden from the strip's lanes below `j − diagonal`.
                        let diagonal = queries.seen(lane) as isize - 1 - key as isize;
                        let strip = lane..lane + STRIP;
                        let (largest, total) = (&mut largest[strip.clone()], &mut total[strip.clone()]);
                        online_softmax(&mut scores[lane..], keys, diagonal, largest, total, &mut factors[strip]);
                    }
                    if key > 0 {
                        scale_columns(&mut out[lane..], &factors[lane..lane + lanes]);
                    }
                    let p = Panels::rows(&scores[lane..], LANES);
                    product((hd, lanes, keys), &mut out[lane..], LANES, key > 0, 1.0, v_tile.t(), p);
                }
            }
            for (i, (largest, total)) in largest.iter().zip(total).take(rows).enumerate() {
                factors[i] = 1.0 / total;
                // SAFETY: tasks differ in their head or rows; this is the element of one head and row.
                let slot = unsafe { lse.slice((row0 + i) * heads.num_heads + head, 1) };
                slot[0] = largest + total.ln();
            }
            scale_columns(out, &factors[..rows]);
            // SAFETY: as above; `transpose` writes only the columns of this head.
            let o_tile = unsafe { o.slice(at, (rows - 1) * q_cols + hd) };
            transpose((hd, rows), out, LANES, o_tile, q_cols);
        });
    });
}

multiversion! {
    /// Of the first `keys` rows of `scores` (rows [`LANES`] apart, one strip wide), makes exp(score − running maximum)
    /// of the visible scores and 0 of the others; `factors` are those for what was added up under the old maximum.
    fn online_softmax(
        scores: &mut [f32],
        keys: usize,
        diagonal: isize,
        largest: &mut [f32],
        total: &mut [f32],
        factors: &mut [f32],
    ) {
        let mut top = [f32::NEG_INFINITY; STRIP];
        for (row, j) in scores.chunks_mut(LANES).take(keys).zip(0isize..) {
            let row = &mut row[..STRIP];
            if j > diagonal {
                let hidden = ((j - diagonal) as usize).min(STRIP);
                row[..hidden].fill(f32::NEG_INFINITY);
            }
            for (top, s) in top.iter_mut().zip(row) {
                *top = if *s > *top { *s } else { *top };
            }
        }
        for i in 0..STRIP {
            top[i] = if largest[i] > top[i] { largest[i] } else { top[i] };
            // A lane that has seen no key yet has nothing to rescale, and −∞ − −∞ must not become its factor.
            factors[i] = if largest[i] == f32::NEG_INFINITY { 0.0 } else { exp(largest[i] - top[i]) };
            largest[i] = top[i];
        }
        let mut sums = [0.0f32; STRIP];
        for row in scores.chunks_mut(LANES).take(keys) {
            for ((s, top), sum) in row[..STRIP].iter_mut().zip(&top).zip(&mut sums) {
                *s = exp(*s - top);
                *sum += *s;
            }
        }
        for i in 0..STRIP {
            total[i] = total[i] * factors[i] + sums[i];
        }
    }
}

multiversion! {
    /// Multiplies the leading columns of each row of `out` (rows [`LANES`] apart) by `factors`.
    fn scale_columns(out: &mut [f32], factors: &[f32]) {
        for row in out.chunks_mut(LANES) {
            for (x, factor) in row.iter_mut().zip(factors) {
                *x *= factor;
            }
        }
    }
}

/// A share of the backward pass: consecutive queries of the heads that read one key/value head.
struct Share<'a> {
    segment: &'a Segment,
    kv_head: usize,
    queries: std::ops::Range<usize>,
    /// Where its d_k and d_v lie among the partial sums; `None` for the last queries, which see all keys and write to
    /// the gradients themselves.
    partial: Option<usize>,
}

/// Cuts the queries of each segment and key/value head into parts of about the same number of scores. Returns the
/// shares and the number of floats of their partial sums.
fn shares(segments: &[Segment], heads: Heads) -> (Vec<Share<'_>>, usize) {
    let wanted = TASKS.div_ceil((segments.len() * heads.num_kv_heads).max(1));
    let (mut shares, mut floats) = (Vec::new(), 0);
    for segment in segments {
        let tiles = segment.queries.len().div_ceil(LANES);
        // Shorter parts would spend their time on adding up.
        let parts = wanted.min(tiles.div_ceil(4));
        let bound = |i: usize| {
            let tile = (tiles as f64 * (i as f64 / parts as f64).sqrt()).round() as usize;
            (tile * LANES).min(segment.queries.len())
        };
        for kv_head in 0..heads.num_kv_heads {
            for part in (0..parts).rev() {
                let queries = bound(part)..bound(part + 1);
                let partial = (part + 1 < parts).then_some(floats);
                if partial.is_some() {
                    floats += 2 * queries.end * heads.head_dim;
                }
                shares.push(Share { segment, kv_head, queries, partial });
            }
        }
    }
    (shares, floats)
}

/// Bytes of the partial sums.
pub(crate) fn partial_bytes(segments: &[Segment], heads: Heads) -> usize {
    4 * shares(segments, heads).1
}

/// Bytes of [`Tiles`]: q, d_o and out, and two tiles of scores.
pub(crate) fn tile_bytes(head_dim: usize) -> usize {
    4 * (3 * LANES * head_dim + 2 * KEYS * LANES)
}

#[allow(unsafe_code)]
pub(crate) fn backward(qkv: Qkv<'_>, o: &[f32], lse: &[f32], d_o: &[f32], [d_q, d_k, d_v]: [&mut [f32]; 3]) {
    let Qkv { segments, heads, .. } = qkv;
    let [q, k, v] = [qkv.q, qkv.k, qkv.v].map(Tensor::data);
    let (kv_cols, hd) = (heads.kv_cols(), heads.head_dim);
    let (shares, floats) = shares(segments, heads);
    let mut sums = PARTIAL.take();
    sums.resize(&[floats]);
    let partial = Shared::new(sums.data_mut());
    let inputs = Inputs { q, k, v, o, lse, d_o, heads };
    let (d_q, d_k, d_v) = (Shared::new(d_q), Shared::new(d_k), Shared::new(d_v));
    shares.par_iter().with_max_len(1).for_each(|share| {
        let keys = share.queries.end;
        let (d_k, d_v, stride) = match share.partial {
            // SAFETY: `shares` gave each share a range of its own.
            Some(at) => unsafe { (partial.slice(at, keys * hd), partial.slice(at + keys * hd, keys * hd), hd) },
            None => {
                let (at, len) = (share.segment.keys.start * kv_cols + share.kv_head * hd, (keys - 1) * kv_cols + hd);
                // SAFETY: one share of a segment and key/value head has no partial sums, and only it comes here; it
                // touches only the columns of its head in the rows of its segment.
                unsafe { (d_k.slice(at, len), d_v.slice(at, len), kv_cols) }
            }
        };
        TILES.with_borrow_mut(|tiles| backward_share(&inputs, share, d_q, d_k, d_v, stride, tiles));
    });
    // The partial sums are added in the order of the shares, row by row, by whichever thread takes the rows.
    for share in &shares {
        let Some(at) = share.partial else { continue };
        let keys = share.queries.end;
        for (sum, to) in [(at, d_k), (at + keys * hd, d_v)] {
            (0..keys).into_par_iter().with_min_len(64).for_each(|key| {
                let row = (share.segment.keys.start + key) * kv_cols + share.kv_head * hd;
                // SAFETY: one row of this head, which one thread takes; nothing writes to the partial sums any more.
                let (from, to) = unsafe { (partial.slice(sum + key * hd, hd), to.slice(row, hd)) };
                from.iter().zip(to).for_each(|(from, to)| *to += from);
            });
        }
    }
    PARTIAL.set(sums);
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
    d_o: &'a [f32],
    heads: Heads,
}

/// The gradients that the queries of `share` cause: d_q of these queries, and `d_k` and `d_v` of the keys they see,
/// whose rows are `stride` apart.
#[allow(unsafe_code)]
fn backward_share(
    inputs: &Inputs<'_>,
    share: &Share<'_>,
    d_q: Shared,
    d_k: &mut [f32],
    d_v: &mut [f32],
    stride: usize,
    tiles: &mut Tiles,
) {
    let Inputs { q, k, v, o, lse, d_o, heads } = *inputs;
    let (q_cols, kv_cols, hd, scale) = (heads.q_cols(), heads.kv_cols(), heads.head_dim, heads.scale());
    let Share { segment, kv_head, ref queries, .. } = *share;
    for gradient in [&mut *d_k, &mut *d_v] {
        gradient.chunks_mut(stride).take(queries.end).for_each(|row| row[..hd].fill(0.0));
    }
    let [q_tile, d_o_tile, d_q_tile] = [&mut tiles.q, &mut tiles.d_o, &mut tiles.out].map(|t| {
        t.resize(&[hd, LANES]);
        t.data_mut()
    });
    let [p, d_s] = [&mut tiles.scores, &mut tiles.d_scores].map(|t| {
        t.resize(&[KEYS, LANES]);
        t.data_mut()
    });
    let group = kv_head * heads.group()..(kv_head + 1) * heads.group();
    for (first, head) in queries.clone().step_by(LANES).flat_map(|first| group.clone().map(move |head| (first, head))) {
        let lanes_of = Queries { first, rows: LANES.min(queries.end - first), cached: 0 };
        let rows = lanes_of.rows;
        let row0 = segment.queries.start + first;
        let at = row0 * q_cols + head * hd;
        transpose((rows, hd), &q[at..], q_cols, q_tile, LANES);
        transpose((rows, hd), &d_o[at..], q_cols, d_o_tile, LANES);
        let (mut row_lse, mut delta) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..rows {
            row_lse[i] = lse[(row0 + i) * heads.num_heads + head];
            // Σ o · d_o: the softmax's own contribution to the gradient of the scores.
            let at = at + i * q_cols;
            delta[i] = dot(&o[at..at + hd], &d_o[at..at + hd]);
        }
        for key in (0..lanes_of.seen(rows - 1)).step_by(KEYS) {
            let kv_at = (segment.keys.start + key) * kv_cols + kv_head * hd;
            let (k_tile, v_tile) = (View::rows(&k[kv_at..], kv_cols), View::rows(&v[kv_at..], kv_cols));
            let (d_k, d_v) = (&mut d_k[key * stride..], &mut d_v[key * stride..]);
            for Piece { lane, lanes, keys } in lanes_of.pieces(key) {
                let q_part = Panels::rows(&q_tile[lane..], LANES);
                product((keys, lanes, hd), &mut p[lane..], LANES, false, scale, k_tile, q_part);
                let d_o_part = Panels::rows(&d_o_tile[lane..], LANES);
                product((keys, lanes, hd), &mut d_s[lane..], LANES, false, 1.0, v_tile, d_o_part);
                for lane in (lane..lane + lanes).step_by(STRIP) {
                    let diagonal = lanes_of.seen(lane) as isize - 1 - key as isize;
                    let (p, d_s, strip) = (&mut p[lane..], &mut d_s[lane..], lane..lane + STRIP);
                    score_gradient(p, d_s, keys, diagonal, &row_lse[strip.clone()], &delta[strip], scale);
                }
                let rows_at = at + lane * q_cols;
                let (d_o_rows, q_rows) = (Panels::rows(&d_o[rows_at..], q_cols), Panels::rows(&q[rows_at..], q_cols));
                product((keys, hd, lanes), d_v, stride, true, 1.0, View::rows(&p[lane..], LANES), d_o_rows);
                product((keys, hd, lanes), d_k, stride, true, 1.0, View::rows(&d_s[lane..], LANES), q_rows);
                let d_s_part = Panels::rows(&d_s[lane..], LANES);
                product((hd, lanes, keys), &mut d_q_tile[lane..], LANES, key > 0, 1.0, k_tile.t(), d_s_part);
            }
        }
        // SAFETY: shares differ in their queries or their heads; `transpose` writes only this head's columns of them.
        let d_q = unsafe { d_q.slice(at, (rows - 1) * q_cols + hd) };
        transpose((hd, rows), d_q_tile, LANES, d_q, q_cols);
    }
}

multiversion! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        crate::cpu::simd::reduce2(a, b, |a, b| a * b)
    }
}

multiversion! {
    /// One strip of a tile. p: scores → probabilities; d_s: gradient of probabilities → gradient of the unscaled
    /// scores.
    fn score_gradient(
        p: &mut [f32],
        d_s: &mut [f32],
        keys: usize,
        diagonal: isize,
        lse: &[f32],
        delta: &[f32],
        scale: f32,
    ) {
        for ((p, d), j) in p.chunks_mut(LANES).zip(d_s.chunks_mut(LANES)).take(keys).zip(0isize..) {
            let (p, d) = (&mut p[..STRIP], &mut d[..STRIP]);
            for i in 0..STRIP {
                p[i] = exp(p[i] - lse[i]);
                d[i] = p[i] * (d[i] - delta[i]) * scale;
            }
            if j > diagonal {
                let hidden = ((j - diagonal) as usize).min(STRIP);
                p[..hidden].fill(0.0);
                d[..hidden].fill(0.0);
            }
        }
    }
}
