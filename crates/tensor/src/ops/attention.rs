//! Causal scaled dot-product attention with grouped heads over independent segments:
//! o = softmax(q kᵀ / √D, causal) v, for each segment and query head; query head h reads key/value head h / (H / K).

pub use crate::contract::{Heads, Qkv, Segment};
use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// Bytes of the tiles that each thread keeps.
pub fn thread_bytes(head_dim: usize) -> usize {
    cpu::attention::tile_bytes(head_dim)
}

/// Bytes of the sums that the backward pass of a document of `tokens` tokens keeps beside its gradients.
pub fn shared_bytes(tokens: usize, heads: Heads) -> usize {
    cpu::attention::partial_bytes(&Segment::documents(&[tokens]), heads)
}

fn check(Qkv { q, k, v, segments, heads }: Qkv<'_>) {
    assert!(heads.num_kv_heads > 0 && heads.num_heads.is_multiple_of(heads.num_kv_heads), "{heads:?}");
    assert_eq!(q.cols(), heads.q_cols());
    assert!(k.cols() == heads.kv_cols() && v.cols() == heads.kv_cols());
    let mut next = 0;
    for s in segments {
        assert!(s.queries.start == next && s.queries.end <= q.rows(), "queries of segments follow each other: {s:?}");
        assert!(s.keys.end <= k.rows().min(v.rows()) && s.queries.len() <= s.keys.len(), "{s:?}");
        next = s.queries.end;
    }
    assert_eq!(next, q.rows(), "segments cover all queries");
}

/// `o` [T, H·D] = attention; `lse` [T, H] (log of the sum of exponentials of each row of scores) is kept for the
/// backward pass.
pub fn forward(qkv: Qkv<'_>, o: &mut Tensor, lse: &mut Tensor) {
    check(qkv);
    let Qkv { q, heads, .. } = qkv;
    if let Some(gpu) = q.gpu() {
        return cuda::attention::forward(gpu, qkv, o, lse);
    }
    o.resize_like(q, q.shape());
    lse.resize_like(q, &[q.rows(), heads.num_heads]);
    cpu::attention::forward(qkv, o.data_mut(), lse.data_mut());
}

/// As [`forward`] without what a backward pass needs: for new tokens of one or several sequences over cached keys and
/// values.
pub fn forward_cached(qkv: Qkv<'_>, o: &mut Tensor) {
    if let Some(gpu) = qkv.q.gpu().filter(|_| cuda::attention_decode::takes(qkv.segments, qkv.heads)) {
        check(qkv);
        return cuda::attention_decode::attention(gpu, qkv, o);
    }
    forward(qkv, o, &mut Tensor::default());
}

