//! Attention of a few new tokens over the cached keys and values of one sequence (grouped heads, causal):
//! o = softmax(q kᵀ / √D) v, where the last of T queries sees all keys, the one before all but the last, and so on.
//!
//! Reading the cache is what this costs, so keys and values may be kept in f16, and each is read once for all query
//! heads that share it. A long context is cut into runs of [`RUN`] keys that threads work on independently; their
//! partial results are merged in order ("Flash-Decoding for long-context inference", Dao et al., 2023), so the result
//! does not depend on the number of threads.

pub use crate::kv::{Element, KeyValues};
use crate::{cpu, team};
use crate::{kv::RUN, tensor::Tensor};

/// Buffers for partial results, kept from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    /// For each run of keys, key/value head, query row and head of the group: D sums, then maximum and total.
    partial: Vec<f32>,
}

/// `o` [T, H·D] from `q` [T, H·D] and the first `num_keys` tokens of `cache`, of which the last T belong to `q`.
///
/// # Panics
/// When shapes do not fit, or the cache holds fewer tokens.
#[allow(unsafe_code)]
pub fn forward<E: Element>(q: &Tensor, cache: &KeyValues<E>, num_keys: usize, o: &mut Tensor, scratch: &mut Scratch) {
    let heads = cache.heads;
    let (d, group, num_rows) = (heads.head_dim, heads.group(), q.rows());
    assert_eq!(q.cols(), heads.q_cols());
    assert!(num_rows <= num_keys && num_keys <= cache.room(), "{num_rows} queries, {num_keys} keys");
    o.resize(q.shape());
    let num_runs = num_keys.div_ceil(RUN);
    let record = group * (d + 2);
    scratch.partial.resize(num_runs * heads.num_kv_heads * num_rows * record, 0.0);
    let records = cpu::view::Shared::new(&mut scratch.partial);
    team::for_each(num_runs * heads.num_kv_heads, |task| {
        let (run, kv_head) = (task / heads.num_kv_heads, task % heads.num_kv_heads);
        let first = run * RUN;
        let keys = &cache.per_head[kv_head].k::<E>()[first * d..];
        let values = &cache.per_head[kv_head].v::<E>()[first * d..];
        for row in 0..num_rows {
            let seen = (num_keys - num_rows + row + 1).saturating_sub(first).min(RUN);
            let q = &q.row(row)[kv_head * group * d..(kv_head + 1) * group * d];
            // SAFETY: one record for each task and row, and no two of them overlap.
            let record = unsafe { records.slice((task * num_rows + row) * record, record) };
            cpu::attention_decode::partial(q, keys, values, seen, heads.scale(), d, record);
        }
    });
    let partial = &scratch.partial;
    for row in 0..num_rows {
        for (kv_head, o) in o.row_mut(row).chunks_exact_mut(group * d).enumerate() {
            let runs = (0..num_runs).map(|run| (run * heads.num_kv_heads + kv_head) * num_rows + row);
            cpu::attention_decode::merge(runs.map(|at| &partial[at * record..(at + 1) * record]), d, o);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Heads;
    use crate::ops::attention::{Qkv, Segment, forward as reference};
    use crate::rng::Rng;
    use half::f16;

    fn random(rng: &mut Rng, rows: usize, cols: usize) -> Tensor {
        Tensor::from_slice(&[rows, cols], &rng.normals(rows * cols, 1.0))
    }

    /// As it comes back from the cache.
    fn rounded<E: Element>(x: &Tensor) -> Tensor {
        let mut values = Vec::new();
        E::narrow(x.data(), |_, part| values.extend(part.iter().map(|x| x.to_f32())));
        Tensor::from_slice(x.shape(), &values)
    }

    fn matches_the_training_kernel<E: Element>() {
        let (mut rng, mut scratch) = (Rng::new(31, 0), Scratch::default());
        for (num_heads, num_kv_heads, head_dim) in [(9, 3, 64), (4, 2, 6), (8, 1, 16), (5, 1, 80), (2, 2, 128)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            for (num_rows, num_keys) in [(1, 1), (1, 15), (3, 16), (2, 257), (4, 260), (1, 700)] {
                let q = random(&mut rng, num_rows, heads.q_cols());
                let [k, v] = [(); 2].map(|_| random(&mut rng, num_keys, heads.kv_cols()));
                let mut cache = KeyValues::<E>::new(heads);
                cache.write(0, &k, &v);
                let mut o = Tensor::default();
                forward(&q, &cache, num_keys, &mut o, &mut scratch);
                let (mut want, mut lse) = (Tensor::default(), Tensor::default());
                let segments = [Segment { queries: 0..num_rows, keys: 0..num_keys }];
                let (k, v) = (rounded::<E>(&k), rounded::<E>(&v));
                reference(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut want, &mut lse);
                for (a, b) in o.data().iter().zip(want.data()) {
                    assert!((a - b).abs() < 2e-6, "{heads:?} {num_rows} {num_keys}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn both_caches_match_the_training_kernel() {
        matches_the_training_kernel::<f16>();
        matches_the_training_kernel::<f32>();
    }

    fn tokens_may_come_one_by_one<E: Element>() {
        let mut rng = Rng::new(32, 0);
        let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 24 };
        let [k, v] = [(); 2].map(|_| random(&mut rng, 300, 48));
        let part = |t: &Tensor, rows: std::ops::Range<usize>| {
            Tensor::from_slice(&[rows.len(), 48], &t.data()[rows.start * 48..rows.end * 48])
        };
        let mut cache = KeyValues::<E>::new(heads);
        cache.write(0, &part(&k, 7..250), &part(&v, 7..250));
        for token in (0..240).chain(230..300) {
            cache.write(token, &part(&k, token..token + 1), &part(&v, token..token + 1));
        }
        let (mut got_k, mut got_v) = (Tensor::zeros(&[301, 48]), Tensor::zeros(&[301, 48]));
        cache.read(300, &mut got_k, &mut got_v);
        assert_eq!(part(&got_k, 0..300).data(), rounded::<E>(&k).data());
        assert_eq!(part(&got_v, 0..300).data(), rounded::<E>(&v).data());
        assert_eq!(got_k.row(300), &[0.0; 48]);
        assert_eq!(cache.bytes(), 2 * 2 * 512 * 24 * size_of::<E>());
    }

    #[test]
    fn tokens_may_come_one_by_one_and_be_forgotten() {
        tokens_may_come_one_by_one::<f16>();
        tokens_may_come_one_by_one::<f32>();
    }

    #[test]
    fn what_is_too_large_for_f16_saturates() {
        let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 24 };
        let mut cache = KeyValues::<f16>::new(heads);
        cache.write(0, &Tensor::from_slice(&[1, 48], &[1e9; 48]), &Tensor::from_slice(&[1, 48], &[-1e9; 48]));
        let (mut k, mut v) = (Tensor::zeros(&[1, 48]), Tensor::zeros(&[1, 48]));
        cache.read(1, &mut k, &mut v);
        assert_eq!((k.row(0)[0], v.row(0)[47]), (65504.0, -65504.0));
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let mut rng = Rng::new(33, 0);
        let heads = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 };
        let q = random(&mut rng, 2, heads.q_cols());
        let [k, v] = [(); 2].map(|_| random(&mut rng, 1000, heads.kv_cols()));
        let mut cache = KeyValues::<f16>::new(heads);
        cache.write(0, &k, &v);
        let results = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut o = Tensor::default();
            pool.install(|| team::scope(|| forward(&q, &cache, 1000, &mut o, &mut Scratch::default())));
            o
        });
        assert_eq!(results[0].data(), results[1].data());
    }
}
