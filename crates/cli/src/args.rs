//! The arguments of every command.

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use tunesmith_tensor::{DeviceSpec, Dtype};

/// A place on this machine to write to; an address would become a folder of that name.
fn local_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|text| match text.to_string_lossy().contains("://") {
        true => Err("this is written to local paths only: name one, and copy it to the bucket afterwards"),
        false => Ok(PathBuf::from(text)),
    })
}

/// Fine-tune, evaluate and run LLaMA-family models: one binary, from raw text to tuned weights.
#[derive(Debug, Parser)]
#[command(name = "tunesmith", version, max_term_width = 110)]
pub struct Cli {
    /// Never use the network: only what is local or cached (also TUNESMITH_OFFLINE=1 or HF_HUB_OFFLINE=1).
    #[arg(long, global = true)]
    pub offline: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands, in the order in which a newcomer needs them.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a real model on real text in a few minutes, and see what changed.
    Quickstart(QuickstartArgs),
    /// Write a new model with random weights, to be trained from nothing or measured.
    Init(InitArgs),
    /// Turn rows of text into blocks of tokens, and show counts or a preview.
    Prepare(PrepareArgs),
    /// Make a tokenizer.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Look at every row as it would be trained on, and name those in which something is wrong.
    Doctor(DoctorArgs),
    /// What a run will need of memory, time and disk, without loading the weights.
    Plan(PlanArgs),
    /// Train as a configuration file says.
    Train(TrainArgs),
    /// Loss, perplexity and bits per byte on held-out data; with an adapter, base against tuned.
    Evaluate(EvaluateArgs),
    /// Continue a prompt.
    Generate(GenerateArgs),
    /// Talk with a model in the terminal.
    Chat(ChatArgs),
    /// Merge an adapter into its base model and write a Hugging Face folder.
    Merge(MergeArgs),
    /// Compare logits, loss, gradients or training curves with another implementation's.
    Verify(VerifyArgs),
    /// Check in seconds that the engine agrees with itself on this machine: gradients, packing, adapters, files.
    Selftest(SelftestArgs),
    /// Check that a GPU computes what the processor computes: every operation, and training and generation of small models.
    GpuCheck(GpuCheckArgs),
    /// Measure training steps on a GPU with random weights of Llama's shapes, and the share of its peaks that they reach.
    GpuBench(GpuBenchArgs),
    /// Measure this machine's peaks and the share that training reaches; speed and memory of training steps.
    Bench(BenchArgs),
}

/// Which model: shared by every command that loads one.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A folder, a .gguf file, hf:org/name[@revision], s3://bucket/prefix (gs://, az://), https://host/file.gguf,
    /// pypi:package==version/path/inside, or a known name such as
    /// smollm2-135m-instruct.
    #[arg(long, value_name = "SOURCE")]
    pub model: String,
    /// PEFT folder of a LoRA adapter to put on top (a path, hf:org/name, s3://bucket/prefix).
    #[arg(long, value_name = "SOURCE")]
    pub adapter: Option<String>,
    /// Jinja file to use instead of the model's own chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// Where a model runs: shared by the commands that can use a GPU.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Where the model runs: cpu, a GPU by its number such as cuda:0, or auto (cuda:0 where it can be used).
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceSpec,
    /// Type of weights and activations on a GPU.
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: ElementName,
    /// With --dtype f32: matrix products may round their factors to TF32, which is faster; exact otherwise.
    #[arg(long)]
    pub tf32: bool,
}

/// Type of weights and activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ElementName {
    /// The upper half of an f32.
    Bf16,
    /// 32 bits.
    F32,
}

impl From<ElementName> for Dtype {
    fn from(name: ElementName) -> Self {
        match name {
            ElementName::Bf16 => Self::BF16,
            ElementName::F32 => Self::F32,
        }
    }
}

/// `tunesmith quickstart`
#[derive(Args, Debug)]
pub struct QuickstartArgs {
    /// Folder for data, run and report.
    #[arg(long, default_value = "quickstart", value_name = "FOLDER", value_parser = local_path())]
    pub dir: PathBuf,
    /// Training steps; without it, as many as fit into about three minutes on this machine.
    #[arg(long)]
    pub steps: Option<u64>,
    /// The model to tune.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    pub model: String,
    /// Your own data (files, folders or globs) instead of Shakespeare's plays; a tenth of its rows is held out as test set.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
}