/// `[d_q, d_k, d_v]` of the shapes of q, k and v = gradients for `d_o` [T, H·D]; `o` and `lse` are what [`forward`]
/// left. Segments must have as many queries as keys and cover all rows (training has no cache).
pub fn backward(qkv: Qkv<'_>, o: &Tensor, lse: &Tensor, d_o: &Tensor, gradients: [&mut Tensor; 3]) {
    check(qkv);
    let Qkv { q, k, v, segments, .. } = qkv;
    assert!(segments.iter().all(|s| s.queries == s.keys) && k.rows() == q.rows(), "training has no cache");
    let [d_q, d_k, d_v] = gradients;
    d_q.resize_like(q, q.shape());
    d_k.resize_like(k, k.shape());
    d_v.resize_like(v, v.shape());
    if let Some(gpu) = q.gpu() {
        return cuda::attention::backward(gpu, qkv, o, lse, d_o, [d_q, d_k, d_v]);
    }
    let gradients = [d_q, d_k, d_v].map(Tensor::data_mut);
    cpu::attention::backward(qkv, o.data(), lse.data(), d_o.data(), gradients);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check as check_gradient, check_close, to_f64, weighted};
    use crate::rng::Rng;
    use proptest::prelude::*;

    fn naive(q: &[f64], k: &[f64], v: &[f64], segments: &[Segment], heads: Heads) -> Vec<f64> {
        let (qc, kc, hd) = (heads.q_cols(), heads.kv_cols(), heads.head_dim);
        let mut o = vec![0.0; q.len()];
        for s in segments {
            for h in 0..heads.num_heads {
                for (i, row) in s.queries.clone().enumerate() {
                    let q = &q[row * qc + h * hd..][..hd];
                    let head =
                        |x: &[f64], j: usize| x[(s.keys.start + j) * kc + h / heads.group() * hd..][..hd].to_vec();
                    let seen = s.keys.len() - s.queries.len() + i + 1;
                    let scores: Vec<f64> = (0..seen)
                        .map(|j| q.iter().zip(head(k, j)).map(|(a, b)| a * b).sum::<f64>() / (hd as f64).sqrt())
                        .collect();
                    let largest = scores.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
                    let total: f64 = scores.iter().map(|x| (x - largest).exp()).sum();
                    for (j, score) in scores.iter().enumerate() {
                        let p = (score - largest).exp() / total;
                        for (c, x) in head(v, j).iter().enumerate() {
                            o[row * qc + h * hd + c] += p * x;
                        }
                    }
                }
            }
        }
        o
    }

    fn random(rng: &mut Rng, rows: usize, cols: usize) -> Tensor {
        Tensor::from_slice(&[rows, cols], &rng.normals(rows * cols, 1.0))
    }

    #[test]
    fn gradients_match_differences() {
        let mut rng = Rng::new(12, 0);
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 6 };
        let segments = Segment::documents(&[3, 1, 7]);
        let [q, d_o] = [(); 2].map(|_| random(&mut rng, 11, 24));
        let [k, v] = [(); 2].map(|_| random(&mut rng, 11, 12));
        let (mut o, mut lse) = (Tensor::default(), Tensor::default());
        forward(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut o, &mut lse);
        let (mut d_q, mut d_k, mut d_v) = (Tensor::default(), Tensor::default(), Tensor::default());
        backward(
            Qkv { q: &q, k: &k, v: &v, segments: &segments, heads },
            &o,
            &lse,
            &d_o,
            [&mut d_q, &mut d_k, &mut d_v],
        );
        let [q64, k64, v64] = [&q, &k, &v].map(|t| to_f64(t.data()));
        let loss = |q: &[f64], k: &[f64], v: &[f64]| weighted(&naive(q, k, v, &segments, heads), d_o.data());
        check_gradient("d_q", q.data(), d_q.data(), 1e-5, |x| loss(x, &k64, &v64));
        check_gradient("d_k", k.data(), d_k.data(), 1e-5, |x| loss(&q64, x, &v64));
        check_gradient("d_v", v.data(), d_v.data(), 1e-5, |x| loss(&q64, &k64, x));
    }

    #[test]
    fn several_tiles_and_a_cache_match_naive() {
        let mut rng = Rng::new(13, 0);
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 8 };
        for (num_queries, num_keys) in [(300, 300), (1, 257), (70, 200), (64, 128)] {
            let q = random(&mut rng, num_queries, 16);
            let [k, v] = [(); 2].map(|_| random(&mut rng, num_keys + 3, 8));
            let segments = [Segment { queries: 0..num_queries, keys: 2..num_keys + 2 }];
            let (mut o, mut lse) = (Tensor::default(), Tensor::default());
            forward(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut o, &mut lse);
            let want = naive(&to_f64(q.data()), &to_f64(k.data()), &to_f64(v.data()), &segments, heads);
            check_close("o", o.data(), &want, 1e-5);
        }
    }

    #[test]
    fn backward_over_several_tiles_matches_the_closed_form() {
        let mut rng = Rng::new(14, 0);
        // (query heads, key/value heads, head size, tokens): several tiles and shares, grouped heads, odd sizes.
        for (num_heads, num_kv_heads, head_dim, n) in [(2, 1, 4, 290), (3, 1, 64, 600), (4, 2, 37, 70)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            let (qc, kc) = (heads.q_cols(), heads.kv_cols());
            let q = random(&mut rng, n, qc);
            let [k, v] = [(); 2].map(|_| random(&mut rng, n, kc));
            let d_o = random(&mut rng, n, qc);
            let segments = Segment::documents(&[n]);
            let (mut o, mut lse) = (Tensor::default(), Tensor::default());
            forward(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut o, &mut lse);
            let (mut d_q, mut d_k, mut d_v) = (Tensor::default(), Tensor::default(), Tensor::default());
            backward(
                Qkv { q: &q, k: &k, v: &v, segments: &segments, heads },
                &o,
                &lse,
                &d_o,
                [&mut d_q, &mut d_k, &mut d_v],
            );
            let [q64, k64, v64, g64] = [&q, &k, &v, &d_o].map(|t| to_f64(t.data()));
            check_close("o", o.data(), &naive(&q64, &k64, &v64, &segments, heads), 1e-5);
            let (mut wq, mut wk, mut wv) = (vec![0.0; n * qc], vec![0.0; n * kc], vec![0.0; n * kc]);
            let root = (head_dim as f64).sqrt();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            for h in 0..num_heads {
                for i in 0..n {
                    let at_q = i * qc + h * head_dim..i * qc + (h + 1) * head_dim;
                    let at_k = |j: usize| j * kc + h / heads.group() * head_dim;
                    let row = |x: &[f64], j: usize| x[at_k(j)..at_k(j) + head_dim].to_vec();
                    let g = &g64[at_q.clone()];
                    let s: Vec<f64> = (0..=i).map(|j| dot(&q64[at_q.clone()], &row(&k64, j)) / root).collect();
                    let total: f64 = s.iter().map(|s| s.exp()).sum();
                    let p: Vec<f64> = s.iter().map(|s| s.exp() / total).collect();
                    let d_p: Vec<f64> = (0..=i).map(|j| dot(g, &row(&v64, j))).collect();
                    let mean = dot(&p, &d_p);
                    for j in 0..=i {
                        let d_s = p[j] * (d_p[j] - mean) / root;
                        for c in 0..head_dim {
                            wv[at_k(j) + c] += p[j] * g[c];
                            wq[at_q.start + c] += d_s * k64[at_k(j) + c];
                            wk[at_k(j) + c] += d_s * q64[at_q.start + c];
                        }
                    }
                }
            }
            check_close("d_q", d_q.data(), &wq, 1e-5);
            check_close("d_k", d_k.data(), &wk, 1e-5);
            check_close("d_v", d_v.data(), &wv, 1e-5);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn packing_changes_nothing(lengths in proptest::collection::vec(1usize..90, 1..5), seed in 0u64..1000) {
            let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 4 };
            let total: usize = lengths.iter().sum();
            let mut rng = Rng::new(seed, 0);
            let [q, k, v] = [(); 3].map(|_| random(&mut rng, total, 8));
            let (mut o, mut lse) = (Tensor::default(), Tensor::default());
            forward(Qkv { q: &q, k: &k, v: &v, segments: &Segment::documents(&lengths), heads }, &mut o, &mut lse);
            let mut start = 0;
            for n in lengths {
                let cut = |t: &Tensor| Tensor::from_slice(&[n, 8], &t.data()[start * 8..(start + n) * 8]);
                let (mut alone, mut l) = (Tensor::default(), Tensor::default());
                forward(Qkv { q: &cut(&q), k: &cut(&k), v: &cut(&v), segments: &Segment::documents(&[n]), heads }, &mut alone, &mut l);
                prop_assert_eq!(alone.data(), &o.data()[start * 8..(start + n) * 8]);
                start += n;
            }
        }
    }
}
