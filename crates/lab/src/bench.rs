//! Speed and memory of training steps.

use serde::Serialize;
use std::time::Instant;
use tunesmith_files::{Error, Result};
use tunesmith_model::{
    AdapterConfig, Batch, Gradients, LINEAR_NAMES, Llama, LossOptions, Modules, Recompute, Workspace,
};
use tunesmith_tensor::rng::Rng;
use tunesmith_train::memory::peak_resident;
use tunesmith_train::optimizer::{AdamW, AdamWOptions, Optim, clip_coefficient, gradient_norm};

/// What a benchmark trains, and how.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Every weight instead of a LoRA adapter.
    pub full: bool,
    /// Frozen weights multiply in 8 bits.
    pub int8: bool,
    /// Rows of a step.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// Activation recomputation.
    pub recompute: Recompute,
    /// The optimizer.
    pub optim: Optim,
}

impl Default for Setup {
    fn default() -> Self {
        let (recompute, optim) = (Recompute::default(), Optim::default());
        Self { full: false, int8: false, batch: 4, seq: 512, recompute, optim }
    }
}

impl Setup {
    /// Whether it goes together.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self) -> Result<()> {
        if self.batch == 0 || self.seq < 2 {
            return Err(Error::Input("--batch must be at least 1, --seq at least 2".into()));
        }
        if self.full && self.int8 {
            let why = "--compute int8 is for frozen weights; with --method full leave it at f32";
            return Err(Error::Input(why.into()));
        }
        Ok(())
    }

    /// Sets which parameters of `model` are trainable, and how the others multiply.
    ///
    /// # Errors
    /// When the model cannot train so.
    pub fn make_trainable(&self, model: &mut Llama) -> Result<()> {
        match self.full {
            true => model.train_all(),
            false => model.add_adapter(&adapter(), 0)?,
        }
        if self.int8 {
            model.compute_int8(true)?;
        }
        Ok(())
    }

    /// The method's name.
    pub fn method(&self) -> &'static str {
        if self.full { "full" } else { "lora" }
    }
}

/// What training steps took.
#[derive(Debug, Serialize)]
pub struct TrainResult {
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

/// What was trained of data: every row once.
#[derive(Debug, Serialize)]
struct DataResult {
    rows: usize,
    steps: usize,
    tokens: usize,
    trained_tokens: usize,
}

/// Complete training steps (forward, backward, clipping, AdamW): `num_steps` on random tokens, every position trained, or
/// one on each of the batches of `data`, which hold as many rows as it says.
///
/// # Errors
/// When the model cannot train so.
pub fn train(
    setup: &Setup,
    model: &mut Llama,
    num_steps: usize,
    data: Option<(Vec<Batch>, usize)>,
) -> Result<TrainResult> {
    setup.make_trainable(model)?;
    let (recompute, optim) = (setup.recompute, setup.optim);
    let mut result = TrainResult {
        method: setup.method(),
        batch: setup.batch,
        seq: setup.seq,
        threads: rayon::current_num_threads(),
        tokens_per_s: 0.0,
        best: 0.0,
        peak_rss_gb: None,
        data: None,
    };
    // The first step warms up.
    if let Some((batches, rows)) = data {
        let with_first = std::iter::once(&batches[0]).chain(&batches).cloned();
        let seconds = timed_steps(model, with_first, recompute, optim).split_off(1);
        let trained = |batch: &Batch| batch.targets.len();
        let trained_tokens = batches.iter().map(trained).sum();
        result.tokens_per_s = trained_tokens as f64 / seconds.iter().sum::<f64>();
        result.best = batches.iter().zip(&seconds).map(|(b, s)| trained(b) as f64 / s).fold(0.0, f64::max);
        let tokens = batches.iter().map(Batch::len).sum();
        result.data = Some(DataResult { rows, steps: batches.len(), tokens, trained_tokens });
    } else {
        let mut seconds = steps(model, setup.batch, setup.seq, num_steps + 1, recompute, optim).split_off(1);
        seconds.sort_by(f64::total_cmp);
        let tokens = (setup.batch * setup.seq) as f64;
        (result.tokens_per_s, result.best) = (tokens / seconds[seconds.len() / 2], tokens / seconds[0]);
    }
    result.peak_rss_gb = peak_resident().map(|b| b as f64 / 1e9);
    Ok(result)
}

/// The result as text.
pub fn describe(result: &TrainResult) -> String {
    let what = if result.data.is_some() { "trained tokens/s" } else { "tokens/s" };
    let mut text = format!(
        "{} {} x {}: {:.1} {what} (best {:.1}), {} threads\n",
        result.method, result.batch, result.seq, result.tokens_per_s, result.best, result.threads
    );
    if let Some(data) = &result.data {
        text.push_str(&format!(
            "{} rows, {} tokens of which {} trained, in {} steps\n",
            data.rows, data.tokens, data.trained_tokens, data.steps
        ));
    }
    if let Some(gb) = result.peak_rss_gb {
        text.push_str(&format!("peak resident memory {gb:.2} GB\n"));
    }
    text
}

/// The adapter of the benchmarks: rank 16, alpha 32, all linear layers, no dropout.
pub(crate) fn adapter() -> AdapterConfig {
    let target_modules = Modules::List(LINEAR_NAMES.map(String::from).to_vec());
    AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() }
}

/// Seconds that each of `num_steps` training steps on random tokens takes.
pub fn steps(
    model: &mut Llama,
    batch_size: usize,
    seq: usize,
    num_steps: usize,
    recompute: Recompute,
    optim: Optim,
) -> Vec<f64> {
    let mut rng = Rng::new(0, 0);
    let vocab = model.config.vocab_size as u32;
    let batches = (0..num_steps).map(|_| {
        let mut batch = Batch::default();
        for _ in 0..batch_size {
            let ids: Vec<u32> = (0..seq).map(|_| rng.below(vocab)).collect();
            batch.push(&ids, &vec![true; seq]);
        }
        batch
    });
    timed_steps(model, batches, recompute, optim)
}

/// Seconds that a training step on each of `batches` takes.
fn timed_steps(
    model: &mut Llama,
    batches: impl Iterator<Item = Batch>,
    recompute: Recompute,
    optim: Optim,
) -> Vec<f64> {
    let options = AdamWOptions { optim, ..AdamWOptions::default() };
    let mut optimizer = AdamW::new(model, options);
    let mut gradients = Gradients::new(model);
    let mut ws = Workspace::new(recompute);
    let step = |(number, batch): (usize, Batch)| {
        let start = Instant::now();
        let scale = 1.0 / batch.targets.len().max(1) as f32;
        gradients.clear();
        let options =
            LossOptions { scale, label_smoothing: 0.0, dropout_seed: None, step: number as u64, first_token: 0 };
        model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        let norm = gradient_norm(&gradients);
        optimizer.update(model, &gradients, 2e-4, clip_coefficient(norm, 1.0));
        start.elapsed().as_secs_f64()
    };
    batches.enumerate().map(step).collect()
}
