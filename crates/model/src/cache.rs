//! Keys and values of the tokens that a sequence has already been through.

use crate::Config;
use half::f16;
use tunesmith_tensor::Tensor;
use tunesmith_tensor::ops::attention::Heads;
use tunesmith_tensor::ops::attention_decode::{self, Element, KeyValues};

/// The cache of one sequence: for each layer the keys and values of its first [`KvCache::len`] tokens. Memory follows the
/// number of tokens, not the capacity.
#[derive(Debug)]
pub struct KvCache {
    layers: Layers,
    len: usize,
    capacity: usize,
    /// Keys and values of one layer as rows, for prompts that continue a cached sequence.
    k: Tensor,
    v: Tensor,
}

#[derive(Debug)]
enum Layers {
    Exact(Vec<KeyValues<f32>>),
    Half(Vec<KeyValues<f16>>),
}

/// The same for caches of either precision.
macro_rules! either {
    ($layers:expr, $caches:ident => $result:expr) => {
        match $layers {
            Layers::Exact($caches) => $result,
            Layers::Half($caches) => $result,
        }
    };
}

impl KvCache {
    /// An empty cache in f32 for up to `capacity` tokens: generation computes what a pass over the whole text computes.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self::of(Layers::Exact(empty(config)), capacity)
    }

    /// An empty cache in f16: half the memory and half the reading, in the precision of weights of 8 bits.
    pub fn half(config: &Config, capacity: usize) -> Self {
        Self::of(Layers::Half(empty(config)), capacity)
    }

    fn of(layers: Layers, capacity: usize) -> Self {
        Self { layers, len: 0, capacity, k: Tensor::default(), v: Tensor::default() }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Lets it hold up to `capacity` tokens, never fewer than it has.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity.max(self.len);
    }

    /// Bytes of memory held for keys and values.
    pub fn bytes(&self) -> usize {
        either!(&self.layers, layers => layers.iter().map(KeyValues::bytes).sum())
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes `k` and `v` [T, K·D] of `layer` behind the cached tokens.
    pub(crate) fn write(&mut self, layer: usize, k: &Tensor, v: &Tensor) {
        assert!(self.len + k.rows() <= self.capacity, "the cache holds {} tokens", self.capacity);
        either!(&mut self.layers, layers => layers[layer].write(self.len, k, v));
    }

    /// Attention of the last few tokens, `q` [T, H·D], over the first `num_keys` tokens of `layer`, theirs included: `o` [T, H·D].
    pub(crate) fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        num_keys: usize,
        o: &mut Tensor,
        scratch: &mut attention_decode::Scratch,
    ) {
        either!(&self.layers, layers => attention_decode::forward(q, &layers[layer], num_keys, o, scratch));
    }

    /// As [`KvCache::write`]; returns keys and values of all tokens as rows in f32, the new ones as they came.
    pub(crate) fn extend<'a>(&'a mut self, layer: usize, k: &'a Tensor, v: &'a Tensor) -> (&'a Tensor, &'a Tensor) {
        self.write(layer, k, v);
        if self.len == 0 {
            return (k, v);
        }
        for (all, new) in [(&mut self.k, k), (&mut self.v, v)] {
            all.resize(&[self.len + new.rows(), new.cols()]);
            all.data_mut()[self.len * new.cols()..].copy_from_slice(new.data());
        }
        either!(&self.layers, layers => layers[layer].read(self.len, &mut self.k, &mut self.v));
        (&self.k, &self.v)
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// One empty cache for each layer.
fn empty<E: Element>(config: &Config) -> Vec<KeyValues<E>> {
    let heads = Heads {
        num_heads: config.num_attention_heads,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    (0..config.num_hidden_layers).map(|_| KeyValues::new(heads)).collect()
}
