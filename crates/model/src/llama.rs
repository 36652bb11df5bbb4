//! The LLaMA model: parameters, forward and explicit backward.
//!
//! Shape suffixes: t tokens of the micro-batch, d hidden size, f intermediate size, h query heads · head size, k key/value
//! heads · head size, r LoRA rank, n positions that carry loss.

mod decode;
mod inputs;
mod layer;
mod placement;
pub(crate) mod together;

use crate::memory::Offload;
use crate::token_rows::TokenRows;
use crate::{Checkpoint, Config, Recompute, Result, Storage, batch::Batch};
use inputs::Inputs;
use layer::{ForwardBuffers, KeptActivations, Masks, Pass};
use rayon::prelude::*;
use std::ops::Range;
use tunesmith_tensor::ops::{attention, embedding, linear, linear_cross_entropy, rmsnorm, rope, rows};
use tunesmith_tensor::{Device, Dtype, Tensor, Weight, pool, rng::Rng};

/// A named tensor of the model, under its Hugging Face (or PEFT) name.
#[derive(Debug)]
pub struct Parameter {
    /// Such as `model.layers.0.self_attn.q_proj.weight` or `base_model.model.….lora_A.weight`.
    pub name: String,
    /// The weights: dense where they train, and for norms, biases and adapters.
    pub value: Weight,
    /// Whether training changes it (only then does it get a gradient buffer).
    pub trained: bool,
    /// For a trained weight in bf16 on a GPU: what rounding left of its f32 ([`Tensor::split`]).
    pub low: Option<Tensor>,
}

/// One linear layer: indices into [`Llama::parameters`].
#[derive(Debug)]
pub(crate) struct Linear {
    /// Path without `.weight`, as PEFT names modules.
    pub(crate) module: String,
    pub(crate) weight: usize,
    pub(crate) bias: Option<usize>,
    pub(crate) lora: Option<Lora>,
}

/// The adapter of one linear layer: A [r, in] and B [out, r] as indices into the parameters.
#[derive(Debug)]
pub(crate) struct Lora {
    pub(crate) a: usize,
    pub(crate) b: usize,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
}

/// Positions of the seven linear layers in [`Layer::linears`].
pub(crate) const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Tokens that go through the model at once while training, unless a single document is longer. What a pass keeps for its
/// backward pass grows with every token; this many rows still make large matrix products.
pub const PASS_TOKENS: usize = 1024;

pub use placement::PASS_TOKENS_GPU;

/// Names of the seven linear layers of a block, in the order of the constants above.
pub const LINEAR_NAMES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

#[derive(Debug)]
pub(crate) struct Layer {
    input_norm: usize,
    post_norm: usize,
    pub(crate) linears: [Linear; 7],
}

/// A LLaMA model in memory.
#[derive(Debug)]
pub struct Llama {
    /// Its sizes and constants.
    pub config: Config,
    /// All tensors; adapter tensors come last.
    pub parameters: Vec<Parameter>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) embed: usize,
    norm: usize,
    /// The same index as `embed` when the head is tied: one tensor, one gradient, one update.
    pub(crate) head: usize,
    /// What multiplies in place of a tied head that is rounded to 8 bits: rows of the embedding stay exact.
    pub(crate) int8_head: Option<Weight>,
    frequencies: Vec<f32>,
    pub(crate) adapter: Option<crate::AdapterConfig>,
    /// Rows of the embedding and of the head that the adapter has.
    pub(crate) token_rows: Vec<TokenRows>,
    adapter_enabled: bool,
    /// Whether the embedding stays on the processor when the rest moves to a GPU.
    embedding_stays: bool,
}

/// Gradient buffers: one for each trained parameter, in the order of [`Llama::parameters`].
#[derive(Debug, Default)]
pub struct Gradients {
    /// `None` where the parameter is frozen.
    pub tensors: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Zeroed buffers for what trains in `model`.
    pub fn new(model: &Llama) -> Self {
        let zeros = |p: &Parameter| Tensor::zeros_on(&p.value.device(), Dtype::F32, p.value.shape());
        let buffer = |p: &Parameter| p.trained.then(|| zeros(p));
        Self { tensors: model.parameters.iter().map(buffer).collect() }
    }

