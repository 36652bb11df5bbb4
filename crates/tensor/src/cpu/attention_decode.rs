//! Kernels of attention over a cache in f32 or f16; contract in `ops/attention_decode.rs`, layout of the
//! cache in `kv.rs`.

use crate::cpu::simd::{exp, max, multiversion, reduce2};
use crate::kv::{Element, RUN, TILE};

/// Query heads of which one pass over keys or values keeps the sums in registers.
const QUERIES: usize = 4;

/// The partial result of `seen` keys for the query heads that share a key/value head.
///
/// `q` is [group, d]; `keys` holds tiles [d, TILE] and `values` rows [d], both from the run's first token on. `record`
/// takes group x d sums of exp(score − maximum) · value, then the group's maxima, then its totals of exp(score −
/// maximum).
pub(crate) fn partial<E: Element>(
    q: &[f32],
    keys: &[E],
    values: &[E],
    seen: usize,
    scale: f32,
    d: usize,
    record: &mut [f32],
) {
    let group = q.len() / d;
    let (sums, rest) = record.split_at_mut(group * d);
    let (maxima, totals) = rest.split_at_mut(group);
    let mut scores = [[0.0f32; RUN]; QUERIES];
    let heads = q.chunks(QUERIES * d).zip(sums.chunks_mut(QUERIES * d));
    let heads = heads.zip(maxima.chunks_mut(QUERIES)).zip(totals.chunks_mut(QUERIES));
    for (((q, sums), maxima), totals) in heads {
        let num = maxima.len();
        let tiles = seen.div_ceil(TILE);
        score(q, &keys[..tiles * TILE * d], d, &mut scores[..num]);
        for ((scores, maximum), total) in scores.iter_mut().zip(maxima).zip(totals) {
            (*maximum, *total) = exponentials(&mut scores[..seen], scale);
        }
        weigh(&scores[..num], &values[..seen * d], d, sums);
    }
}

multiversion! {
    /// Scores → exp(scale · score − maximum); returns the maximum of the scaled scores and the sum.
    fn exponentials(scores: &mut [f32], scale: f32) -> (f32, f32) {
        for x in scores.iter_mut() {
            *x *= scale;
        }
        let maximum = max(scores);
        if maximum == f32::NEG_INFINITY {
            return (maximum, 0.0);
        }
        for x in scores.iter_mut() {
            *x = exp(*x - maximum);
        }
        (maximum, reduce2(scores, scores, |x, _| x))
    }
}

/// Puts the partial results of consecutive runs together: `o` [group, d].
pub(crate) fn merge<'a>(records: impl Iterator<Item = &'a [f32]> + Clone, d: usize, o: &mut [f32]) {
    let group = o.len() / d;
    for (g, o) in o.chunks_exact_mut(d).enumerate() {
        let largest = records.clone().map(|r| r[group * d + g]).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        o.fill(0.0);
        for record in records.clone() {
            let (maximum, sum) = (record[group * d + g], record[group * (d + 1) + g]);
            if sum > 0.0 {
                let factor = exp(maximum - largest);
                total += factor * sum;
                add_scaled(&record[g * d..(g + 1) * d], factor, o);
            }
        }
        let inverse = 1.0 / total;
        o.iter_mut().for_each(|x| *x *= inverse);
    }
}

multiversion! {
    fn add_scaled(x: &[f32], factor: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += factor * x;
        }
    }
}

/// `scores[g][token]` = `q[g]` · key of the token, for all tokens of `keys` (whole tiles).
#[allow(unsafe_code)]
fn score<E: Element>(q: &[f32], keys: &[E], d: usize, scores: &mut [[f32; RUN]]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::simd::level() == crate::cpu::simd::Level::Avx512 {
        // SAFETY: `level` has seen AVX-512 F on this CPU.
        return unsafe { avx512::score(q, keys, d, scores) };
    }
    score_portable(q, keys, d, scores);
}

