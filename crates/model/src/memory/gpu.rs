//! What a pass takes of a GPU's memory: the same buffers as on the processor in the type of the activations, what launches
//! ask for besides, each with the size that the allocator gives it.

use super::{Buffers, PassBytes, PassShape, Recompute};
use crate::llama::together::PIECE;
use crate::token_rows::TOKEN_MODULES;
use crate::{AdapterConfig, Config};
use tunesmith_tensor::Dtype;
use tunesmith_tensor::cuda::sizes::{self, allocated};
use tunesmith_tensor::ops::attention::Heads;

/// What a model on a GPU has besides activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnGpu {
    /// Type of activations and dense weights.
    pub dtype: Dtype,
    /// Elements of the largest matrix that is quantised and therefore decoded for products; 0 where none is.
    pub largest_quantised: usize,
    /// Number of tensors that train.
    pub num_trained: usize,
    /// Whether the head is one of them.
    pub head_trains: bool,
    /// Whether the inputs of blocks wait in the processor's memory: two are here at a time.
    pub parked: bool,
}

impl OnGpu {
    /// Bytes of an activation of `len` elements.
    fn element(&self, len: usize) -> u64 {
        allocated(len * self.dtype.bytes()) as u64
    }

    /// Bytes of the decoded part of a quantised matrix.
    fn decoded(&self) -> u64 {
        sizes::dequantized(self.largest_quantised, self.dtype) as u64
    }
}

/// Bytes of the processor's memory for inputs of blocks that wait there, of passes of `tokens` tokens.
pub fn parked_bytes(config: &Config, tokens: usize, dtype: Dtype) -> u64 {
    (config.num_hidden_layers * tokens * config.hidden_size * dtype.bytes()) as u64
}

/// Bytes of an f32 tensor of `len` elements: a gradient, a moment.
pub fn float_bytes(len: usize) -> u64 {
    allocated(4 * len) as u64
}

/// Bytes of a dense weight of `len` elements; a trained one in bf16 keeps the rest of its f32 beside it.
pub fn dense_bytes(len: usize, dtype: Dtype, trained: bool) -> u64 {
    let halves = if trained && dtype == Dtype::BF16 { 2 } else { 1 };
    halves * allocated(len * dtype.bytes()) as u64
}

/// Bytes of the embedding of a model of `config` on a GPU, in NF4 where `nf4` says so.
pub fn embedding_bytes(config: &Config, nf4: bool, dtype: Dtype) -> u64 {
    let len = config.vocab_size * config.hidden_size;
    if nf4 { sizes::nf4(len) as u64 } else { dense_bytes(len, dtype, false) }
}

/// Bytes of all weights of a model of `config`, and the elements of the largest one that is quantised: all matrices where `nf4` says
/// so.
pub fn weight_bytes(config: &Config, nf4: bool, dtype: Dtype, trained: bool) -> (u64, usize) {
    let (mut bytes, mut largest) = (0, 0);
    for (_, shape) in config.expected_tensors() {
        let len = shape.iter().product();
        if nf4 && shape.len() == 2 {
            largest = largest.max(len);
            bytes += sizes::nf4(len) as u64;
        } else {
            bytes += dense_bytes(len, dtype, trained);
        }
    }
    (bytes, largest)
}

fn heads(b: &Buffers) -> Heads {
    Heads { num_heads: b.num_heads, num_kv_heads: b.k / b.head_dim, head_dim: b.head_dim }
}

/// Rows of the head that `adapter` trains by themselves.
fn head_rows(config: &Config, adapter: &AdapterConfig) -> usize {
    let [embedding, head] = TOKEN_MODULES;
    let module = if config.tie_word_embeddings { embedding } else { head };
    adapter.trainable_token_indices.get(module).map_or(0, Vec::len)
}