    /// Sets every gradient to zero.
    pub fn clear(&mut self) {
        pool::enter(|| self.tensors.iter_mut().flatten().for_each(Tensor::clear));
    }
}

/// Rows `rows` of the weight `name` of a new model into `out` [rows, columns], as Hugging Face initialises one: normal with
/// standard deviation `initializer_range`, norms 1, biases 0. Every row is a function of (seed, name, row) alone.
///
/// # Panics
/// When `out` is not whole rows.
pub fn initial_rows(config: &Config, seed: u64, name: &str, rows: Range<usize>, out: &mut [f32]) {
    if name.ends_with("norm.weight") {
        return out.fill(1.0);
    }
    if !name.ends_with(".weight") {
        return out.fill(0.0);
    }
    // FNV-1a of the name: which tensor it is, whatever else the model has.
    let tensor = name.bytes().fold(0x811c_9dc5u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let cols = out.len() / rows.len().max(1);
    assert_eq!(out.len(), cols * rows.len(), "{name}: {rows:?}");
    out.par_chunks_mut(cols.max(1)).zip(rows).for_each(|(out, row)| {
        let mut rng = Rng::new(seed, u64::from(tensor) << 32 | row as u64);
        out.iter_mut().for_each(|x| *x = rng.normal() * config.initializer_range);
    });
}

/// How one training pass computes its loss. Dropout is a function of the seed, the step and the place of a token in it: cutting a
/// step into passes does not change it.
#[derive(Clone, Copy, Debug)]
pub struct LossOptions {
    /// Factor on the summed weighted loss before the backward pass: 1 / sum of the weights of the whole optimizer step.
    pub scale: f32,
    /// Label smoothing ε.
    pub label_smoothing: f32,
    /// Seed of dropout masks; `None` turns dropout off.
    pub dropout_seed: Option<u64>,
    /// Number of the optimizer step.
    pub step: u64,
    /// Tokens of this step that went before this batch.
    pub first_token: u64,
}

/// What a layer makes in its forward pass and needs in its backward pass, but for its input.
#[derive(Debug, Default)]
struct LayerActivations {
    rstd1_t: Tensor,
    q_th: Tensor,
    k_tk: Tensor,
    v_tk: Tensor,
    o_th: Tensor,
    lse: Tensor,
    x2_td: Tensor,
    rstd2_t: Tensor,
    gate_tf: Tensor,
    up_tf: Tensor,
    /// x Aᵀ of each adapted linear layer.
    xa_tr: [Tensor; 7],
}

/// What follows from [`LayerActivations`] by one pass over memory each: made again in the backward pass or kept too.
#[derive(Debug, Default)]
struct MadeActivations {
    /// Output of the norm in front of attention.
    normed_td: Tensor,
    /// Output of the norm in front of the MLP.
    normed2_td: Tensor,
    /// Output of SwiGLU.
    act_tf: Tensor,
}

/// Every buffer of a pass, kept from step to step: memory is asked for once. What layers share has one buffer, what is kept
/// for the backward pass one for each layer.
#[derive(Debug, Default)]
pub struct Workspace {
    recompute: Recompute,
    /// Input of each layer.
    inputs: Inputs,
    layers: Vec<LayerActivations>,
    made: Vec<MadeActivations>,
    /// Input of an adapter after dropout.
    dropped: Tensor,
    stream_td: Tensor,
    angles: rope::Angles,
    h_nd: Tensor,
    rstd_n: Tensor,
    normed_nd: Tensor,
    logits: Tensor,
    /// A copy of the logits of a model on a GPU.
    host_logits: Tensor,
    losses: Vec<f32>,
    head: linear_cross_entropy::Scratch,
    back: BackwardBuffers,
    generation: decode::Buffers,
}

#[derive(Debug, Default)]
struct BackwardBuffers {
    d_stream_td: Tensor,
    d_normed_nd: Tensor,
    d_h_nd: Tensor,
    d_n_td: Tensor,
    d_act_tf: Tensor,
    d_o_th: Tensor,
    d_q_th: Tensor,
    d_k_tk: Tensor,
    d_v_tk: Tensor,
    d_xa_tr: Tensor,
    d_dropped: Tensor,
}

impl Workspace {
    /// Buffers for passes that make again what `recompute` says.
    pub fn new(recompute: Recompute) -> Self {
        Self { recompute, ..Self::default() }
    }

    /// The same for a model on a GPU, with the inputs of layers in the processor's memory between their forward and their backward
    /// pass: copied beside the work that goes on.
    pub fn parked(recompute: Recompute) -> Self {
        Self { recompute, inputs: Inputs::Offloaded(Box::default()), ..Self::default() }
    }

    /// Bytes of all buffers.
    pub fn num_bytes(&self) -> usize {
        let layer = |act: &LayerActivations| {
            let LayerActivations { rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf, xa_tr } = act;
            let one = [rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf];
            one.into_iter().chain(xa_tr).map(Tensor::capacity_bytes).sum::<usize>()
        };
        let made = |m: &MadeActivations| {
            [&m.normed_td, &m.normed2_td, &m.act_tf].map(Tensor::capacity_bytes).iter().sum::<usize>()
        };
        let Self { inputs, dropped, stream_td, h_nd, rstd_n, normed_nd, logits, .. } = self;
        let BackwardBuffers { d_stream_td, d_normed_nd, d_h_nd, d_n_td, d_act_tf, d_o_th, .. } = &self.back;
        let BackwardBuffers { d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped, .. } = &self.back;
        let one = [dropped, stream_td, h_nd, rstd_n, normed_nd, logits, d_stream_td, d_normed_nd, d_h_nd, d_n_td];
        let two = [d_act_tf, d_o_th, d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped];
        let tensors = inputs.num_bytes() + one.into_iter().chain(two).map(Tensor::capacity_bytes).sum::<usize>();
        let layers = self.layers.iter().map(layer).sum::<usize>() + self.made.iter().map(made).sum::<usize>();
        let generation = self.generation.num_bytes();
        tensors + layers + generation + self.angles.num_bytes() + self.head.num_bytes() + 4 * self.losses.capacity()
    }

    /// Buffers for passes of a model on `device`: as [`Workspace::parked`] where that is a GPU and `offload` says so.
    pub fn on(device: &Device, recompute: Recompute, offload: Offload) -> Self {
        match device.gpu() {
            Some(_) if offload.activations => Self::parked(recompute),
            _ => Self::new(recompute),
        }
    }

    /// Whether generation on a GPU goes by a record of its last pass.
    pub fn is_recorded(&self) -> bool {
        self.generation.recorded.is_captured()
    }

    /// Loss (nats) of each position of the last batch that carries loss, in the order of [`Batch::loss_rows`].
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }
}

