//! The forward pass of generation: new tokens of several sequences over a KV cache, whether they are parts of prompts or one token
//! of each.
//!
//! The same operations as in training, put together for reading weights and cache as seldom as can be: products with the
//! same input are one call and read their weights once for all sequences, the cache may be in f16, the head and most of the last
//! layer run only for tokens whose logits are wanted. While there are few rows, the threads of the pool stand by instead of being
//! woken for every product. On a GPU a pass of one token of each sequence is captured and replayed.

use super::{DOWN, GATE, K, Layer, Llama, Lora, O, Q, UP, V};
use rayon::prelude::*;
use tunesmith_tensor::ops::attention_paged::{Chunk, Slots};
use tunesmith_tensor::ops::linear::Into::{Accumulate, Overwrite};
use tunesmith_tensor::ops::products::{self, Product};
use tunesmith_tensor::ops::{embedding, linear, rmsnorm, rope, rows, swiglu};
use tunesmith_tensor::packed_int::Int8Rows;
use tunesmith_tensor::{Device, Dtype, PagedCache, Recorded, Tensor, pool, team};

/// Tokens of a prompt that go through a model on the CPU at once: enough for large products, few enough that what a layer makes of
/// them stays in the CPU's cache.
const PREFILL_CHUNK: usize = 512;

/// Tokens of prompts that go through a model on a GPU at once.
pub(crate) const PREFILL_CHUNK_GPU: usize = 8192;

/// Rows up to which threads stand by between products with integers, which divide such a loop among them.
const TEAM_ROWS: usize = 64;

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// What they are.
    pub ids: &'a [u32],
    /// Tokens of the sequence that are cached already.
    pub past: usize,
    /// The block table of the sequence, with pages for the new tokens.
    pub pages: &'a [u32],
    /// Whether the logits that follow the last of them are wanted.
    pub logits: bool,
}

/// Buffers of an inference pass, kept from pass to pass.
#[derive(Debug, Default)]
pub struct InferWorkspace {
    positions: Vec<u32>,
    angles: rope::Angles,
    stream_td: Tensor,
    normed_td: Tensor,
    rstd_t: Tensor,
    q_th: Tensor,
    k_tk: Tensor,
    v_tk: Tensor,
    o_th: Tensor,
    gate_tf: Tensor,
    up_tf: Tensor,
    act_tf: Tensor,
    /// x Aᵀ of the adapters of products that go together.
    xa_tr: [Tensor; 3],
    /// The input of products with integer weights.
    rounded: Int8Rows,
    /// Where the tokens go, and those whose logits are wanted.
    slots: Slots,
    wanted: Slots,
    wanted_nd: Tensor,
    logits: Tensor,
    captured: Recorded,
}

impl InferWorkspace {
    /// Addresses of all buffers that a pass on a GPU uses.
    fn addresses(&self) -> impl Iterator<Item = u64> {
        let Self { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, gate_tf, up_tf, act_tf, logits, .. } = self;
        let tensors = [stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, o_th, gate_tf, up_tf, act_tf, logits];
        tensors.into_iter().chain(&self.xa_tr).map(Tensor::address).chain(self.angles.addresses())
    }

    /// Whether the last pass on a GPU was replayed.
    pub fn is_captured(&self) -> bool {
        self.captured.is_recorded()
    }
}