/// Encoding of the matrices of a new model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InitDtype {
    /// 32 bits.
    F32,
    /// 16 bits, range of f32.
    Bf16,
    /// 16 bits, IEEE half.
    F16,
    /// Blocks of 32 in 8 bits (GGUF files only).
    #[value(name = "q8_0")]
    Q8_0,
    /// Blocks of 32 in 4 bits (GGUF files only).
    #[value(name = "q4_0")]
    Q4_0,
}

/// `tunesmith init`
#[derive(Args, Debug)]
pub struct InitArgs {
    /// A config.json of architecture llama: the sizes of the model.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// What to write: a file that ends in .gguf, or else a Hugging Face folder. Must not exist.
    #[arg(long, value_name = "PATH", value_parser = local_path())]
    pub out: PathBuf,
    /// Encoding of the matrices. Weights are made and written piece by piece: the model is never whole in memory.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: InitDtype,
    /// Seed of the weights.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Model, or folder with a tokenizer alone, whose tokenizer is taken over; for a .gguf file it must be one itself.
    #[arg(long, value_name = "SOURCE")]
    pub tokenizer: Option<String>,
}

/// `tunesmith prepare`
#[derive(Args, Debug)]
pub struct PrepareArgs {
    /// Configuration file (the same as for `train`); without it give --model and --data.
    pub config: Option<PathBuf>,
    /// Model whose tokenizer and chat template are used (model.source).
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,
    /// Files, folders or globs to train on (data.train); may be repeated.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// Folder to write to [default: OUTPUT_DIR/data].
    #[arg(long, value_name = "FOLDER", value_parser = local_path())]
    pub out: Option<PathBuf>,
    /// Set a field of the configuration, such as --set data.max_length=512; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Show the tokens of this many rows of each split, coloured by trained or not.
    #[arg(long, value_name = "N")]
    pub preview: Option<usize>,
}

/// `tunesmith tokenizer`
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Learn a byte-level BPE tokenizer from data, and write it as a Hugging Face folder.
    Train(TokenizerTrainArgs),
}

/// How text is cut into words before bytes are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WordRuleName {
    /// Runs of letters, of digits and of other characters.
    Gpt2,
    /// The same, and every digit alone.
    Smollm,
    /// Digits in groups of three.
    Llama3,
    /// Every digit alone, text in Unicode's normal form C.
    Qwen2,
}

/// `tunesmith tokenizer train`
#[derive(Args, Debug)]
pub struct TokenizerTrainArgs {
    /// Configuration file (the same as for `train`) whose [data] section is used; without it give --data.
    pub config: Option<PathBuf>,
    /// Files, folders or globs to learn from (data.train); may be repeated.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// Set a field of the configuration, such as --set data.text_rows=line; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Folder to write to; must not exist or be empty.
    #[arg(long, value_name = "FOLDER", value_parser = local_path())]
    pub out: PathBuf,
    /// Tokens in all: 256 bytes, the special tokens, and what is learned.
    #[arg(long, value_name = "N")]
    pub vocab_size: usize,
    /// Join only pairs that are seen this often.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub min_frequency: u64,
    /// How text is cut into words; no token reaches across them.
    #[arg(long, value_enum, default_value = "llama3")]
    pub words: WordRuleName,
    /// Token that ends a text.
    #[arg(long, default_value = "<|endoftext|>", value_name = "TEXT")]
    pub eos: String,
    /// Token that begins a text; every text then gets it in front.
    #[arg(long, value_name = "TEXT")]
    pub bos: Option<String>,
    /// Token that fills up rows.
    #[arg(long, value_name = "TEXT")]
    pub pad: Option<String>,
    /// Further special token, such as "<|im_start|>"; may be repeated.
    #[arg(long, value_name = "TEXT")]
    pub special: Vec<String>,
    /// Jinja file of a chat template for the folder.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// `tunesmith doctor`
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Configuration file (the same as for `train`).
    pub config: PathBuf,
    /// Set a field of the configuration, such as --set data.max_length=512; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write what was found as JSON to this file, or to standard output for `-`.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// `tunesmith plan`
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// Configuration file (the same as for `train`); its data is prepared if it is not yet.
    pub config: PathBuf,
    /// Set a field of the configuration, such as --set memory_limit=4GB; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the plan as JSON to this file, or to standard output for `-`.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// `tunesmith train`
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// Configuration file (docs/config.md lists every field).
    pub config: PathBuf,
    /// Set a field of the configuration, such as --set training.max_steps=100; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on from the newest whole checkpoint in output_dir, or in the bucket of `upload` (starts anew if there is none).
    #[arg(long)]
    pub resume: bool,
}

