//! Checks of a GPU against the processor, whose own numbers are those of other implementations (`verify`): every operation in
//! f32 and bf16 on fresh random inputs, then whole models: gradients, training, resuming, generation, a model whose numbers
//! transformers computed, and the plan of memory against the allocator's peak.

mod offload;
mod plan;
mod reference;
mod weights;

use crate::optimizer::{AdamW, AdamWOptions, Optim, clip_coefficient, gradient_norm};
use crate::selftest::{Check, small, worst};
use crate::{Error, Result};
use tunesmith_model::{AdapterConfig, Batch, Config, Gradients, KvCache, Llama, LossOptions, Recompute, Workspace};
use tunesmith_tensor::ops::attention::{Heads, Segment};
use tunesmith_tensor::ops::linear::{Adapter, Store};
use tunesmith_tensor::ops::{
    attention, dropout, embedding, grad_norm, linear, linear_cross_entropy, rmsnorm, rope, rows, sample, swiglu,
};
use tunesmith_tensor::{Device, Dtype, Packed, Tensor, Weight, rng::Rng};

/// How large the inputs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Seconds where every thread is emulated.
    Small,
    /// Shapes of real models, cut in length so that the processor keeps up.
    Large,
}

/// Sums of thousands of products in another order than the processor's, measured by the largest element.
const F32_BOUND: f64 = 2e-5;
/// TF32 keeps 10 bits behind the leading one: if the rest is cut off, each factor is off by up to 1e-3 and both together by half of
/// that each on average.
const TF32_BOUND: f64 = 2.5e-3;
/// bf16 has 8 bits: half a step of the largest element, and rounding on the way.
const BF16_BOUND: f64 = 1e-2;

struct Lab<'a> {
    device: &'a Device,
    dtype: Dtype,
    rng: Rng,
    size: Size,
    observe: &'a mut dyn FnMut(Check),
}

/// All checks on `device`, each given to `observe` when it is done. `seed` makes the inputs.
///
/// # Errors
/// When the device fails: everything after that would be about nothing.
pub fn run(device: &Device, seed: u64, size: Size, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let gpu = device.gpu().ok_or_else(|| Error::Input("there is nothing to check on the processor".into()))?;
    gpu.poison(true);
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut lab = Lab { device, dtype, rng: Rng::new(seed, dtype.bytes() as u64), size, observe };
        lab.elementwise()?;
        lab.products()?;
        lab.attention()?;
        lab.loss()?;
        lab.quantised()?;
        lab.choices()?;
        lab.updates()?;
        models(device, dtype, size, lab.observe)?;
        reference::check(device, dtype, size, lab.observe)?;
        offload::check(device, dtype, size == Size::Small, lab.observe)?;
        lab.plan()?;
    }
    gpu.poison(false);
    Ok(())
}

