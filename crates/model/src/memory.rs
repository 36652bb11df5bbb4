//! What a pass through the model needs, from its configuration alone: buffers are sized by shapes, so their bytes are known
//! before any of them exists. `Workspace::num_bytes` counts what is really there, and a test holds the two together.

pub mod gpu;
mod offload;

use crate::{AdapterConfig, Config};
pub use offload::Offload;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;
use std::str::FromStr;
use tunesmith_tensor::ops::{attention, linear, linear_cross_entropy};

/// What the backward pass makes again instead of keeping it from the forward pass. The gradients are the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: the most memory.
    None,
    /// The outputs of norms and of SwiGLU: one more pass over memory for each, nearly free.
    #[default]
    Norms,
    /// Whole blocks: only the input of each is kept, and its forward pass runs a second time.
    Block,
}

impl Recompute {
    /// All levels, from the one that needs most memory to the one that needs least.
    pub const ALL: [Self; 3] = [Self::None, Self::Norms, Self::Block];

    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Norms => "norms",
            Self::Block => "block",
        }
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|level| level.name() == text);
        found.ok_or_else(|| format!("recompute = {text:?} is none of \"none\", \"norms\", \"block\""))
    }
}

impl<'de> Deserialize<'de> for Recompute {
    /// A name, or a truth value as Hugging Face's `gradient_checkpointing` has it: true is `block`, false `none`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"none\", \"norms\", \"block\", or true (block) or false (none)")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Recompute, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_bool<E: de::Error>(self, block: bool) -> Result<Recompute, E> {
                Ok(if block { Recompute::Block } else { Recompute::None })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// The largest part of a batch that goes through the model at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    /// Tokens, T.
    pub tokens: usize,
    /// Positions that carry loss, N.
    pub loss_rows: usize,
    /// Threads that work on it.
    pub threads: usize,
    /// Whether frozen weights multiply in 8-bit integers.
    pub int8: bool,
}

/// Bytes of a training pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassBytes {
    /// What the forward pass keeps for the backward pass, all layers together.
    pub activations: u64,
    /// What one layer after the other uses, gradients of activations, logits.
    pub workspace: u64,
    /// What the kernels keep for themselves: tiles of the threads, sums that are added up later.
    pub kernels: u64,
}

/// Bytes of a training pass over `shape`: the buffers of [`Workspace`](crate::Workspace), and those of the kernels.
pub fn training_bytes(
    config: &Config,
    adapter: Option<&AdapterConfig>,
    shape: PassShape,
    recompute: Recompute,
) -> PassBytes {
    let b = Buffers::new(config, adapter, shape);
    let layers = config.num_hidden_layers;
    let activations = match recompute {
        Recompute::None => layers * (b.input() + b.layer() + b.made()),
        Recompute::Norms => layers * (b.input() + b.layer()) + b.made(),
        Recompute::Block => layers * b.input() + b.layer() + b.made(),
    };
    let shared = match recompute {
        Recompute::None => 0,
        Recompute::Norms => b.made(),
        Recompute::Block => b.made() + b.layer(),
    };
    let bytes = |floats: usize| 4 * floats as u64;
    PassBytes {
        activations: bytes(activations - shared),
        workspace: bytes(shared + b.head() + b.backward()),
        kernels: b.kernels(),
    }
}

/// Bytes of a cache of keys and values in f32 for `tokens` tokens.
pub fn cache_bytes(config: &Config, tokens: usize) -> u64 {
    (2 * 4 * config.num_hidden_layers * tokens * config.num_key_value_heads * config.head_dim) as u64
}

/// Sizes of groups of buffers, in f32 elements.
struct Buffers {
    t: usize,
    n: usize,
    d: usize,
    f: usize,
    h: usize,
    k: usize,
    num_heads: usize,
    head_dim: usize,
    vocab: usize,
    threads: usize,
    int8: bool,
    /// Sum of the ranks of a layer's adapters, each of them, the largest, and the widest input of one with dropout.
    ranks: usize,
    layer_ranks: Vec<usize>,
    largest_rank: usize,
    dropped: usize,
}

