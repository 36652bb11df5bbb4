//! What a run needs of memory, known before its first step, and how to make it fit.
//!
//! Every buffer has a size that follows from the configuration, the model and the lengths of the documents; what the program
//! and the tokenizer take is measured by whoever asks ([`Inputs::baseline`]). A run's peak is that of its largest phase.

mod room;

pub use room::{DRIVER, Host, HostPlan};

use crate::config::{Compute, Config, Method};
use crate::evaluate::AT_ONCE;
use crate::optimizer::Optim;
use crate::order::Order;
use crate::{Error, Result};
use serde::Serialize;
use tunesmith_model::llama::{PASS_TOKENS, PASS_TOKENS_GPU};
use tunesmith_model::memory::gpu::{self, OnGpu};
use tunesmith_model::memory::{Offload, PassBytes, PassShape, Recompute, adapter_ranks, cache_bytes, training_bytes};
use tunesmith_model::{AdapterConfig, Config as Model, Storage, largest_part};
use tunesmith_tensor::Dtype;
use tunesmith_text::PreparedSplit;

/// Steps whose documents are looked at to find the largest pass. All blocks of a longer run are much alike.
const STEPS_SEEN: u64 = 2000;

/// Lengths of the documents that a run trains on, in its own order, and that it is validated on.
#[derive(Clone, Debug, Default)]
pub struct DataShape {
    /// For each step and each of its blocks the lengths of its documents.
    steps: Vec<Vec<Vec<usize>>>,
    /// The same for each block of the validation split.
    validation: Vec<Vec<usize>>,
    /// Steps in all.
    pub max_steps: u64,
    /// Tokens that a step trains on, on average.
    pub tokens_per_step: f64,
    /// Tokens of the validation split.
    pub validation_tokens: u64,
}

impl DataShape {
    /// Looks at the prepared data of a run.
    ///
    /// # Errors
    /// When a block cannot be read, or there is none.
    pub fn of(config: &Config, train: &PreparedSplit, validation: &PreparedSplit) -> Result<Self> {
        let validated = (0..validation.len().min(STEPS_SEEN as usize)).map(|i| validation.document_lengths(i));
        let validated = validated.collect::<std::result::Result<Vec<_>, _>>()?;
        if config.data.streaming {
            // Not known beforehand: the longest documents, and as many as fill a part to the brim.
            let t = &config.training;
            let (blocks, length) =
                (t.per_device_train_batch_size * t.gradient_accumulation_steps, config.data.max_length);
            return Ok(Self {
                steps: vec![vec![vec![length]; blocks], vec![vec![1; length]; blocks]],
                validation: validated,
                max_steps: u64::try_from(t.max_steps).unwrap_or(0),
                tokens_per_step: (blocks * length) as f64,
                validation_tokens: validation.num_tokens(),
            });
        }
        let mut order = Order::new(config, train)?;
        let max_steps = order.max_steps(config);
        let mut steps = Vec::new();
        for step in 0..max_steps.min(STEPS_SEEN) {
            let blocks = order.blocks(step).iter().map(|i| train.document_lengths(*i as usize));
            steps.push(blocks.collect::<std::result::Result<Vec<_>, _>>()?);
        }
        Ok(Self {
            steps,
            validation: validated,
            max_steps,
            tokens_per_step: match train.sources() {
                [] => train.num_tokens() as f64,
                sources => order.tokens_per_epoch(sources.iter().map(|source| source.tokens as u64)),
            } / order.steps_per_epoch() as f64,
            validation_tokens: validation.num_tokens(),
        })
    }

    /// Data of `blocks_per_step` blocks a step that are one document of `tokens` tokens each.
    pub fn uniform(blocks_per_step: usize, tokens: usize) -> Self {
        Self {
            steps: vec![vec![vec![tokens]; blocks_per_step]],
            max_steps: 1,
            tokens_per_step: (blocks_per_step * tokens) as f64,
            ..Self::default()
        }
    }

    /// Tokens of the largest pass when `batch` blocks make a micro-batch, which goes through the model in parts of `most` tokens.
    pub fn pass_tokens(&self, batch: usize, most: usize) -> usize {
        let micro_batches = self.steps.iter().flat_map(|blocks| blocks.chunks(batch));
        micro_batches.map(|blocks| largest_part(blocks.iter().flatten().copied(), most)).max().unwrap_or(0)
    }

