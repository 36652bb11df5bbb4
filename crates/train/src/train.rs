//! The training loop: full fine-tuning and LoRA are the same lines, they differ only in which tensors train.

use crate::checkpoint::{self, Contents, RunState};
use crate::config::{Compute, Config, Method};
use crate::evaluate::{continuations, document_losses, mean_loss, training_batch};
use crate::feed::Feed;
use crate::metrics::{MetricRecord, MetricsWriter, read_metrics};
use crate::optimizer::{AdamW, AdamWOptions, clip_coefficient, gradient_norm};
use crate::trainer_state::{RunProgress, RunSummary, TrainerState};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tunesmith_model::{AdapterConfig, AdapterFile, Gradients, Llama, LossOptions, Modules, Workspace};
use tunesmith_tensor::Device;
use tunesmith_text::{Block, ChatTemplate, Message, PreparedSplit, Split, Tokenizer};

/// What a run needs besides its configuration, all loaded and checked.
pub struct Job<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The model as [`prepare_model`] left it, on the processor. It is moved to `device`.
    pub model: &'a mut Llama,
    /// Where the model runs.
    pub device: &'a Device,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template, needed for samples with `chat = true`.
    pub template: Option<&'a ChatTemplate>,
    /// Its generation_config.json, passed on to saved models.
    pub generation_config: Option<&'a serde_json::Value>,
    /// Tokens that end a generated sample.
    pub end_tokens: &'a [u32],
    /// Folder of the prepared data.
    pub data: &'a Path,
    /// Key of the prepared data.
    pub data_key: &'a str,
    /// Go on from the newest whole checkpoint, if there is one.
    pub resume: bool,
    /// Set by Ctrl-C: save after the present step and return.
    pub stop: &'a AtomicBool,
}

/// What the loop tells whoever watches.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The run is about to begin (or to go on) at `step` of `max_steps`.
    Started {
        /// Steps done before.
        step: u64,
        /// Steps in all.
        max_steps: u64,
        /// Weights that train.
        num_trained_parameters: usize,
        /// Blocks of training data; `None` when it is read as training goes on.
        num_blocks: Option<usize>,
    },
    /// A record was written to metrics.jsonl.
    Record(&'a MetricRecord),
    /// Blocks of the validation split done, and in all.
    Evaluating(usize, usize),
    /// A checkpoint or the final weights are about to be saved.
    Saving(&'a Path),
    /// They are saved.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Steps done.
    pub step: u64,
    /// Steps that were planned.
    pub max_steps: u64,
    /// False when it was stopped before the last step.
    pub finished: bool,
    /// Folder of the weights: `final`, or the checkpoint that was saved on stopping.
    pub weights: PathBuf,
    /// Step and validation loss of the best evaluation.
    pub best: Option<(u64, f64)>,
    /// Seconds of training, those before a resume included.
    pub elapsed_s: f64,
}

/// What a configuration names and has been looked up.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// What an adapter calls the model that it belongs to.
    pub base: String,
    /// Folder of the adapter of `model.adapter`, on this machine.
    pub adapter: Option<PathBuf>,
    /// Tokens that have been added to the vocabulary.
    pub new_tokens: Vec<u32>,
}

/// The adapter that trains as `config` says, if one does: a new one, or a saved one. The rows of added tokens are not in it yet
/// ([`Llama::train_tokens`]).
///
/// # Errors
/// When a saved adapter cannot be read.
pub fn adapter_config(config: &Config, start: &Start) -> Result<Option<AdapterConfig>> {
    match (config.method, &start.adapter) {
        (Method::Full, _) => Ok(None),
        (Method::Lora, Some(folder)) => Ok(Some(AdapterFile::open(folder)?.config)),
        (Method::Lora, None) => {
            let lora = &config.lora;
            Ok(Some(AdapterConfig {
                r: lora.r,
                lora_alpha: lora.lora_alpha,
                lora_dropout: lora.lora_dropout,
                use_rslora: lora.use_rslora,
                base_model_name_or_path: Some(start.base.clone()),
                target_modules: Modules::List(lora.targets()),
                ..AdapterConfig::default()
            }))
        }
    }
}

