//! The LLaMA model: parameters, forward and explicit backward.
//!
//! A step is `forward`, a loss over the hidden states that it leaves, `backward`. The model is not changed by any of them, and does
//! not know which adapter goes with it: that is an argument.
//!
//! Shape suffixes: t tokens of the micro-batch, d hidden size, f intermediate size, h query heads · head size, k key/value
//! heads · head size, r LoRA rank, n positions that carry loss.

mod decode;
mod inputs;
mod layer;
mod placement;
pub(crate) mod together;

use crate::memory::Offload;
use crate::{Adapter, Checkpoint, Config, Error, Gradients, Parameter, Recompute, Result, Storage, batch::Batch};
use inputs::Inputs;
use layer::{ForwardBuffers, KeptActivations, LayerPass, Purpose};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use tunesmith_tensor::ops::linear::HeadRows;
use tunesmith_tensor::ops::{attention, embedding, linear, linear_cross_entropy, rmsnorm, rope, rows};
use tunesmith_tensor::{Device, Tensor, Weight, pool, rng::Rng};

/// One linear layer: indices into [`Llama::parameters`].
#[derive(Debug)]
pub(crate) struct Linear {
    /// Path without `.weight`, as PEFT names modules.
    pub(crate) module: String,
    pub(crate) weight: usize,
    pub(crate) bias: Option<usize>,
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
    /// All tensors, in the order of [`Config::expected_tensors`].
    pub parameters: Vec<Parameter>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) embed: usize,
    norm: usize,
    /// The same index as `embed` when the head is tied: one tensor, one gradient, one update.
    pub(crate) head: usize,
    /// What multiplies in place of a tied head that is rounded to 8 bits: rows of the embedding stay exact.
    pub(crate) int8_head: Option<Weight>,
    /// The head of a classifier [classes, d].
    score: Option<usize>,
    frequencies: Vec<f32>,
    /// Whether the embedding stays in host memory when the rest moves to a GPU.
    embedding_stays: bool,
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

/// The dropout masks of a batch: a function of the seed, the step and the position of a token in it, so that cutting a step into
/// passes does not change it.
#[derive(Clone, Copy, Debug)]
pub struct Masks {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u64,
    /// Tokens of this step before this batch.
    pub first_token: u64,
}

/// Whether a pass keeps its activations for a backward pass, and which dropout it draws.
#[derive(Clone, Copy, Debug)]
pub enum Pass {
    /// Forward for [`Llama::backward`], with dropout where masks are given.
    Train(Option<Masks>),
    /// Forward only.
    Infer,
}

/// Which matrix scores the hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Every token of the vocabulary: the embedding or `lm_head`.
    Tokens,
    /// Every class: `score`.
    Classes,
}

/// How [`Llama::cross_entropy`] computes its loss.
#[derive(Clone, Copy, Debug)]
pub struct LossOptions {
    /// What is scored.
    pub head: Head,
    /// Factor on the summed weighted loss before the backward pass: 1 / sum of the weights of the whole optimizer step.
    pub scale: f32,
    /// Label smoothing ε.
    pub label_smoothing: f32,
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

/// What follows from [`LayerActivations`] by one pass over memory each: recomputed in the backward pass or kept too.
#[derive(Debug, Default)]
struct CheapActivations {
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
    cheap: Vec<CheapActivations>,
    /// Input of an adapter after dropout.
    dropped: Tensor,
    stream_td: Tensor,
    angles: rope::Angles,
    h_nd: Tensor,
    rstd_n: Tensor,
    normed_nd: Tensor,
    logits: Tensor,
    /// Logits of an adapter's rows of tokens.
    row_logits: Tensor,
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
    /// Buffers for passes that recompute what `recompute` says.
    pub fn new(recompute: Recompute) -> Self {
        Self { recompute, ..Self::default() }
    }

    /// The same for a model on a GPU, with the inputs of layers in host memory between their forward and their backward pass: copied
    /// beside the work that goes on.
    pub fn parked(recompute: Recompute) -> Self {
        Self { recompute, inputs: Inputs::Parked(Box::default()), ..Self::default() }
    }

