//! `tunesmith plan`, and the plan that training makes before its first step.

use crate::args::PlanArgs;
use crate::device;
use crate::load;
use serde::Serialize;
use std::path::Path;
use std::time::Instant;
use tunesmith_files::table::grouped;
use tunesmith_files::{Error, Result};
use tunesmith_files::{atomic, bytes::format_bytes};
use tunesmith_hub::{Settings, UPLOAD_MEMORY};
use tunesmith_infer::Opened;
use tunesmith_model::memory::gpu::dense_bytes;
use tunesmith_model::memory::{AdapterRank, Offload, adapter_ranks};
use tunesmith_model::token_rows::token_indices;
use tunesmith_model::{AdapterConfig, Batch, Config as Model, Gradients, Llama, LossOptions, Storage, Workspace};
use tunesmith_tensor::cuda::{Gpu, sizes};
use tunesmith_tensor::{Device, num_threads, rng::Rng};
use tunesmith_text::{Message, PreparedSplit, Report, Split};
use tunesmith_train::checkpoint::{self, free_bytes};
use tunesmith_train::config::{Compute, Config, Method};
use tunesmith_train::memory::{Choice, DRIVER, DataShape, Host, Inputs, Place, Plan};
use tunesmith_train::optimizer::{AdamW, AdamWOptions};
use tunesmith_train::train::{Start, adapter_config};

/// What a process gains between opening a model and its last step besides planned buffers: code that is touched, stacks of
/// threads, the log of the run.
const GROWTH: u64 = 8_000_000;

pub(crate) fn run(args: &PlanArgs, settings: &Settings) -> Result<()> {
    let config = super::prepare::load_config(&args.config, &args.set)?;
    config.check_trainable()?;
    let opened = load::open_configured(&config.model, settings)?;
    let folder = config.output_dir.join("data");
    let data = super::prepare::prepare(&config.data, &opened, &folder, settings)?;
    // A plan needs no GPU, only the time of a step does.
    let device = device::open(config.device, settings);
    let on_gpu = !matches!(device, Ok(Device::Cpu));
    let facts = Facts::gather(&config, &opened, &data, &folder, on_gpu)?;
    let settled = facts.settle(&config, false)?;
    let gpu = device.as_ref().ok().and_then(Device::gpu);
    if let Some(Err(refused)) = gpu.map(|gpu| facts.check_room(&settled, gpu)) {
        eprintln!("note: as things are, train would refuse this run: {refused}");
    }
    let time = match device {
        Ok(device) => Some(facts.measure(&settled, &facts.model, &device)?),
        Err(reason) => {
            eprintln!("the time of a step is not known, since {} cannot be used: {reason}", config.device);
            None
        }
    };
    let output = Output::new(&facts, &settled, &opened, time);
    match &args.json {
        None => print!("{}", output.describe(&settled, &opened)),
        Some(file) => {
            let text = serde_json::to_string_pretty(&output).map_err(|e| Error::Failure(e.to_string()))?;
            if file.as_os_str() == "-" {
                println!("{text}");
            } else {
                atomic::write(file, text + "\n")?;
            }
        }
    }
    Ok(())
}

/// What planning knows of a run besides its configuration: nothing here needs the weights.
pub(crate) struct Facts {
    /// The model with rows for added tokens.
    model: Model,
    adapter: Option<AdapterConfig>,
    data: DataShape,
    /// Part of the tokens that carry loss.
    trained_share: f64,
    place: Place,
    weights: u64,
    /// Of the embedding on a GPU, where it can wait in the processor's memory.
    embedding: Option<u64>,
    other_weights: Vec<(Storage, u64)>,
    loading: u64,
    baseline: u64,
    host: Option<Host>,
    sample: Option<(usize, usize, usize)>,
}

/// A configuration whose micro-batch and recompute level are decided, and its plan.
pub(crate) struct Settled {
    pub(crate) config: Config,
    pub(crate) plan: Plan,
    /// Whose memory it is about.
    pub(crate) place: Place,
    /// What was chosen and why, where something was chosen.
    pub(crate) chosen: Option<String>,
}

