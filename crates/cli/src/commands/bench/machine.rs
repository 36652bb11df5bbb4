//! `tunesmith bench`: the peaks of this machine, and what share of them each part of a training step reaches.

use super::{adapter, steps};
use crate::args::{BenchMachineArgs, BenchMethod, ComputeName};
use crate::error::{Error, Result};
use crate::load;
use crate::source::Settings;
use crate::terminal;
use rayon::prelude::*;
use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;
use tunesmith_model::llama::PASS_TOKENS;
use tunesmith_model::{Checkpoint, Config, Llama, Storage};
use tunesmith_tensor::ops::attention::{Heads, Segment};
use tunesmith_tensor::ops::{
    adamw, attention, embedding, grad_norm, linear, linear_cross_entropy, rmsnorm, rope, swiglu,
};
use tunesmith_tensor::{Int8Weight, Tensor, Weight, pool, rng::Rng};

/// SmolLM2-135M's sizes: what is measured without `--model`, with random weights.
const SMOLLM2: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 100000.0}"#;

/// Rows and columns of the square products that stand for the peak: large enough that packing costs nothing.
const SQUARE: usize = 2048;
/// Bytes that are read for the bandwidth: many times the last cache.
const READ: usize = 512 << 20;
/// Seconds that each measurement takes at least; the best run counts.
const SECONDS: f64 = 0.4;