    /// Bytes of all buffers.
    pub fn num_bytes(&self) -> usize {
        let layer = |act: &LayerActivations| {
            let LayerActivations { rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf, xa_tr } = act;
            let one = [rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf];
            one.into_iter().chain(xa_tr).map(Tensor::capacity_bytes).sum::<usize>()
        };
        let cheap = |m: &CheapActivations| {
            [&m.normed_td, &m.normed2_td, &m.act_tf].map(Tensor::capacity_bytes).iter().sum::<usize>()
        };
        let Self { inputs, dropped, stream_td, h_nd, rstd_n, normed_nd, logits, .. } = self;
        let BackwardBuffers { d_stream_td, d_normed_nd, d_h_nd, d_n_td, d_act_tf, d_o_th, .. } = &self.back;
        let BackwardBuffers { d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped, .. } = &self.back;
        let one = [dropped, stream_td, h_nd, rstd_n, normed_nd, logits, d_stream_td, d_normed_nd, d_h_nd, d_n_td];
        let two = [d_act_tf, d_o_th, d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped];
        let tensors = inputs.num_bytes() + one.into_iter().chain(two).map(Tensor::capacity_bytes).sum::<usize>();
        let layers = self.layers.iter().map(layer).sum::<usize>() + self.cheap.iter().map(cheap).sum::<usize>();
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
        self.generation.recorded.is_recorded()
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
            parameters.push(Parameter::new(name.clone(), checkpoint.load(name, storage)?, false));
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
            Parameter::new(name, value, false)
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
                    Linear { module, weight, bias }
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
        // A classifier has no language-model head: its embedding takes that part, as a tied one does.
        let head = index.get("lm_head.weight").copied().unwrap_or(embed);
        let score = index.get("score.weight").copied();
        let norm = index["model.norm.weight"];
        let frequencies = config.inverse_frequencies();
        Self {
            config,
            layers,
            embed,
            norm,
            head,
            int8_head: None,
            score,
            frequencies,
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
            parameter.make_dense();
            parameter.trained = true;
        }
    }

    /// Number of weights (a tied head counts once).
    pub fn num_params(&self) -> usize {
        self.parameters.iter().map(|p| p.value.len()).sum()
    }

    /// A classification head [classes, d] to begin with: its own, or a new one as Hugging Face initialises it.
    pub(crate) fn initial_score(&self, num_classes: usize, seed: u64) -> Tensor {
        if let Some(score) = self.score.map(|score| self.tensor(score)).filter(|score| score.rows() == num_classes) {
            return score.clone();
        }
        let mut score = Tensor::zeros(&[num_classes, self.config.hidden_size]);
        initial_rows(&self.config, seed, "score.weight", 0..num_classes, score.data_mut());
        score
    }

    /// Makes it a classifier for the classes `labels` with a new head that trains, if it is none yet.
    ///
    /// # Errors
    /// When it is a classifier for other classes.
    pub fn train_score(&mut self, labels: &[String], seed: u64) -> Result<()> {
        if self.score.is_some() && self.config.id2label != labels {
            let found = self.config.id2label.join(", ");
            return Err(Error::Input(format!(
                "the model is a classifier for {found}; the data has {}",
                labels.join(", ")
            )));
        }
        if self.score.is_none() {
            self.set_score(self.initial_score(labels.len(), seed).into(), labels.to_vec());
        }
        self.parameters.iter_mut().skip(self.norm + 1).for_each(|score| score.trained = true);
        Ok(())
    }

    /// Makes it a classifier with the head `score` [classes, d] in place of its language-model head.
    pub(crate) fn set_score(&mut self, score: Weight, labels: Vec<String>) {
        let parameter = Parameter::new("score.weight".into(), score, false);
        // What follows the last norm is the head, which nothing else refers to.
        self.parameters.truncate(self.norm + 1);
        self.head = self.embed;
        self.score = Some(self.parameters.len());
        self.parameters.push(parameter);
        self.config.id2label = labels;
    }