impl Facts {
    /// Looks at the prepared data in `folder` and at the headers of the model's files; whether the model will be on a GPU.
    pub(crate) fn gather(config: &Config, opened: &Opened, data: &Report, folder: &Path, on_gpu: bool) -> Result<Self> {
        let splits = [Split::Train, Split::Validation].map(|split| PreparedSplit::open(folder, split));
        let [train, validation] = splits;
        let mut longest = None;
        let samples = &config.samples;
        for prompt in &samples.prompts {
            let ids = match opened.template.as_ref().filter(|_| samples.chat) {
                Some(t) => opened.tokenizer.encode(&t.render(&[Message::new("user", prompt)], true)?, false)?,
                None => opened.tokenizer.encode(prompt, true)?,
            };
            longest = longest.max(Some(ids.len()));
        }
        let storage = config.model.storage;
        let checkpoint = &opened.checkpoint;
        let mut weights = checkpoint.weight_bytes(storage);
        let mut other_weights = [Storage::Stored, Storage::Nf4].map(|other| (other, checkpoint.weight_bytes(other)));
        let mut loading = checkpoint.loading_bytes(storage);
        if config.compute == Compute::Int8 {
            let [after, most] = checkpoint.int8_bytes(storage);
            (weights, loading) = (after, most - after);
        }
        let trained = config.method == Method::Full;
        let uploads = if config.upload.is_some() { UPLOAD_MEMORY } else { 0 };
        let (mut place, mut baseline, mut host) = (Place::Cpu, resident() + GROWTH + uploads, None);
        let mut embedding = None;
        // On a GPU weights are in the process's memory before they are moved: as they are read, or in the mapped file.
        let held = if on_gpu { opened.storage_before_gpu(storage, trained) } else { storage };
        if on_gpu {
            host = Some(Host {
                program: baseline + sizes::HOST as u64,
                weights: checkpoint.weight_bytes(held),
                loading: checkpoint.loading_bytes(held),
            });
            let dtype = config.element();
            let on = |storage| checkpoint.gpu_weights(storage, dtype, trained);
            let (bytes, largest_quantised) = on(storage);
            place = Place::Gpu { dtype, largest_quantised };
            let waits = config.method == Method::Lora && !checkpoint.config().tie_word_embeddings;
            embedding = waits.then(|| checkpoint.gpu_embedding(storage, dtype));
            (weights, loading, baseline) = (bytes, 0, 0);
            other_weights = other_weights.map(|(other, _)| (other, on(other).0));
        }
        let model = opened.model();
        let mut adapter = adapter_config(config, &Start::of(opened))?;
        if let Some(adapter) = adapter.as_mut().filter(|_| !opened.new_tokens.is_empty()) {
            adapter.trainable_token_indices = token_indices(&model, &opened.new_tokens);
        }
        let rows = adapter.as_ref().map_or(0, |adapter| adapter.trainable_token_indices.len());
        if rows > 0 && config.compute == Compute::Int8 {
            return Err(Error::Input(
                "the adapter has rows of added tokens, which are not rounded to 8 bits; use compute = \"f32\"".into(),
            ));
        }
        let grown = model.vocab_size > checkpoint.config().vocab_size;
        let all = if model.tie_word_embeddings { 1 } else { 2 };
        let matrices = if grown { all } else { rows };
        // Rows that train are where they are placed.
        embedding = embedding.filter(|_| matrices == 0);
        if matrices > 0 {
            // They become dense, and one after the other is there twice while it grows.
            let (len, count) = (model.vocab_size * model.hidden_size, matrices as u64);
            let matrix = 4 * len as u64;
            let on_host = |storage| (checkpoint.token_matrix_bytes(storage, matrices), count * matrix);
            let there = |storage| match place {
                Place::Cpu => on_host(storage),
                Place::Gpu { dtype, .. } => {
                    let old = checkpoint.gpu_token_matrix_bytes(storage, dtype, trained, matrices);
                    (old, count * dense_bytes(len, dtype, trained))
                }
            };
            let exchange = |bytes: u64, (old, new): (u64, u64)| bytes - old + new;
            weights = exchange(weights, there(storage));
            other_weights = other_weights.map(|(other, bytes)| (other, exchange(bytes, there(other))));
            match &mut host {
                None => loading = loading.max(matrix),
                Some(host) => {
                    host.weights = exchange(host.weights, on_host(held));
                    host.loading = host.loading.max(matrix);
                }
            }
        }
        Ok(Self {
            adapter,
            data: DataShape::of(config, &train?, &validation?)?,
            place,
            trained_share: match config.data.streaming {
                // Not known beforehand: all of them at most.
                true => 1.0,
                false => {
                    (data.train.trained_tokens + data.train.weighted_tokens) as f64 / data.train.tokens.max(1) as f64
                }
            },
            weights,
            embedding,
            model,
            other_weights: other_weights.to_vec(),
            loading,
            baseline,
            host,
            sample: longest.map(|prompt| (samples.prompts.len(), prompt, samples.max_new_tokens)),
        })
    }