/// As [`super::training_bytes`], on a GPU.
pub fn training_bytes(
    config: &Config,
    adapter: Option<&AdapterConfig>,
    shape: PassShape,
    recompute: Recompute,
    on: OnGpu,
) -> PassBytes {
    let b = Buffers::new(config, adapter, shape);
    let (e, float) = (|len| on.element(len), float_bytes);
    let layers = config.num_hidden_layers as u64;
    let input = e(b.t * b.d);
    let adapters = b.layer_ranks.iter().map(|rank| e(b.t * rank)).sum::<u64>();
    let layer = e(b.t * b.d)
        + 2 * e(b.t * b.h)
        + 2 * e(b.t * b.k)
        + 2 * e(b.t * b.f)
        + 2 * float(b.t)
        + float(b.t * b.num_heads)
        + adapters;
    let made = 2 * e(b.t * b.d) + e(b.t * b.f);
    let (activations, shared) = match recompute {
        Recompute::None => (layers * (input + layer + made), 0),
        Recompute::Norms => (layers * (input + layer), made),
        Recompute::Block => (if on.parked { layers.min(2) } else { layers } * input, layer + made),
    };
    let stream = e(b.t * b.d) + e(b.t * b.dropped) + 2 * float(b.t * b.head_dim / 2);
    let own_rows = adapter.map_or(0, |adapter| head_rows(config, adapter));
    let head = 2 * e(b.n * b.d)
        + float(b.n)
        + (sizes::loss(b.n, b.vocab, on.head_trains) + sizes::loss_rows(b.n, b.vocab, own_rows, on.dtype)) as u64;
    let backward = 2 * e(b.t * b.d)
        + e(b.t * b.f)
        + 2 * e(b.t * b.h)
        + 2 * e(b.t * b.k)
        + e(b.t * b.largest_rank)
        + e(b.t * b.dropped)
        + 2 * e(b.n * b.d);
    // Of what launches ask for and give back, the largest.
    let sums = sizes::attention_sums(b.t, heads(&b)).max(sizes::norm(on.num_trained)) as u64;
    PassBytes {
        activations,
        workspace: shared + stream + head + backward,
        kernels: sums.max(on.decoded()) + (sizes::tables(b.t) + sizes::PRODUCTS) as u64,
    }
}

/// Bytes that [`crate::generate_together`] takes on a GPU: keys and values of `places` sequences of up to `prompt` + `new` tokens,
/// buffers of the pass through all prompts, logits, and what choosing tokens needs.
pub fn generation_bytes(
    config: &Config,
    adapter: Option<&AdapterConfig>,
    places: usize,
    (prompt, new): (usize, usize),
    on: OnGpu,
) -> u64 {
    let capacity = (prompt + new).min(config.max_position_embeddings);
    let tokens = (places * prompt).min(PIECE);
    let b = Buffers::new(config, adapter, PassShape { tokens, loss_rows: 0, threads: 0, int8: false });
    let (e, float) = (|len| on.element(len), float_bytes);
    let cache = 2 * config.num_hidden_layers as u64 * e(places * capacity * b.k);
    let buffers = 2 * e(b.t * b.d)
        + 2 * e(b.t * b.h)
        + 2 * e(b.t * b.k)
        + 3 * e(b.t * b.f)
        + 3 * e(b.t * b.largest_rank)
        + float(b.t)
        + 2 * float(b.t * b.head_dim / 2);
    let logits = float(places * b.vocab);
    // What a recorded pass keeps: partial results, the decoded part of a matrix, where tokens go and what they see.
    let decoded = if sizes::dequantizes(places) { on.decoded() } else { 0 };
    let parts = sizes::decoding(places, capacity, heads(&b)) as u64;
    let kept = parts + decoded + (allocated(4 * places) + allocated(8 * places)) as u64;
    let transient = logits.max(float(b.t * b.num_heads)).max(on.decoded());
    cache + buffers + logits + kept + transient + sizes::tables(b.t) as u64
}