    /// The f32 values of the tensor `name` (a Hugging Face name) on the CPU, wherever the model is.
    ///
    /// # Errors
    /// As [`Llama::base_tensor`].
    pub fn host_tensor(&self, name: &str) -> Result<Cow<'_, Tensor>> {
        self.base_tensor(name)?;
        let found = self.parameters.iter().find(|p| p.name == name).map(Parameter::host);
        found.ok_or_else(|| Error::Failure(format!("the model has no tensor {name}")))
    }

    /// The tensor `name` (a Hugging Face name) of the base model.
    ///
    /// # Errors
    /// When the model has none of that name, or only one rounded to 8 bits.
    pub fn base_tensor(&self, name: &str) -> Result<&Weight> {
        let found = self.parameters.iter().find(|p| p.name == name).map(|p| &p.value);
        if let Some(Weight::Int8(_)) = found {
            return Err(crate::int8::values_are_gone(name));
        }
        found.ok_or_else(|| Error::Failure(format!("the model has no tensor {name}")))
    }

    /// The linear layers of all blocks, in order.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|l| &l.linears)
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

    /// A parameter that is dense in every model: a norm, a bias.
    fn tensor(&self, index: usize) -> &Tensor {
        self.parameters[index].value.tensor()
    }

    /// The rows of tokens that `adapter` has in the embedding, or in the head.
    fn token_rows<'a>(&self, adapter: Option<&'a Adapter>, matrix: usize) -> Option<(HeadRows<'a>, usize)> {
        let module = if matrix == self.embed { "embed_tokens" } else { "lm_head" };
        let adapter = adapter?;
        let (ids, index) = adapter.rows_of(module)?;
        Some((HeadRows { ids, w: adapter.parameters[index].value.tensor() }, index))
    }

    /// Tokens that go through the model at once while training: [`Batch::parts`] of at most so many share no attention. A GPU needs
    /// more of them for its products, and its memory is not shared with a cache.
    pub fn pass_tokens(&self) -> usize {
        if self.device() == Device::Cpu { PASS_TOKENS } else { PASS_TOKENS_GPU }
    }

    /// Forward pass up to the final norm at [`Batch::loss_rows`]: what a loss is computed from, left in `ws`.
    pub fn forward(&self, batch: &Batch, adapter: Option<&Adapter>, pass: Pass, ws: &mut Workspace) {
        pool::enter(|| {
            self.run_layers(batch, adapter, pass, ws);
            rows::gather(&ws.stream_td, &batch.loss_rows, &mut ws.h_nd);
            let eps = self.config.rms_norm_eps;
            rmsnorm::forward(&ws.h_nd, self.tensor(self.norm), eps, &mut ws.normed_nd, &mut ws.rstd_n);
        });
    }

    /// Cross-entropy of [`Batch::targets`] at the hidden states of the last [`Llama::forward`] of `batch`: fills
    /// [`Workspace::losses`] and returns their weighted sum in nats (unscaled). With `gradients` the gradients of
    /// `scale` · Σ weight · loss are added to them for the head, and left for [`Llama::backward`] for the hidden states. The logits are
    /// never whole.
    ///
    /// # Panics
    /// When classes are asked for and neither the model nor the adapter has a head for them.
    pub fn cross_entropy(
        &self,
        batch: &Batch,
        adapter: Option<&Adapter>,
        options: LossOptions,
        ws: &mut Workspace,
        gradients: Option<&mut Gradients>,
    ) -> f64 {
        let Workspace { normed_nd, losses, head: scratch, back, .. } = ws;
        let own_score = adapter.and_then(|adapter| Some((adapter, adapter.score()?)));
        let (w, rows) = match (options.head, own_score, self.score) {
            (Head::Tokens, ..) => (self.head_weight(), self.token_rows(adapter, self.head)),
            (Head::Classes, Some((adapter, score)), _) => (&adapter.parameters[score].value, None),
            (Head::Classes, None, Some(score)) => (self.value(score), None),
            (Head::Classes, None, None) => panic!("there is no classification head"),
        };
        let head = linear_cross_entropy::Head { w, rows: rows.map(|(rows, _)| rows) };
        let (targets, smoothing) = (&batch.targets, options.label_smoothing);
        pool::enter(|| match gradients {
            None => linear_cross_entropy::forward(normed_nd, head, targets, smoothing, scratch, losses),
            Some(gradients) => {
                let Gradients { model, adapter } = gradients;
                let (d_w, d_rows) = match (options.head, own_score, self.score) {
                    (Head::Classes, Some((_, score)), _) => (adapter[score].as_mut(), None),
                    (Head::Classes, None, score) => (score.and_then(|score| model[score].as_mut()), None),
                    (Head::Tokens, ..) => (model[self.head].as_mut(), rows.and_then(|(_, i)| adapter[i].as_mut())),
                };
                let (scale, weights, d_h) = (options.scale, batch.weights(), &mut back.d_normed_nd);
                let sums = linear_cross_entropy::Gradients { scale, weights, d_h, d_w, d_rows };
                linear_cross_entropy::forward_backward(normed_nd, head, targets, smoothing, scratch, losses, sums);
            }
        });
        batch.weighted_sum(losses)
    }

    /// Backward pass of the last [`Llama::forward`] with [`Pass::Train`] of the same arguments, from the gradient of its hidden states:
    /// adds to the gradients of everything that trains.
    pub fn backward(
        &self,
        batch: &Batch,
        adapter: Option<&Adapter>,
        masks: Option<Masks>,
        ws: &mut Workspace,
        gradients: &mut Gradients,
    ) {
        pool::enter(|| self.pooled_backward(batch, adapter, masks, ws, gradients));
    }

    fn pooled_backward(
        &self,
        batch: &Batch,
        adapter: Option<&Adapter>,
        masks: Option<Masks>,
        ws: &mut Workspace,
        gradients: &mut Gradients,
    ) {
        let Workspace { recompute, inputs, layers, cheap, dropped, .. } = ws;
        let Workspace { stream_td, angles, h_nd, rstd_n, back, .. } = ws;
        let recompute = *recompute;
        back.d_h_nd.resize_like(h_nd, h_nd.shape());
        back.d_h_nd.clear();
        let d_norm = gradients.model[self.norm].as_mut();
        rmsnorm::backward(h_nd, self.tensor(self.norm), rstd_n, &back.d_normed_nd, &mut back.d_h_nd, d_norm);
        back.d_stream_td.resize_like(stream_td, stream_td.shape());
        back.d_stream_td.clear();
        rows::scatter(&back.d_h_nd, &batch.loss_rows, &mut back.d_stream_td);
        let lowest = self.lowest_trained_layer(adapter);
        for l in (lowest..self.layers.len()).rev() {
            let at = LayerPass { l, adapter, batch, angles, masks };
            let act = &mut layers[kept(recompute < Recompute::Block, l)];
            let cheap = &mut cheap[kept(recompute == Recompute::None, l)];
            match recompute {
                Recompute::None => {}
                Recompute::Norms => self.recompute_cheap(l, inputs.get(l), act, cheap),
                // The forward pass ended with this layer: its buffers still hold it.
                Recompute::Block if l + 1 == self.layers.len() => {}
                Recompute::Block => {
                    stream_td.assign(inputs.get(l));
                    let buffers = ForwardBuffers { act, cheap, dropped };
                    self.layer_forward(at, stream_td, buffers, Purpose::Recompute);
                }
            }
            let kept = KeptActivations { x_td: inputs.get(l), act, cheap };
            self.layer_backward(at, kept, back, dropped, gradients);
            if l > lowest {
                inputs.done(l);
            }
        }
        if let Some(d_table) = gradients.model[self.embed].as_mut() {
            embedding::backward(&back.d_stream_td, &batch.ids, d_table);
        }
        if let Some((rows, index)) = self.token_rows(adapter, self.embed)
            && let Some(d_rows) = gradients.adapter[index].as_mut()
        {
            embedding::backward_rows(&back.d_stream_td, &batch.ids, rows.ids, d_rows);
        }
    }

    /// Logits [T, V] at every position of `batch`.
    pub fn logits<'w>(&self, batch: &Batch, adapter: Option<&Adapter>, ws: &'w mut Workspace) -> &'w Tensor {
        self.run_layers(batch, adapter, Pass::Infer, ws);
        let eps = self.config.rms_norm_eps;
        rmsnorm::forward(&ws.stream_td, self.tensor(self.norm), eps, &mut ws.normed_nd, &mut ws.rstd_n);
        let Workspace { normed_nd, logits, row_logits, .. } = ws;
        self.project_logits(adapter, normed_nd, row_logits, logits);
        logits
    }

    /// `logits` [N, V] in f32 of the normed hidden states `x` [N, d].
    fn project_logits(&self, adapter: Option<&Adapter>, x: &Tensor, columns: &mut Tensor, logits: &mut Tensor) {
        linear::logits(x, self.head_weight(), logits);
        self.replace_logits(adapter, x, columns, logits);
    }

    /// Logits of the tokens of which `adapter` has rows.
    fn replace_logits(&self, adapter: Option<&Adapter>, x: &Tensor, columns: &mut Tensor, logits: &mut Tensor) {
        if let Some((rows, _)) = self.token_rows(adapter, self.head) {
            linear::replace_logits(x, rows, columns, logits);
        }
    }

    /// Nothing below this layer trains, so the backward pass may stop there.
    fn lowest_trained_layer(&self, adapter: Option<&Adapter>) -> usize {
        let trains = |i: usize| self.parameters[i].trained;
        let rows = adapter.and_then(|adapter| Some(adapter.parameters[adapter.rows_of("embed_tokens")?.1].trained));
        if trains(self.embed) || rows == Some(true) {
            return 0;
        }
        let any = |(l, layer): (usize, &Layer)| {
            let linear = |linear: &Linear| trains(linear.weight) || linear.bias.is_some_and(trains);
            trains(layer.input_norm)
                || trains(layer.post_norm)
                || layer.linears.iter().any(linear)
                || adapter.is_some_and(|adapter| adapter.trains_in(l))
        };
        self.layers.iter().enumerate().position(any).unwrap_or(self.layers.len())
    }

    /// Rows `ids` [T] of the embedding, or of those that `adapter` has: `x` [T, d].
    fn embed(&self, ids: &[u32], adapter: Option<&Adapter>, x: &mut Tensor) {
        embedding::forward_on(self.value(self.embed), ids, &self.device(), self.dtype(), x);
        if let Some((rows, _)) = self.token_rows(adapter, self.embed) {
            embedding::replace(rows.w, rows.ids, ids, x);
        }
    }

    /// Embedding and all layers: leaves the residual stream [T, d] in `ws.stream_td`.
    fn run_layers(&self, batch: &Batch, adapter: Option<&Adapter>, pass: Pass, ws: &mut Workspace) {
        let (purpose, masks) = match pass {
            Pass::Train(masks) => (Purpose::Train, masks),
            Pass::Infer => (Purpose::Infer, None),
        };
        let keeps = purpose == Purpose::Train;
        let (keeps_layers, keeps_cheap) =
            (keeps && ws.recompute < Recompute::Block, keeps && ws.recompute == Recompute::None);
        let count = |keeps: bool| if keeps { self.layers.len() } else { 1 };
        grow(&mut ws.layers, count(keeps_layers));
        grow(&mut ws.cheap, count(keeps_cheap));
        self.embed(&batch.ids, adapter, &mut ws.stream_td);
        ws.angles.fill_on(&ws.stream_td.device(), &batch.positions, &self.frequencies);
        for l in 0..self.layers.len() {
            if keeps {
                ws.inputs.keep(l, &ws.stream_td);
            }
            let buffers = ForwardBuffers {
                act: &mut ws.layers[kept(keeps_layers, l)],
                cheap: &mut ws.cheap[kept(keeps_cheap, l)],
                dropped: &mut ws.dropped,
            };
            let at = LayerPass { l, adapter, batch, angles: &ws.angles, masks };
            self.layer_forward(at, &mut ws.stream_td, buffers, purpose);
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