    fn inputs<'a>(&'a self, config: &'a Config, model: &'a Model) -> Inputs<'a> {
        Inputs {
            config,
            model,
            adapter: self.adapter.as_ref(),
            place: self.place,
            weights: self.weights,
            embedding: self.embedding,
            other_weights: &self.other_weights,
            loading: self.loading,
            baseline: self.baseline,
            driver: self.host.map_or(0, |_| DRIVER),
            host: self.host,
            data: &self.data,
            sample: self.sample,
            threads: num_threads(),
        }
    }

    /// The plan of `config` as it is or, under a memory limit, as it is changed to fit. A run that is resumed goes on as it
    /// began: sums in another order would not be the same to the bit.
    ///
    /// # Errors
    /// When nothing fits below the limit.
    pub(crate) fn settle(&self, config: &Config, resume: bool) -> Result<Settled> {
        let inputs = self.inputs(config, &self.model);
        inputs.check_offload()?;
        let asked = inputs.plan();
        let Some(limit) = config.memory_limit() else {
            return Ok(Settled { config: config.clone(), plan: asked, place: self.place, chosen: None });
        };
        if let Some(config) = resume.then(|| as_begun(config)).flatten() {
            let plan = self.inputs(&config, &self.model).plan();
            return Ok(Settled { config, plan, place: self.place, chosen: None });
        }
        let plan = inputs.fit(limit)?;
        let (a, b) = (asked.choice, plan.choice);
        let mut config = config.clone();
        config.training.per_device_train_batch_size = b.per_device_train_batch_size;
        config.training.gradient_accumulation_steps = b.gradient_accumulation_steps;
        config.training.recompute = Some(b.recompute);
        config.training.offload = b.offload;
        let waiting = |offload: Offload| match offload {
            Offload::NONE => String::new(),
            offload => format!(", offload = {offload}"),
        };
        let mut chosen = format!(
            "memory_limit {}: micro-batches of {} x {} steps of accumulation, recompute = \"{}\"{}: {} at the peak",
            config.memory_limit.as_deref().unwrap_or_default(),
            b.per_device_train_batch_size,
            b.gradient_accumulation_steps,
            b.recompute,
            waiting(b.offload),
            format_bytes(plan.total)
        );
        let choices = [a, b].map(|c| (c.per_device_train_batch_size, c.recompute, c.offload));
        if choices[0] != choices[1] {
            chosen.push_str(&format!(
                "; {} x {} and \"{}\"{} would take {}",
                a.per_device_train_batch_size,
                a.gradient_accumulation_steps,
                a.recompute,
                waiting(a.offload),
                format_bytes(asked.total)
            ));
        }
        Ok(Settled { config, plan, place: self.place, chosen: Some(chosen) })
    }

    /// Whether what was settled has room in what is free on `gpu`, where its driver tells.
    ///
    /// # Errors
    /// When it has not.
    pub(crate) fn check_room(&self, settled: &Settled, gpu: &Gpu) -> Result<()> {
        let Some(free) = gpu.free_memory() else { return Ok(()) };
        let inputs = self.inputs(&settled.config, &self.model);
        inputs.check_room(&settled.plan, gpu.name(), free as u64)
    }

    /// Seconds of a step, of the whole training and of all evaluations, from passes through one and two blocks of the
    /// model's shape with random weights on `device`.
    fn measure(&self, settled: &Settled, model: &Model, device: &Device) -> Result<Time> {
        let config = &settled.config;
        let [one, two] = [1, 2].map(|layers| self.probe(settled, model, layers, device));
        let (one, two) = (one?, two?);
        let vocab_scale = model.vocab_size as f64 / one.vocab as f64;
        let layers = model.num_hidden_layers as f64;
        let per_token = |one: f64, two: f64| {
            let layer = (two - one).max(0.0);
            // What is not the layers is nearly all the head, which only sees tokens that carry loss.
            let head = (one - layer).max(0.0) * vocab_scale * self.trained_share;
            (layers * layer + head) / probe_tokens(&settled.plan) as f64
        };
        let tokens = self.data.tokens_per_step;
        let rank_weights = |r: &AdapterRank| r.rank * (r.shape[0] + r.shape[1]);
        let trained: usize = match &self.adapter {
            Some(adapter) => adapter_ranks(model, adapter).iter().map(rank_weights).sum(),
            None => model.num_params(),
        };
        let update = one.update / one.trained.max(1) as f64 * trained as f64;
        let step = tokens * per_token(one.pass, two.pass) + update;
        let t = &config.training;
        let max_steps = self.data.max_steps;
        let evaluations = 2 + max_steps.saturating_sub(1).checked_div(t.eval_steps).unwrap_or(0);
        let evaluated = (evaluations * self.data.validation_tokens) as f64;
        Ok(Time {
            step_s: step,
            tokens_per_s: tokens / step,
            training_s: step * max_steps as f64,
            evaluations_s: evaluated * per_token(one.forward, two.forward),
            max_steps,
        })
    }

    /// Times passes through a model of `layers` blocks that is like `model` otherwise, with a smaller vocabulary.
    fn probe(&self, settled: &Settled, model: &Model, layers: usize, device: &Device) -> Result<Probe> {
        let config = &settled.config;
        let vocab = model.vocab_size.min(8192);
        let small = Model { num_hidden_layers: layers, vocab_size: vocab, ..model.clone() };
        let mut llama = Llama::random(small, 0);
        match &self.adapter {
            None => llama.train_all(),
            Some(adapter) => llama.add_adapter(adapter, 0)?,
        }
        if config.compute == Compute::Int8 {
            llama.compute_int8(true)?;
        }
        if let Some(gpu) = device.gpu() {
            gpu.set_tf32(config.training.tf32);
            llama.check_device(config.element())?;
            if settled.plan.choice.offload.embedding {
                llama.leave_embedding();
            }
            llama.move_to(device, config.element());
        }
        let tokens = probe_tokens(&settled.plan);
        let mut rng = Rng::new(0, 0);
        let ids: Vec<u32> = (0..tokens).map(|_| rng.below(vocab as u32)).collect();
        let mut batch = Batch::default();
        // Documents of the length that blocks have at most: attention does not reach further.
        for document in ids.chunks(config.data.max_length) {
            batch.push(document, &vec![true; document.len()]);
        }
        let Choice { recompute, offload, .. } = settled.plan.choice;
        let (optim, offload_moments) = (config.training.optim, offload.optimizer);
        let options = AdamWOptions { optim, offload: offload_moments, ..AdamWOptions::default() };
        let mut optimizer = AdamW::new(&llama, options);
        let mut gradients = Gradients::new(&llama);
        let mut ws = Workspace::on(device, recompute, offload);
        let options = LossOptions { scale: 1.0, label_smoothing: 0.0, dropout_seed: Some(0), step: 0, first_token: 0 };
        let mut best = [f64::INFINITY; 3];
        // The first round also asks the system for memory.
        for round in 0..3 {
            let mut seconds = [0.0; 3];
            let start = Instant::now();
            llama.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
            seconds[0] = start.elapsed().as_secs_f64();
            let start = Instant::now();
            optimizer.update(&mut llama, &gradients, 0.0, 1.0);
            device.synchronize()?;
            seconds[1] = start.elapsed().as_secs_f64();
            let start = Instant::now();
            llama.loss(&batch, 0.0, &mut ws);
            seconds[2] = start.elapsed().as_secs_f64();
            if round > 0 {
                best = std::array::from_fn(|i| seconds[i].min(best[i]));
            }
        }
        let [pass, update, forward] = best;
        Ok(Probe { pass, update, forward, vocab, trained: llama.num_trained() })
    }
}