/// Makes train in `model` what `config` says: every weight, a new adapter, or an adapter that was saved before; and the rows of
/// new tokens.
///
/// # Errors
/// When the adapter's targets match nothing, or a saved one does not fit the model.
pub fn prepare_model(config: &Config, start: &Start, model: &mut Llama) -> Result<()> {
    match (&start.adapter, adapter_config(config, start)?) {
        (_, None) => {
            model.add_tokens(&start.new_tokens)?;
            model.train_all();
        }
        (Some(folder), Some(_)) => model.attach_adapter(AdapterFile::open(folder)?, true)?,
        (None, Some(adapter)) => {
            model.add_adapter(&adapter, config.seed)?;
            if !start.new_tokens.is_empty() {
                model.train_tokens(&start.new_tokens)?;
            }
        }
    }
    if config.compute == Compute::Int8 {
        model.compute_int8(true)?;
    }
    Ok(())
}

/// Runs the training that `job` describes.
///
/// # Errors
/// When a step's loss is not finite (it names the step and its rows; the last checkpoint stays as it is), when a file cannot
/// be written, or when a checkpoint does not fit the configuration.
pub fn train(job: Job<'_>, observe: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let mut run = Run::new(job, observe)?;
    while run.state.step < run.max_steps {
        run.evaluate_when_due()?;
        run.sample_when_due()?;
        run.save_when_due()?;
        if run.job.stop.load(Ordering::Relaxed) {
            let weights = run.save_checkpoint()?;
            return Ok(run.outcome(false, weights));
        }
        run.step()?;
    }
    run.finish()
}

/// The state of a running training.
struct Run<'a, 'o> {
    job: Job<'a>,
    observe: &'o mut dyn FnMut(Event<'_>),
    feed: Feed<'a>,
    validation: PreparedSplit,
    max_steps: u64,
    optimizer: AdamW,
    gradients: Gradients,
    ws: Workspace,
    metrics: MetricsWriter,
    state: RunState,
    /// Steps at which evaluation, samples and checkpoint were last made, so that none is made twice.
    done: [Option<u64>; 3],
    started: Instant,
    earlier_s: f64,
    /// Since the last record: weighted loss sum, sum of the weights, tokens, start.
    interval: (f64, f64, u64, Instant),
}

const EVALUATED: usize = 0;
const SAMPLED: usize = 1;
const SAVED: usize = 2;

