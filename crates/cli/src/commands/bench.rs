//! `tunesmith bench`: speed and memory of training steps, and of what they are made of.

mod machine;

use crate::args::{Bench, BenchArgs, BenchMethod, BenchTrainArgs, ComputeName, StorageName};
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::Settings;
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;
use tunesmith_model::{Adapter, AdapterConfig, Batch, LINEAR_NAMES, Modules, Workspace};
use tunesmith_tensor::rng::Rng;
use tunesmith_text::{PrepareOptions, PreparedSplit, Split};
use tunesmith_train::evaluate::batch_of;
use tunesmith_train::objective::Objective;
use tunesmith_train::optimizer::AdamWOptions;
use tunesmith_train::step::Trainer;

pub(crate) fn run(args: &BenchArgs, settings: &Settings) -> Result<()> {
    match &args.what {
        Some(Bench::Train(args)) => train(args, settings),
        Some(Bench::Generate(args)) => super::bench_generate::run(args, settings),
        None => machine::run(&args.machine, settings),
    }
}

#[derive(Serialize)]
struct TrainResult {
    method: &'static str,
    batch: usize,
    seq: usize,
    threads: usize,
    tokens_per_s: f64,
    best: f64,
    peak_rss_gb: Option<f64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    data: Option<DataResult>,
}

/// What was trained with `--data`: every row once.
#[derive(Serialize)]
struct DataResult {
    rows: usize,
    steps: usize,
    tokens: usize,
    trained_tokens: usize,
}

/// Full training steps (forward, backward, clipping, AdamW): on random tokens, every position trained, or on the rows of
/// files, packed as training packs them.
fn train(args: &BenchTrainArgs, settings: &Settings) -> Result<()> {
    if args.batch == 0 || args.steps == 0 || args.seq < 2 {
        return Err(Error::Input("--batch and --steps must be at least 1, --seq at least 2".into()));
    }
    let opened: Opened = load::open(&args.model, None, settings)?;
    if args.method == BenchMethod::Full && args.storage != StorageName::F32 {
        return Err(Error::Input("--storage is for frozen weights; with --method full leave it at f32".into()));
    }
    if args.method == BenchMethod::Full && args.compute == ComputeName::Int8 {
        return Err(Error::Input("--compute int8 is for frozen weights; with --method full leave it at f32".into()));
    }
    let prepared = if args.data.is_empty() { None } else { Some(packed_rows(args, &opened, settings)?) };
    let mut model = opened.llama(args.storage.into())?;
    drop(opened);
    let adapter = match args.method {
        BenchMethod::Full => {
            model.train_all();
            None
        }
        BenchMethod::Lora => Some(Adapter::new(&model, &adapter(), 0)?),
    };
    if args.compute == ComputeName::Int8 {
        model.compute_int8(true)?;
    }
    let options = AdamWOptions { optim: args.optim.into(), ..AdamWOptions::default() };
    let vocab = model.config.vocab_size;
    let mut trainer = Trainer::new(Arc::new(model), adapter, options, Workspace::new(args.recompute.into()));
    let mut result = TrainResult {
        method: if args.method == BenchMethod::Lora { "lora" } else { "full" },
        batch: args.batch,
        seq: args.seq,
        threads: super::threads(),
        tokens_per_s: 0.0,
        best: 0.0,
        peak_rss_gb: None,
        data: None,
    };
    if let Some((batches, rows)) = prepared {
        let mut seconds = timed_steps(&mut trainer, std::iter::once(&batches[0]).chain(&batches).cloned())?;
        seconds.remove(0);
        let trained = |batch: &Batch| batch.targets.len();
        let trained_tokens = batches.iter().map(trained).sum();
        result.tokens_per_s = trained_tokens as f64 / seconds.iter().sum::<f64>();
        result.best = batches.iter().zip(&seconds).map(|(b, s)| trained(b) as f64 / s).fold(0.0, f64::max);
        let tokens = batches.iter().map(Batch::len).sum();
        result.data = Some(DataResult { rows, steps: batches.len(), tokens, trained_tokens });
    } else {
        let mut seconds = timed_steps(&mut trainer, random_batches(vocab, args.batch, args.seq).take(args.steps + 1))?;
        seconds.remove(0);
        seconds.sort_by(f64::total_cmp);
        let tokens = (args.batch * args.seq) as f64;
        (result.tokens_per_s, result.best) = (tokens / seconds[seconds.len() / 2], tokens / seconds[0]);
    }
    result.peak_rss_gb = super::plan::peak_resident().map(|b| b as f64 / 1e9);
    if let Some(file) = &args.json {
        return super::write_json_line(file, &result);
    }
    let what = if result.data.is_some() { "trained tokens/s" } else { "tokens/s" };
    println!(
        "{} {} x {}: {:.1} {what} (best {:.1}), {} threads",
        result.method, result.batch, result.seq, result.tokens_per_s, result.best, result.threads
    );
    if let Some(data) = &result.data {
        println!(
            "{} rows, {} tokens of which {} trained, in {} steps",
            data.rows, data.tokens, data.trained_tokens, data.steps
        );
    }
    if let Some(gb) = result.peak_rss_gb {
        println!("peak resident memory {gb:.2} GB");
    }
    Ok(())
}

/// The adapter of the benchmarks: rank 16, alpha 32, all linear layers, no dropout.
fn adapter() -> AdapterConfig {
    let target_modules = Modules::List(LINEAR_NAMES.map(String::from).to_vec());
    AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() }
}

/// The rows of `--data` in steps of `--batch` blocks of up to `--seq` tokens, and how many rows they are.
fn packed_rows(args: &BenchTrainArgs, opened: &Opened, settings: &Settings) -> Result<(Vec<Batch>, usize)> {
    let options = PrepareOptions {
        train: args.data.clone(),
        validation_fraction: 0.0,
        max_length: args.seq,
        ..PrepareOptions::default()
    };
    let folder = tempfile::tempdir()
        .map_err(|source| Error::Io { what: "cannot make a temporary folder for the data".into(), source })?;
    let report = super::prepare::prepare(&options, opened, folder.path(), settings)?;
    let split = PreparedSplit::open(folder.path(), Split::Train)?;
    let blocks = (0..split.len()).map(|i| split.block(i)).collect::<std::result::Result<Vec<_>, _>>()?;
    let batches = blocks.chunks(args.batch).map(batch_of).collect();
    Ok((batches, report.split(Split::Train).counts.rows))
}

/// Batches of `batch_size` rows of `seq` random tokens, all of which are trained.
pub(crate) fn random_batches(vocab: usize, batch_size: usize, seq: usize) -> impl Iterator<Item = Batch> {
    let mut rng = Rng::new(0, 0);
    std::iter::repeat_with(move || {
        let mut batch = Batch::default();
        for _ in 0..batch_size {
            let ids: Vec<u32> = (0..seq).map(|_| rng.below(vocab as u32)).collect();
            batch.push(&ids, &vec![true; seq]);
        }
        batch
    })
}

/// Seconds that a training step on each of `batches` takes.
pub(crate) fn timed_steps(trainer: &mut Trainer, batches: impl Iterator<Item = Batch>) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for batch in batches {
        let start = Instant::now();
        trainer.step(&[batch], &Objective::default(), 2e-4)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}
