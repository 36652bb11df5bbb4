//! Speed and memory of training steps on a GPU, with random weights of known shapes, beside what the GPU reaches on its own.

mod plan;

pub use plan::{Lacking, Settled};

use crate::optimizer::{AdamW, AdamWOptions, Optim, clip_coefficient, gradient_norm};
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;
use tunesmith_model::memory::Offload;
use tunesmith_model::{AdapterConfig, Batch, Config, Gradients, Llama, LossOptions, Modules, Recompute, Workspace};
use tunesmith_tensor::cuda::sizes;
use tunesmith_tensor::ops::linear::{self, Store};
use tunesmith_tensor::ops::sample::{self, Choice, Scratch};
use tunesmith_tensor::{Device, Dtype, Tensor, rng::Rng};

/// Bytes that the quantised 8B model should need at most.
const QLORA_BYTES: u64 = 5_500_000_000;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name of the model's shape.
    pub model: &'static str,
    /// Its sizes.
    pub config: Config,
    /// Every weight trains; LoRA of rank 16 on all linear layers otherwise.
    pub full: bool,
    /// The frozen matrices are in NF4.
    pub nf4: bool,
    /// Tokens of a step, one document.
    pub tokens: usize,
    /// What the backward pass makes again, at least.
    pub recompute: Recompute,
    /// How the optimizer keeps its moments, at most.
    pub optim: Optim,
    /// What waits in the processor's memory, at least.
    pub offload: Offload,
    /// Bytes that the case should need at most, where it can.
    pub limit: Option<u64>,
}

impl Case {
    /// The adapter that trains.
    fn adapter(&self) -> Option<AdapterConfig> {
        (!self.full).then(|| AdapterConfig {
            r: 16,
            lora_alpha: 32.0,
            target_modules: Modules::List(tunesmith_model::LINEAR_NAMES.map(String::from).to_vec()),
            ..AdapterConfig::default()
        })
    }

    /// `full`, `lora` or `qlora`.
    pub fn method(&self) -> &'static str {
        match (self.full, self.nf4) {
            (true, _) => "full",
            (false, true) => "qlora",
            (false, false) => "lora",
        }
    }
}

/// What the GPU reaches on its own.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    /// Bytes a second of a large copy, reading and writing counted.
    pub copy: f64,
    /// Operations a second of a large product.
    pub product: f64,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Shape of the model.
    pub model: &'static str,
    /// `full`, `lora` or `qlora`.
    pub method: &'static str,
    /// Tokens of a step.
    pub tokens: usize,
    /// Of the steps after the first two.
    pub tokens_per_s: f64,
    /// Operations a second that the mathematics asks for; what is made again does not count.
    pub flops: f64,
    /// Those as a share of [`Peaks::product`].
    pub share: f64,
    /// Most bytes held on the device since it was opened.
    pub peak_bytes: usize,
    /// What was planned of them.
    pub planned_bytes: u64,
    /// How the optimizer kept its moments.
    pub optim: Optim,
    /// What the backward pass made again.
    pub recompute: Recompute,
    /// What waited in the processor's memory.
    pub offload: Offload,
    /// Loss of the first step: about ln(vocabulary) for random weights.
    pub first_loss: f64,
}

/// Generation of several sequences at once.
#[derive(Clone, Debug, Serialize)]
pub struct Decoded {
    /// Shape of the model.
    pub model: &'static str,
    /// Sequences.
    pub sequences: usize,
    /// Tokens that each sequence has before.
    pub context: usize,
    /// New tokens a second, of all sequences together.
    pub tokens_per_s: f64,
    /// The same if nothing but reading weights, keys and values took time, at the speed of [`Peaks::copy`].
    pub limit: f64,
    /// Part of the limit that was reached.
    pub share: f64,
    /// Most bytes held on the device since it was opened.
    pub peak_bytes: usize,
    /// What was planned of them.
    pub planned_bytes: u64,
}

