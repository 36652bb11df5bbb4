//! Keys and values of the tokens that a sequence has already been through.

use crate::Config;
use tunesmith_tensor::Tensor;

/// The cache of one sequence: for each layer k and v [capacity, K·D], of which the first [`KvCache::len`] rows are filled.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for up to `capacity` tokens.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let shape = [capacity, config.num_key_value_heads * config.head_dim];
        let layer = |_| (Tensor::zeros(&shape), Tensor::zeros(&shape));
        Self { layers: (0..config.num_hidden_layers).map(layer).collect(), len: 0, capacity }
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

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes `k` and `v` [T, K·D] of `layer` behind the cached rows and returns both tensors whole.
    pub(crate) fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> (&Tensor, &Tensor) {
        assert!(self.len + k.rows() <= self.capacity, "the cache holds {} tokens", self.capacity);
        let (all_k, all_v) = &mut self.layers[layer];
        let at = self.len * k.cols();
        all_k.data_mut()[at..at + k.len()].copy_from_slice(k.data());
        all_v.data_mut()[at..at + v.len()].copy_from_slice(v.data());
        (all_k, all_v)
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