/// Split of prepared data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SplitName {
    /// What the model was trained on.
    Train,
    /// What it was watched with while training.
    Validation,
    /// What was held out to the end.
    Test,
}

/// How frozen matrices are kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StorageName {
    /// Expanded to f32: 4 bytes a weight, the fastest.
    F32,
    /// As the file has them (16-bit floats, blocks of a GGUF file); the results are those of f32.
    Stored,
    /// Rounded to 4-bit NormalFloat with double quantisation when loaded, as QLoRA does.
    Nf4,
}

impl From<StorageName> for tunesmith_model::Storage {
    fn from(name: StorageName) -> Self {
        match name {
            StorageName::F32 => Self::F32,
            StorageName::Stored => Self::Stored,
            StorageName::Nf4 => Self::Nf4,
        }
    }
}

/// How frozen weights multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ComputeName {
    /// In f32.
    F32,
    /// Rounded to 8 bits, as are their inputs: faster, a little less exact.
    Int8,
}

/// `tunesmith evaluate`
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    /// The model and the adapter.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How the weights are kept in memory.
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: StorageName,
    /// How the weights multiply.
    #[arg(long, value_enum, default_value = "f32")]
    pub compute: ComputeName,
    /// Compare with this model instead of with the model without its adapter (it must have the same tokenizer).
    #[arg(long, value_name = "SOURCE", conflicts_with = "adapter")]
    pub base: Option<String>,
    /// Files, folders or globs, all of whose rows are scored; or one prepared folder (see --split).
    #[arg(long, required = true, value_name = "PATH")]
    pub data: Vec<String>,
    /// Split to score when --data is a prepared folder.
    #[arg(long, value_enum, default_value = "test")]
    pub split: SplitName,
    /// Set a field of the data configuration, such as --set data.max_length=512; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Side-by-side samples to generate.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub samples: usize,
    /// Tokens to generate for each sample.
    #[arg(long, default_value_t = 60, value_name = "N")]
    pub max_new_tokens: usize,
    /// Bootstrap resamples for the confidence intervals.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub resamples: usize,
    /// Write everything as JSON.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
    /// Write an HTML report.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub report: Option<PathBuf>,
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Always take the most likely token.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub greedy: bool,
    /// Divides the logits: below 1 sharpens, above 1 flattens.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Choose among the k most likely tokens only (0 = all).
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Choose among the most likely tokens that together reach this probability.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Choose among tokens at least this fraction as likely as the most likely one.
    #[arg(long)]
    pub min_p: Option<f32>,
    /// Above 1 makes tokens that already occurred less likely.
    #[arg(long)]
    pub repetition_penalty: Option<f32>,
    /// Seed of the draws; without it, every run differs.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,
    /// Stop where this text appears (it is not printed); may be repeated.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// `tunesmith generate`
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// The model and the adapter.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Arithmetic. `f32`: all weights are expanded when the model is loaded, exact, 4 bytes a weight. `int8`: weights stay in
    /// the 8 or 4 bits of a GGUF file (others are rounded to 8 bits in blocks of 32), what they multiply is rounded to 8
    /// bits in blocks of 32: faster, smaller, a little less exact [default: int8 for a GGUF file of quantised blocks, as
    /// other programs run such files; f32 for all other models].
    #[arg(long, value_enum)]
    pub compute: Option<ComputeName>,
    /// The prompt; `-` reads it from standard input.
    #[arg(required_unless_present = "prompts", conflicts_with = "prompts")]
    pub prompt: Option<String>,
    /// Continue every prompt of a file instead, several at once, and print a JSON object for each, in their order. A `.jsonl`
    /// file has a string or an object with `prompt` on each line; of any other file, each line is a prompt. The draws of
    /// line n (from 0) are those of --seed plus n.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Most prompts of --prompts that are continued at once: more are faster and need memory for their keys and values.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "prompts")]
    pub batch: usize,
    /// Put the prompt into the chat template as a user's message (otherwise it is continued as plain text).
    #[arg(long)]
    pub chat: bool,
    /// System message, with --chat.
    #[arg(long, requires = "chat", value_name = "TEXT")]
    pub system: Option<String>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print one JSON object with text, token ids, finish reason and speed instead of streaming.
    #[arg(long)]
    pub json: bool,
}

