//! The forward pass of generation: a prompt in pieces that make large matrix products, then token by token.
//!
//! The same operations as in training, put together for reading weights and cache as seldom as can be: products with the
//! same input are one call, the cache may be in f16, the head and most of the last layer run for the last token only. While there
//! are few rows, the threads of the pool stand by instead of being woken for every product.

use super::{DOWN, GATE, K, Layer, Llama, O, Q, UP, V, Workspace};
use crate::KvCache;
use crate::adapter::{Adapter, Lora};
use rayon::prelude::*;
use tunesmith_tensor::ops::attention::{self, Segment};
use tunesmith_tensor::ops::linear::Into::{Accumulate, Overwrite};
use tunesmith_tensor::ops::products::{self, Product};
use tunesmith_tensor::ops::{attention_cached, attention_decode, linear, rmsnorm, rope, swiglu};
use tunesmith_tensor::packed_int::Int8Rows;
use tunesmith_tensor::{Device, Recorded, Tensor, pool, team};

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
    pub(super) places: attention_cached::Places,
    pub(super) recorded: Recorded,
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
    pub fn decode<'w>(
        &self,
        ids: &[u32],
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        ws: &'w mut Workspace,
    ) -> &'w [f32] {
        if self.device() == Device::Cpu {
            return self.decode_logits(ids, adapter, cache, ws).data();
        }
        ws.host_logits = self.decode_logits(ids, adapter, cache, ws).to_host();
        ws.host_logits.data()
    }

    /// As [`Llama::decode`]; the logits [1, V] in f32 stay where the model is.
    ///
    /// # Panics
    /// As [`Llama::decode`].
    pub fn decode_logits<'w>(
        &self,
        ids: &[u32],
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        ws: &'w mut Workspace,
    ) -> &'w mut Tensor {
        if ids.len() == 1 && self.device() != Device::Cpu && self.decode_recorded(ids, adapter, cache, ws) {
            return &mut ws.logits;
        }
        let Workspace { generation: buffers, logits, row_logits, .. } = &mut *ws;
        let mut pieces = ids.chunks(PIECE).peekable();
        while let Some(piece) = pieces.next() {
            let last = self.layers.len() - 1;
            let is_end = pieces.peek().is_none();
            let num_keys = cache.len() + piece.len();
            let begin = |cache: &mut KvCache, buffers: &mut Buffers| {
                let first = cache.len() as u32;
                self.embed_tokens(piece, adapter, first..first + piece.len() as u32, buffers);
                for l in 0..last {
                    self.attend(l, adapter, cache, buffers);
                    self.finish_layer(l, adapter, buffers);
                }
                self.extend_cache(last, adapter, cache, buffers);
            };
            let mut end = |cache: &KvCache, buffers: &mut Buffers| {
                self.attend_last(adapter, cache, num_keys, buffers);
                self.finish_layer(last, adapter, buffers);
                self.logits_of_last(buffers, logits);
                self.replace_logits(adapter, &buffers.normed_td, row_logits, logits);
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
    fn decode_recorded(&self, ids: &[u32], adapter: Option<&Adapter>, cache: &mut KvCache, ws: &mut Workspace) -> bool {
        let len = cache.len();
        let Some(rows) = cache.device_rows().filter(|_| len > 0) else { return false };
        self.embed_tokens(ids, adapter, std::iter::once(len as u32), &mut ws.generation);
        let done = self.token_pass(&[len as u32], &[Segment { queries: 0..1, keys: 0..len + 1 }], adapter, rows, ws);
        if done {
            cache.advance(1);
        }
        done
    }

    /// Keeps every matrix as integers from now on: [`Llama::decode`] then rounds what they multiply to 8 bits
    /// ([`Weight::to_integers`]). Adapters, norms and biases stay as they are.
    pub fn round_activations(&mut self) {
        let matrices = self.parameters.par_iter_mut().filter(|p| !p.trained && p.value.shape().len() == 2);
        matrices.for_each(|p| p.value = p.value.to_integers());
    }

    /// An empty cache for up to `capacity` tokens, in the precision of this model: f16 where its matrices are integers, f32 elsewhere.
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        let integers = self.parameters.iter().any(|p| p.value.is_integers());
        if integers { KvCache::half(&self.config, capacity) } else { KvCache::new(&self.config, capacity) }
    }

    pub(super) fn embed_tokens(
        &self,
        ids: &[u32],
        adapter: Option<&Adapter>,
        positions: impl Iterator<Item = u32>,
        buffers: &mut Buffers,
    ) {
        self.embed(ids, adapter, &mut buffers.stream_td);
        buffers.positions.clear();
        buffers.positions.extend(positions);
        buffers.angles.fill_on(&self.device(), &buffers.positions, &self.frequencies);
    }

    /// The attention of layer `l` up to its output, without the output projection.
    fn attend(&self, l: usize, adapter: Option<&Adapter>, cache: &mut KvCache, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, lse, xa_tr, rounded, angles, .. } = buffers;
        let layer = &self.layers[l];
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        self.value(layer.linears[O].weight).read_ahead();
        self.products(l, adapter, normed_td, &mut [(Q, q_th), (K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
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
            attention::forward(q_th, k, v, &segments, self.heads(), o_th, lse);
        }
    }

    /// Keys and values of layer `l` and nothing else: all that later tokens need of the last layer.
    fn extend_cache(&self, l: usize, adapter: Option<&Adapter>, cache: &mut KvCache, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, rstd_t, k_tk, v_tk, xa_tr, rounded, angles, .. } = buffers;
        let layer = &self.layers[l];
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        self.products(l, adapter, normed_td, &mut [(K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(k_tk, angles);
        cache.write(l, k_tk, v_tk);
    }

    /// Behind [`Llama::extend_cache`] of the last layer: its attention for the last token only. Leaves one row.
    fn attend_last(&self, adapter: Option<&Adapter>, cache: &KvCache, num_keys: usize, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, q_th, o_th, xa_tr, rounded, angles, positions, attention, .. } = buffers;
        let last = self.layers.len() - 1;
        let last_row = stream_td.rows() - 1;
        stream_td.keep_row(last_row);
        normed_td.keep_row(last_row);
        angles.fill_on(&self.device(), &positions[positions.len() - 1..], &self.frequencies);
        self.products(last, adapter, normed_td, &mut [(Q, q_th)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        cache.attend(last, q_th, num_keys, o_th, attention);
    }

    /// From the output of attention to that of the layer.
    pub(super) fn finish_layer(&self, l: usize, adapter: Option<&Adapter>, buffers: &mut Buffers) {
        let layer = &self.layers[l];
        let ahead = |layer: &Layer, i: usize| self.value(layer.linears[i].weight).read_ahead();
        let Buffers { stream_td, normed_td, rstd_t, o_th, gate_tf, up_tf, act_tf, xa_tr, rounded, .. } = buffers;
        ahead(layer, GATE);
        self.products(l, adapter, o_th, &mut [(O, stream_td)], Accumulate, xa_tr, rounded);
        rmsnorm::forward(stream_td, self.tensor(layer.post_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        ahead(layer, DOWN);
        self.products(l, adapter, normed_td, &mut [(GATE, gate_tf), (UP, up_tf)], Overwrite, xa_tr, rounded);
        swiglu::forward(gate_tf, up_tf, act_tf);
        match self.layers.get(l + 1) {
            Some(next) => ahead(next, Q),
            None => self.head_weight().read_ahead(),
        }
        self.products(l, adapter, act_tf, &mut [(DOWN, stream_td)], Accumulate, xa_tr, rounded);
    }

    /// Linear layers of block `l` that read the same `x`, with biases and adapters.
    pub(super) fn products(
        &self,
        l: usize,
        adapter: Option<&Adapter>,
        x: &Tensor,
        outputs: &mut [(usize, &mut Tensor)],
        into: linear::Into,
        xa_tr: &mut [Tensor; 3],
        rounded: &mut Int8Rows,
    ) {
        let layer = &self.layers[l];
        let lora = |i: usize| adapter.and_then(|adapter| adapter.pair(l, i));
        let mut products = Vec::with_capacity(2 * outputs.len());
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter_mut()) {
            let weight = self.value(layer.linears[*i].weight);
            products.push(Product { x, weight, alpha: 1.0, y, into });
            if let Some(lora) = lora(*i) {
                products.push(Product { x, weight: lora.a, alpha: 1.0, y: xa, into: Overwrite });
            }
        }
        products::forward(&mut products, rounded);
        let mut products = Vec::new();
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter()) {
            if let Some(bias) = layer.linears[*i].bias {
                linear::add_bias(self.tensor(bias), y);
            }
            if let Some(Lora { b, scale, .. }) = lora(*i) {
                products.push(Product { x: xa, weight: b, alpha: scale, y, into: Accumulate });
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
        let product = Product { x: normed_td, weight, alpha: 1.0, y: logits, into: Overwrite };
        products::forward(&mut [product], rounded);
    }
}