impl Buffers {
    fn new(config: &Config, adapter: Option<&AdapterConfig>, shape: PassShape) -> Self {
        let mut buffers = Self {
            t: shape.tokens,
            n: shape.loss_rows,
            d: config.hidden_size,
            f: config.intermediate_size,
            h: config.num_attention_heads * config.head_dim,
            k: config.num_key_value_heads * config.head_dim,
            num_heads: config.num_attention_heads,
            head_dim: config.head_dim,
            vocab: config.vocab_size,
            threads: shape.threads,
            int8: shape.int8,
            ranks: 0,
            layer_ranks: Vec::new(),
            largest_rank: 0,
            dropped: 0,
        };
        let Some(adapter) = adapter else { return buffers };
        let ranks = adapter_ranks(config, adapter);
        let of_layer = |l: usize| ranks.iter().filter(move |r| r.layer == l).map(|r| r.rank).collect::<Vec<_>>();
        // Layers seldom differ; where they do, the widest counts for all.
        let layers = (0..config.num_hidden_layers).map(of_layer);
        buffers.layer_ranks = layers.max_by_key(|ranks| ranks.iter().sum::<usize>()).unwrap_or_default();
        buffers.ranks = buffers.layer_ranks.iter().sum();
        buffers.largest_rank = ranks.iter().map(|r| r.rank).max().unwrap_or(0);
        if adapter.lora_dropout > 0.0 {
            buffers.dropped = ranks.iter().map(|r| r.shape[1]).max().unwrap_or(0);
        }
        buffers
    }

    /// The input of a block.
    fn input(&self) -> usize {
        self.t * self.d
    }

    /// What a block keeps besides its input and what is cheap to make again.
    fn layer(&self) -> usize {
        self.t * (self.d + 2 * self.h + 2 * self.k + 2 * self.f + self.num_heads + 2 + self.ranks)
    }

    /// Outputs of both norms and of SwiGLU.
    fn made(&self) -> usize {
        self.t * (2 * self.d + self.f)
    }

    /// Residual stream, rotation angles, and everything of the head.
    fn head(&self) -> usize {
        let chunk = self.n.min(linear_cross_entropy::chunk_rows(self.vocab));
        self.t * (self.d + self.head_dim) + self.n * (2 * self.d + 2) + chunk * self.vocab
    }

    /// Gradients of activations.
    fn backward(&self) -> usize {
        self.t * (2 * self.d + self.f + 2 * self.h + 2 * self.k + self.largest_rank + 2 * self.dropped)
            + 2 * self.n * self.d
    }

    /// Bytes that kernels hold, for each thread and together; one long document needs most.
    fn kernels(&self) -> u64 {
        let heads = attention::Heads {
            num_heads: self.num_heads,
            num_kv_heads: self.k / self.head_dim,
            head_dim: self.head_dim,
        };
        let thread = linear::THREAD_BYTES + attention::thread_bytes(self.head_dim);
        // The operand of an integer product as bytes with scales: rows of logits, or of the widest layer.
        let chunk = self.n.min(linear_cross_entropy::chunk_rows(self.vocab)) * self.vocab;
        let operand = chunk.max(self.t * self.f.max(self.d).max(self.h));
        let operand = if self.int8 { operand + operand / 16 } else { 0 };
        (self.threads * thread + attention::shared_bytes(self.t, heads) + operand) as u64
    }
}

/// One adapter of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterRank {
    /// Number of the block.
    pub layer: usize,
    /// Extents of the weight that it adapts, [out, in].
    pub shape: [usize; 2],
    /// Rank.
    pub rank: usize,
}

/// The adapters that `adapter` puts on a model of `config`.
pub fn adapter_ranks(config: &Config, adapter: &AdapterConfig) -> Vec<AdapterRank> {
    let adapted = config.linear_modules().into_iter().filter(|(_, module, _)| adapter.matches(module));
    adapted.map(|(layer, module, shape)| AdapterRank { layer, shape, rank: adapter.rank_for(&module) }).collect()
}