/// `sums[g]` [d] = Σ over tokens of `weights[g][token]` · value of the token.
#[allow(unsafe_code)]
fn weigh<E: Element>(weights: &[[f32; RUN]], values: &[E], d: usize, sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::simd::level() == crate::cpu::simd::Level::Avx512 && d.is_multiple_of(16) {
        // SAFETY: as above.
        return unsafe { avx512::weigh(weights, values, d, sums) };
    }
    weigh_portable(weights, values, d, sums);
}

multiversion! {
    fn score_portable<E: Element>(q: &[f32], keys: &[E], d: usize, scores: &mut [[f32; RUN]]) {
        for (t, tile) in keys.chunks_exact(TILE * d).enumerate() {
            for (q, scores) in q.chunks_exact(d).zip(scores.iter_mut()) {
                let mut sums = [0.0f32; TILE];
                for (lanes, q) in tile.as_chunks::<TILE>().0.iter().zip(q) {
                    for i in 0..TILE {
                        sums[i] += q * lanes[i].to_f32();
                    }
                }
                scores[t * TILE..(t + 1) * TILE].copy_from_slice(&sums);
            }
        }
    }
}

multiversion! {
    fn weigh_portable<E: Element>(weights: &[[f32; RUN]], values: &[E], d: usize, sums: &mut [f32]) {
        for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(d)) {
            sums.fill(0.0);
            for (value, weight) in values.chunks_exact(d).zip(weights) {
                for (sum, x) in sums.iter_mut().zip(value) {
                    *sum += weight * x.to_f32();
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Element, QUERIES, RUN, TILE};
    use std::arch::x86_64::*;

    /// Sixteen elements as f32.
    #[target_feature(enable = "avx512f")]
    #[inline]
    #[allow(unsafe_code)]
    fn load<E: Element>(x: &[E; 16]) -> __m512 {
        if size_of::<E>() == 2 {
            // SAFETY: 16 elements of 2 bytes are 32 readable bytes, and the load needs no alignment.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
        } else {
            const { assert!(size_of::<E>() == 2 || size_of::<E>() == 4) };
            // SAFETY: 16 elements of 4 bytes are 64 readable bytes, and the load needs no alignment.
            unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    #[allow(unsafe_code)]
    fn store(x: __m512, to: &mut [f32; 16]) {
        // SAFETY: an array of 16 f32 is 64 writable bytes, and the store needs no alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn score<E: Element>(q: &[f32], keys: &[E], d: usize, scores: &mut [[f32; RUN]]) {
        // A vector of each query head for QUERIES tiles at a time: enough sums to hide the latency of an addition.
        match scores.len() {
            1 => score_heads::<E, 1>(q, keys, d, scores),
            2 => score_heads::<E, 2>(q, keys, d, scores),
            3 => score_heads::<E, 3>(q, keys, d, scores),
            _ => score_heads::<E, QUERIES>(q, keys, d, scores),
        }
    }

    #[target_feature(enable = "avx512f")]
    fn score_heads<E: Element, const G: usize>(q: &[f32], keys: &[E], d: usize, scores: &mut [[f32; RUN]]) {
        let q: [&[f32]; G] = std::array::from_fn(|g| &q[g * d..(g + 1) * d]);
        let num_tiles = keys.len() / (TILE * d);
        let mut tile = 0;
        while num_tiles - tile >= 4 {
            score_tiles::<E, G, 4>(&q, keys, d, tile, scores);
            tile += 4;
        }
        while tile < num_tiles {
            score_tiles::<E, G, 1>(&q, keys, d, tile, scores);
            tile += 1;
        }
    }

    #[target_feature(enable = "avx512f")]
    fn score_tiles<E: Element, const G: usize, const N: usize>(
        q: &[&[f32]; G],
        keys: &[E],
        d: usize,
        first: usize,
        scores: &mut [[f32; RUN]],
    ) {
        let tile = |n: usize| keys[(first + n) * TILE * d..(first + n + 1) * TILE * d].as_chunks::<TILE>().0;
        let tiles: [&[[E; TILE]]; N] = std::array::from_fn(tile);
        let mut sums = [[_mm512_setzero_ps(); N]; G];
        for i in 0..d {
            let mut lanes = [_mm512_setzero_ps(); N];
            for n in 0..N {
                lanes[n] = load(&tiles[n][i]);
            }
            for g in 0..G {
                let q = _mm512_set1_ps(q[g][i]);
                for n in 0..N {
                    sums[g][n] = _mm512_fmadd_ps(q, lanes[n], sums[g][n]);
                }
            }
        }
        for g in 0..G {
            let (out, _) = scores[g].as_chunks_mut::<TILE>();
            for n in 0..N {
                store(sums[g][n], &mut out[first + n]);
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn weigh<E: Element>(weights: &[[f32; RUN]], values: &[E], d: usize, sums: &mut [f32]) {
        match weights.len() {
            1 => weigh_heads::<E, 1>(weights, values, d, sums),
            2 => weigh_heads::<E, 2>(weights, values, d, sums),
            3 => weigh_heads::<E, 3>(weights, values, d, sums),
            _ => weigh_heads::<E, QUERIES>(weights, values, d, sums),
        }
    }

    #[target_feature(enable = "avx512f")]
    fn weigh_heads<E: Element, const G: usize>(weights: &[[f32; RUN]], values: &[E], d: usize, sums: &mut [f32]) {
        let mut column = 0;
        while d - column >= 64 {
            weigh_columns::<E, G, 4>(weights, values, d, column, sums);
            column += 64;
        }
        while column < d {
            weigh_columns::<E, G, 1>(weights, values, d, column, sums);
            column += 16;
        }
    }

    /// Columns `first..first + 16 · N` of the sums.
    #[target_feature(enable = "avx512f")]
    fn weigh_columns<E: Element, const G: usize, const N: usize>(
        weights: &[[f32; RUN]],
        values: &[E],
        d: usize,
        first: usize,
        sums: &mut [f32],
    ) {
        let weights: [&[f32; RUN]; G] = std::array::from_fn(|g| &weights[g]);
        let mut totals = [[_mm512_setzero_ps(); N]; G];
        for (token, value) in values.chunks_exact(d).take(RUN).enumerate() {
            let (value, _) = value[first..first + 16 * N].as_chunks::<16>();
            let mut lanes = [_mm512_setzero_ps(); N];
            for n in 0..N {
                lanes[n] = load(&value[n]);
            }
            for g in 0..G {
                let weight = _mm512_set1_ps(weights[g][token]);
                for n in 0..N {
                    totals[g][n] = _mm512_fmadd_ps(weight, lanes[n], totals[g][n]);
                }
            }
        }
        for g in 0..G {
            let (out, _) = sums[g * d + first..g * d + first + 16 * N].as_chunks_mut::<16>();
            for n in 0..N {
                store(totals[g][n], &mut out[n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use half::f16;

    #[test]
    fn portable_and_chosen_kernels_agree() {
        let mut rng = Rng::new(34, 0);
        for (d, group) in [(64, 3), (16, 4), (80, 1), (48, 2)] {
            let num = 5 * TILE;
            let exact = rng.normals(num * d, 1.0);
            let halves: Vec<f16> = exact.iter().map(|x| f16::from_f32(*x)).collect();
            let q = rng.normals(group * d, 1.0);
            agree(&q, &exact, d);
            agree(&q, &halves, d);
        }
    }

    /// Both kernels on `x` as keys and as values.
    fn agree<E: Element>(q: &[f32], x: &[E], d: usize) {
        let (group, num) = (q.len() / d, x.len() / d);
        let [mut a, mut b] = [[[0.0f32; RUN]; QUERIES]; 2];
        score(q, x, d, &mut a[..group]);
        score_portable(q, x, d, &mut b[..group]);
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(a.iter().zip(&b).all(|(a, b)| close(a, b)) && a[0][num - 1] != 0.0);
        let [mut c, mut e] = [vec![f32::NAN; group * d], vec![f32::NAN; group * d]];
        weigh(&a[..group], x, d, &mut c);
        weigh_portable(&a[..group], x, d, &mut e);
        assert!(c.iter().zip(&e).all(|(a, b)| (a - b).abs() < 2e-3), "{c:?} {e:?}");
    }
}