impl<'a, 'o> Run<'a, 'o> {
    fn new(job: Job<'a>, observe: &'o mut dyn FnMut(Event<'_>)) -> Result<Self> {
        let (config, t) = (job.config, &job.config.training);
        config.check_trainable()?;
        let mut feed = Feed::open(&job)?;
        let validation = PreparedSplit::open(job.data, Split::Validation)?;
        let max_steps = feed.max_steps(config);
        t.lr_scheduler_type.check(config.warmup_steps(max_steps), max_steps)?;
        let options = AdamWOptions {
            optim: t.optim,
            adam_beta1: t.adam_beta1,
            adam_beta2: t.adam_beta2,
            adam_epsilon: t.adam_epsilon,
            weight_decay: t.weight_decay,
            decay_vectors: false,
            offload: t.offload.optimizer,
        };
        let mut optimizer = AdamW::new(job.model, options);
        let mut state = RunState { data_key: job.data_key.to_owned(), ..RunState::default() };
        let metrics_file = config.output_dir.join("metrics.jsonl");
        let from = job.resume.then(|| checkpoint::newest(&config.output_dir.join("checkpoints"))).flatten();
        let metrics = match &from {
            None => {
                // Stopped before its first checkpoint: what it logged belongs to steps that are done anew.
                if job.resume && metrics_file.exists() {
                    std::fs::remove_file(&metrics_file).map_err(|e| Error::io("cannot delete", &metrics_file, e))?;
                }
                MetricsWriter::create(&metrics_file)?
            }
            Some(folder) => {
                checkpoint::restore_weights(folder, job.model)?;
                state = checkpoint::restore_training(folder, job.model, &mut optimizer)?;
                if state.data_key != job.data_key {
                    return Err(Error::Input(format!(
                        "{}: the training data is not what this run began with (key {} then, {} now); restore the data, or \
                         start a new run in another output_dir",
                        folder.display(),
                        state.data_key,
                        job.data_key
                    )));
                }
                feed.restore(folder)?;
                MetricsWriter::resume(&metrics_file, state.step)?
            }
        };
        if let Some(gpu) = job.device.gpu() {
            gpu.set_tf32(config.training.tf32);
            job.model.check_device(config.element())?;
            if t.offload.embedding && !job.model.leave_embedding() {
                return Err(Error::Input(format!(
                    "training.offload = {}: the embedding is the head too or has rows that train; leave \"embedding\" out",
                    t.offload
                )));
            }
            job.model.move_to(job.device, config.element());
            optimizer = optimizer.to_device(job.device);
        }
        let gradients = Gradients::new(job.model);
        observe(Event::Started {
            step: state.step,
            max_steps,
            num_trained_parameters: job.model.num_trained(),
            num_blocks: feed.num_blocks(),
        });
        let now = Instant::now();
        // A checkpoint was made behind the evaluation and the samples of its step.
        let done = [from.is_some().then_some(state.step); 3];
        Ok(Self {
            feed,
            validation,
            max_steps,
            optimizer,
            gradients,
            ws: Workspace::on(job.device, config.recompute(), t.offload),
            metrics,
            earlier_s: state.elapsed_s,
            state,
            done,
            started: now,
            interval: (0.0, 0.0, 0, now),
            job,
            observe,
        })
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<()> {
        let t = &self.job.config.training;
        let step = self.state.step;
        let blocks = self.feed.blocks(step)?;

        // The weights of all tokens of the whole step come first (1 each, unless the data says otherwise): every micro-batch is
        // scaled by the same sum, so that cutting a step into micro-batches does not change its gradient.
        let micro_batches: Vec<&[Block]> = blocks.chunks(t.per_device_train_batch_size).collect();
        let num_tokens: usize = blocks.iter().map(Block::num_losses).sum();
        let weight: f64 = blocks.iter().map(Block::total_weight).sum();
        // Every block has a trained token, so this only keeps a step of foreign data finite.
        let weight = if weight > 0.0 { weight } else { 1.0 };
        let scale = 1.0 / weight as f32;

        self.gradients.clear();
        let (mut loss_sum, mut first_token) = (0.0, 0);
        for blocks in micro_batches {
            let options = LossOptions {
                scale,
                label_smoothing: t.label_smoothing_factor as f32,
                dropout_seed: Some(self.job.config.seed),
                step,
                first_token,
            };
            let batch = training_batch(blocks);
            let loss = self.job.model.loss_and_gradients(&batch, options, &mut self.ws, &mut self.gradients);
            // A device that has failed gives numbers that mean nothing.
            self.job.device.synchronize()?;
            if !loss.is_finite() {
                return Err(self.not_finite("loss", loss, blocks));
            }
            loss_sum += loss;
            first_token += batch.len() as u64;
        }
        let norm = gradient_norm(&self.gradients);
        self.job.device.synchronize()?;
        if !norm.is_finite() {
            return Err(self.not_finite("gradient norm", norm, &blocks));
        }
        let learning_rate = self.job.config.learning_rate()
            * t.lr_scheduler_type.multiplier(step, self.job.config.warmup_steps(self.max_steps), self.max_steps);
        let clip = clip_coefficient(norm, t.max_grad_norm);
        self.optimizer.update(self.job.model, &self.gradients, learning_rate, clip);

        let num_input_tokens: usize = blocks.iter().map(|b| b.ids.len()).sum();
        self.state.step += 1;
        self.state.num_tokens += num_tokens as u64;
        self.state.num_input_tokens += num_input_tokens as u64;
        self.state.num_blocks += blocks.len() as u64;
        self.state.loss_sum += loss_sum / weight;
        self.state.elapsed_s = self.earlier_s + self.started.elapsed().as_secs_f64();
        self.interval.0 += loss_sum;
        self.interval.1 += weight;
        self.interval.2 += num_input_tokens as u64;
        if self.state.step.is_multiple_of(t.logging_steps) || self.state.step == self.max_steps {
            let (loss_sum, weight, tokens, since) = self.interval;
            let record = MetricRecord::Train {
                step: self.state.step,
                epoch: self.epoch(),
                loss: loss_sum / weight,
                learning_rate,
                grad_norm: norm,
                num_tokens: self.state.num_tokens,
                tokens_per_s: tokens as f64 / since.elapsed().as_secs_f64(),
                elapsed_s: self.state.elapsed_s,
                rss_bytes: memory_stats::memory_stats().map_or(0, |m| m.physical_mem as u64),
            };
            self.record(&record)?;
            self.interval = (0.0, 0.0, 0, Instant::now());
        }
        if let Some(message) = self.feed.note(self.state.step, self.max_steps)? {
            self.record(&MetricRecord::Note { step: self.state.step, message })?;
        }
        Ok(())
    }

    fn not_finite(&self, what: &str, value: f64, blocks: &[Block]) -> Error {
        let mut rows: Vec<String> = blocks.iter().flat_map(|b| &b.sources).map(|s| s.to_string()).collect();
        rows.dedup();
        let more = rows.len().saturating_sub(5);
        rows.truncate(5);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let last = checkpoint::newest(&self.checkpoints())
            .map_or("there is no checkpoint yet".into(), |p| format!("the last good checkpoint is {}", p.display()));
        Error::Failure(format!(
            "step {}: the {what} is {value}; its rows: {}{more}. The weights were not changed; {last}. Try a lower \
             learning_rate, more warmup_steps, or look at these rows",
            self.state.step + 1,
            rows.join(", ")
        ))
    }

    fn epoch(&self) -> f64 {
        self.feed.epoch(self.state.step)
    }

    fn checkpoints(&self) -> PathBuf {
        self.job.config.output_dir.join("checkpoints")
    }

    fn record(&mut self, record: &MetricRecord) -> Result<()> {
        self.metrics.write(record)?;
        (self.observe)(Event::Record(record));
        Ok(())
    }

    /// Whether something with this interval is due now and has not been done at this step.
    fn due(&mut self, what: usize, every: u64, at_start: bool) -> bool {
        let step = self.state.step;
        let hit = if step == 0 { at_start } else { every > 0 && step.is_multiple_of(every) };
        let due = hit && self.done[what] != Some(step);
        if due {
            self.done[what] = Some(step);
        }
        due
    }

    fn evaluate_when_due(&mut self) -> Result<()> {
        if self.due(EVALUATED, self.job.config.training.eval_steps, true) { self.evaluate() } else { Ok(()) }
    }

    fn evaluate(&mut self) -> Result<()> {
        self.done[EVALUATED] = Some(self.state.step);
        if self.validation.is_empty() {
            return Ok(());
        }
        let paused = Instant::now();
        let observe = &mut self.observe;
        let progress = |done, all| observe(Event::Evaluating(done, all));
        let documents = document_losses(self.job.model, &self.validation, &mut self.ws, progress)?;
        self.job.device.synchronize()?;
        let (eval_loss, num_tokens) = mean_loss(&documents);
        let (step, epoch) = (self.state.step, self.epoch());
        if self.state.best.is_none_or(|(_, best)| eval_loss < best) {
            self.state.best = Some((step, eval_loss));
        }
        self.record(&MetricRecord::Eval { step, epoch, eval_loss, eval_perplexity: eval_loss.exp(), num_tokens })?;
        self.not_training(paused);
        Ok(())
    }

    /// Time since `paused` was not spent on training steps: it does not count for tokens/s.
    fn not_training(&mut self, paused: Instant) {
        self.interval.3 += paused.elapsed();
    }

    fn sample_when_due(&mut self) -> Result<()> {
        if self.due(SAMPLED, self.job.config.samples.every, true) { self.sample() } else { Ok(()) }
    }

    fn sample(&mut self) -> Result<()> {
        self.done[SAMPLED] = Some(self.state.step);
        let paused = Instant::now();
        let samples = &self.job.config.samples;
        let texts = sample_texts(
            self.job.model,
            self.job.tokenizer,
            self.job.template.filter(|_| samples.chat),
            &samples.prompts,
            self.job.end_tokens,
            samples.max_new_tokens,
        )?;
        for (prompt, text) in samples.prompts.iter().zip(texts) {
            let record = MetricRecord::Sample { step: self.state.step, prompt: prompt.clone(), text };
            self.record(&record)?;
        }
        self.not_training(paused);
        Ok(())
    }

    fn save_when_due(&mut self) -> Result<()> {
        if self.due(SAVED, self.job.config.training.save_steps, false) {
            self.save_checkpoint()?;
        }
        Ok(())
    }

    fn save_checkpoint(&mut self) -> Result<PathBuf> {
        let paused = Instant::now();
        let folder = self.checkpoints().join(format!("step-{}", self.state.step));
        let files = self.side_files(None)?;
        // On a GPU moments are copied to where they can be written from.
        let mut copy = self.job.device.gpu().map(|_| self.optimizer.to_host(self.job.model));
        self.job.device.synchronize()?;
        let contents = Contents {
            model: self.job.model,
            tokenizer: self.job.tokenizer,
            generation_config: self.job.generation_config,
            training: Some((copy.as_mut().unwrap_or(&mut self.optimizer), &self.state)),
            stream: self.feed.stream(),
            files,
        };
        (self.observe)(Event::Saving(&folder));
        checkpoint::save(&folder, contents)?;
        let best = self.state.best.map(|(step, _)| step);
        checkpoint::prune(&self.checkpoints(), self.job.config.training.save_total_limit, best)?;
        (self.observe)(Event::Saved(&folder));
        self.not_training(paused);
        Ok(folder)
    }

    /// trainer_state.json as it stands.
    fn side_files(&self, summary: Option<RunSummary>) -> Result<BTreeMap<String, String>> {
        let t = &self.job.config.training;
        let best_folder = self.state.best.map(|(step, _)| self.checkpoints().join(format!("step-{step}")));
        let progress = RunProgress {
            global_step: self.state.step,
            epoch: self.epoch(),
            max_steps: self.max_steps,
            num_train_epochs: self.feed.num_train_epochs(self.max_steps),
            logging_steps: t.logging_steps,
            eval_steps: t.eval_steps,
            save_steps: t.save_steps,
            train_batch_size: t.per_device_train_batch_size as u64,
            num_input_tokens_seen: self.state.num_input_tokens,
            total_flos: 0.0,
            best_model_checkpoint: best_folder.filter(|f| f.exists()).map(|f| f.display().to_string()),
            summary,
        };
        let records = read_metrics(&self.job.config.output_dir.join("metrics.jsonl"))?;
        let state = TrainerState::from_metrics(&records, &progress);
        Ok(BTreeMap::from([("trainer_state.json".to_owned(), state.to_json()?)]))
    }

    /// Last evaluation, samples and checkpoint, and the final weights.
    fn finish(mut self) -> Result<Outcome> {
        let step = self.state.step;
        if self.done[EVALUATED] != Some(step) {
            self.evaluate()?;
        }
        if self.done[SAMPLED] != Some(step) {
            self.sample()?;
        }
        if self.done[SAVED] != Some(step) {
            self.save_checkpoint()?;
        }
        if self.job.config.training.load_best_model_at_end
            && let Some((best, loss)) = self.state.best.filter(|(best, _)| *best != step)
        {
            let folder = self.checkpoints().join(format!("step-{best}"));
            if checkpoint::is_complete(&folder) {
                checkpoint::restore_weights(&folder, self.job.model)?;
                let message = format!("the final weights are those of step {best}, validation loss {loss:.4}");
                self.record(&MetricRecord::Note { step, message })?;
            } else {
                let message = format!(
                    "step {best} was best (validation loss {loss:.4}) but has no checkpoint; the final weights are those of step {step}"
                );
                self.record(&MetricRecord::Note { step, message })?;
            }
        }
        let summary = RunSummary {
            train_loss: self.state.loss_sum / step.max(1) as f64,
            train_runtime: self.state.elapsed_s,
            num_samples: self.state.num_blocks,
        };
        let files = self.side_files(Some(summary))?;
        let folder = self.job.config.output_dir.join("final");
        let contents = Contents {
            model: self.job.model,
            tokenizer: self.job.tokenizer,
            generation_config: self.job.generation_config,
            training: None,
            stream: None,
            files,
        };
        (self.observe)(Event::Saving(&folder));
        checkpoint::save(&folder, contents)?;
        (self.observe)(Event::Saved(&folder));
        Ok(self.outcome(true, folder))
    }

    fn outcome(&self, finished: bool, weights: PathBuf) -> Outcome {
        Outcome {
            step: self.state.step,
            max_steps: self.max_steps,
            finished,
            weights,
            best: self.state.best,
            elapsed_s: self.state.elapsed_s,
        }
    }
}

/// What `model` says to each of `prompts`: as a user's message where a `template` is given, as plain text to be continued
/// otherwise. See [`continuations`] for how tokens are chosen.
///
/// # Errors
/// When a prompt cannot be rendered or is too long for the model.
pub fn sample_texts(
    model: &Llama,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    prompts: &[String],
    end_tokens: &[u32],
    max_new_tokens: usize,
) -> Result<Vec<String>> {
    let encode = |prompt: &String| match template {
        Some(template) => tokenizer.encode(&template.render(&[Message::new("user", prompt)], true)?, false),
        None => tokenizer.encode(prompt, true),
    };
    let ids = prompts.iter().map(encode).collect::<std::result::Result<Vec<_>, _>>()?;
    let slices: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let new = continuations(model, &slices, end_tokens, max_new_tokens)?;
    Ok(new.iter().map(|new| tokenizer.decode(new, true)).collect::<std::result::Result<_, _>>()?)
}