/// Generates `new` tokens, the most likely ones, behind `context` tokens in each of `sequences` sequences; `planned` bytes are what
/// [`Case::settle_decode`] found.
///
/// # Errors
/// When the model's sizes have no kernels, or the device fails.
///
/// # Panics
/// When a number is 0.
pub fn measure_decode(
    device: &Device,
    dtype: Dtype,
    case: &Case,
    (sequences, context, new): (usize, usize, usize),
    planned: u64,
    peaks: &Peaks,
) -> Result<Decoded> {
    let config = &case.config;
    let model = Llama::random_on(config.clone(), 1, case.nf4, false, false, device, dtype);
    model.check_device(dtype)?;
    let mut rng = Rng::new(3, 0);
    let prompts: Vec<Vec<u32>> =
        (0..sequences).map(|_| (0..context).map(|_| rng.below(config.vocab_size as u32)).collect()).collect();
    let (mut cache, mut ws) = (model.new_sequences(sequences, context + new), Workspace::default());
    let (greedy, mut scratch) =
        (vec![Choice { repetition_penalty: 1.0, history: &[], draw: None }; sequences], Scratch::default());
    let parts: Vec<(usize, &[u32])> = prompts.iter().enumerate().map(|(i, p)| (i, p.as_slice())).collect();
    let mut tokens = sample::rows(model.feed(&parts, &mut cache, &mut ws), &greedy, &mut scratch);
    device.synchronize()?;
    let mut start = Instant::now();
    // Until buffers have their sizes and the pass is recorded.
    let warm = 3.min(new - 1);
    for i in 0..new {
        if i == warm {
            device.synchronize()?;
            start = Instant::now();
        }
        let parts: Vec<(usize, &[u32])> = tokens.chunks(1).enumerate().collect();
        tokens = sample::rows(model.feed(&parts, &mut cache, &mut ws), &greedy, &mut scratch);
    }
    device.synchronize()?;
    let seconds = start.elapsed().as_secs_f64() / (new - warm) as f64;
    let tokens_per_s = sequences as f64 / seconds;
    // Of the embedding a few rows are read, unless it is the head too.
    let weights: usize = model.parameters.iter().map(|p| p.value.num_bytes()).sum();
    let embedding = if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size * dtype.bytes() };
    let row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.bytes();
    let read = (weights - embedding) as f64 + (sequences * row) as f64 * (context as f64 + new as f64 / 2.0);
    let limit = sequences as f64 * peaks.copy / read;
    Ok(Decoded {
        model: case.model,
        sequences,
        context,
        tokens_per_s,
        limit,
        share: tokens_per_s / limit,
        peak_bytes: device.gpu().map_or(0, |gpu| gpu.memory().1),
        planned_bytes: planned,
    })
}

/// A number that was aimed at, for one H100 and 4,096 tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// What was measured.
    pub what: String,
    /// What it came to.
    pub found: f64,
    /// What was wanted: at least that, or at most.
    pub wanted: f64,
    /// Whether less is better.
    pub at_most: bool,
}

impl Bar {
    /// Whether what was wanted was reached.
    pub fn reached(&self) -> bool {
        if self.at_most { self.found <= self.wanted } else { self.found >= self.wanted }
    }
}

/// Bytes that buffers may take on a GPU that is sold as one of 80 GB: its 80 GiB without 1.25 that firmware and driver keep, and
/// without loaded code.
const CARD_OF_80: u64 = (315 << 28) - sizes::MODULES as u64;

/// The bars that these measurements are about, and those that plans say are out of reach.
pub fn bars(measured: &[Measured], lacking: &[Lacking], decoded: &[Decoded]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let on_a_card = |what: &str, bytes: u64| Bar {
        what: format!("8B full, GiB {what}, on a card of 80"),
        found: gib(bytes),
        wanted: gib(CARD_OF_80),
        at_most: true,
    };
    for m in measured {
        if (m.model, m.method) == ("8B", "full") {
            bars.push(on_a_card("at the peak", m.peak_bytes as u64));
        }
        let wanted = match (m.model, m.method) {
            ("8B", "lora") => 15_000.0,
            ("8B", "qlora") => 14_000.0,
            ("3B", "lora") => 34_000.0,
            ("1B", "lora") => 75_000.0,
            ("1B", "full") => 65_000.0,
            _ => continue,
        };
        let what = format!("{} {}, tokens/s", m.model, m.method);
        bars.push(Bar { what, found: m.tokens_per_s, wanted, at_most: false });
        if m.method == "qlora" {
            let what = format!("{} {}, GB at the peak", m.model, m.method);
            bars.push(Bar { what, found: m.peak_bytes as f64 / 1e9, wanted: QLORA_BYTES as f64 / 1e9, at_most: true });
        }
    }
    for l in lacking.iter().filter(|l| (l.model, l.method) == ("8B", "full")) {
        bars.push(on_a_card("at the peak as planned", l.needed));
    }
    for d in decoded.iter().filter(|d| d.model == "8B") {
        let (what, found, wanted) = match d.sequences {
            1 => ("8B, 1 sequence, % of the bandwidth limit", 100.0 * d.share, 70.0),
            64 => ("8B, 64 sequences, tokens/s", d.tokens_per_s, 3000.0),
            _ => continue,
        };
        bars.push(Bar { what: what.into(), found, wanted, at_most: false });
    }
    bars
}