/// `config` with what was chosen when its run began, if that was under the same limit and for as many blocks a step.
fn as_begun(config: &Config) -> Option<Config> {
    let file = config.output_dir.join("run.toml");
    let begun = Config::parse(&std::fs::read_to_string(file).ok()?, "run.toml", &[]).ok()?.training;
    let (mut config, t) = (config.clone(), &config.training);
    let blocks = |b: usize, a: usize| b * a;
    let same = blocks(begun.per_device_train_batch_size, begun.gradient_accumulation_steps)
        == blocks(t.per_device_train_batch_size, t.gradient_accumulation_steps);
    config.training.per_device_train_batch_size = begun.per_device_train_batch_size;
    config.training.gradient_accumulation_steps = begun.gradient_accumulation_steps;
    config.training.recompute = begun.recompute;
    config.training.offload = begun.offload;
    same.then_some(config)
}

/// Tokens of a probe's pass: as many as a pass of the run, up to a size where more no longer changes the speed.
fn probe_tokens(plan: &Plan) -> usize {
    plan.choice.pass_tokens.clamp(1, 1024)
}

/// Seconds that parts of a step took.
struct Probe {
    pass: f64,
    update: f64,
    forward: f64,
    vocab: usize,
    trained: usize,
}

#[derive(Clone, Copy, Serialize)]
struct Time {
    step_s: f64,
    tokens_per_s: f64,
    training_s: f64,
    evaluations_s: f64,
    max_steps: u64,
}

