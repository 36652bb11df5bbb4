//! Keys and values of the tokens that a sequence has already been through.

use crate::Config;
use tunesmith_tensor::Tensor;
use tunesmith_tensor::ops::attention::Heads;
use tunesmith_tensor::ops::attention_decode::KeyValues;

/// The cache of one sequence: for each layer the keys and values of its first [`KvCache::len`] tokens, in f16. Memory
/// follows the number of tokens, not the capacity.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<KeyValues>,
    len: usize,
    capacity: usize,
    /// Keys and values of one layer in f32, for prompts that continue a cached sequence.
    k: Tensor,
    v: Tensor,
}

impl KvCache {
    /// An empty cache for up to `capacity` tokens.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let heads = Heads {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        let layers = (0..config.num_hidden_layers).map(|_| KeyValues::new(heads)).collect();
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
        self.layers.iter().map(KeyValues::bytes).sum()
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes `k` and `v` [T, K·D] of `layer` behind the cached tokens and returns what the layer now holds.
    pub(crate) fn write(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> &KeyValues {
        assert!(self.len + k.rows() <= self.capacity, "the cache holds {} tokens", self.capacity);
        self.layers[layer].write(self.len, k, v);
        &self.layers[layer]
    }

    /// Keys and values of `layer`.
    pub(crate) fn layer(&self, layer: usize) -> &KeyValues {
        &self.layers[layer]
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
        self.layers[layer].read(self.len, &mut self.k, &mut self.v);
        (&self.k, &self.v)
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