impl Llama {
    /// Reads every tensor of `checkpoint`; matrices are kept as `storage` says, everything else in f32. `progress` is called
    /// with (tensors read, tensors in all).
    ///
    /// # Errors
    /// Whatever [`Checkpoint::load`] finds wrong with a tensor.
    pub fn load(checkpoint: &Checkpoint, storage: Storage, mut progress: impl FnMut(usize, usize)) -> Result<Self> {
        let config = checkpoint.config().clone();
        let names = config.expected_tensors();
        let mut parameters = Vec::with_capacity(names.len());
        for (i, (name, _)) in names.iter().enumerate() {
            parameters.push(Parameter {
                name: name.clone(),
                value: checkpoint.load(name, storage)?,
                trained: false,
                low: None,
            });
            progress(i + 1, names.len());
        }
        Ok(Self::assemble(config, parameters))
    }

    /// A model with random weights, as Hugging Face initialises one: normal with standard deviation
    /// `initializer_range`, norms 1, biases 0.
    pub fn random(config: Config, seed: u64) -> Self {
        let parameters = config.expected_tensors().into_iter().map(|(name, shape)| {
            let mut value = Tensor::zeros(&shape);
            initial_rows(&config, seed, &name, 0..value.rows(), value.data_mut());
            Parameter { name, value: value.into(), trained: false, low: None }
        });
        let parameters = parameters.collect();
        Self::assemble(config, parameters)
    }