#[derive(Serialize)]
struct Report {
    simd: &'static str,
    threads: usize,
    peaks: Peaks,
    model: String,
    method: &'static str,
    compute: &'static str,
    batch: usize,
    seq: usize,
    parts: Vec<Part>,
    /// Seconds of all parts of a step together.
    parts_s: f64,
    /// Seconds of a whole step.
    step_s: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Peaks {
    /// f32 product of two matrices of 2,048 rows and columns.
    f32_gflops: f64,
    f32_gflops_one_thread: f64,
    /// The same product with 8-bit integers, quantising one side of it included.
    int8_gops: f64,
    int8_gops_one_thread: f64,
    read_gb_per_s: f64,
    read_gb_per_s_one_thread: f64,
}

/// One part of a step: all its operations in all layers, forward and backward.
#[derive(Clone, Serialize)]
struct Part {
    name: &'static str,
    /// Milliseconds of a step.
    ms: f64,
    /// Of what it does most: products (GFLOP/s) or moving memory (GB/s, each operand read or written once).
    rate: f64,
    unit: &'static str,
    /// Of the peak of that kind.
    share_of_peak: f64,
}

pub(super) fn run(args: &BenchMachineArgs, settings: &Settings) -> Result<()> {
    if args.batch == 0 || args.seq < 2 {
        return Err(Error::Input("--batch must be at least 1, --seq at least 2".into()));
    }
    if args.method == BenchMethod::Full && args.compute == ComputeName::Int8 {
        return Err(Error::Input("--compute int8 is for frozen weights; with --method full leave it at f32".into()));
    }
    let bar = terminal::count_bar("measuring peaks", 0);
    let peaks = peaks()?;
    bar.set_message("reading the model");
    let (name, mut model) = match &args.model {
        Some(spec) => {
            let checkpoint = Checkpoint::open(&load::resolve(spec, settings)?.path)?;
            (spec.clone(), Llama::load(&checkpoint, Storage::F32, |_, _| ())?)
        }
        None => {
            let config = Config::from_json(SMOLLM2, "the built-in sizes of SmolLM2-135M")?;
            ("random weights, sizes of SmolLM2-135M".to_owned(), Llama::random(config, 0))
        }
    };
    bar.set_message("measuring parts");
    let parts = Step::new(&model.config, args).parts(peaks);
    match args.method {
        BenchMethod::Full => model.train_all(),
        BenchMethod::Lora => model.add_adapter(&adapter(), 0)?,
    }
    if args.compute == ComputeName::Int8 {
        model.compute_int8(true)?;
    }
    bar.set_message("measuring whole steps");
    let step_s = steps(&mut model, args.batch, args.seq, 4, super::Recompute::default(), super::Optim::default())
        .into_iter()
        .fold(f64::INFINITY, f64::min);
    bar.finish_and_clear();
    let report = Report {
        simd: tunesmith_tensor::simd_level(),
        threads: super::super::threads(),
        peaks,
        model: name,
        method: if args.method == BenchMethod::Lora { "lora" } else { "full" },
        compute: if args.compute == ComputeName::Int8 { "int8" } else { "f32" },
        batch: args.batch,
        seq: args.seq,
        parts_s: parts.iter().map(|part| part.ms / 1e3).sum(),
        parts,
        step_s,
    };
    if let Some(file) = &args.json {
        return super::super::write_json_line(file, &report);
    }
    print!("{}", text(&report));
    Ok(())
}

fn text(report: &Report) -> String {
    let peaks = &report.peaks;
    let peak = |what: &str, one: f64, all: f64| vec![what.to_owned(), format!("{one:.0}"), format!("{all:.0}")];
    let peaks = [
        peak("f32 products, GFLOP/s", peaks.f32_gflops_one_thread, peaks.f32_gflops),
        peak("int8 products, GOP/s", peaks.int8_gops_one_thread, peaks.int8_gops),
        peak("reading memory, GB/s", peaks.read_gb_per_s_one_thread, peaks.read_gb_per_s),
    ];
    let all = format!("{} threads", report.threads);
    let row = |name: &str, ms: f64, rate: String, share: String| {
        vec![name.to_owned(), format!("{ms:.1}"), format!("{:.1} %", ms / report.step_s / 10.0), rate, share]
    };
    let mut rows: Vec<Vec<String>> = report
        .parts
        .iter()
        .map(|p| row(p.name, p.ms, format!("{:.0} {}", p.rate, p.unit), format!("{:.0} %", 100.0 * p.share_of_peak)))
        .collect();
    rows.push(row("all parts", report.parts_s * 1e3, String::new(), String::new()));
    rows.push(row("a whole step", report.step_s * 1e3, String::new(), String::new()));
    format!(
        "{} instructions\n\n{}\n{}, {} {} {} x {}: {:.1} tokens/s\n\n{}",
        report.simd,
        terminal::table(&["peak", "1 thread", &all], &peaks),
        report.model,
        report.method,
        report.compute,
        report.batch,
        report.seq,
        (report.batch * report.seq) as f64 / report.step_s,
        terminal::table(&["part of a step", "ms", "of the step", "rate", "of the peak"], &rows),
    )
}

/// Seconds of the fastest of several runs, made on the pool's threads as a training step is.
fn best(mut run: impl FnMut() + Send) -> f64 {
    pool::enter(|| {
        let (begin, mut best) = (Instant::now(), f64::INFINITY);
        let mut runs = 0;
        while runs < 3 || begin.elapsed().as_secs_f64() < SECONDS {
            let start = Instant::now();
            run();
            best = best.min(start.elapsed().as_secs_f64());
            runs += 1;
        }
        best
    })
}

fn random(shape: &[usize]) -> Tensor {
    let mut tensor = Tensor::zeros(shape);
    let mut rng = Rng::new(0, shape.iter().product::<usize>() as u64);
    // A stretch of random numbers over and over: speed does not depend on what they are.
    let stretch = rng.normals(4099, 0.05);
    tensor.data_mut().iter_mut().zip(stretch.iter().cycle()).for_each(|(x, r)| *x = *r);
    tensor
}

fn peaks() -> Result<Peaks> {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one = one.map_err(|e| Error::Failure(format!("cannot start a thread: {e}")))?;
    let (a, b, mut c) = (random(&[SQUARE, SQUARE]), random(&[SQUARE, SQUARE]), Tensor::default());
    let mut product = || best(|| linear::matmul(black_box(&a), &b, 1.0, &mut c, linear::Store::Overwrite));
    let gflops = |seconds: f64| 2.0 * (SQUARE as f64).powi(3) / seconds / 1e9;
    let (all_s, one_s) = (product(), one.install(&mut product));
    let int8 = Weight::Int8(Int8Weight::new(&b, false));
    let mut product = || best(|| linear::forward(black_box(&a), &int8, 1.0, &mut c, linear::Store::Overwrite));
    let (all_int8, one_int8) = (product(), one.install(&mut product));
    let memory = Tensor::zeros(&[READ / 4]);
    // Sums of bits: as many bytes as the memory gives, whatever the instruction set.
    let read = || {
        let sum = |part: &[f32]| part.iter().fold(0u32, |sum, x| sum.wrapping_add(x.to_bits()));
        black_box(black_box(&memory).data().par_chunks(1 << 16).map(sum).reduce(|| 0, u32::wrapping_add));
    };
    let (all_read, one_read) = (best(read), one.install(|| best(read)));
    let gb = |seconds: f64| READ as f64 / seconds / 1e9;
    Ok(Peaks {
        f32_gflops: gflops(all_s),
        f32_gflops_one_thread: gflops(one_s),
        int8_gops: gflops(all_int8),
        int8_gops_one_thread: gflops(one_int8),
        read_gb_per_s: gb(all_read),
        read_gb_per_s_one_thread: gb(one_read),
    })
}

/// The shapes of a step.
struct Step<'a> {
    config: &'a Config,
    full: bool,
    /// Whether frozen weights multiply in 8 bits.
    int8: bool,
    /// Lengths of the documents that go through the model at once.
    documents: Vec<usize>,
    /// Tokens of them.
    t: usize,
    /// Passes of a step.
    passes: f64,
}