/// Measures the peaks with matrices of `size` rows and columns.
///
/// # Errors
/// When the device fails.
pub fn peaks(device: &Device, dtype: Dtype, size: usize) -> Result<Peaks> {
    const REPEATS: usize = 10;
    let [a, b] = [(); 2].map(|()| Tensor::zeros_on(device, dtype, &[size, size]));
    let (mut to, mut c) = (Tensor::default(), Tensor::default());
    let time = |mut f: Box<dyn FnMut() + '_>| -> Result<f64> {
        f();
        device.synchronize()?;
        let start = Instant::now();
        (0..REPEATS).for_each(|_| f());
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / REPEATS as f64)
    };
    let copy = 2.0 * (a.len() * dtype.bytes()) as f64 / time(Box::new(|| to.assign(&a)))?;
    let product = time(Box::new(|| linear::matmul(&a, &b, 1.0, &mut c, Store::Overwrite)))?;
    Ok(Peaks { copy, product: 2.0 * (size as f64).powi(3) / product })
}

/// Trains `steps` steps after two to warm up.
///
/// # Errors
/// When the model's sizes have no kernels, or the device fails.
pub fn measure(device: &Device, dtype: Dtype, settled: &Settled, steps: u64, peaks: &Peaks) -> Result<Measured> {
    let case = &settled.case;
    let mut model =
        Llama::random_on(case.config.clone(), 1, case.nf4, case.full, case.offload.embedding, device, dtype);
    model.check_device(dtype)?;
    if let Some(adapter) = case.adapter() {
        model.add_adapter(&adapter, 1)?;
        model.move_to(device, dtype);
    }
    let mut rng = Rng::new(2, 0);
    let vocab = case.config.vocab_size as u32;
    let ids: Vec<u32> = (0..case.tokens).map(|_| rng.below(vocab)).collect();
    let mut batch = Batch::default();
    batch.push(&ids, &vec![true; ids.len()]);
    let options = AdamWOptions { optim: case.optim, offload: case.offload.optimizer, ..AdamWOptions::default() };
    let (mut optimizer, mut gradients) = (AdamW::new(&model, options), Gradients::new(&model));
    let mut ws = Workspace::on(device, case.recompute, case.offload);
    let (mut first_loss, mut start) = (f64::NAN, Instant::now());
    for step in 0..steps + 2 {
        if step == 2 {
            device.synchronize()?;
            start = Instant::now();
        }
        gradients.clear();
        let scale = 1.0 / batch.targets.len().max(1) as f32;
        let options = LossOptions { scale, label_smoothing: 0.0, dropout_seed: None, step, first_token: 0 };
        let loss = model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        let norm = gradient_norm(&gradients);
        optimizer.update(&mut model, &gradients, 1e-5, clip_coefficient(norm, 1.0));
        if step == 0 {
            first_loss = loss * f64::from(scale);
        }
    }
    device.synchronize()?;
    if !first_loss.is_finite() {
        return Err(Error::Failure(format!("{}: the first loss is {first_loss}", case.model)));
    }
    let tokens_per_s = case.tokens as f64 * steps as f64 / start.elapsed().as_secs_f64();
    let flops = tokens_per_s * flops_per_token(case);
    Ok(Measured {
        model: case.model,
        method: case.method(),
        tokens: case.tokens,
        tokens_per_s,
        flops,
        share: flops / peaks.product,
        peak_bytes: device.gpu().map_or(0, |gpu| gpu.memory().1),
        planned_bytes: settled.bytes,
        optim: case.optim,
        recompute: case.recompute,
        offload: case.offload,
        first_loss,
    })
}