    /// `parameters` in the order of [`Config::expected_tensors`].
    fn assemble(config: Config, parameters: Vec<Parameter>) -> Self {
        let index: std::collections::HashMap<&str, usize> =
            parameters.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
        let layers = (0..config.num_hidden_layers)
            .map(|l| {
                let linear = |block: &str, name: &str| {
                    let module = format!("model.layers.{l}.{block}.{name}");
                    let weight = index[format!("{module}.weight").as_str()];
                    let bias = index.get(format!("{module}.bias").as_str()).copied();
                    Linear { module, weight, bias, lora: None }
                };
                Layer {
                    input_norm: index[format!("model.layers.{l}.input_layernorm.weight").as_str()],
                    post_norm: index[format!("model.layers.{l}.post_attention_layernorm.weight").as_str()],
                    linears: std::array::from_fn(|i| {
                        linear(if i < GATE { "self_attn" } else { "mlp" }, LINEAR_NAMES[i])
                    }),
                }
            })
            .collect();
        let embed = index["model.embed_tokens.weight"];
        let head = if config.tie_word_embeddings { embed } else { index["lm_head.weight"] };
        let norm = index["model.norm.weight"];
        let frequencies = config.inverse_frequencies();
        Self {
            config,
            layers,
            embed,
            norm,
            head,
            int8_head: None,
            frequencies,
            adapter: None,
            token_rows: Vec::new(),
            adapter_enabled: true,
            embedding_stays: false,
            parameters,
        }
    }

    /// Makes every parameter of the base model train (full fine-tuning or pre-training). Packed weights are decoded: only f32
    /// trains.
    ///
    /// # Panics
    /// After [`Llama::compute_int8`].
    pub fn train_all(&mut self) {
        assert!(!self.computes_int8(), "weights rounded to 8 bits cannot train");
        for parameter in &mut self.parameters {
            if let Weight::Packed(packed) = &parameter.value {
                parameter.value = packed.to_tensor().into();
            }
            parameter.trained = true;
        }
    }

    /// Number of weights that train.
    pub fn num_trained(&self) -> usize {
        self.parameters.iter().filter(|p| p.trained).map(|p| p.value.len()).sum()
    }

    /// Number of weights of the base model (a tied head counts once).
    pub fn num_params(&self) -> usize {
        self.parameters.iter().filter(|p| !p.name.starts_with("base_model.")).map(|p| p.value.len()).sum()
    }

    /// The configuration of the attached adapter.
    pub fn adapter(&self) -> Option<&crate::AdapterConfig> {
        self.adapter.as_ref()
    }

    /// Turns the attached adapter off (the model is then the base model, to the bit) or on again.
    pub fn enable_adapter(&mut self, enabled: bool) {
        self.adapter_enabled = enabled;
        self.place_token_rows(enabled);
    }

    fn heads(&self) -> attention::Heads {
        attention::Heads {
            num_heads: self.config.num_attention_heads,
            num_kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        }
    }

    fn value(&self, index: usize) -> &Weight {
        &self.parameters[index].value
    }

    fn head_weight(&self) -> &Weight {
        self.int8_head.as_ref().unwrap_or_else(|| self.value(self.head))
    }

    /// A parameter that is dense in every model: a norm, a bias, an adapter.
    fn tensor(&self, index: usize) -> &Tensor {
        self.parameters[index].value.tensor()
    }

    /// Forward pass without gradients: fills [`Workspace::losses`] and returns their sum in nats, each times its weight. Goes through the batch in
    /// parts, as [`Llama::loss_and_gradients`] does.
    pub fn loss(&self, batch: &Batch, label_smoothing: f32, ws: &mut Workspace) -> f64 {
        pool::enter(|| self.pooled_loss(batch, label_smoothing, ws))
    }