impl<'a> Step<'a> {
    fn new(config: &'a Config, args: &BenchMachineArgs) -> Self {
        let rows = (PASS_TOKENS / args.seq).clamp(1, args.batch);
        Self {
            config,
            full: args.method == BenchMethod::Full,
            int8: args.compute == ComputeName::Int8,
            documents: vec![args.seq; rows],
            t: rows * args.seq,
            passes: args.batch as f64 / rows as f64,
        }
    }

    /// A weight as it is multiplied.
    fn frozen(&self, weight: Tensor) -> Weight {
        if self.int8 { Weight::Int8(Int8Weight::new(&weight, true)) } else { weight.into() }
    }

    /// Times in a step, of what each layer does once.
    fn layers(&self) -> f64 {
        self.passes * self.config.num_hidden_layers as f64
    }

    fn parts(&self, peaks: Peaks) -> Vec<Part> {
        let products = |name, (seconds, flops): (f64, f64)| Part {
            name,
            ms: seconds * 1e3,
            rate: flops / seconds / 1e9,
            unit: "GFLOP/s",
            share_of_peak: flops / seconds / 1e9 / peaks.f32_gflops,
        };
        // With weights of 8 bits.
        let with_weights = |name, timed| {
            let part: Part = products(name, timed);
            if self.int8 { Part { unit: "GOP/s", share_of_peak: part.rate / peaks.int8_gops, ..part } } else { part }
        };
        let memory = |name, (seconds, bytes): (f64, f64)| Part {
            name,
            ms: seconds * 1e3,
            rate: bytes / seconds / 1e9,
            unit: "GB/s",
            share_of_peak: bytes / seconds / 1e9 / peaks.read_gb_per_s,
        };
        let shapes: Vec<(usize, usize)> = self.config.linear_modules().iter().map(|(_, [o, i])| (*o, *i)).collect();
        let mut parts = vec![
            with_weights("q, k, v", self.linear(&shapes[..3])),
            with_weights("o", self.linear(&shapes[3..4])),
            with_weights("gate, up, down", self.linear(&shapes[4..])),
        ];
        if !self.full {
            parts.push(products("adapters' other products", self.adapters(&shapes)));
        }
        let [forward, backward] = self.attention();
        parts.push(products("attention forward", forward));
        parts.push(products("attention backward", backward));
        parts.push(with_weights("head and loss", self.head()));
        parts.push(memory("norms", self.norms()));
        parts.push(memory("rope", self.rope()));
        parts.push(memory("swiglu", self.swiglu()));
        parts.push(memory("embedding", self.embedding()));
        parts.push(memory("gradient norm and AdamW", self.optimizer(&shapes)));
        parts
    }

