//! Setting up a run: what trains, where it begins or goes on.

use crate::checkpoint::{self, RunState};
use crate::config::{Compute, Config, Method};
use crate::feed::Feed;
use crate::metrics::MetricsWriter;
use crate::optimizer::{AdamW, AdamWOptions};
use crate::step::{Trainer, trained_mut};
use crate::train::{Interval, Job, Run};
use crate::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tunesmith_model::{Adapter, AdapterConfig, AdapterFile, Llama, Modules, Workspace, trained};
use tunesmith_tensor::Device;
use tunesmith_text::{PreparedSplit, Split};

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

/// The configuration of the adapter that trains as `config` says, if one does: a new one, or a saved one. The rows of added tokens are
/// not in it yet ([`Adapter::train_tokens`]).
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

/// Sets what trains as `config` says: every weight of `model`, a new adapter, or an adapter that was saved before, which is returned;
/// and the rows of new tokens.
///
/// # Errors
/// When the adapter's targets match nothing, or a saved one does not fit the model.
pub fn prepare_model(config: &Config, start: &Start, model: &mut Llama) -> Result<Option<Adapter>> {
    let adapter = match (&start.adapter, adapter_config(config, start)?) {
        (_, None) => {
            model.add_tokens(&start.new_tokens)?;
            model.train_all();
            None
        }
        (Some(folder), Some(_)) => Some(Adapter::open(model, AdapterFile::open(folder)?, true)?),
        (None, Some(adapter)) => {
            let mut adapter = Adapter::new(model, &adapter, config.seed)?;
            if !start.new_tokens.is_empty() {
                adapter.train_tokens(model, &start.new_tokens)?;
            }
            Some(adapter)
        }
    };
    if config.compute == Compute::Int8 {
        adapter.as_ref().map_or(Ok(()), Adapter::check_int8)?;
        model.compute_int8(true)?;
    }
    Ok(adapter)
}

/// A model that nobody else holds, to be changed.
fn alone(model: &mut Arc<Llama>) -> Result<&mut Llama> {
    Arc::get_mut(model)
        .ok_or_else(|| Error::Failure("the model is in use elsewhere and cannot be moved to a GPU".into()))
}

impl<'a, 'o> Run<'a, 'o> {
    /// A run at its first step, or at the newest whole checkpoint where `job` goes on.
    pub(crate) fn new(
        job: Job<'a>,
        mut model: Arc<Llama>,
        mut adapter: Option<Adapter>,
        observe: &'o mut dyn FnMut(crate::train::Event<'_>),
    ) -> Result<Self> {
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
        let mut optimizer = AdamW::new(&model, adapter.as_ref(), options);
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
                checkpoint::restore_weights(folder, adapter.is_some(), trained_mut(&mut model, adapter.as_mut())?)?;
                state = checkpoint::restore_training(folder, trained(&model, adapter.as_ref()), &mut optimizer)?;
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
            gpu.set_tf32(t.tf32);
            model.check_device(config.element())?;
            if model.device() == Device::Cpu {
                let model = alone(&mut model)?;
                if t.offload.embedding && !model.leave_embedding() {
                    return Err(Error::Input(format!(
                        "training.offload = {}: the embedding is the head too or trains; leave \"embedding\" out",
                        t.offload
                    )));
                }
                model.move_to(job.device, config.element());
            }
            if let Some(adapter) = &mut adapter {
                adapter.move_to(job.device, config.element());
            }
            optimizer = optimizer.to_device(job.device);
        }
        let workspace = Workspace::on(job.device, config.recompute(), t.offload);
        let trainer = Trainer {
            optimizer: Some(optimizer),
            max_grad_norm: t.max_grad_norm,
            dropout_seed: Some(config.seed),
            num_steps: state.step,
            ..Trainer::for_gradients(model, adapter, workspace)
        };
        Ok(Self {
            objective: config.objective(),
            feed,
            validation,
            max_steps,
            trainer,
            metrics,
            earlier_s: state.elapsed_s,
            resumed_at: from.is_some().then_some(state.step),
            state,
            started: Instant::now(),
            interval: Interval::new(),
            job,
            observe,
        })
    }
}