impl Lab<'_> {
    /// Random numbers that the type can hold.
    fn random(&mut self, shape: &[usize]) -> Tensor {
        let round = |x: f32| if self.dtype == Dtype::BF16 { to_bf16(x) } else { x };
        let values = self.rng.normals(shape.iter().product(), 1.0);
        Tensor::from_slice(shape, &values.into_iter().map(round).collect::<Vec<_>>())
    }

    /// The same computation on the processor and on the device; its results are compared one by one.
    fn compare(
        &mut self,
        check: &'static str,
        compared: &str,
        inputs: Vec<Tensor>,
        f: impl Fn(&[Tensor]) -> Vec<Tensor>,
    ) -> Result<()> {
        let want = f(&inputs);
        let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_device(self.device, self.dtype)).collect();
        let got = f(&inputs);
        self.device.synchronize()?;
        let bound = if self.dtype == Dtype::F32 { F32_BOUND } else { BF16_BOUND };
        let error = worst(
            got.iter().zip(&want).map(|(got, want)| crate::selftest::of_largest(got.to_host().data(), want.data())),
        );
        let (model, compared) = (self.dtype.name().to_owned(), compared.to_owned());
        (self.observe)(Check { model, check, compared, error, bound });
        Ok(())
    }

    fn pick(&self, small: usize, large: usize) -> usize {
        if self.size == Size::Small { small } else { large }
    }

    fn elementwise(&mut self) -> Result<()> {
        let (t, d) = (self.pick(5, 333), self.pick(64, 4096));
        let inputs = vec![self.random(&[t, d]), self.random(&[d]), self.random(&[t, d]), self.random(&[t, d])];
        self.compare("rmsnorm", "output, gradients of input and weight", inputs, |x| {
            let [mut y, mut rstd] = [(); 2].map(|()| Tensor::default());
            rmsnorm::forward(&x[0], &x[1], 1e-5, &mut y, &mut rstd);
            let mut d_x = x[3].clone();
            let mut d_w = Tensor::zeros_on(&x[0].device(), Dtype::F32, x[1].shape());
            rmsnorm::backward(&x[0], &x[1], &rstd, &x[2], &mut d_x, Some(&mut d_w));
            vec![y, rstd, d_x, d_w]
        })?;
        let inputs = (0..3).map(|_| self.random(&[t, d + 3])).collect();
        self.compare("swiglu", "output, gradients of gate and up", inputs, |x| {
            let (mut y, mut d_gate, mut d_up) = (Tensor::default(), x[0].clone(), x[1].clone());
            swiglu::forward(&x[0], &x[1], &mut y);
            swiglu::backward(&mut d_gate, &mut d_up, &x[2]);
            vec![y, d_gate, d_up]
        })?;
        let positions: Vec<u32> = (0..t as u32).map(|i| i * 37 % 8191).collect();
        let frequencies: Vec<f32> = (0..32).map(|i| 0.75f32.powi(i)).collect();
        let inputs = vec![self.random(&[t, 256])];
        self.compare("rope", "turned", inputs, |x| {
            let mut angles = rope::Angles::default();
            angles.fill_on(&x[0].device(), &positions, &frequencies);
            let mut y = x[0].clone();
            rope::forward(&mut y, &angles);
            vec![y]
        })?;
        let ids: Vec<u32> = (0..t).map(|_| self.rng.below(50)).collect();
        let inputs = vec![self.random(&[50, d]), self.random(&[t, d])];
        self.compare("embedding", "rows, gradient of the table and of single rows", inputs, |x| {
            let (mut y, mut picked) = (Tensor::default(), Tensor::default());
            embedding::forward(&x[0].clone().into(), &ids, &mut y);
            let mut d_table = Tensor::zeros_on(&x[0].device(), Dtype::F32, x[0].shape());
            embedding::backward(&x[1], &ids, &mut d_table);
            let mut d_rows = Tensor::zeros_on(&x[0].device(), Dtype::F32, &[20, d]);
            embedding::backward_rows(&x[1], &ids, &listed(20, 50), &mut d_rows);
            rows::gather(&x[0], &[49, 0, 7], &mut picked);
            let mut put = x[0].clone();
            rows::scatter(&picked, &[1, 2, 3], &mut put);
            vec![y, d_table, d_rows, put]
        })?;
        let inputs = vec![self.random(&[t, d]), self.random(&[t, d])];
        let mask = dropout::Mask { p: 0.2, seed: 9, stream: 7, first_row: 3 };
        self.compare("dropout", "output, gradient", inputs, |x| {
            let (mut y, mut d_x) = (Tensor::default(), x[1].clone());
            dropout::forward(&x[0], mask, &mut y);
            dropout::backward(&x[0], mask, &mut d_x);
            vec![y, d_x]
        })
    }

    fn products(&mut self) -> Result<()> {
        let (t, n, k) = (self.pick(5, 515), self.pick(24, 1536), self.pick(64, 1024));
        let shapes: [&[usize]; 8] = [&[t, k], &[n, k], &[t, n], &[t, 8], &[n, 8], &[8, k], &[n], &[t, 8]];
        let inputs: Vec<Tensor> = shapes.iter().map(|shape| self.random(shape)).collect();
        self.compare("linear", "output, gradients of input, weight, bias; with an adapter", inputs, |x| {
            let device = x[0].device();
            let weight = Weight::from(x[1].clone());
            let (mut y, mut d_x) = (Tensor::default(), Tensor::default());
            linear::forward_adapted(
                &x[0],
                &weight,
                Adapter { inner: &x[3], outer: &x[4], scale: 0.5 },
                &mut y,
                Store::Overwrite,
            );
            linear::add_bias(&x[6], &mut y);
            let adapter = Adapter { inner: &x[7], outer: &x[5], scale: 1.0 };
            linear::input_gradient_adapted(&x[2], &weight, adapter, &mut d_x, Store::Overwrite);
            linear::input_gradient(&x[2], &weight, 0.5, &mut d_x, Store::Accumulate);
            let mut d_w = Tensor::zeros_on(&device, Dtype::F32, x[1].shape());
            let mut d_bias = Tensor::zeros_on(&device, Dtype::F32, x[6].shape());
            linear::matmul_weight_gradient(&x[2], &x[0], 1.0, &mut d_w);
            linear::bias_gradient(&x[2], &mut d_bias);
            vec![y, d_x, d_w, d_bias]
        })?;
        let (w, x) = (self.random(&[n, k]), self.random(&[t, k]));
        if let Some(gpu) = self.device.gpu().filter(|_| self.dtype == Dtype::F32) {
            let [mut want, mut got, mut exact] = [(); 3].map(|()| Tensor::default());
            linear::matmul(&x, &w, 1.0, &mut want, Store::Overwrite);
            let [x, w] = [&x, &w].map(|t| t.to_device(self.device, self.dtype));
            gpu.set_tf32(true);
            linear::matmul(&x, &w, 1.0, &mut got, Store::Overwrite);
            gpu.set_tf32(false);
            linear::matmul(&x, &w, 1.0, &mut exact, Store::Overwrite);
            self.device.synchronize()?;
            for (check, y, bound) in [("linear in TF32", &got, TF32_BOUND), ("linear after TF32", &exact, F32_BOUND)] {
                let error = crate::selftest::of_largest(y.to_host().data(), want.data());
                (self.observe)(Check { model: "f32".into(), check, compared: "output".into(), error, bound });
            }
        }
        let packed = Packed::nf4(&w, true);
        let (mut want, mut got) = (Tensor::default(), Tensor::default());
        linear::forward(&x, &packed.to_tensor().into(), 1.0, &mut want, Store::Overwrite);
        let weight = Weight::Packed(packed).to_device(self.device, self.dtype);
        linear::forward(&x.to_device(self.device, self.dtype), &weight, 1.0, &mut got, Store::Overwrite);
        self.device.synchronize()?;
        let error = crate::selftest::of_largest(got.to_host().data(), want.data());
        let bound = if self.dtype == Dtype::F32 { F32_BOUND } else { BF16_BOUND };
        let (model, compared) = (self.dtype.name().to_owned(), "output".to_owned());
        (self.observe)(Check { model, check: "linear of NF4", compared, error, bound });
        let inputs = [self.random(&[t * k])];
        let norm = |x: &Tensor| grad_norm::norm(&[x]);
        let on_device = inputs[0].to_device(self.device, Dtype::F32);
        let (want, got) = (norm(&inputs[0]), norm(&on_device));
        self.device.synchronize()?;
        let (error, model) = ((got / want - 1.0).abs(), self.dtype.name().to_owned());
        (self.observe)(Check { model, check: "gradient norm", compared: "norm".into(), error, bound: 1e-9 });
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        let shapes: &[(usize, usize, usize, &[usize])] = match self.size {
            Size::Small => &[(2, 1, 16, &[3, 70]), (2, 2, 64, &[33])],
            Size::Large => {
                &[(8, 2, 64, &[1, 700, 64, 257]), (8, 2, 128, &[900, 100]), (3, 1, 96, &[300, 5]), (4, 4, 80, &[130])]
            }
        };
        for (num_heads, num_kv_heads, head_dim, lengths) in shapes {
            let heads = Heads { num_heads: *num_heads, num_kv_heads: *num_kv_heads, head_dim: *head_dim };
            let t: usize = lengths.iter().sum();
            let segments = Segment::documents(lengths);
            let (q, kv) = ([t, heads.q_cols()], [t, heads.kv_cols()]);
            let inputs = vec![self.random(&q), self.random(&kv), self.random(&kv), self.random(&q)];
            let compared = format!("output and gradients, {num_heads}/{num_kv_heads} heads of {head_dim}");
            self.compare("attention", &compared, inputs.clone(), |x| {
                let [mut o, mut lse, mut d_q, mut d_k, mut d_v] = [(); 5].map(|()| Tensor::default());
                attention::forward(
                    attention::Qkv { q: &x[0], k: &x[1], v: &x[2], segments: &segments, heads },
                    &mut o,
                    &mut lse,
                );
                attention::backward(
                    attention::Qkv { q: &x[0], k: &x[1], v: &x[2], segments: &segments, heads },
                    &o,
                    &lse,
                    &x[3],
                    [&mut d_q, &mut d_k, &mut d_v],
                );
                vec![o, lse, d_q, d_k, d_v]
            })?;
            let last = vec![self.random(&[2, heads.q_cols()]), inputs[1].clone(), inputs[2].clone()];
            self.compare("attention over a cache", &format!("output, {t} keys"), last, |x| {
                let mut o = Tensor::default();
                let segments = [Segment { queries: 0..2, keys: 0..t }];
                attention::forward_cached(
                    attention::Qkv { q: &x[0], k: &x[1], v: &x[2], segments: &segments, heads },
                    &mut o,
                );
                vec![o]
            })?;
        }
        Ok(())
    }

    fn loss(&mut self) -> Result<()> {
        let (n, d, vocab) = (self.pick(4, 300), self.pick(16, 256), self.pick(70, 32_001));
        let targets: Vec<u32> = (0..n).map(|_| self.rng.below(vocab as u32)).collect();
        let weights: Vec<f32> = (0..n).map(|_| self.rng.below(5) as f32 * 0.5).collect();
        let inputs = vec![self.random(&[n, d]), self.random(&[vocab, d])];
        let own = listed(self.pick(3, 77), vocab as u32);
        self.compare("head and loss", "loss, gradients of hidden states, head and single rows", inputs.clone(), |x| {
            let weight = Weight::from(x[1].clone());
            let (mut scratch, mut loss, mut d_h) = (Default::default(), Vec::new(), Tensor::default());
            let mut d_w = Tensor::zeros_on(&x[0].device(), Dtype::F32, x[1].shape());
            let mut d_own = Tensor::zeros_on(&x[0].device(), Dtype::F32, &[own.len(), d]);
            let gradients = linear_cross_entropy::Gradients {
                scale: 0.25,
                weights: Some(&weights),
                d_h: &mut d_h,
                d_w: Some(&mut d_w),
                d_rows: Some(linear_cross_entropy::HeadRows { ids: &own, d_w: &mut d_own }),
            };
            linear_cross_entropy::forward_backward(&x[0], &weight, &targets, 0.1, &mut scratch, &mut loss, gradients);
            vec![Tensor::from_slice(&[loss.len()], &loss), d_h, d_w, d_own]
        })?;
        self.compare("greedy tokens", "token", inputs, |x| {
            let mut logits = Tensor::default();
            linear::logits(&x[0], &x[1].clone().into(), &mut logits);
            let greedy = sample::Choice { repetition_penalty: 1.0, history: &[], draw: None };
            let tokens = sample::rows(&mut logits, &vec![greedy; x[0].rows()], &mut sample::Scratch::default());
            let tokens: Vec<f32> = tokens.iter().map(|t| *t as f32).collect();
            vec![Tensor::from_slice(&[tokens.len()], &tokens)]
        })
    }
}