    /// Tokens of the largest pass of an evaluation.
    fn evaluation_tokens(&self, most: usize) -> usize {
        self.validation.iter().map(|block| largest_part(block.iter().copied(), most)).max().unwrap_or(0)
    }
}

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The model's.
    pub model: &'a Model,
    /// The adapter that trains, if one does.
    pub adapter: Option<&'a AdapterConfig>,
    /// Where the model is.
    pub place: Place,
    /// Bytes of the base model's weights as they are kept there.
    pub weights: u64,
    /// Those of the embedding among them where it can wait in the processor's memory ([`Offload::embedding`]).
    pub embedding: Option<u64>,
    /// [`Inputs::weights`] for other values of `model.storage`, for suggestions.
    pub other_weights: &'a [(Storage, u64)],
    /// Bytes that loading holds besides: the largest matrix, on its way into another encoding.
    pub loading: u64,
    /// Bytes that the process has before weights are loaded: program, tokenizer, headers. On a GPU 0.
    pub baseline: u64,
    /// Bytes of a GPU that its driver takes for itself, [`DRIVER`] where nothing else is known. On the processor 0.
    pub driver: u64,
    /// What a run on a GPU has in the process's own memory.
    pub host: Option<Host>,
    /// Lengths of the documents.
    pub data: &'a DataShape,
    /// Prompts that are continued while training: how many, tokens of the longest, and of what may follow; `None` = no samples.
    pub sample: Option<(usize, usize, usize)>,
    /// Threads that compute.
    pub threads: usize,
}

/// Whose memory is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The processor's, with everything else that the process has.
    Cpu,
    /// A GPU's: what the allocator gives out, and beside it [`Inputs::driver`].
    Gpu {
        /// Type of activations and dense weights.
        dtype: Dtype,
        /// Elements of the largest weight that is quantised there.
        largest_quantised: usize,
    },
}

impl Place {
    /// Tokens that go through the model at once.
    fn pass_tokens(self) -> usize {
        if self == Self::Cpu { PASS_TOKENS } else { PASS_TOKENS_GPU }
    }

    /// Bytes of a gradient of `len` elements.
    fn gradient(self, len: usize) -> u64 {
        if self == Self::Cpu { 4 * len as u64 } else { gpu::float_bytes(len) }
    }

    /// Bytes of a trained weight of `len` elements.
    fn trained_weight(self, len: usize) -> u64 {
        match self {
            Self::Cpu => 4 * len as u64,
            Self::Gpu { dtype, .. } => gpu::dense_bytes(len, dtype, true),
        }
    }

    /// Bytes of both moments of a tensor of `len` elements.
    fn moments(self, optim: Optim, len: usize) -> u64 {
        if self == Self::Cpu { optim.state_bytes(len) as u64 } else { optim.gpu_state_bytes(len) as u64 }
    }
}

/// What may be chosen without changing what a run computes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// `training.per_device_train_batch_size`.
    pub per_device_train_batch_size: usize,
    /// `training.gradient_accumulation_steps`.
    pub gradient_accumulation_steps: usize,
    /// `training.recompute`.
    #[serde(serialize_with = "recompute_name")]
    pub recompute: Recompute,
    /// `training.offload`.
    pub offload: Offload,
    /// Tokens of the largest pass.
    pub pass_tokens: usize,
}

fn recompute_name<S: serde::Serializer>(level: &Recompute, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(level.name())
}

/// Bytes of a run, part by part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// How the run goes through its data.
    pub choice: Choice,
    /// Weights of the base model.
    pub weights: u64,
    /// Weights of the adapter.
    pub adapters: u64,
    /// Gradients of what trains.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// What a forward pass keeps for its backward pass.
    pub activations: u64,
    /// Buffers that layers share, logits, tiles of the threads.
    pub workspace: u64,
    /// Program, tokenizer, data; on a GPU 0.
    pub baseline: u64,
    /// What the driver takes of its GPU, on the processor 0. The peaks below are without it.
    pub driver: u64,
    /// Peak while weights are loaded.
    pub loading_peak: u64,
    /// Peak of a training step.
    pub training_peak: u64,
    /// Peak of an evaluation or a sample during training.
    pub evaluation_peak: u64,
    /// The largest of the peaks, with what the driver takes.
    pub total: u64,
    /// What a run on a GPU takes of the process's own memory.
    pub host: Option<HostPlan>,
}

impl Plan {
    /// The largest of the peaks: of a GPU what its allocator gives out.
    pub fn buffers(&self) -> u64 {
        self.total - self.driver
    }
}

