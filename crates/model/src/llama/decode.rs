//! The forward pass of generation: a prompt in pieces that make large matrix products, then token by token.
//!
//! The same operations as in training, put together for reading weights and cache as seldom as can be: products with the
//! same input are one call, the cache may be in f16, the head and most of the last layer run for the last token only. While there
//! are few rows, the threads of the pool stand by instead of being woken for every product.

use super::{DOWN, GATE, K, Layer, Llama, Lora, O, Q, UP, V, Workspace};
use crate::KvCache;
use rayon::prelude::*;
use tunesmith_tensor::ops::attention::{self, Segment};
use tunesmith_tensor::ops::linear::Store::{Accumulate, Overwrite};
use tunesmith_tensor::ops::products::{self, Product};
use tunesmith_tensor::ops::{attention_cached, attention_decode, embedding, linear, rmsnorm, rope, swiglu};
use tunesmith_tensor::packed_int::Int8Rows;
use tunesmith_tensor::{CapturedGraph, Device, Tensor, pool, team};

/// Tokens of a prompt that go through the model at once: enough for large products, few enough that what a layer makes of
/// them stays in the processor's cache.
const PIECE: usize = 512;

/// Buffers of a generating pass, kept from token to token.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    positions: Vec<u32>,
    pub(super) angles: rope::Angles,
    pub(super) stream_td: Tensor,
    pub(super) normed_td: Tensor,
    pub(super) rstd_t: Tensor,
    pub(super) q_th: Tensor,
    pub(super) k_tk: Tensor,
    pub(super) v_tk: Tensor,
    pub(super) o_th: Tensor,
    lse: Tensor,
    gate_tf: Tensor,
    up_tf: Tensor,
    act_tf: Tensor,
    /// x Aᵀ of the adapters of products that go together.
    pub(super) xa_tr: [Tensor; 3],
    pub(super) attention: attention_decode::Scratch,
    /// On a GPU: where one new token of each sequence goes, and the record of such a pass.
    pub(super) places: attention_cached::SlotMapping,
    pub(super) recorded: CapturedGraph,
    /// The input of products with integer weights.
    pub(super) rounded: Int8Rows,
}

impl Buffers {
    /// Addresses of all buffers that a pass on a GPU uses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> {
        let Self { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, gate_tf, up_tf, act_tf, .. } = self;
        let tensors = [stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, gate_tf, up_tf, act_tf];
        tensors.into_iter().chain(&self.xa_tr).map(Tensor::address).chain(self.angles.addresses())
    }

    /// Bytes of all buffers, but for what a few rows need.
    pub(super) fn num_bytes(&self) -> usize {
        let Self { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, lse, gate_tf, up_tf, act_tf, .. } = self;
        let tensors = [stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, lse, gate_tf, up_tf, act_tf];
        tensors.into_iter().chain(&self.xa_tr).map(Tensor::capacity_bytes).sum::<usize>() + self.angles.num_bytes()
    }
}