/// `count` numbers below `end`, ascending, the last among them.
fn listed(count: usize, end: u32) -> Vec<u32> {
    let count = count as u32;
    (0..count).map(|i| end - 1 - (count - 1 - i) * (end / count)).collect()
}

fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

fn batch() -> Batch {
    let mut rng = Rng::new(4, 0);
    let mut batch = Batch::default();
    for length in [40, 1, 70] {
        let ids: Vec<u32> = (0..length).map(|_| rng.below(260)).collect();
        batch.push(&ids, &vec![true; ids.len()]);
    }
    batch
}

/// A model with heads of 32 elements, two of which share keys and values.
fn shape(hidden: u32, layers: u32, vocab: u32, tied: bool) -> Result<Config> {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 64 * 2, "num_key_value_heads": hidden / 64, "head_dim": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": tied,
    });
    Ok(Config::from_json(&config.to_string(), "a shape of gpu-check")?)
}

/// Losses and gradient norms of `steps` steps.
fn curve(model: &mut Llama, optimizer: &mut AdamW, steps: std::ops::Range<u64>) -> Result<Vec<f64>> {
    let (batch, mut gradients, mut ws) = (batch(), Gradients::new(model), Workspace::new(Recompute::Block));
    let mut curve = Vec::new();
    for step in steps {
        gradients.clear();
        let scale = 1.0 / batch.targets.len() as f32;
        let options = LossOptions { scale, label_smoothing: 0.0, dropout_seed: Some(3), step, first_token: 0 };
        let loss = model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        let norm = gradient_norm(&gradients);
        optimizer.update(model, &gradients, 1e-3, clip_coefficient(norm, 1.0));
        curve.extend([loss, norm]);
    }
    model.device().synchronize()?;
    Ok(curve)
}