/// Everything that the command says, as `--json` prints it; sizes in bytes.
#[derive(Serialize)]
struct Output {
    memory: Plan,
    memory_limit: Option<u64>,
    chosen: Option<String>,
    /// Not known where the GPU cannot be used.
    time: Option<Time>,
    checkpoint: u64,
    disk_free: Option<u64>,
}

impl Output {
    fn new(facts: &Facts, settled: &Settled, opened: &Opened, time: Option<Time>) -> Self {
        let (config, plan) = (&settled.config, settled.plan);
        let model = opened.checkpoint.config();
        let trained: Vec<usize> = match &facts.adapter {
            Some(adapter) => adapter_ranks(model, adapter).iter().flat_map(|r| r.shape.map(|n| n * r.rank)).collect(),
            None => model.expected_tensors().iter().map(|(_, shape)| shape.iter().product()).collect(),
        };
        let optim = config.training.optim;
        let saved: usize = trained.iter().map(|len| 4 * len + optim.state_bytes(*len)).sum();
        Self {
            memory: plan,
            memory_limit: config.memory_limit(),
            chosen: settled.chosen.clone(),
            time,
            checkpoint: saved as u64 + checkpoint::SIDE_FILES,
            disk_free: free_bytes(&config.output_dir),
        }
    }