    /// Seconds and operations of a step for linear layers of shapes [out, in]: y = x Wᵀ and the gradient of x, with the
    /// products of an adapter that join them, or where all weights train the gradient of W.
    fn linear(&self, shapes: &[(usize, usize)]) -> (f64, f64) {
        use linear::Store::Overwrite;
        let (mut seconds, mut flops) = (0.0, 0.0);
        for &(n_out, n_in) in shapes {
            let (mut x, mut y) = (random(&[self.t, n_in]), random(&[self.t, n_out]));
            let w = self.frozen(random(&[n_out, n_in]));
            let one = 2.0 * (self.t * n_out * n_in) as f64;
            if self.full {
                seconds += best(|| linear::forward(black_box(&x), &w, 1.0, &mut y, Overwrite));
                seconds += best(|| linear::input_gradient(black_box(&y), &w, 1.0, &mut x, Overwrite));
                let mut d_w = Tensor::zeros(&[n_out, n_in]);
                seconds += best(|| linear::matmul_weight_gradient(black_box(&y), &x, 1.0, &mut d_w));
                flops += 3.0 * one;
            } else {
                let r = adapter().r;
                let (inner, a, b) = (random(&[self.t, r]), random(&[r, n_in]), random(&[n_out, r]));
                let joined = |outer| linear::Adapter { inner: &inner, outer, scale: 1.0 };
                seconds += best(|| linear::forward_adapted(black_box(&x), &w, joined(&b), &mut y, Overwrite));
                seconds += best(|| linear::input_gradient_adapted(black_box(&y), &w, joined(&a), &mut x, Overwrite));
                flops += 2.0 * one + 2.0 * (self.t * r * (n_out + n_in)) as f64;
            }
        }
        (seconds * self.layers(), flops * self.layers())
    }

    /// The other products of rank-16 adapters: x Aᵀ, its gradient, and the gradients of A and B.
    fn adapters(&self, shapes: &[(usize, usize)]) -> (f64, f64) {
        let r = adapter().r;
        let (mut seconds, mut flops) = (0.0, 0.0);
        for &(n_out, n_in) in shapes {
            let (x, d_y, a, b) =
                (random(&[self.t, n_in]), random(&[self.t, n_out]), random(&[r, n_in]), random(&[n_out, r]));
            let [mut xa, mut d_xa] = [(); 2].map(|()| Tensor::default());
            let (mut d_a, mut d_b) = (Tensor::zeros(a.shape()), Tensor::zeros(b.shape()));
            seconds += best(|| {
                linear::matmul(black_box(&x), &a, 1.0, &mut xa, linear::Store::Overwrite);
                linear::matmul_input_gradient(black_box(&d_y), &b, 1.0, &mut d_xa, linear::Store::Overwrite);
                linear::matmul_weight_gradient(&d_y, &xa, 1.0, &mut d_b);
                linear::matmul_weight_gradient(&d_xa, &x, 1.0, &mut d_a);
            });
            flops += 2.0 * 2.0 * (self.t * r * (n_in + n_out)) as f64;
        }
        (seconds * self.layers(), flops * self.layers())
    }

    fn attention(&self) -> [(f64, f64); 2] {
        let c = self.config;
        let heads =
            Heads { num_heads: c.num_attention_heads, num_kv_heads: c.num_key_value_heads, head_dim: c.head_dim };
        let [q, k, v, d_o] =
            [heads.q_cols(), heads.kv_cols(), heads.kv_cols(), heads.q_cols()].map(|cols| random(&[self.t, cols]));
        let segments = Segment::documents(&self.documents);
        let [mut o, mut lse, mut d_q, mut d_k, mut d_v] = [(); 5].map(|()| Tensor::default());
        let forward = best(|| {
            attention::forward(
                attention::Qkv { q: black_box(&q), k: &k, v: &v, segments: &segments, heads },
                &mut o,
                &mut lse,
            )
        });
        let backward = best(|| {
            let (d_q, d_k, d_v) = (&mut d_q, &mut d_k, &mut d_v);
            attention::backward(
                attention::Qkv { q: black_box(&q), k: &k, v: &v, segments: &segments, heads },
                &o,
                &lse,
                &d_o,
                [d_q, d_k, d_v],
            );
        });
        // A product over the visible half of the scores.
        let seen: usize = self.documents.iter().map(|n| n * (n + 1) / 2).sum();
        let one = 2.0 * (seen * heads.q_cols()) as f64;
        [(forward, 2.0 * one), (backward, 5.0 * one)].map(|(s, flops)| (s * self.layers(), flops * self.layers()))
    }

