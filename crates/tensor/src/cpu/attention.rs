//! Attention kernels that never hold more than one tile of scores; contract in `ops/attention.rs`.
//!
//! The online softmax of Dao et al., "FlashAttention" (2022): scores are made tile by tile, the running maximum and sum
//! of each row rescale what has been added up so far, and the backward pass makes each tile again from the saved
//! log-sum-exp of its rows.

use crate::cpu::matmul::{Shared, View, gemm};
use crate::cpu::simd::{exp, max, multiversion, reduce2};
use crate::ops::attention::{Heads, Segment};
use rayon::prelude::*;
use std::cell::RefCell;

/// Tile extents: 64 x 128 scores are 32 KiB, and with the tiles of q, k, v and o they stay inside L2.
const TILE_Q: usize = 64;
const TILE_K: usize = 128;

thread_local! {
    /// Two tiles of scores for each thread, kept between calls.
    static TILES: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// How many keys of a segment query row `row` of it may see.
fn visible(segment: &Segment, row: usize) -> usize {
    segment.keys.len() - segment.queries.len() + row + 1
}

#[allow(unsafe_code)]
pub(crate) fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    segments: &[Segment],
    heads: Heads,
    o: &mut [f32],
    lse: &mut [f32],
) {
    let (q_cols, kv_cols, hd) = (heads.q_cols(), heads.kv_cols(), heads.head_dim);
    let scale = heads.scale();
    let mut tasks = Vec::new();
    for segment in segments {
        for head in 0..heads.num_heads {
            for first in (0..segment.queries.len()).step_by(TILE_Q) {
                tasks.push((segment, head, first));
            }
        }
    }
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    tasks.into_par_iter().for_each(|(segment, head, first)| {
        TILES.with_borrow_mut(|(tile, sums)| {
            tile.resize(TILE_Q * TILE_K, 0.0);
            sums.resize(3 * TILE_Q, 0.0);
            let rows = TILE_Q.min(segment.queries.len() - first);
            let row0 = segment.queries.start + first;
            let (largest, rest) = sums.split_at_mut(TILE_Q);
            let (total, corrections) = rest.split_at_mut(TILE_Q);
            largest.fill(f32::NEG_INFINITY);
            total.fill(0.0);
            let kv_head = head / heads.group();
            let q_tile = View { data: &q[row0 * q_cols + head * hd..], row_stride: q_cols, col_stride: 1 };
            // SAFETY: tasks differ in (head, query rows); each touches only the columns of its head in its rows.
            let out = unsafe { o.slice(row0 * q_cols + head * hd, (rows - 1) * q_cols + hd) };
            let keys_seen = visible(segment, first + rows - 1);
            for key0 in (0..keys_seen).step_by(TILE_K) {
                let keys = TILE_K.min(keys_seen - key0);
                let kv_row = (segment.keys.start + key0) * kv_cols + kv_head * hd;
                let k_tile = View { data: &k[kv_row..], row_stride: kv_cols, col_stride: 1 };
                let v_tile = View { data: &v[kv_row..], row_stride: kv_cols, col_stride: 1 };
                gemm((rows, keys, hd), tile, TILE_K, false, scale, q_tile, k_tile.t(), 1);
                for i in 0..rows {
                    let seen = visible(segment, first + i).saturating_sub(key0).min(keys);
                    let row = &mut tile[i * TILE_K..i * TILE_K + keys];
                    corrections[i] = online_softmax(row, seen, &mut largest[i], &mut total[i]);
                }
                if key0 > 0 {
                    scale_rows(out, q_cols, hd, &corrections[..rows]);
                }
                let scores = View { data: tile, row_stride: TILE_K, col_stride: 1 };
                gemm_into_head((rows, hd, keys), out, q_cols, key0 > 0, scores, v_tile);
            }
            for (i, sum) in total[..rows].iter().enumerate() {
                corrections[i] = 1.0 / sum;
                // SAFETY: one element that belongs to this task's head and row.
                let slot = unsafe { lse.slice((row0 + i) * heads.num_heads + head, 1) };
                slot[0] = largest[i] + sum.ln();
            }
            scale_rows(out, q_cols, hd, &corrections[..rows]);
        });
    });
}

/// `out` is the part of one head in consecutive rows that are `stride` apart: `out = accumulate · out + a · b`.
fn gemm_into_head(
    mnk: (usize, usize, usize),
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
) {
    gemm(mnk, out, stride, accumulate, 1.0, a, b, 1);
}

multiversion! {
    /// Makes exp(score − running maximum) of the first `seen` scores and 0 of the others; returns the factor for what
    /// was added up under the old maximum.
    fn online_softmax(row: &mut [f32], seen: usize, largest: &mut f32, total: &mut f32) -> f32 {
        let (live, masked) = row.split_at_mut(seen);
        masked.fill(0.0);
        let new = largest.max(max(live));
        if new == f32::NEG_INFINITY {
            return 1.0;
        }
        let correction = exp(*largest - new);
        for x in live.iter_mut() {
            *x = exp(*x - new);
        }
        *total = *total * correction + reduce2(live, live, |a, _| a);
        *largest = new;
        correction
    }
}

multiversion! {
    fn scale_rows(out: &mut [f32], stride: usize, cols: usize, factors: &[f32]) {
        for (row, factor) in out.chunks_mut(stride).zip(factors) {
            for x in row[..cols].iter_mut() {
                *x *= factor;
            }
        }
    }
}