    fn describe(&self, settled: &Settled, opened: &Opened) -> String {
        let (m, choice) = (&self.memory, self.memory.choice);
        let row = |name: &str, bytes: u64, note: String| vec![name.to_owned(), format_bytes(bytes), note];
        let kept = match (settled.place, settled.config.model.storage) {
            // What is not quantised has the type that the GPU computes in.
            (Place::Gpu { dtype, .. }, Storage::F32) => dtype.name(),
            (_, storage) => storage.name(),
        };
        let rows = [
            row(
                "weights",
                m.weights,
                format!("{} weights, {}", grouped(opened.checkpoint.config().num_params()), kept),
            ),
            row("adapters", m.adapters, String::new()),
            row("gradients", m.gradients, String::new()),
            row("optimizer", m.optimizer, settled.config.training.optim.name().to_owned()),
            row(
                "activations",
                m.activations,
                format!("recompute = \"{}\", passes of {} tokens", choice.recompute, choice.pass_tokens),
            ),
            match settled.place {
                Place::Cpu => row("workspace", m.workspace, format!("{} threads", num_threads())),
                Place::Gpu { .. } => {
                    let products = if settled.config.training.tf32 { ", products in TF32" } else { "" };
                    row("workspace", m.workspace, format!("with that of cuBLASLt{products}"))
                }
            },
            match settled.place {
                Place::Cpu => row("program", m.baseline, "with tokenizer and data".to_owned()),
                Place::Gpu { .. } => {
                    row("driver", m.driver, "context and loaded code: assumed, not measured".to_owned())
                }
            },
            row("total", m.total, self.phases()),
        ];
        let host = m.host.map(|host| {
            let mut phases = format!(
                "of the process beside it, not in memory_limit: loading {}, saving {}, {} else",
                format_bytes(host.loading_peak),
                format_bytes(host.saving_peak),
                format_bytes(host.program + host.offloaded)
            );
            if choice.offload != Offload::NONE {
                phases.push_str(&format!(", of which {} offload {}", format_bytes(host.offloaded), choice.offload));
            }
            row("host", host.total, phases)
        });
        let lines: Vec<String> = rows
            .iter()
            .chain(&host)
            .map(|r| format!("{:<12} {:>10}  {}", r[0], r[1], r[2]).trim_end().to_owned())
            .collect();
        let mut text = lines.join("\n") + "\n\n";
        if let Some(chosen) = &self.chosen {
            text.push_str(&format!("{chosen}\n\n"));
        }
        if let Some(t) = &self.time {
            text.push_str(&format!(
                "step         {:>10}  {:.0} tokens/s, measured on 2 of {} blocks\n\
                 training     {:>10}  {} steps\n\
                 evaluations  {:>10}\n",
                duration(t.step_s),
                t.tokens_per_s,
                opened.checkpoint.config().num_hidden_layers,
                duration(t.training_s),
                grouped(t.max_steps),
                duration(t.evaluations_s),
            ));
        }
        text.push_str(&format!(
            "checkpoint   {:>10}  {} are kept{}\n",
            format_bytes(self.checkpoint),
            settled.config.training.save_total_limit + 1,
            self.disk_free.map_or(String::new(), |free| format!("; {} are free", format_bytes(free)))
        ));
        text
    }

    fn phases(&self) -> String {
        let m = &self.memory;
        let driver = if m.driver > 0 { ", each with the driver's share" } else { "" };
        format!(
            "loading {}, training {}, evaluation and samples {}{driver}",
            format_bytes(m.loading_peak + m.driver),
            format_bytes(m.training_peak + m.driver),
            format_bytes(m.evaluation_peak + m.driver)
        )
    }
}

/// Seconds for people.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.2} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// Memory of this process, where the system tells.
fn resident() -> u64 {
    // What preparing data has freed would otherwise count.
    tunesmith_tensor::release_freed_memory();
    memory_stats::memory_stats().map_or(0, |m| m.physical_mem as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_readable() {
        let shown = [0.5, 12.3, 600.0, 10_000.0, 400_000.0].map(duration);
        assert_eq!(shown, ["0.50 s", "12 s", "10 min", "2.8 h", "4.6 days"]);
    }
}
