//! The training loop: full fine-tuning and LoRA are the same lines, they differ only in which tensors train.

use crate::checkpoint::{self, Contents, RunState};
use crate::config::Config;
use crate::evaluate::{continuations, document_losses, mean_loss, training_batch};
use crate::feed::Feed;
use crate::metrics::{MetricRecord, MetricsWriter, read_metrics};
use crate::objective::Objective;
pub use crate::resume::{Start, adapter_config, prepare_model};
use crate::step::{Step, Trainer};
use crate::trainer_state::{RunProgress, RunSummary, TrainerState};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tunesmith_model::{Adapter, Batch, Llama, Workspace};
use tunesmith_tensor::Device;
use tunesmith_text::{Block, ChatTemplate, Message, PreparedSplit, Tokenizer};

/// What a run needs besides its configuration, all loaded and checked.
pub struct Job<'a> {
    /// The configuration.
    pub config: &'a Config,
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
    /// Set by Ctrl-C, for instance: save after the present step and return.
    pub stop: &'a AtomicBool,
}

/// Progress of a run.
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
#[derive(Debug)]
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
    /// The model, where it ran, with the weights of the folder.
    pub model: Arc<Llama>,
    /// The adapter that trained, likewise.
    pub adapter: Option<Adapter>,
}

/// Runs the training that `job` describes of `model` and `adapter`, as [`prepare_model`] left them; they are moved to its device.
///
/// # Errors
/// When a step's loss is not finite (it names the step and its rows; the last checkpoint stays as it is), when a file cannot
/// be written, or when a checkpoint does not fit the configuration.
pub fn train(
    job: Job<'_>,
    model: Arc<Llama>,
    adapter: Option<Adapter>,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    let mut run = Run::new(job, model, adapter, observe)?;
    run.begin();
    // Once more than there are steps, so that what is due after the last one is not told twice.
    loop {
        let (t, samples) = (&run.job.config.training, &run.job.config.samples);
        let is_last = run.state.step == run.max_steps;
        let stops = !is_last && run.job.stop.load(Ordering::Relaxed);

        // Once in a while: evaluate, sample, save.
        if run.is_due(t.eval_steps, true) {
            run.evaluate()?;
        }
        if run.is_due(samples.every, true) {
            run.sample()?;
        }
        if run.is_due(t.save_steps, false) || stops {
            let weights = run.save_checkpoint()?;
            if stops {
                return Ok(run.outcome(false, weights));
            }
        }
        if is_last {
            return run.finish();
        }
        run.step()?;
    }
}

/// The state of a running training.
pub(crate) struct Run<'a, 'o> {
    pub(crate) job: Job<'a>,
    pub(crate) observe: &'o mut dyn FnMut(Event<'_>),
    pub(crate) objective: Objective,
    pub(crate) feed: Feed<'a>,
    pub(crate) validation: PreparedSplit,
    pub(crate) max_steps: u64,
    pub(crate) trainer: Trainer,
    pub(crate) metrics: MetricsWriter,
    pub(crate) state: RunState,
    /// The step of the checkpoint from which the run goes on: what is due there was done before it was saved.
    pub(crate) resumed_at: Option<u64>,
    pub(crate) started: Instant,
    pub(crate) earlier_s: f64,
    pub(crate) interval: Interval,
}

/// What happened since the last record of training.
pub(crate) struct Interval {
    /// Weighted loss sum, and the sum of the weights.
    loss_sum: f64,
    weight: f64,
    /// Tokens that went through the model.
    num_tokens: u64,
    /// Its beginning, moved on by the time that no step took.
    since: Instant,
}

impl Interval {
    pub(crate) fn new() -> Self {
        Self { loss_sum: 0.0, weight: 0.0, num_tokens: 0, since: Instant::now() }
    }
}

impl Run<'_, '_> {
    fn begin(&mut self) {
        (self.observe)(Event::Started {
            step: self.state.step,
            max_steps: self.max_steps,
            num_trained_parameters: self.trainer.trained().map(|p| p.value.len()).sum(),
            num_blocks: self.feed.num_blocks(),
        });
    }