    /// Every position carries loss.
    fn head(&self) -> (f64, f64) {
        let (d, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let (h, w) = (random(&[self.t, d]), self.frozen(random(&[vocab, d])));
        let mut rng = Rng::new(0, 0);
        let targets: Vec<u32> = (0..self.t).map(|_| rng.below(vocab as u32)).collect();
        let (mut scratch, mut loss) = (linear_cross_entropy::Scratch::default(), Vec::new());
        let (mut d_h, mut d_w) = (Tensor::default(), self.full.then(|| Tensor::zeros(&[vocab, d])));
        let seconds = best(|| {
            let gradients = linear_cross_entropy::Gradients {
                scale: 1e-3,
                weights: None,
                d_h: &mut d_h,
                d_w: d_w.as_mut(),
                d_rows: None,
            };
            let (scratch, loss) = (&mut scratch, &mut loss);
            linear_cross_entropy::forward_backward(black_box(&h), &w, &targets, 0.0, scratch, loss, gradients);
        });
        let products = if self.full { 3.0 } else { 2.0 };
        (seconds * self.passes, products * 2.0 * (self.t * d * vocab) as f64 * self.passes)
    }

    /// Two norms a layer: forward, once more for the backward pass, and backward.
    fn norms(&self) -> (f64, f64) {
        let d = self.config.hidden_size;
        let (x, weight, d_y, mut d_x) =
            (random(&[self.t, d]), random(&[d]), random(&[self.t, d]), random(&[self.t, d]));
        let (mut y, mut rstd, mut d_weight) = (Tensor::default(), Tensor::default(), Tensor::zeros(&[d]));
        let forward = best(|| rmsnorm::forward(black_box(&x), &weight, 1e-5, &mut y, &mut rstd));
        let again = best(|| rmsnorm::apply(black_box(&x), &weight, &rstd, &mut y));
        let backward = best(|| {
            let d_weight = self.full.then_some(&mut d_weight);
            rmsnorm::backward(black_box(&x), &weight, &rstd, &d_y, &mut d_x, d_weight);
        });
        let moved = (2 + 2 + 4) * self.t * d * 4;
        (2.0 * (forward + again + backward) * self.layers(), 2.0 * moved as f64 * self.layers())
    }

    /// q and k, forward and backward.
    fn rope(&self) -> (f64, f64) {
        let c = self.config;
        let cols = [c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim];
        let mut angles = rope::Angles::default();
        let positions: Vec<u32> = self.documents.iter().flat_map(|n| 0..*n as u32).collect();
        angles.fill(&positions, &c.inverse_frequencies());
        let [mut q, mut k] = cols.map(|cols| random(&[self.t, cols]));
        let seconds = best(|| {
            rope::forward(&mut q, &angles);
            rope::forward(&mut k, &angles);
            rope::backward(&mut q, &angles);
            rope::backward(&mut k, &angles);
        });
        let moved = 2 * 2 * self.t * (cols[0] + cols[1]) * 4;
        (seconds * self.layers(), moved as f64 * self.layers())
    }

    /// Forward, once more for the backward pass, and backward.
    fn swiglu(&self) -> (f64, f64) {
        let shape = [self.t, self.config.intermediate_size];
        let (mut gate, mut up, mut d_y) = (random(&shape), random(&shape), Tensor::zeros(&shape));
        let mut y = Tensor::default();
        let forward = best(|| swiglu::forward(black_box(&gate), &up, &mut y));
        // A run works on what the one before left: a smaller factor would soon leave numbers so small that they are slow.
        d_y.data_mut().fill(2.0);
        let backward = best(|| swiglu::backward(black_box(&mut gate), &mut up, &d_y));
        let moved = (3 + 3 + 5) * shape[0] * shape[1] * 4;
        ((2.0 * forward + backward) * self.layers(), moved as f64 * self.layers())
    }

    fn embedding(&self) -> (f64, f64) {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let mut rng = Rng::new(0, 0);
        let ids: Vec<u32> = (0..self.t).map(|_| rng.below(shape[0] as u32)).collect();
        let (table, mut x) = (Weight::from(random(&shape)), Tensor::default());
        let mut seconds = best(|| embedding::forward(black_box(&table), &ids, &mut x));
        let mut moved = 2 * self.t * shape[1] * 4;
        if self.full {
            let mut d_table = random(&shape);
            seconds += best(|| embedding::backward(black_box(&x), &ids, &mut d_table));
            moved += 3 * self.t * shape[1] * 4;
        }
        (seconds * self.passes, moved as f64 * self.passes)
    }

    /// Of everything that trains, once a step.
    fn optimizer(&self, shapes: &[(usize, usize)]) -> (f64, f64) {
        let r = adapter().r;
        let layers = self.config.num_hidden_layers;
        // Tensors of one size, as often as they occur.
        let mut tensors: Vec<(usize, usize)> = Vec::new();
        for &(n_out, n_in) in shapes {
            if self.full {
                tensors.push((n_out * n_in, layers));
            } else {
                tensors.extend([(r * n_in, layers), (n_out * r, layers)]);
            }
        }
        if self.full {
            let c = self.config;
            tensors.push((c.hidden_size, 2 * layers + 1));
            tensors.push((c.vocab_size * c.hidden_size, if c.tie_word_embeddings { 1 } else { 2 }));
        }
        let step = adamw::Step {
            number: 10,
            learning_rate: 1e-5,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            grad_scale: 1.0,
        };
        let (mut seconds, mut moved) = (0.0, 0.0);
        for (len, times) in tensors {
            // All of one kind in one tensor each: a step meets them cold, one after the other.
            let mut value: Vec<Tensor> = (0..times).map(|_| random(&[len])).collect();
            let grads = value.clone();
            let (mut m, mut v) = (grads.clone(), grads.iter().map(|g| Tensor::zeros(g.shape())).collect::<Vec<_>>());
            seconds += best(|| {
                for grad in &grads {
                    black_box(grad_norm::sum_of_squares(grad));
                }
                for (((value, grad), m), v) in value.iter_mut().zip(&grads).zip(&mut m).zip(&mut v) {
                    adamw::update(value, grad, m, v, &step);
                }
            });
            moved += (8 * 4 * len * times) as f64;
        }
        (seconds, moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_peaks_and_shares() {
        let part = |name, ms, share_of_peak| Part { name, ms, rate: 100.0, unit: "GFLOP/s", share_of_peak };
        let report = Report {
            simd: "AVX2",
            threads: 2,
            peaks: Peaks {
                f32_gflops: 200.0,
                f32_gflops_one_thread: 100.0,
                int8_gops: 800.0,
                int8_gops_one_thread: 400.0,
                read_gb_per_s: 30.0,
                read_gb_per_s_one_thread: 16.0,
            },
            model: "m".into(),
            method: "lora",
            compute: "f32",
            batch: 4,
            seq: 512,
            parts: vec![part("q, k, v", 500.0, 0.5), part("rope", 250.0, 0.25)],
            parts_s: 0.75,
            step_s: 1.0,
        };
        let text = text(&report);
        assert!(text.contains("f32 products, GFLOP/s       100        200"), "{text}");
        assert!(text.contains("m, lora f32 4 x 512: 2048.0 tokens/s"), "{text}");
        let line = text.lines().find(|line| line.starts_with("q, k, v")).unwrap();
        assert!(line.contains("500.0       50.0 %  100 GFLOP/s         50 %"), "{line}");
    }

    #[test]
    fn parts_of_a_tiny_step() {
        let text = SMOLLM2.replace("49152", "300").replace("\"num_hidden_layers\": 30", "\"num_hidden_layers\": 2");
        let config = Config::from_json(&text.replace("1536", "64"), "test").unwrap();
        let args = BenchMachineArgs {
            model: None,
            method: BenchMethod::Full,
            compute: ComputeName::F32,
            batch: 3,
            seq: 8,
            json: None,
        };
        let step = Step::new(&config, &args);
        assert_eq!((step.t, step.passes), (24, 1.0));
        let (seconds, flops) = step.linear(&[(64, 576)]);
        assert_eq!(flops, 3.0 * 2.0 * (24 * 64 * 576) as f64 * 2.0);
        assert!(seconds > 0.0);
    }
}