/// `tunesmith chat`
#[derive(Args, Debug)]
pub struct ChatArgs {
    /// The model and the adapter.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Arithmetic. `f32`: all weights are expanded when the model is loaded, exact, 4 bytes a weight. `int8`: weights stay in
    /// the 8 or 4 bits of a GGUF file (others are rounded to 8 bits in blocks of 32), what they multiply is rounded to 8
    /// bits in blocks of 32: faster, smaller, a little less exact [default: int8 for a GGUF file of quantised blocks, as
    /// other programs run such files; f32 for all other models].
    #[arg(long, value_enum)]
    pub compute: Option<ComputeName>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Number format of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// 32 bits, exact.
    F32,
    /// 16 bits, range of f32.
    Bf16,
    /// 16 bits, IEEE half.
    F16,
}

/// `tunesmith merge`
#[derive(Args, Debug)]
pub struct MergeArgs {
    /// The base model (any source).
    #[arg(long, value_name = "SOURCE")]
    pub model: String,
    /// The adapter to merge into it.
    #[arg(long, value_name = "SOURCE")]
    pub adapter: String,
    /// Folder to write, or prefix of a bucket (s3://bucket/prefix, gs://, az://); must not exist or be empty.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Number format of the written weights.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DtypeName,
}

/// What trained in a reference curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodName {
    /// Every weight.
    Full,
    /// A LoRA adapter.
    Lora,
    /// A rank-stabilised LoRA adapter.
    Rslora,
}

/// `tunesmith verify`
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The model and the adapter (for curves: the adapter at the start of the curve).
    #[command(flatten)]
    pub model: ModelArgs,
    /// Safetensors file with input_ids and any of logits, labels, loss, grad.NAME.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["batches", "curves"], required_unless_present = "batches")]
    pub reference: Option<PathBuf>,
    /// Safetensors file with input_ids (and labels) [steps, rows, tokens] for --curves.
    #[arg(long, value_name = "FILE", requires = "curves")]
    pub batches: Option<PathBuf>,
    /// JSON file of training curves: lists of {step, lr, loss, grad_norm}.
    #[arg(long, value_name = "FILE", requires_all = ["batches", "method"])]
    pub curves: Option<PathBuf>,
    /// What trained in the curve.
    #[arg(long, value_enum)]
    pub method: Option<MethodName>,
    /// Name of the curve in the file [default: the method's name].
    #[arg(long, value_name = "NAME", requires = "curves")]
    pub curve: Option<String>,
    /// AdamW weight decay of the curve, on every trained parameter.
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub weight_decay: f64,
    /// Label smoothing of the curve.
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub label_smoothing: f32,
    /// Rows of the table to print (the largest differences first).
    #[arg(long, default_value_t = 12, value_name = "N")]
    pub show: usize,
    /// Write every comparison as JSON.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// `tunesmith selftest`
#[derive(Args, Debug)]
pub struct SelftestArgs {
    /// Check this model with a LoRA adapter, instead of two small random models.
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,
    /// How the weights of --model are kept in memory.
    #[arg(long, value_enum, default_value = "f32", requires = "model")]
    pub storage: StorageName,
    /// Write every check as one line of JSON to this file, or to standard output for `-` (then without the table).
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// `tunesmith gpu-check`
#[derive(Args, Debug)]
pub struct GpuCheckArgs {
    /// The GPU: cuda:0, or the number of another. NVIDIA's libraries are looked for in the folders of
    /// TUNESMITH_CUDA_LIBRARIES, in the system, in CUDA_HOME, and in Python environments.
    #[arg(long, default_value = "cuda:0", value_name = "DEVICE")]
    pub device: DeviceSpec,
    /// Seed of the random inputs; another one every time when not given.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write every check as one line of JSON to this file, or to standard output for `-` (then without the table).
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// What a benchmark trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchMethod {
    /// LoRA of rank 16 on all linear layers.
    Lora,
    /// Every weight.
    Full,
}

/// What the backward pass makes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecomputeName {
    /// Nothing.
    None,
    /// The outputs of norms and SwiGLU.
    Norms,
    /// Whole blocks.
    Block,
}

impl From<RecomputeName> for tunesmith_model::Recompute {
    fn from(name: RecomputeName) -> Self {
        match name {
            RecomputeName::None => Self::None,
            RecomputeName::Norms => Self::Norms,
            RecomputeName::Block => Self::Block,
        }
    }
}