    /// One optimizer step, and what is logged of it.
    fn step(&mut self) -> Result<()> {
        let t = &self.job.config.training;
        let blocks = self.feed.blocks(self.state.step)?;
        let micro_batches: Vec<&[Block]> = blocks.chunks(t.per_device_train_batch_size).collect();
        let batches: Vec<Batch> = micro_batches.iter().map(|blocks| training_batch(blocks)).collect();
        let learning_rate = self.job.config.learning_rate()
            * t.lr_scheduler_type.multiplier(
                self.state.step,
                self.job.config.warmup_steps(self.max_steps),
                self.max_steps,
            );
        let Step { loss, grad_norm } = self.trainer.step(&batches, &self.objective, learning_rate)?;
        if let Some(i) = loss.not_finite {
            return Err(self.not_finite("loss", loss.sum, micro_batches[i]));
        }
        if !grad_norm.is_finite() {
            return Err(self.not_finite("gradient norm", grad_norm, &blocks));
        }

        let num_input_tokens: usize = batches.iter().map(Batch::len).sum();
        self.state.step += 1;
        self.state.num_tokens += blocks.iter().map(Block::num_losses).sum::<usize>() as u64;
        self.state.num_input_tokens += num_input_tokens as u64;
        self.state.num_blocks += blocks.len() as u64;
        self.state.loss_sum += loss.mean();
        self.state.elapsed_s = self.earlier_s + self.started.elapsed().as_secs_f64();
        self.interval.loss_sum += loss.sum;
        self.interval.weight += loss.weight;
        self.interval.num_tokens += num_input_tokens as u64;
        if self.state.step.is_multiple_of(t.logging_steps) || self.state.step == self.max_steps {
            let Interval { loss_sum, weight, num_tokens, since } =
                std::mem::replace(&mut self.interval, Interval::new());
            let record = MetricRecord::Train {
                step: self.state.step,
                epoch: self.epoch(),
                loss: loss_sum / weight,
                learning_rate,
                grad_norm,
                num_tokens: self.state.num_tokens,
                tokens_per_s: num_tokens as f64 / since.elapsed().as_secs_f64(),
                elapsed_s: self.state.elapsed_s,
                rss_bytes: memory_stats::memory_stats().map_or(0, |m| m.physical_mem as u64),
            };
            self.record(&record)?;
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

    /// Whether something is due before the next step that is done `every` so many steps (0: never), before the first step where
    /// `at_start` says so, and after the last.
    fn is_due(&self, every: u64, at_start: bool) -> bool {
        let step = self.state.step;
        let hit = if step == 0 { at_start } else { every > 0 && step.is_multiple_of(every) };
        (hit || step == self.max_steps) && self.resumed_at != Some(step)
    }

    fn evaluate(&mut self) -> Result<()> {
        if self.validation.is_empty() {
            return Ok(());
        }
        let paused = Instant::now();
        let observe = &mut self.observe;
        let progress = |done, all| observe(Event::Evaluating(done, all));
        let Trainer { model, adapter, workspace, device, .. } = &mut self.trainer;
        let documents = document_losses(model, adapter.as_ref(), &self.validation, workspace, progress)?;
        device.synchronize()?;
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
        self.interval.since += paused.elapsed();
    }

    fn sample(&mut self) -> Result<()> {
        let paused = Instant::now();
        let samples = &self.job.config.samples;
        let Trainer { model, adapter, workspace, .. } = &mut self.trainer;
        let texts = sample_texts(
            model,
            adapter.as_ref(),
            self.job.tokenizer,
            self.job.template.filter(|_| samples.chat),
            &samples.prompts,
            self.job.end_tokens,
            samples.max_new_tokens,
            workspace,
        )?;
        for (prompt, text) in samples.prompts.iter().zip(texts) {
            let record = MetricRecord::Sample { step: self.state.step, prompt: prompt.clone(), text };
            self.record(&record)?;
        }
        self.not_training(paused);
        Ok(())
    }

    fn save_checkpoint(&mut self) -> Result<PathBuf> {
        let paused = Instant::now();
        let folder = self.checkpoints().join(format!("step-{}", self.state.step));
        let files = self.side_files(None)?;
        (self.observe)(Event::Saving(&folder));
        let Trainer { model, adapter, optimizer, device, .. } = &mut self.trainer;
        let adapter = adapter.as_ref();
        // On a GPU moments are copied to where they can be written from.
        let mut copy = None;
        if device.gpu().is_some() {
            let trained = tunesmith_model::trained(model, adapter);
            copy = optimizer.as_ref().map(|optimizer| optimizer.to_host(trained));
        }
        device.synchronize()?;
        let contents = Contents {
            model,
            adapter,
            tokenizer: self.job.tokenizer,
            generation_config: self.job.generation_config,
            training: copy.as_mut().or(optimizer.as_mut()).map(|optimizer| (optimizer, &self.state)),
            stream: self.feed.stream(),
            files,
        };
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

    /// The final weights: the last ones, or the best.
    fn finish(mut self) -> Result<Outcome> {
        let step = self.state.step;
        if self.job.config.training.load_best_model_at_end
            && let Some((best, loss)) = self.state.best.filter(|(best, _)| *best != step)
        {
            let folder = self.checkpoints().join(format!("step-{best}"));
            if checkpoint::is_complete(&folder) {
                let is_adapter = self.trainer.adapter.is_some();
                checkpoint::restore_weights(&folder, is_adapter, self.trainer.trained_mut()?)?;
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
            model: &self.trainer.model,
            adapter: self.trainer.adapter.as_ref(),
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

    fn outcome(self, finished: bool, weights: PathBuf) -> Outcome {
        Outcome {
            step: self.state.step,
            max_steps: self.max_steps,
            finished,
            weights,
            best: self.state.best,
            elapsed_s: self.state.elapsed_s,
            model: self.trainer.model,
            adapter: self.trainer.adapter,
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
    adapter: Option<&Adapter>,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    prompts: &[String],
    end_tokens: &[u32],
    max_new_tokens: usize,
    ws: &mut Workspace,
) -> Result<Vec<String>> {
    let encode = |prompt: &String| match template {
        Some(template) => tokenizer.encode(&template.render(&[Message::new("user", prompt)], true)?, false),
        None => tokenizer.encode(prompt, true),
    };
    let ids = prompts.iter().map(encode).collect::<std::result::Result<Vec<_>, _>>()?;
    let slices: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let new = continuations(model, adapter, &slices, end_tokens, max_new_tokens, ws)?;
    Ok(new.iter().map(|new| tokenizer.decode(new, true)).collect::<std::result::Result<_, _>>()?)
}