    fn pooled_loss(&self, batch: &Batch, label_smoothing: f32, ws: &mut Workspace) -> f64 {
        let mut losses = Vec::with_capacity(batch.targets.len());
        for part in batch.parts(self.pass_tokens()) {
            self.run_layers(&part, Pass::Discard, ws);
            self.gather_and_norm(&part, ws);
            let (h, head) = (&ws.normed_nd, self.head_weight());
            linear_cross_entropy::forward(h, head, &part.targets, label_smoothing, &mut ws.head, &mut ws.losses);
            losses.extend_from_slice(&ws.losses);
        }
        ws.losses = losses;
        batch.weighted_sum(&ws.losses)
    }

    /// Logits [T, V] at every position of `batch`.
    pub fn logits<'w>(&self, batch: &Batch, ws: &'w mut Workspace) -> &'w Tensor {
        self.run_layers(batch, Pass::Discard, ws);
        let eps = self.config.rms_norm_eps;
        rmsnorm::forward(&ws.stream_td, self.tensor(self.norm), eps, &mut ws.normed_nd, &mut ws.rstd_n);
        linear::logits(&ws.normed_nd, self.head_weight(), &mut ws.logits);
        &ws.logits
    }

    /// One forward and backward pass: adds the gradients of `scale` · Σ weight · loss to `gradients`, fills
    /// [`Workspace::losses`] and returns their weighted sum in nats (unscaled).
    ///
    /// Documents do not see each other, so a batch of more than [`PASS_TOKENS`] tokens goes through the model in several
    /// parts, document by document: the same gradients for a part of the memory.
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        options: LossOptions,
        ws: &mut Workspace,
        gradients: &mut Gradients,
    ) -> f64 {
        let mut losses = Vec::with_capacity(batch.targets.len());
        let mut options = options;
        for part in batch.parts(self.pass_tokens()) {
            pool::enter(|| self.part_gradients(&part, options, ws, gradients));
            losses.extend_from_slice(&ws.losses);
            options.first_token += part.len() as u64;
        }
        ws.losses = losses;
        batch.weighted_sum(&ws.losses)
    }

    /// One part of a pass.
    fn part_gradients(&self, batch: &Batch, options: LossOptions, ws: &mut Workspace, gradients: &mut Gradients) {
        let LossOptions { step, first_token, .. } = options;
        let masks = options.dropout_seed.map(|seed| Masks { seed, step, first_token });
        self.run_layers(batch, Pass::Keep(masks), ws);
        self.gather_and_norm(batch, ws);
        let recompute = ws.recompute;
        let Workspace { inputs, layers, made, dropped, .. } = ws;
        let Workspace { stream_td, angles, h_nd, rstd_n, normed_nd, losses, head, back, .. } = ws;
        let targets = &batch.targets;
        // Rows of their own are parameters behind the matrices.
        let (matrices, others) = gradients.tensors.split_at_mut(self.head.max(self.embed) + 1);
        let head_rows = self.token_rows.iter().find(|rows| rows.matrix == self.head);
        let d_rows = head_rows.and_then(|rows| {
            let d_w = others[rows.rows - matrices.len()].as_mut()?;
            Some(linear_cross_entropy::HeadRows { ids: &rows.ids, d_w })
        });
        let sums = linear_cross_entropy::Gradients {
            scale: options.scale,
            weights: batch.weights(),
            d_h: &mut back.d_normed_nd,
            d_w: matrices[self.head].as_mut(),
            d_rows,
        };
        let smoothing = options.label_smoothing;
        linear_cross_entropy::forward_backward(normed_nd, self.head_weight(), targets, smoothing, head, losses, sums);
        back.d_h_nd.resize_like(h_nd, h_nd.shape());
        back.d_h_nd.clear();
        let norm = self.tensor(self.norm);
        let d_norm = gradients.tensors[self.norm].as_mut();
        rmsnorm::backward(h_nd, norm, rstd_n, &back.d_normed_nd, &mut back.d_h_nd, d_norm);
        back.d_stream_td.resize_like(stream_td, stream_td.shape());
        back.d_stream_td.clear();
        rows::scatter(&back.d_h_nd, &batch.loss_rows, &mut back.d_stream_td);
        let lowest = self.lowest_trained_layer();
        for l in (lowest..self.layers.len()).rev() {
            let act = &mut layers[kept(recompute < Recompute::Block, l)];
            let made = &mut made[kept(recompute == Recompute::None, l)];
            match recompute {
                Recompute::None => {}
                Recompute::Norms => self.make_again(l, inputs.get(l), act, made),
                // The forward pass ended with this layer: its buffers still hold it.
                Recompute::Block if l + 1 == self.layers.len() => {}
                Recompute::Block => {
                    stream_td.assign(inputs.get(l));
                    let buffers = ForwardBuffers { act, made, dropped };
                    self.layer_forward(l, stream_td, buffers, angles, batch, Pass::Again(masks));
                }
            }
            let kept = KeptActivations { x_td: inputs.get(l), act, made };
            self.layer_backward(l, kept, batch, angles, masks, back, dropped, gradients);
            if l > lowest {
                inputs.done(l);
            }
        }
        if let Some(d_table) = gradients.tensors[self.embed].as_mut() {
            embedding::backward(&back.d_stream_td, &batch.ids, d_table);
        }
        if let Some(rows) = self.token_rows.iter().find(|rows| rows.matrix == self.embed)
            && let Some(d_rows) = gradients.tensors[rows.rows].as_mut()
        {
            embedding::backward_rows(&back.d_stream_td, &batch.ids, &rows.ids, d_rows);
        }
    }

    /// Nothing below this layer trains, so the backward pass may stop there.
    fn lowest_trained_layer(&self) -> usize {
        let rows = self.token_rows.iter().find(|rows| rows.matrix == self.embed);
        if self.parameters[self.embed].trained || rows.is_some_and(|rows| self.parameters[rows.rows].trained) {
            return 0;
        }
        let trains = |i: usize| self.parameters[i].trained;
        let any = |layer: &Layer| {
            let linear = |l: &Linear| {
                trains(l.weight)
                    || l.bias.is_some_and(trains)
                    || l.lora.as_ref().is_some_and(|l| trains(l.a) || trains(l.b))
            };
            trains(layer.input_norm) || trains(layer.post_norm) || layer.linears.iter().any(linear)
        };
        self.layers.iter().position(any).unwrap_or(self.layers.len())
    }

    /// Final hidden states of the positions that carry loss, and their norm: the head sees nothing else.
    fn gather_and_norm(&self, batch: &Batch, ws: &mut Workspace) {
        rows::gather(&ws.stream_td, &batch.loss_rows, &mut ws.h_nd);
        let eps = self.config.rms_norm_eps;
        rmsnorm::forward(&ws.h_nd, self.tensor(self.norm), eps, &mut ws.normed_nd, &mut ws.rstd_n);
    }

    /// Embedding and all layers: leaves the residual stream [T, d] in `ws.stream_td`.
    fn run_layers(&self, batch: &Batch, pass: Pass, ws: &mut Workspace) {
        let keeps = matches!(pass, Pass::Keep(_));
        let (keeps_layers, keeps_made) =
            (keeps && ws.recompute < Recompute::Block, keeps && ws.recompute == Recompute::None);
        let count = |keeps: bool| if keeps { self.layers.len() } else { 1 };
        grow(&mut ws.layers, count(keeps_layers));
        grow(&mut ws.made, count(keeps_made));
        embedding::forward_on(self.value(self.embed), &batch.ids, &self.device(), self.dtype(), &mut ws.stream_td);
        ws.angles.fill_on(&ws.stream_td.device(), &batch.positions, &self.frequencies);
        for l in 0..self.layers.len() {
            if keeps {
                ws.inputs.keep(l, &ws.stream_td);
            }
            let buffers = ForwardBuffers {
                act: &mut ws.layers[kept(keeps_layers, l)],
                made: &mut ws.made[kept(keeps_made, l)],
                dropped: &mut ws.dropped,
            };
            self.layer_forward(l, &mut ws.stream_td, buffers, &ws.angles, batch, pass);
        }
    }
}

/// Where what belongs to layer `l` is, among buffers for each layer or in the one that layers share.
fn kept(each: bool, l: usize) -> usize {
    if each { l } else { 0 }
}

fn grow<T: Default>(buffers: &mut Vec<T>, len: usize) {
    if buffers.len() < len {
        buffers.resize_with(len, T::default);
    }
}