impl Inputs<'_> {
    /// The plan of the run as it is configured.
    pub fn plan(&self) -> Plan {
        let t = &self.config.training;
        self.plan_of(self.choice(t.per_device_train_batch_size, self.config.recompute(), t.offload))
    }

    fn choice(&self, batch: usize, recompute: Recompute, offload: Offload) -> Choice {
        let t = &self.config.training;
        let blocks = t.per_device_train_batch_size * t.gradient_accumulation_steps;
        Choice {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: blocks / batch,
            recompute,
            offload,
            pass_tokens: self.data.pass_tokens(batch, self.place.pass_tokens()),
        }
    }

    fn plan_of(&self, choice: Choice) -> Plan {
        let model = self.model;
        // Numbers of elements of everything that trains, tensor by tensor: the optimizer may treat small ones otherwise.
        let mut trained: Vec<usize> = Vec::new();
        let mut adapters = 0;
        if let Some(adapter) = self.adapter {
            for a in adapter_ranks(model, adapter) {
                trained.extend(a.shape.map(|extent| a.rank * extent));
            }
            let rows = adapter.trainable_token_indices.values();
            trained.extend(rows.map(|ids| ids.len() * model.hidden_size));
            adapters = trained.iter().map(|len| self.place.trained_weight(*len)).sum();
        }
        if self.config.method == Method::Full {
            trained.extend(model.expected_tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()));
        }
        let gradients: u64 = trained.iter().map(|len| self.place.gradient(*len)).sum();
        let optim = self.config.training.optim;
        let optimizer: u64 = match choice.offload.optimizer {
            true => optim.gpu_piece_bytes(&trained) as u64,
            false => trained.iter().map(|len| self.place.moments(optim, *len)).sum(),
        };
        let weights = self.weights - self.embedding.filter(|_| choice.offload.embedding).unwrap_or(0);
        let parked = choice.offload.activations;
        let pass = self.pass_bytes(model, choice.pass_tokens, choice.recompute, trained.len(), parked);
        // Evaluation and samples keep nothing for a backward pass, like a pass that keeps only blocks, of one block.
        let forward = |tokens| {
            let one = Model { num_hidden_layers: 1, ..model.clone() };
            let pass = self.pass_bytes(&one, tokens, Recompute::Block, trained.len(), false);
            pass.activations + pass.workspace + pass.kernels
        };
        let resident = self.baseline + weights + adapters + gradients + optimizer;
        let training = pass.activations + pass.workspace + pass.kernels;
        // They share the buffers of training, which are not given back.
        let evaluation = training.max(forward(self.data.evaluation_tokens(self.place.pass_tokens())));
        let sampling = self.sample.map_or(0, |(prompts, prompt, new)| match self.place {
            Place::Cpu => {
                let tokens = (prompt + new).min(model.max_position_embeddings);
                training.max(forward(prompt.min(PASS_TOKENS))) + cache_bytes(model, tokens)
            }
            Place::Gpu { dtype, largest_quantised } => {
                let on = self.on_gpu(dtype, largest_quantised, trained.len(), false);
                evaluation + gpu::generation_bytes(model, self.adapter, prompts.clamp(1, AT_ONCE), (prompt, new), on)
            }
        });
        let loading_peak = self.baseline + weights + self.loading;
        let training_peak = resident + training;
        let evaluation_peak = resident + evaluation.max(sampling);
        Plan {
            choice,
            weights,
            adapters,
            gradients,
            optimizer,
            activations: pass.activations,
            workspace: pass.workspace + pass.kernels,
            baseline: self.baseline,
            driver: self.driver,
            loading_peak,
            training_peak,
            evaluation_peak,
            total: loading_peak.max(training_peak).max(evaluation_peak) + self.driver,
            host: self.host.map(|host| self.host_plan(host, choice, &trained)),
        }
    }

    fn on_gpu(&self, dtype: Dtype, largest_quantised: usize, num_trained: usize, parked: bool) -> OnGpu {
        OnGpu { dtype, largest_quantised, num_trained, head_trains: self.config.method == Method::Full, parked }
    }

    /// Bytes of a training pass of `tokens` tokens; `num_trained` tensors train, and inputs of blocks may be `parked`.
    fn pass_bytes(
        &self,
        model: &Model,
        tokens: usize,
        recompute: Recompute,
        num_trained: usize,
        parked: bool,
    ) -> PassBytes {
        let int8 = self.config.compute == Compute::Int8;
        let shape = PassShape { tokens, loss_rows: tokens, threads: self.threads, int8 };
        match self.place {
            Place::Cpu => training_bytes(model, self.adapter, shape, recompute),
            Place::Gpu { dtype, largest_quantised } => {
                let on = self.on_gpu(dtype, largest_quantised, num_trained, parked);
                gpu::training_bytes(model, self.adapter, shape, recompute, on)
            }
        }
    }

    /// Whether `training.offload` can be done.
    ///
    /// # Errors
    /// When the embedding is to wait, and is the head too or has rows that train.
    pub fn check_offload(&self) -> Result<()> {
        let offload = self.config.training.offload;
        if self.place == Place::Cpu || !offload.embedding || self.embedding.is_some() {
            return Ok(());
        }
        Err(Error::Input(format!(
            "training.offload = {offload}: the embedding cannot wait in the processor's memory, since it is the head too or has rows that \
             train; leave \"embedding\" out"
        )))
    }

    /// What may wait in the processor's memory besides what has to, from nothing more to all that can, while `recompute` is the level.
    fn offloads(&self, recompute: Recompute) -> impl Iterator<Item = Offload> {
        let asked = self.config.training.offload;
        Offload::all().filter(move |offload| {
            let possible = self.place != Place::Cpu
                && (self.embedding.is_some() || !offload.embedding)
                && (recompute == Recompute::Block || !offload.activations);
            *offload == asked || (offload.contains(asked) && possible)
        })
    }

    /// The way that needs least, with micro-batches of `batch` blocks.
    fn least(&self, batch: usize) -> Plan {
        let all = self.offloads(Recompute::Block).last().unwrap_or(self.config.training.offload);
        self.plan_of(self.choice(batch, Recompute::Block, all))
    }

    /// The fastest way through the data that stays below `limit` bytes: how many blocks go through the model at once,
    /// what the backward pass makes again, and what waits in the processor's memory beside a GPU. Blocks a step stay what they were, and so does what is computed, up to the order
    /// of summation.
    ///
    /// # Errors
    /// When nothing fits: the smallest limit that would do, and what else would make the run smaller.
    pub fn fit(&self, limit: u64) -> Result<Plan> {
        let plan = self.fastest(limit);
        if plan.total <= limit {
            return Ok(plan);
        }
        let smallest = plan.total;
        let mut message = format!(
            "memory_limit = {:?}: the run needs at least {}, with {}; set memory_limit = \"{}MB\" or more",
            self.config.memory_limit.as_deref().unwrap_or_default(),
            format_bytes(smallest),
            at_least(&plan),
            // What the program itself takes differs a little from start to start.
            (smallest + smallest / 50).div_ceil(1_000_000)
        );
        for suggestion in self.suggestions(limit, smallest, 0) {
            message.push_str("; ");
            message.push_str(&suggestion);
        }
        Err(Error::Input(message))
    }

    /// As [`Inputs::fit`]; when nothing fits, the way that needs least.
    pub(crate) fn fastest(&self, limit: u64) -> Plan {
        let t = &self.config.training;
        let configured = t.per_device_train_batch_size;
        let batches = (1..=configured).filter(|b| configured.is_multiple_of(*b));
        // A level that was set is kept or exceeded, never undercut.
        let levels = Recompute::ALL.into_iter().filter(|level| t.recompute.is_none_or(|set| *level >= set));
        let levels: Vec<Recompute> = levels.collect();
        let mut least = self.least(configured);
        let mut best: Option<(f64, Plan)> = None;
        for batch in batches {
            for (level, offload) in levels.iter().flat_map(|l| self.offloads(*l).map(move |offload| (*l, offload))) {
                let plan = self.plan_of(self.choice(batch, level, offload));
                if plan.total < least.total {
                    least = plan;
                }
                let time = self.relative_time(plan.choice);
                // Of two equally fast ways the one with larger micro-batches, which is nearer to what was asked for.
                let order = |(least_time, best): &(f64, Plan)| {
                    let batch = |p: &Plan| p.choice.per_device_train_batch_size;
                    time.total_cmp(least_time).then(batch(best).cmp(&batch(&plan)))
                };
                if plan.total <= limit && best.as_ref().is_none_or(|best| order(best).is_lt()) {
                    best = Some((time, plan));
                }
            }
        }
        best.map_or(least, |(_, plan)| plan)
    }

    /// Time of a run relative to one that keeps everything and takes many tokens at once. Making norms and SwiGLU again and
    /// running blocks again cost what was measured on SmolLM2-135M (`bench train --recompute`); small passes make small products,
    /// whose share of overhead falls with the number of tokens. What waits beside a GPU costs what is assumed until it is measured:
    /// rows of the embedding nearly nothing, inputs of blocks little, since they are copied beside the work, moments the time of two
    /// copies at 25 GB/s in a step that computes at 200 TFLOP/s.
    pub(crate) fn relative_time(&self, choice: Choice) -> f64 {
        let level = match choice.recompute {
            Recompute::None => 1.0,
            Recompute::Norms => 1.005,
            Recompute::Block => 1.26,
        };
        let Offload { embedding, activations, optimizer } = choice.offload;
        let factor = |waits: bool, factor: f64| if waits { factor } else { 1.0 };
        let copies = if optimizer {
            let (trained, operations) = match self.adapter {
                None => (self.model.num_params(), 6),
                Some(adapter) => {
                    let ranks = adapter_ranks(self.model, adapter);
                    (ranks.iter().map(|a| a.rank * (a.shape[0] + a.shape[1])).sum(), 4)
                }
            };
            let moved = 2.0 * self.config.training.optim.state_bytes(trained) as f64;
            let computed = (operations * self.model.num_params()) as f64 * self.data.tokens_per_step;
            (moved / 25e9) / (computed / 2e14).max(1e-9)
        } else {
            0.0
        };
        level
            * (1.0 + 24.0 / choice.pass_tokens.max(1) as f64)
            * factor(embedding, 1.002)
            * factor(activations, 1.02)
            * (1.0 + copies)
    }

    /// Changes that would alter results and are therefore the user's to make; what they need is named without `there`, which
    /// is taken already.
    fn suggestions(&self, limit: u64, smallest: u64, there: u64) -> Vec<String> {
        let mut found = Vec::new();
        let mut with = |what: &str, smaller: Inputs<'_>| {
            let bytes = smaller.least(1).total;
            if bytes < smallest {
                let fits = if bytes <= limit { ", which fits" } else { "" };
                found.push(format!("{what} would need {}{fits}", format_bytes(bytes - there)));
            }
        };
        if self.config.training.optim == Optim::AdamW {
            let mut config = self.config.clone();
            config.training.optim = Optim::AdamW8bit;
            with("training.optim = \"adamw_8bit\"", Inputs { config: &config, ..self.clone() });
        }
        if self.config.method == Method::Full {
            found.push("method = \"lora\" trains far fewer weights".into());
            return found;
        }
        if self.config.compute == Compute::Int8 {
            return found;
        }
        for (storage, weights) in self.other_weights {
            let what = format!("model.storage = \"{}\"", storage.name());
            with(&what, Inputs { weights: *weights, loading: 0, ..self.clone() });
        }
        found
    }
}