/// Operations for a token: two a weight forwards, two for the gradient of the input, two more for that of the weight where it
/// trains; half the positions of attention, three and a half times as much with its backward pass.
fn flops_per_token(case: &Case) -> f64 {
    let c = &case.config;
    let head = c.vocab_size * c.hidden_size;
    let matrices = c.num_params() - if c.tie_word_embeddings { 0 } else { head };
    let attention = 7 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * case.tokens;
    ((if case.full { 6 } else { 4 }) * matrices + attention) as f64
}

/// The cases of `tunesmith gpu-bench`: shapes of Llama 3.
///
/// # Errors
/// When a shape is no valid configuration.
pub fn cases(recompute: Recompute) -> Result<Vec<Case>> {
    let config = |layers: usize, hidden: usize, intermediate: usize, heads: usize, head_dim: usize, tied: bool| {
        let text = serde_json::json!({
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": tied,
        });
        Config::from_json(&text.to_string(), "a shape of gpu-bench")
    };
    let shapes = [
        ("1B", config(16, 2048, 8192, 32, 64, true)?),
        ("3B", config(28, 3072, 8192, 24, 128, true)?),
        ("8B", config(32, 4096, 14_336, 32, 128, false)?),
    ];
    let mut cases = Vec::new();
    for (model, config) in shapes {
        let (optim, offload) = (Optim::AdamW, Offload::NONE);
        let lora =
            Case { model, config, full: false, nf4: false, tokens: 4096, recompute, optim, offload, limit: None };
        if model != "3B" {
            cases.push(Case { full: true, ..lora.clone() });
        }
        if model == "8B" {
            let (recompute, optim) = (Recompute::Block, Optim::AdamW8bit);
            cases.push(Case { nf4: true, tokens: 2048, recompute, optim, limit: Some(QLORA_BYTES), ..lora.clone() });
        }
        cases.push(lora);
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_reached_or_missed() {
        let measured = |model, method, tokens_per_s, peak_bytes| Measured {
            model,
            method,
            tokens: 4096,
            tokens_per_s,
            flops: 0.0,
            share: 0.0,
            peak_bytes,
            planned_bytes: 1,
            optim: Optim::AdamW8bit,
            recompute: Recompute::Block,
            offload: Offload::NONE,
            first_loss: 11.8,
        };
        let decoded = |sequences, tokens_per_s, share| Decoded {
            model: "8B",
            sequences,
            context: 512,
            tokens_per_s,
            limit: 1.0,
            share,
            peak_bytes: 0,
            planned_bytes: 0,
        };
        let lines = [
            measured("8B", "qlora", 14_000.0, 6_000_000_000),
            measured("1B", "full", 64_999.0, 1),
            measured("8B", "full", 1.0, 84_200_000_000),
        ];
        let reached = |bars: Vec<Bar>| bars.iter().map(Bar::reached).collect::<Vec<_>>();
        let all = bars(&lines, &[], &[decoded(1, 100.0, 0.71), decoded(64, 2999.0, 0.5)]);
        assert_eq!(reached(all), [true, false, false, true, true, false]);
        // What had no room is a bar too: with what it would have needed.
        let lacking = |gb: u64| {
            let case = cases(Recompute::None).unwrap().into_iter().find(|c| c.model == "8B" && c.full).unwrap();
            let lacking = case.settle(Dtype::BF16, 1).unwrap_err();
            Lacking { needed: gb * 1_000_000_000, ..lacking }
        };
        assert_eq!(reached(bars(&[], &[lacking(84), lacking(85)], &[])), [true, false]);
    }

    #[test]
    fn shapes_are_those_of_llama() {
        let cases = cases(Recompute::Norms).unwrap();
        let size = |name: &str| cases.iter().find(|c| c.model == name).map(|c| c.config.num_params()).unwrap();
        assert_eq!([size("1B"), size("3B"), size("8B")], [1_235_814_400, 3_212_749_824, 8_030_261_248]);
        assert_eq!(cases.len(), 6);
        // 8B LoRA: 4 operations for each of 7.5 billion weights in products, and attention.
        let lora = cases.iter().rfind(|c| c.model == "8B").unwrap();
        assert!((flops_per_token(lora) / 3.38e10 - 1.0).abs() < 0.01, "{}", flops_per_token(lora));
    }
}
