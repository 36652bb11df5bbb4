//! Keys and values of the tokens that a sequence has already been through.

use crate::Config;
use tunesmith_tensor::Tensor;
use tunesmith_tensor::ops::attention::{self, Heads, Segment};
use tunesmith_tensor::ops::attention_decode::{self, KeyValues};

/// The cache of one sequence: for each layer the keys and values of its first [`KvCache::len`] tokens. Memory follows the
/// number of tokens, not the capacity.
#[derive(Debug)]
pub struct KvCache {
    layers: Layers,
    len: usize,
    capacity: usize,
    /// Keys and values of one layer in f32, for prompts that continue a cached sequence in f16.
    k: Tensor,
    v: Tensor,
}

#[derive(Debug)]
enum Layers {
    /// Rows of f32: k and v [T, K·D].
    Exact(Vec<(Tensor, Tensor)>),
    Half(Vec<KeyValues>),
}

impl KvCache {
    /// An empty cache in f32 for up to `capacity` tokens: generation computes what a pass over the whole text computes.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let layers = (0..config.num_hidden_layers).map(|_| <(Tensor, Tensor)>::default()).collect();
        Self { layers: Layers::Exact(layers), len: 0, capacity, k: Tensor::default(), v: Tensor::default() }
    }

    /// An empty cache in f16: half the memory and half the reading, in the precision of weights of 8 bits.
    pub fn half(config: &Config, capacity: usize) -> Self {
        let heads = Heads {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        let layers = (0..config.num_hidden_layers).map(|_| KeyValues::new(heads)).collect();
        Self { layers: Layers::Half(layers), ..Self::new(config, capacity) }
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
        match &self.layers {
            Layers::Exact(layers) => layers.iter().map(|(k, v)| k.capacity_bytes() + v.capacity_bytes()).sum(),
            Layers::Half(layers) => layers.iter().map(KeyValues::bytes).sum(),
        }
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes `k` and `v` [T, K·D] of `layer` behind the cached tokens.
    pub(crate) fn write(&mut self, layer: usize, k: &Tensor, v: &Tensor) {
        assert!(self.len + k.rows() <= self.capacity, "the cache holds {} tokens", self.capacity);
        match &mut self.layers {
            Layers::Exact(layers) => {
                let (all_k, all_v) = &mut layers[layer];
                for (all, new) in [(all_k, k), (all_v, v)] {
                    append(all, self.len, new);
                }
            }
            Layers::Half(layers) => layers[layer].write(self.len, k, v),
        }
    }

    /// Attention of the last few tokens, `q` [T, H·D], over the first `num_keys` tokens of `layer`, theirs included: `o` [T, H·D].
    pub(crate) fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        num_keys: usize,
        heads: Heads,
        o: &mut Tensor,
        lse: &mut Tensor,
        scratch: &mut attention_decode::Scratch,
    ) {
        match &self.layers {
            Layers::Exact(layers) => {
                let (k, v) = &layers[layer];
                let segments = [Segment { queries: 0..q.rows(), keys: 0..num_keys }];
                attention::forward(q, k, v, &segments, heads, o, lse);
            }
            Layers::Half(layers) => attention_decode::forward(q, &layers[layer], num_keys, o, scratch),
        }
    }

    /// As [`KvCache::write`]; returns keys and values of all tokens as rows in f32, the new ones as they came.
    pub(crate) fn extend<'a>(&'a mut self, layer: usize, k: &'a Tensor, v: &'a Tensor) -> (&'a Tensor, &'a Tensor) {
        self.write(layer, k, v);
        match &self.layers {
            Layers::Exact(layers) => (&layers[layer].0, &layers[layer].1),
            Layers::Half(_) if self.len == 0 => (k, v),
            Layers::Half(layers) => {
                for (all, new) in [(&mut self.k, k), (&mut self.v, v)] {
                    all.resize(&[self.len + new.rows(), new.cols()]);
                    all.data_mut()[self.len * new.cols()..].copy_from_slice(new.data());
                }
                layers[layer].read(self.len, &mut self.k, &mut self.v);
                (&self.k, &self.v)
            }
        }
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Tokens by which a cache in f32 grows.
const STEP: usize = 256;

/// Puts the rows of `new` behind the first `kept` rows of `all`; what was there behind them is forgotten.
fn append(all: &mut Tensor, kept: usize, new: &Tensor) {
    let (rows, cols) = (kept + new.rows(), new.cols());
    if all.capacity_bytes() < 4 * rows * cols {
        let mut larger = Tensor::zeros(&[rows.next_multiple_of(STEP), cols]);
        larger.data_mut()[..kept * cols].copy_from_slice(&all.data()[..kept * cols]);
        *all = larger;
    }
    all.resize(&[rows, cols]);
    all.data_mut()[kept * cols..].copy_from_slice(new.data());
}