impl Llama {
    /// Puts the new tokens of each of `sequences` after what `cache` holds of it and returns the logits [N, V] in f32 that follow the
    /// last tokens of those that want them. They stay where the model is.
    ///
    /// # Panics
    /// When a sequence has no new tokens, or too few pages for them.
    pub fn infer<'w>(
        &self,
        sequences: &[Tokens<'_>],
        cache: &mut PagedCache,
        ws: &'w mut InferWorkspace,
    ) -> &'w mut Tensor {
        let (mut ids, mut chunks, mut last, mut wanted) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        ws.positions.clear();
        for Tokens { ids: new, past, pages, logits } in sequences {
            assert!(!new.is_empty(), "nothing to put after a sequence");
            let (first, end) = (ids.len(), past + new.len());
            ids.extend_from_slice(new);
            ws.positions.extend(*past as u32..end as u32);
            chunks.push(Chunk { rows: first..ids.len(), past: *past, pages: pages.to_vec() });
            if *logits {
                last.push(Chunk { rows: wanted.len()..wanted.len() + 1, past: end - 1, pages: pages.to_vec() });
                wanted.push(ids.len() as u32 - 1);
            }
        }
        let decodes = chunks.iter().all(|chunk| products::are_few(chunk.rows.len()));
        embedding::forward_on(self.value(self.embed), &ids, &self.device(), self.dtype(), &mut ws.stream_td);
        ws.angles.fill_on(&self.device(), &ws.positions, &self.frequencies);
        ws.slots.set(cache, chunks);
        if wanted.len() == ids.len() {
            match self.device() != Device::Cpu && ws.slots.can_be_captured() {
                true => self.replay(wanted.len(), cache, ws),
                false => self.on_threads(ids.len(), decodes, || self.all_rows(cache, ws)),
            }
        } else {
            self.on_threads(ids.len(), decodes, || self.prefill(cache, ws));
            ws.logits.resize_on(&self.device(), Dtype::F32, &[0, self.config.vocab_size]);
            if !wanted.is_empty() {
                ws.wanted.set(cache, last);
                self.on_threads(wanted.len(), true, || self.wanted_rows(&wanted, cache, ws));
            }
        }
        &mut ws.logits
    }

    /// Runs a pass of `rows` rows, which are a few of each sequence where it `decodes`.
    fn on_threads(&self, rows: usize, decodes: bool, pass: impl FnOnce() + Send) {
        let integers = rows <= TEAM_ROWS && self.rounds_activations();
        if self.device() != Device::Cpu {
            pass()
        } else if products::are_few(rows) || decodes && integers {
            team::scope(pass)
        } else {
            pool::enter(pass)
        }
    }

    /// One embedded token of each sequence on a GPU up to the logits: captured when it comes again, and then replayed.
    fn replay(&self, rows: usize, cache: &mut PagedCache, ws: &mut InferWorkspace) {
        // Everything that launches depend on: what is computed, and where everything is.
        let mut key: Vec<u64> = vec![self.adapter_enabled.into()];
        key.extend(ws.slots.key().chain(ws.addresses()).chain(cache.addresses()));
        key.extend(self.parameters.iter().map(|p| p.value.address()));
        let mut captured = std::mem::take(&mut ws.captured);
        captured.run(&self.device(), key, || self.all_rows(cache, ws));
        ws.captured = captured;
        // A replay changes no shape, and another pass may have been in between.
        ws.logits.resize_on(&self.device(), Dtype::F32, &[rows, self.config.vocab_size]);
    }

    /// All layers and the head, for every row.
    fn all_rows(&self, cache: &mut PagedCache, ws: &mut InferWorkspace) {
        for l in 0..self.layers.len() {
            self.layer(l, cache, ws);
        }
        self.logits_of_rows(ws);
    }

    /// All layers but the last, of which only keys and values: all that later tokens need of it.
    fn prefill(&self, cache: &mut PagedCache, ws: &mut InferWorkspace) {
        let last = self.layers.len() - 1;
        for l in 0..last {
            self.layer(l, cache, ws);
        }
        self.norm_input(last, ws);
        let InferWorkspace { normed_td, k_tk, v_tk, xa_tr, rounded, angles, slots, .. } = ws;
        self.products(&self.layers[last], normed_td, &mut [(K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(k_tk, angles);
        slots.write(cache, last, k_tk, v_tk);
    }

    /// The rest of the last layer and the head after [`Llama::prefill`], for the rows `wanted` only.
    fn wanted_rows(&self, wanted: &[u32], cache: &PagedCache, ws: &mut InferWorkspace) {
        let last = self.layers.len() - 1;
        let InferWorkspace { stream_td, normed_td, q_th, o_th, xa_tr, rounded, angles, positions, .. } = ws;
        for x in [&mut *stream_td, &mut *normed_td] {
            rows::gather(x, wanted, &mut ws.wanted_nd);
            x.assign(&ws.wanted_nd);
        }
        let positions: Vec<u32> = wanted.iter().map(|row| positions[*row as usize]).collect();
        angles.fill_on(&self.device(), &positions, &self.frequencies);
        self.products(&self.layers[last], normed_td, &mut [(Q, q_th)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        ws.wanted.attend(cache, last, q_th, None, o_th);
        self.finish_layer(last, ws);
        self.logits_of_rows(ws);
    }

    /// Layer `l`, for every row.
    fn layer(&self, l: usize, cache: &mut PagedCache, ws: &mut InferWorkspace) {
        self.norm_input(l, ws);
        let InferWorkspace { normed_td, q_th, k_tk, v_tk, o_th, xa_tr, rounded, angles, slots, .. } = ws;
        let layer = &self.layers[l];
        self.value(layer.linears[O].weight).read_ahead();
        self.products(layer, normed_td, &mut [(Q, q_th), (K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        rope::forward(k_tk, angles);
        slots.write(cache, l, k_tk, v_tk);
        slots.attend(cache, l, q_th, Some((k_tk, v_tk)), o_th);
        self.finish_layer(l, ws);
    }

    fn norm_input(&self, l: usize, ws: &mut InferWorkspace) {
        let InferWorkspace { stream_td, normed_td, rstd_t, .. } = ws;
        let norm = self.tensor(self.layers[l].input_norm);
        rmsnorm::forward(stream_td, norm, self.config.rms_norm_eps, normed_td, rstd_t);
    }

    /// From the output of attention to that of the layer.
    fn finish_layer(&self, l: usize, ws: &mut InferWorkspace) {
        let layer = &self.layers[l];
        let ahead = |layer: &Layer, i: usize| self.value(layer.linears[i].weight).read_ahead();
        let InferWorkspace { stream_td, normed_td, rstd_t, o_th, gate_tf, up_tf, act_tf, xa_tr, rounded, .. } = ws;
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

    /// Norm and head of every row.
    fn logits_of_rows(&self, ws: &mut InferWorkspace) {
        let InferWorkspace { stream_td, normed_td, rstd_t, rounded, logits, .. } = ws;
        rmsnorm::forward(stream_td, self.tensor(self.norm), self.config.rms_norm_eps, normed_td, rstd_t);
        let weight = self.head_weight();
        if self.device() != Device::Cpu {
            return linear::logits(normed_td, weight, logits);
        }
        let product = Product { x: normed_td, weight, alpha: 1.0, y: logits, into: Overwrite };
        products::forward(&mut [product], rounded);
    }

    /// Linear layers of `layer` that read the same `x`, with biases and adapters.
    fn products(
        &self,
        layer: &Layer,
        x: &Tensor,
        outputs: &mut [(usize, &mut Tensor)],
        into: linear::Into,
        xa_tr: &mut [Tensor; 3],
        rounded: &mut Int8Rows,
    ) {
        let adapter = |i: usize| layer.linears[i].lora.as_ref().filter(|_| self.adapter_enabled);
        let mut products = Vec::with_capacity(2 * outputs.len());
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter_mut()) {
            let weight = self.value(layer.linears[*i].weight);
            products.push(Product { x, weight, alpha: 1.0, y, into });
            if let Some(lora) = adapter(*i) {
                products.push(Product { x, weight: self.value(lora.a), alpha: 1.0, y: xa, into: Overwrite });
            }
        }
        products::forward(&mut products, rounded);
        let mut products = Vec::new();
        for ((i, y), xa) in outputs.iter_mut().zip(xa_tr.iter()) {
            if let Some(bias) = layer.linears[*i].bias {
                linear::add_bias(self.tensor(bias), y);
            }
            if let Some(Lora { b, scale, .. }) = adapter(*i) {
                products.push(Product { x: xa, weight: self.value(*b), alpha: *scale, y, into: Accumulate });
            }
        }
        if !products.is_empty() {
            products::forward(&mut products, rounded);
        }
    }

    /// Keeps every matrix as integers from now on: [`Llama::infer`] then rounds what they multiply to 8 bits
    /// ([`Weight::to_integers`]). Adapters, norms and biases stay as they are.
    pub fn round_activations(&mut self) {
        let matrices = self.parameters.par_iter_mut().filter(|p| !p.trained && p.value.shape().len() == 2);
        matrices.filter(|p| !p.name.starts_with("base_model.")).for_each(|p| p.value = p.value.to_integers());
    }

    /// Whether [`Llama::round_activations`] was called.
    fn rounds_activations(&self) -> bool {
        self.layers.iter().any(|layer| self.value(layer.linears[Q].weight).is_integers())
    }

    /// An empty cache of `num_pages` pages where the model is and in its precision: f16 where its matrices are integers, and f32
    /// elsewhere on the CPU.
    pub fn new_cache(&self, num_pages: usize) -> PagedCache {
        let (heads, num_layers) = (self.heads(), self.layers.len());
        match self.rounds_activations() {
            true => PagedCache::f16(heads, num_layers, num_pages),
            false => PagedCache::new(&self.device(), self.dtype(), heads, num_layers, num_pages),
        }
    }

    /// Tokens of prompts that go through the model at once.
    pub fn prefill_chunk(&self) -> usize {
        if self.device() == Device::Cpu { PREFILL_CHUNK } else { PREFILL_CHUNK_GPU }
    }
}
