//! Keys and values of the tokens that a sequence has already been through.

use crate::Config;
use half::f16;
use tunesmith_tensor::ops::attention::{self, Heads, Segment};
use tunesmith_tensor::ops::attention_decode::{self, Element, KeyValues};
use tunesmith_tensor::{Device, Tensor};

/// The cache of one sequence: for each layer the keys and values of its first [`KvCache::len`] tokens. Memory follows the
/// number of tokens, not the capacity.
#[derive(Debug)]
pub struct KvCache {
    layers: Layers,
    len: usize,
    capacity: usize,
    heads: Heads,
    /// Keys and values of one layer as rows, for prompts that continue a cached sequence.
    k: Tensor,
    v: Tensor,
}

#[derive(Debug)]
enum Layers {
    Exact(Vec<KeyValues<f32>>),
    Half(Vec<KeyValues<f16>>),
    /// Rows k and v [T, K·D] where the model is, in its type.
    Device(Vec<(Tensor, Tensor)>),
}

impl KvCache {
    /// An empty cache in f32 for up to `capacity` tokens: generation computes what a pass over the whole text computes.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self::of(Layers::Exact(empty(config)), config, capacity)
    }

    /// An empty cache in f16: half the memory and half the reading, in the precision of weights of 8 bits.
    pub fn half(config: &Config, capacity: usize) -> Self {
        Self::of(Layers::Half(empty(config)), config, capacity)
    }

    fn of(layers: Layers, config: &Config, capacity: usize) -> Self {
        Self { layers, len: 0, capacity, heads: heads(config), k: Tensor::default(), v: Tensor::default() }
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
            Layers::Exact(layers) => layers.iter().map(KeyValues::bytes).sum(),
            Layers::Half(layers) => layers.iter().map(KeyValues::bytes).sum(),
            Layers::Device(layers) => layers.iter().map(|(k, v)| k.capacity_bytes() + v.capacity_bytes()).sum(),
        }
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Keys and values of all layers on a GPU, with room for one more token; `None` on the processor and while there are none.
    pub(crate) fn device_rows(&mut self) -> Option<&mut [(Tensor, Tensor)]> {
        let Layers::Device(layers) = &mut self.layers else { return None };
        assert!(self.len < self.capacity, "the cache holds {} tokens", self.capacity);
        layers.iter_mut().for_each(|(k, v)| [k, v].into_iter().for_each(|all| make_room(all, self.len, 1)));
        Some(layers)
    }

    /// Writes `k` and `v` [T, K·D] of `layer` behind the cached tokens. An empty cache goes where they are.
    pub(crate) fn write(&mut self, layer: usize, k: &Tensor, v: &Tensor) {
        assert!(self.len + k.rows() <= self.capacity, "the cache holds {} tokens", self.capacity);
        let num_layers = match &self.layers {
            Layers::Exact(layers) => layers.len(),
            Layers::Half(layers) => layers.len(),
            Layers::Device(layers) => layers.len(),
        };
        if k.device() != Device::Cpu && !matches!(self.layers, Layers::Device(_)) {
            assert_eq!(self.len, 0, "what is cached is on the processor");
            self.layers = Layers::Device((0..num_layers).map(|_| <(Tensor, Tensor)>::default()).collect());
        }
        match &mut self.layers {
            Layers::Exact(layers) => layers[layer].write(self.len, k, v),
            Layers::Half(layers) => layers[layer].write(self.len, k, v),
            Layers::Device(layers) => {
                let (all_k, all_v) = &mut layers[layer];
                append(all_k, self.len, k);
                append(all_v, self.len, v);
            }
        }
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
        match &self.layers {
            Layers::Exact(layers) => attention_decode::forward(q, &layers[layer], num_keys, o, scratch),
            Layers::Half(layers) => attention_decode::forward(q, &layers[layer], num_keys, o, scratch),
            Layers::Device(layers) => {
                let (k, v) = &layers[layer];
                let segments = [Segment { queries: 0..q.rows(), keys: 0..num_keys }];
                attention::forward_cached(attention::Qkv { q, k, v, segments: &segments, heads: self.heads }, o);
            }
        }
    }

    /// As [`KvCache::write`]; returns keys and values of all tokens as rows in f32, the new ones as they came.
    pub(crate) fn extend<'a>(&'a mut self, layer: usize, k: &'a Tensor, v: &'a Tensor) -> (&'a Tensor, &'a Tensor) {
        self.write(layer, k, v);
        if let Layers::Device(layers) = &self.layers {
            return (&layers[layer].0, &layers[layer].1);
        }
        if self.len == 0 {
            return (k, v);
        }
        for (all, new) in [(&mut self.k, k), (&mut self.v, v)] {
            all.resize(&[self.len + new.rows(), new.cols()]);
            all.data_mut()[self.len * new.cols()..].copy_from_slice(new.data());
        }
        match &self.layers {
            Layers::Exact(layers) => layers[layer].read(self.len, &mut self.k, &mut self.v),
            Layers::Half(layers) => layers[layer].read(self.len, &mut self.k, &mut self.v),
            Layers::Device(_) => {}
        }
        (&self.k, &self.v)
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

fn heads(config: &Config) -> Heads {
    Heads { num_heads: config.num_attention_heads, num_kv_heads: config.num_key_value_heads, head_dim: config.head_dim }
}

/// One empty cache for each layer.
fn empty<E: Element>(config: &Config) -> Vec<KeyValues<E>> {
    (0..config.num_hidden_layers).map(|_| KeyValues::new(heads(config))).collect()
}

/// Tokens by which a cache on a GPU grows.
const STEP: usize = 256;

/// Puts the rows of `new` behind the first `kept` rows of `all`; what was there behind them is forgotten.
fn append(all: &mut Tensor, kept: usize, new: &Tensor) {
    if all.device() != new.device() {
        *all = Tensor::zeros_on(&new.device(), new.dtype(), &[0, new.cols()]);
    }
    make_room(all, kept, new.rows());
    all.copy_rows(kept, new, new.rows());
}

/// Makes `all` as many rows as the first `kept`, which stay, and `more`.
fn make_room(all: &mut Tensor, kept: usize, more: usize) {
    let (rows, cols) = (kept + more, all.cols());
    if all.capacity_bytes() < all.dtype().bytes() * rows * cols {
        let mut larger = Tensor::zeros_on(&all.device(), all.dtype(), &[rows.next_multiple_of(STEP), cols]);
        if kept > 0 {
            larger.copy_rows(0, all, kept);
        }
        *all = larger;
    }
    all.resize(&[rows, cols]);
}
