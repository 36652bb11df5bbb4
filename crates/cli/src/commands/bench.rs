//! `tunesmith bench`: speed and memory of training steps.

use crate::args::{Bench, BenchArgs, BenchMethod, BenchTrainArgs, ComputeName, StorageName};
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::Settings;
use serde::Serialize;
use std::time::Instant;
use tunesmith_model::{
    AdapterConfig, Batch, Gradients, LINEAR_NAMES, Llama, LossOptions, Modules, Recompute, Workspace,
};
use tunesmith_tensor::rng::Rng;
use tunesmith_train::optimizer::{AdamW, AdamWOptions, Optim, clip_coefficient, gradient_norm};

pub(crate) fn run(args: &BenchArgs, settings: &Settings) -> Result<()> {
    match &args.what {
        Bench::Train(args) => train(args, settings),
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
}

/// Full training steps (forward, backward, clipping, AdamW) on random tokens, every position trained.
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
    let mut model = opened.llama(args.storage.into())?;
    drop(opened);
    match args.method {
        BenchMethod::Full => model.train_all(),
        BenchMethod::Lora => {
            let target_modules = Modules::List(LINEAR_NAMES.map(String::from).to_vec());
            model.add_adapter(
                &AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() },
                0,
            )?;
        }
    }
    if args.compute == ComputeName::Int8 {
        model.compute_int8(true)?;
    }
    let mut seconds = steps(&mut model, args.batch, args.seq, args.steps + 1, args.recompute.into(), args.optim.into());
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    let tokens = (args.batch * args.seq) as f64;
    let result = TrainResult {
        method: if args.method == BenchMethod::Lora { "lora" } else { "full" },
        batch: args.batch,
        seq: args.seq,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        tokens_per_s: tokens / seconds[seconds.len() / 2],
        best: tokens / seconds[0],
        peak_rss_gb: super::plan::peak_resident().map(|b| b as f64 / 1e9),
    };
    match &args.json {
        None => {
            println!(
                "{} {} x {}: {:.1} tokens/s (best {:.1}), {} threads",
                result.method, result.batch, result.seq, result.tokens_per_s, result.best, result.threads
            );
            if let Some(gb) = result.peak_rss_gb {
                println!("peak resident memory {gb:.2} GB");
            }
        }
        Some(file) => {
            let line = serde_json::to_string(&result).map_err(|e| Error::Failure(e.to_string()))?;
            if file.as_os_str() == "-" {
                println!("{line}");
            } else {
                super::write_atomically(file, (line + "\n").as_bytes())?;
            }
        }
    }
    Ok(())
}

/// Seconds that each of `num_steps` training steps on random tokens takes.
pub(crate) fn steps(
    model: &mut Llama,
    batch_size: usize,
    seq: usize,
    num_steps: usize,
    recompute: Recompute,
    optim: Optim,
) -> Vec<f64> {
    let options = AdamWOptions { optim, ..AdamWOptions::default() };
    let mut optimizer = AdamW::new(model, options);
    let mut gradients = Gradients::new(model);
    let mut ws = Workspace::new(recompute);
    let mut rng = Rng::new(0, 0);
    let vocab = model.config.vocab_size as u32;
    let step = |number| {
        let mut batch = Batch::default();
        for _ in 0..batch_size {
            let ids: Vec<u32> = (0..seq).map(|_| rng.below(vocab)).collect();
            batch.push(&ids, &vec![true; seq]);
        }
        let start = Instant::now();
        let scale = 1.0 / batch.targets.len() as f32;
        gradients.clear();
        let options = LossOptions { scale, label_smoothing: 0.0, dropout_seed: None, step: number, first_token: 0 };
        model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        let norm = gradient_norm(&gradients);
        optimizer.update(model, &gradients, 2e-4, clip_coefficient(norm, 1.0));
        start.elapsed().as_secs_f64()
    };
    (0..num_steps as u64).map(step).collect()
}