#[allow(unsafe_code)]
pub(crate) fn backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    segments: &[Segment],
    heads: Heads,
    d_q: &mut [f32],
    d_k: &mut [f32],
    d_v: &mut [f32],
) {
    let (q_cols, kv_cols, hd) = (heads.q_cols(), heads.kv_cols(), heads.head_dim);
    let scale = heads.scale();
    // One task owns a segment's kv head and the query heads that share it: nothing is summed across threads.
    let mut tasks: Vec<(&Segment, usize)> =
        segments.iter().flat_map(|s| (0..heads.num_kv_heads).map(move |h| (s, h))).collect();
    tasks.sort_by_key(|(s, _)| std::cmp::Reverse(s.queries.len()));
    let (d_q, d_k, d_v) = (Shared::new(d_q), Shared::new(d_k), Shared::new(d_v));
    tasks.into_par_iter().with_max_len(1).for_each(|(segment, kv_head)| {
        TILES.with_borrow_mut(|(p, d_p)| {
            p.resize(TILE_Q * TILE_K, 0.0);
            d_p.resize(TILE_Q * TILE_K, 0.0);
            let num_rows = segment.queries.len();
            let offset = segment.keys.len() - num_rows;
            let query_heads = kv_head * heads.group()..(kv_head + 1) * heads.group();
            // Δ of each query row and head: Σ o · d_o (the softmax's own contribution to the score gradient).
            let mut delta = vec![0.0f32; num_rows * heads.group()];
            for i in 0..num_rows {
                for (g, head) in query_heads.clone().enumerate() {
                    let at = (segment.queries.start + i) * q_cols + head * hd;
                    delta[g * num_rows + i] = dot(&o[at..at + hd], &d_o[at..at + hd]);
                }
            }
            for key0 in (0..segment.keys.len()).step_by(TILE_K) {
                let keys = TILE_K.min(segment.keys.len() - key0);
                let kv_at = (segment.keys.start + key0) * kv_cols + kv_head * hd;
                let k_tile = View { data: &k[kv_at..], row_stride: kv_cols, col_stride: 1 };
                let v_tile = View { data: &v[kv_at..], row_stride: kv_cols, col_stride: 1 };
                // SAFETY: rows of this segment, columns of this kv head: nobody else's.
                let d_k_tile = unsafe { d_k.slice(kv_at, (keys - 1) * kv_cols + hd) };
                // SAFETY: as above.
                let d_v_tile = unsafe { d_v.slice(kv_at, (keys - 1) * kv_cols + hd) };
                let mut first_product = true;
                // The first query row that sees this tile at all.
                let start = key0.saturating_sub(offset) / TILE_Q * TILE_Q;
                for first in (start..num_rows).step_by(TILE_Q) {
                    let rows = TILE_Q.min(num_rows - first);
                    let row0 = segment.queries.start + first;
                    for (g, head) in query_heads.clone().enumerate() {
                        let at = row0 * q_cols + head * hd;
                        let q_tile = View { data: &q[at..], row_stride: q_cols, col_stride: 1 };
                        let d_o_tile = View { data: &d_o[at..], row_stride: q_cols, col_stride: 1 };
                        gemm((rows, keys, hd), p, TILE_K, false, scale, q_tile, k_tile.t(), 1);
                        gemm((rows, keys, hd), d_p, TILE_K, false, 1.0, d_o_tile, v_tile.t(), 1);
                        for i in 0..rows {
                            let seen = visible(segment, first + i).saturating_sub(key0).min(keys);
                            let row = i * TILE_K..i * TILE_K + keys;
                            let row_lse = lse[(row0 + i) * heads.num_heads + head];
                            let row_delta = delta[g * num_rows + first + i];
                            score_gradient(&mut p[row.clone()], &mut d_p[row], seen, row_lse, row_delta, scale);
                        }
                        let p_tile = View { data: p, row_stride: TILE_K, col_stride: 1 };
                        let d_s_tile = View { data: d_p, row_stride: TILE_K, col_stride: 1 };
                        gemm((keys, hd, rows), d_v_tile, kv_cols, !first_product, 1.0, p_tile.t(), d_o_tile, 1);
                        gemm((keys, hd, rows), d_k_tile, kv_cols, !first_product, 1.0, d_s_tile.t(), q_tile, 1);
                        first_product = false;
                        // SAFETY: query heads of this kv head in rows of this segment: nobody else's.
                        let d_q_tile = unsafe { d_q.slice(at, (rows - 1) * q_cols + hd) };
                        // The first tile of keys is seen by every row, so it is the one that initialises d_q.
                        gemm((rows, hd, keys), d_q_tile, q_cols, key0 > 0, 1.0, d_s_tile, k_tile, 1);
                    }
                }
            }
        });
    });
}

multiversion! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        reduce2(a, b, |a, b| a * b)
    }
}

multiversion! {
    /// p: scores → probabilities; d_p: gradient of probabilities → gradient of the unscaled scores.
    fn score_gradient(p: &mut [f32], d_p: &mut [f32], seen: usize, lse: f32, delta: f32, scale: f32) {
        for (p, d) in p[..seen].iter_mut().zip(&mut d_p[..seen]) {
            *p = exp(*p - lse);
            *d = *p * (*d - delta) * scale;
        }
        p[seen..].fill(0.0);
        d_p[seen..].fill(0.0);
    }
}