/// `tunesmith gpu-bench`
#[derive(Args, Debug)]
pub struct GpuBenchArgs {
    /// The GPU: cuda:0, or the number of another.
    #[arg(long, default_value = "cuda:0", value_name = "DEVICE")]
    pub device: DeviceSpec,
    /// Shapes to measure, of 1B, 3B and 8B; all of them when none is named.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub models: Vec<String>,
    /// Measured steps, after two that warm up.
    #[arg(long, default_value_t = 8)]
    pub steps: u64,
    /// What the backward pass makes again, at least: more where memory is short (the quantised model always makes whole blocks again).
    #[arg(long, value_enum, default_value = "norms")]
    pub recompute: RecomputeName,
    /// Measure the same steps in transformers + PEFT too, as they are and with torch.compile, and print the ratios: a Python that
    /// has torch, transformers and peft (and bitsandbytes for the quantised model).
    #[arg(long, value_name = "PYTHON")]
    pub peer: Option<PathBuf>,
    /// Leave generation out.
    #[arg(long)]
    pub no_decode: bool,
    /// Write the result as one line of JSON to this file, or to standard output for `-` (then without the table).
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimName {
    /// AdamW with moments in f32.
    Adamw,
    /// AdamW with moments of 8 bits.
    #[value(name = "adamw_8bit")]
    Adamw8bit,
}

impl From<OptimName> for tunesmith_train::optimizer::Optim {
    fn from(name: OptimName) -> Self {
        match name {
            OptimName::Adamw => Self::AdamW,
            OptimName::Adamw8bit => Self::AdamW8bit,
        }
    }
}

/// `tunesmith bench`
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    /// What to measure; without it the machine.
    #[command(subcommand)]
    pub what: Option<Bench>,
    /// How the machine is measured.
    #[command(flatten)]
    pub machine: BenchMachineArgs,
}

/// `tunesmith bench` alone: peaks of the machine, and the share of them that each part of a training step reaches.
#[derive(Args, Debug)]
pub struct BenchMachineArgs {
    /// Model to take [default: random weights of SmolLM2-135M's sizes].
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,
    /// What trains.
    #[arg(long, value_enum, default_value = "lora")]
    pub method: BenchMethod,
    /// How frozen weights multiply.
    #[arg(long, value_enum, default_value = "f32")]
    pub compute: ComputeName,
    /// Rows of a step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 512)]
    pub seq: usize,
    /// Print one line of JSON to this file, or to standard output for `-`.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Training steps on random tokens: tokens per second and peak memory.
    Train(BenchTrainArgs),
    /// Generation: reading a prompt, writing token by token, and a cold start.
    Generate(BenchGenerateArgs),
}

/// `tunesmith bench generate`
#[derive(Args, Debug)]
pub struct BenchGenerateArgs {
    /// The model.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    pub model: String,
    /// Arithmetic [default: as for `generate`].
    #[arg(long, value_enum)]
    pub compute: Option<ComputeName>,
    /// Tokens of the prompt that is read.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub prompt: usize,
    /// Tokens that are written one by one.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub new: usize,
    /// Tokens that are in the cache before the first of them is written.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub context: usize,
    /// Measurements of each kind, after one that warms up.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub repeat: usize,
    /// Print one line of JSON to this file, or to standard output for `-`.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}

/// `tunesmith bench train`
#[derive(Args, Debug)]
pub struct BenchTrainArgs {
    /// The model.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    pub model: String,
    /// What trains.
    #[arg(long, value_enum, default_value = "lora")]
    pub method: BenchMethod,
    /// How frozen weights are kept in memory.
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: StorageName,
    /// How frozen weights multiply.
    #[arg(long, value_enum, default_value = "f32")]
    pub compute: ComputeName,
    /// Rows of a step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 512)]
    pub seq: usize,
    /// What the backward pass makes again instead of keeping it.
    #[arg(long, value_enum, default_value = "norms", value_name = "LEVEL")]
    pub recompute: RecomputeName,
    /// The optimizer.
    #[arg(long, value_enum, default_value = "adamw")]
    pub optim: OptimName,
    /// Measured steps, after one that warms up.
    #[arg(long, default_value_t = 4, conflicts_with = "data")]
    pub steps: usize,
    /// Train on the rows of these files, folders or globs, each once, instead of on random tokens: packed into blocks of up
    /// to --seq tokens, of which --batch make a step. Tokens per second are then those that carry loss.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// Print one line of JSON to this file, or to standard output for `-`.
    #[arg(long, value_name = "FILE", value_parser = local_path())]
    pub json: Option<PathBuf>,
}