impl Llama {
    /// Feeds `ids` behind what `cache` holds and returns the logits [V] that follow the last of them, on the processor.
    ///
    /// # Panics
    /// When `ids` is empty or the cache is too small for them.
    pub fn decode<'w>(&self, ids: &[u32], cache: &mut KvCache, ws: &'w mut Workspace) -> &'w [f32] {
        if self.device() == Device::Cpu {
            return self.decode_logits(ids, cache, ws).data();
        }
        ws.host_logits = self.decode_logits(ids, cache, ws).to_host();
        ws.host_logits.data()
    }

    /// As [`Llama::decode`]; the logits [1, V] in f32 stay where the model is.
    ///
    /// # Panics
    /// As [`Llama::decode`].
    pub fn decode_logits<'w>(&self, ids: &[u32], cache: &mut KvCache, ws: &'w mut Workspace) -> &'w mut Tensor {
        if ids.len() == 1 && self.device() != Device::Cpu && self.decode_recorded(ids, cache, ws) {
            return &mut ws.logits;
        }
        let (buffers, logits) = (&mut ws.generation, &mut ws.logits);
        let mut pieces = ids.chunks(PIECE).peekable();
        while let Some(piece) = pieces.next() {
            let last = self.layers.len() - 1;
            let is_end = pieces.peek().is_none();
            let num_keys = cache.len() + piece.len();
            let begin = |cache: &mut KvCache, buffers: &mut Buffers| {
                let first = cache.len() as u32;
                self.embed_tokens(piece, first..first + piece.len() as u32, buffers);
                for l in 0..last {
                    self.attend(l, cache, buffers);
                    self.finish_layer(l, buffers);
                }
                self.extend_cache(last, cache, buffers);
            };
            let mut end = |cache: &KvCache, buffers: &mut Buffers| {
                self.attend_last(cache, num_keys, buffers);
                self.finish_layer(last, buffers);
                self.logits_of_last(buffers, logits);
            };
            if !products::are_few(piece.len()) {
                pool::enter(|| begin(cache, buffers));
                if is_end {
                    team::scope(|| end(cache, buffers));
                }
            } else {
                team::scope(|| {
                    begin(cache, buffers);
                    if is_end {
                        end(cache, buffers);
                    }
                });
            }
            cache.advance(piece.len());
        }
        &mut ws.logits
    }

    /// One token on a GPU, recorded when it comes again. Says whether it was done: not before a prompt, nor without a kernel for it.
    fn decode_recorded(&self, ids: &[u32], cache: &mut KvCache, ws: &mut Workspace) -> bool {
        let len = cache.len();
        let Some(rows) = cache.device_rows().filter(|_| len > 0) else { return false };
        self.embed_tokens(ids, std::iter::once(len as u32), &mut ws.generation);
        let done = self.token_pass(&[len as u32], &[Segment { queries: 0..1, keys: 0..len + 1 }], rows, ws);
        if done {
            cache.advance(1);
        }
        done
    }

    /// Keeps every matrix as integers from now on: [`Llama::decode`] then rounds what they multiply to 8 bits
    /// ([`Weight::to_integers`]). Adapters, norms and biases stay as they are.
    pub fn round_activations(&mut self) {
        let matrices = self.parameters.par_iter_mut().filter(|p| !p.trained && p.value.shape().len() == 2);
        matrices.filter(|p| !p.name.starts_with("base_model.")).for_each(|p| p.value = p.value.to_integers());
    }

    /// An empty cache for up to `capacity` tokens, in the precision of this model: f16 where its matrices are integers, f32 elsewhere.
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        let integers = self.parameters.iter().any(|p| p.value.is_integers());
        if integers { KvCache::half(&self.config, capacity) } else { KvCache::new(&self.config, capacity) }
    }

    pub(super) fn embed_tokens(&self, ids: &[u32], positions: impl Iterator<Item = u32>, buffers: &mut Buffers) {
        embedding::forward_on(self.value(self.embed), ids, &self.device(), self.dtype(), &mut buffers.stream_td);
        buffers.positions.clear();
        buffers.positions.extend(positions);
        buffers.angles.fill_on(&self.device(), &buffers.positions, &self.frequencies);
    }

    /// The attention of layer `l` up to its output, without the output projection.
    fn attend(&self, l: usize, cache: &mut KvCache, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, lse, xa_tr, rounded, angles, .. } = buffers;
        let layer = &self.layers[l];
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        self.value(layer.linears[O].weight).read_ahead();
        self.products(layer, normed_td, &mut [(Q, q_th), (K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        rope::forward(k_tk, angles);
        let num_rows = q_th.rows();
        let num_keys = cache.len() + num_rows;
        if products::are_few(num_rows) {
            cache.write(l, k_tk, v_tk);
            cache.attend(l, q_th, num_keys, o_th, &mut buffers.attention);
        } else {
            let (k, v) = cache.extend(l, k_tk, v_tk);
            let segments = [Segment { queries: 0..num_rows, keys: 0..num_keys }];
            attention::forward(attention::Qkv { q: q_th, k, v, segments: &segments, heads: self.heads() }, o_th, lse);
        }
    }

    /// Keys and values of layer `l` and nothing else: all that later tokens need of the last layer.
    fn extend_cache(&self, l: usize, cache: &mut KvCache, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, rstd_t, k_tk, v_tk, xa_tr, rounded, angles, .. } = buffers;
        let layer = &self.layers[l];
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        self.products(layer, normed_td, &mut [(K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(k_tk, angles);
        cache.write(l, k_tk, v_tk);
    }

    /// Behind [`Llama::extend_cache`] of the last layer: its attention for the last token only. Leaves one row.
    fn attend_last(&self, cache: &KvCache, num_keys: usize, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, q_th, o_th, xa_tr, rounded, angles, positions, attention, .. } = buffers;
        let last = self.layers.len() - 1;
        let last_row = stream_td.rows() - 1;
        stream_td.keep_row(last_row);
        normed_td.keep_row(last_row);
        angles.fill_on(&self.device(), &positions[positions.len() - 1..], &self.frequencies);
        self.products(&self.layers[last], normed_td, &mut [(Q, q_th)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        cache.attend(last, q_th, num_keys, o_th, attention);
    }

    /// From the output of attention to that of the layer.
    pub(super) fn finish_layer(&self, l: usize, buffers: &mut Buffers) {
        let layer = &self.layers[l];
        let ahead = |layer: &Layer, i: usize| self.value(layer.linears[i].weight).read_ahead();
        let Buffers { stream_td, normed_td, rstd_t, o_th, gate_tf, up_tf, act_tf, xa_tr, rounded, .. } = buffers;
        ahead(layer, GATE);
        self.products(layer, o_th, &mut [(O, stream_td)], Accumulate, xa_tr, rounded);
        rmsnorm::forward(stream_td, self.tensor(layer.post_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        ahead(layer, DOWN);
        self.products(layer, normed_td, &mut [(GATE, gate_tf), (UP, up_tf)], Overwrite, xa_tr, rounded);
        swiglu::forward(gate_tf, up_tf, act_tf);
        match self.layers.get(l + 1) {
            Some(next) => ahead(next, Q),
            None => self.head_weight().read_ahead(),
        }
        self.products(layer, act_tf, &mut [(DOWN, stream_td)], Accumulate, xa_tr, rounded);
    }

    /// Linear layers of `layer` that read the same `x`, with biases and adapters.
    pub(super) fn products(
        &self,
        layer: &Layer,
        x: &Tensor,
        outputs: &mut [(usize, &mut Tensor)],
        into: linear::Store,
        xa_tr: &mut [Tensor; 3],
        rounded: &mut Int8Rows,
    ) {
        let adapter = |i: usize| layer.linears[i].lora.as_ref().filter(|_| self.adapter_enabled);
        let mut products = Vec::with_capacity(2 * outputs.len());
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter_mut()) {
            let weight = self.value(layer.linears[*i].weight);
            products.push(Product { x, weight, alpha: 1.0, y, store: into });
            if let Some(lora) = adapter(*i) {
                products.push(Product { x, weight: self.value(lora.a), alpha: 1.0, y: xa, store: Overwrite });
            }
        }
        products::forward(&mut products, rounded);
        let mut products = Vec::new();
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter()) {
            if let Some(bias) = layer.linears[*i].bias {
                linear::add_bias(self.tensor(bias), y);
            }
            if let Some(Lora { b, scale, .. }) = adapter(*i) {
                products.push(Product { x: xa, weight: self.value(*b), alpha: *scale, y, store: Accumulate });
            }
        }
        if !products.is_empty() {
            products::forward(&mut products, rounded);
        }
    }

    /// Norm and head of the one row that [`Llama::attend_last`] left.
    fn logits_of_last(&self, buffers: &mut Buffers, logits: &mut Tensor) {
        let Buffers { stream_td, normed_td, rstd_t, rounded, .. } = buffers;
        rmsnorm::forward(stream_td, self.tensor(self.norm), self.config.rms_norm_eps, normed_td, rstd_t);
        let weight = self.head_weight();
        if self.device() != Device::Cpu {
            return linear::logits(normed_td, weight, logits);
        }
        let product = Product { x: normed_td, weight, alpha: 1.0, y: logits, store: Overwrite };
        products::forward(&mut [product], rounded);
    }
}