/// The way of a plan that needs least, in words.
fn at_least(plan: &Plan) -> String {
    let waiting = match plan.choice.offload {
        Offload::NONE => String::new(),
        offload => format!(" and offload = {offload}"),
    };
    format!("one block at a time, recompute = \"block\"{waiting}")
}

/// Bytes as people write them: `4GB`, `512 MiB`, `1.5GB`.
///
/// # Errors
/// A message that says what is allowed.
pub fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err("write a number and a unit, such as \"4GB\" or \"3500MiB\"".into()),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok((n * factor) as u64),
        _ => Err("write a number above 0 and a unit, such as \"4GB\" or \"3500MiB\"".into()),
    }
}

/// Bytes in decimal units, three digits.
pub fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_and_written() {
        for (text, bytes) in [("4GB", 4_000_000_000), ("1.5 gb", 1_500_000_000), ("512MiB", 512 << 20), (" 8kB ", 8000)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "4", "GB", "-1GB", "0GB", "4 G B", "1.2.3GB", "NaNGB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert_eq!([12_340, 5_600_000, 7_890_000_000].map(format_bytes), ["12.3 kB", "5.6 MB", "7.89 GB"]);
    }

    #[test]
    fn passes_are_cut_as_training_cuts_them() {
        let data = DataShape::uniform(8, 512);
        assert_eq!([1, 2, 4, 8].map(|b| data.pass_tokens(b, 1024)), [512, 1024, 1024, 1024]);
        let long = DataShape::uniform(2, 3000);
        assert_eq!([1, 2].map(|b| long.pass_tokens(b, 1024)), [3000, 3000]);
    }
}