fn models(device: &Device, dtype: Dtype, size: Size, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let steps = if size == Size::Small { 2 } else { 10 };
    let mut report = |check, compared: &str, error, bound| {
        observe(Check { model: dtype.name().into(), check, compared: compared.into(), error, bound });
    };
    let curve_bound = if dtype == Dtype::F32 { 1e-3 } else { 3e-2 };
    for (method, optim) in [
        ("full", Optim::AdamW),
        ("full, 8-bit moments", Optim::AdamW8bit),
        ("LoRA with dropout", Optim::AdamW),
        ("LoRA with rows of tokens", Optim::AdamW),
    ] {
        let start = || -> Result<Llama> {
            let mut model = small("plain")?;
            if method.starts_with("full") {
                model.train_all();
            } else {
                model.add_adapter(&AdapterConfig { r: 4, lora_dropout: 0.1, ..AdapterConfig::default() }, 1)?;
            }
            if method.ends_with("tokens") {
                // Two that occur in the batch, and one that is new.
                model.train_tokens(&[7, 200, model.config.vocab_size as u32])?;
            }
            Ok(model)
        };
        let options = AdamWOptions { optim, ..AdamWOptions::default() };
        let mut on_host = start()?;
        let mut optimizer = AdamW::new(&on_host, options);
        let want = curve(&mut on_host, &mut optimizer, 0..steps)?;
        let mut model = start()?;
        model.move_to(device, dtype);
        let mut optimizer = AdamW::new(&model, options);
        let mut got = curve(&mut model, &mut optimizer, 0..steps / 2)?;
        // The way of a checkpoint: weights and moments to the processor and back.
        let mut resumed = start()?;
        for (to, from) in resumed.parameters.iter_mut().zip(&model.parameters) {
            to.assign(from.host().into_owned());
        }
        let mut second = optimizer.to_host(&model).to_device(device);
        resumed.move_to(device, dtype);
        let rest = curve(&mut model, &mut optimizer, steps / 2..steps)?;
        let again = curve(&mut resumed, &mut second, steps / 2..steps)?;
        let differing = rest.iter().zip(&again).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        got.extend(rest);
        let error = worst(got.iter().zip(&want).map(|(a, b)| (a / b - 1.0).abs()));
        report("training", &format!("{method}: losses and gradient norms of {steps} steps"), error, curve_bound);
        report("resume", &format!("{method}: steps after it, numbers that differ"), differing as f64, 0.0);
    }
    let mut model = small("biased")?;
    let prompt: Vec<u32> = (0..20).map(|i| i * 13 % 260).collect();
    let mut ws = Workspace::default();
    let mut logits = |model: &Llama| {
        let mut cache = KvCache::new(&model.config, prompt.len());
        let first = model.decode(&prompt[..17], &mut cache, &mut ws).to_vec();
        [
            first,
            model.decode(&prompt[17..19], &mut cache, &mut ws).to_vec(),
            model.decode(&prompt[19..], &mut cache, &mut ws).to_vec(),
        ]
        .concat()
    };
    let want = logits(&model);
    model.move_to(device, dtype);
    let got = logits(&model);
    device.synchronize()?;
    let bound = if dtype == Dtype::F32 { F32_BOUND } else { 3e-2 };
    report("generation", "logits after a prompt and behind its cache", crate::selftest::of_largest(&got, &want), bound);
    let [want, got] = [false, true].map(|recorded| tokens_of_three(&model, recorded));
    device.synchronize()?;
    let differing = want.iter().zip(&got).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    report("recorded passes", "logits of 3 sequences that differ from those without a record", differing as f64, 0.0);
    Ok(())
}

/// Logits behind three prompts and behind eight tokens of each, together; from a record as soon as there can be one, or never.
fn tokens_of_three(model: &Llama, recorded: bool) -> Vec<f32> {
    let prompts: Vec<Vec<u32>> = [5, 20, 11].map(|n| (0..n).map(|i| i * 13 % 260).collect()).to_vec();
    let (mut sequences, mut ws) = (model.new_sequences(prompts.len(), 40), Workspace::default());
    let mut all = Vec::new();
    for step in 0..9u32 {
        let next: Vec<[u32; 1]> = (0..3).map(|i| [(17 * step + 29 * i) % 260]).collect();
        let parts = prompts.iter().zip(&next).enumerate();
        let parts: Vec<(usize, &[u32])> =
            parts.map(|(i, (prompt, next))| (i, if step == 0 { &prompt[..] } else { &next[..] })).collect();
        all.extend_from_slice(model.feed(&parts, &mut sequences, &mut ws).to_host().data());
        if !recorded {
            ws = Workspace::default();
        }
    }
    all
}
