//! Attention on the emulated device against the processor: packed documents, grouped heads, caches, every size of head.

use super::kernels::Source;
use super::lab::{Lab, labs};
use crate::ops::attention::{self, Heads, Segment};
use crate::{Dtype, Tensor};

/// Forward and backward over documents of these `lengths`.
fn compare(lab: &mut Lab, heads: Heads, lengths: &[usize]) {
    let n = lengths.iter().sum();
    let segments = Segment::documents(lengths);
    let [q, d_o] = [(); 2].map(|()| lab.random(&[n, heads.q_cols()], 1.0));
    let [k, v] = [(); 2].map(|()| lab.random(&[n, heads.kv_cols()], 1.0));
    let [mut o, mut lse, mut d_q, mut d_k, mut d_v] = [(); 5].map(|()| Tensor::default());
    attention::forward(&q, &k, &v, &segments, heads, &mut o, &mut lse);
    attention::backward(&q, &k, &v, &o, &lse, &d_o, &segments, heads, &mut d_q, &mut d_k, &mut d_v);

    let [gq, gk, gv, gd_o] = [&q, &k, &v, &d_o].map(|t| lab.up(t));
    let [mut go, mut glse, mut gd_q, mut gd_k, mut gd_v] = [(); 5].map(|()| Tensor::default());
    attention::forward(&gq, &gk, &gv, &segments, heads, &mut go, &mut glse);
    attention::backward(&gq, &gk, &gv, &go, &glse, &gd_o, &segments, heads, &mut gd_q, &mut gd_k, &mut gd_v);
    for (what, got, want) in
        [("o", &go, &o), ("lse", &glse, &lse), ("d_q", &gd_q, &d_q), ("d_k", &gd_k, &d_k), ("d_v", &gd_v, &d_v)]
    {
        lab.close(&format!("{what} of {heads:?} over {lengths:?}"), got, want, 2e-6);
    }
}

#[test]
fn documents_and_groups() {
    for mut lab in labs(11) {
        for (num_heads, num_kv_heads) in [(2, 2), (4, 1)] {
            compare(&mut lab, Heads { num_heads, num_kv_heads, head_dim: 16 }, &[3, 1, 70, 64, 130]);
        }
    }
}

#[test]
fn every_size_of_head() {
    for mut lab in labs(12) {
        let sizes: &[usize] =
            if lab.dtype == Dtype::BF16 { Source::Attention.head_dims() } else { &[12, 33, 128, 256] };
        for head_dim in sizes {
            compare(&mut lab, Heads { num_heads: 2, num_kv_heads: 1, head_dim: *head_dim }, &[37, 68]);
        }
    }
}

/// Sequences of (new queries, keys, rows of the cache before the first key), whose keys may lie anywhere.
fn behind_caches(lab: &mut Lab, heads: Heads, sequences: &[(usize, usize, usize)]) {
    let mut segments = Vec::new();
    let (mut num_queries, mut rows) = (0, 0);
    for (queries, keys, before) in sequences {
        let first = rows + before;
        segments.push(Segment { queries: num_queries..num_queries + queries, keys: first..first + keys });
        (num_queries, rows) = (num_queries + queries, first + keys);
    }
    let q = lab.random(&[num_queries, heads.q_cols()], 1.0);
    let [k, v] = [(); 2].map(|()| lab.random(&[rows + 3, heads.kv_cols()], 1.0));
    let (mut o, mut go) = (Tensor::default(), Tensor::default());
    attention::forward_cached(&q, &k, &v, &segments, heads, &mut o);
    let [gq, gk, gv] = [&q, &k, &v].map(|t| lab.up(t));
    attention::forward_cached(&gq, &gk, &gv, &segments, heads, &mut go);
    lab.close(&format!("{heads:?}, {sequences:?}"), &go, &o, 2e-6);
}

#[test]
fn queries_behind_a_cache() {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
    for mut lab in labs(13) {
        for (num_queries, num_keys) in [(1, 1), (1, 300), (5, 70), (17, 40), (70, 200)] {
            behind_caches(&mut lab, heads, &[(num_queries, num_keys, 0)]);
        }
    }
}

#[test]
fn sequences_of_unequal_length_behind_their_caches() {
    for mut lab in labs(15) {
        for (num_heads, num_kv_heads, head_dim) in [(4, 2, 32), (2, 1, 16), (9, 1, 16)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            behind_caches(&mut lab, heads, &[(1, 5, 0), (1, 700, 9), (1, 1, 70), (1, 256, 0), (1, 257, 1)]);
            behind_caches(&mut lab, heads, &[(3, 3, 0), (1, 300, 9), (16, 20, 0)]);
        }
        behind_caches(
            &mut lab,
            Heads { num_heads: 4, num_kv_heads: 2, head_dim: 16 },
            &[(70, 90, 4), (2, 300, 0), (1, 1, 0)],
        );
    }
}

#[test]
#[should_panic(expected = "head_dim is 48")]
fn other_heads_are_refused() {
    let [_, mut lab] = labs(14);
    compare(&mut lab, Heads { num_heads: 1, num_kv_heads: 1, head_dim: 48 }, &[4]);
}
