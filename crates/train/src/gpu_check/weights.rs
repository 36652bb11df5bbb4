//! Checks of quantised weights, of the choice of tokens, and of updates.

use super::{BF16_BOUND, Check, F32_BOUND, Lab, Size};
use crate::Result;
use crate::selftest::{of_largest, worst};
use tunesmith_tensor::ops::adamw_8bit::{self, DeviceMoment, Moment, Sign};
use tunesmith_tensor::ops::linear::{self, Store};
use tunesmith_tensor::ops::sample::{self, Choice, Draw, Scratch};
use tunesmith_tensor::ops::{adamw, embedding};
use tunesmith_tensor::quant::BlockType;
use tunesmith_tensor::{Bytes, Dtype, Packed, Tensor, Weight};

/// Where the halves lie that scale a block of `kind`: those must be finite numbers.
fn scales(kind: BlockType) -> &'static [usize] {
    match kind {
        BlockType::Q2_K => &[80, 82],
        BlockType::Q3_K => &[108],
        BlockType::Q6_K => &[208],
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
        _ => &[0, 2],
    }
}

impl Lab<'_> {
    fn observe(&mut self, check: &'static str, compared: String, error: f64, bound: f64) {
        let model = self.dtype.name().to_owned();
        (self.observe)(Check { model, check, compared, error, bound });
    }

    fn bound(&self) -> f64 {
        if self.dtype == Dtype::F32 { F32_BOUND } else { BF16_BOUND }
    }

    /// Every block type of GGUF files and NF4, of random bits: rows, products with few rows and with many, gradients of inputs.
    pub(super) fn quantised(&mut self) -> Result<()> {
        let (n, k, many) = (self.pick(24, 1024), self.pick(256, 2048), self.pick(11, 130));
        let mut weights = Vec::new();
        for kind in BlockType::ALL.into_iter().filter(|kind| kind.block_len() > 1) {
            let len = n * k / kind.block_len() * kind.block_bytes();
            let mut bytes: Vec<u8> = (0..len).map(|_| self.rng.below(256) as u8).collect();
            for block in bytes.chunks_exact_mut(kind.block_bytes()) {
                for at in scales(kind) {
                    // Halves of 2^-7 to 2^-5: sign and mantissa are random.
                    block[at + 1] = block[at + 1] & 0x83 | 0x20 | block[at + 1] & 4;
                }
            }
            weights.push(Packed::from_blocks([n, k], kind, Bytes::Owned(bytes), Some(2)));
        }
        let dense = self.random(&[n, k]);
        weights.extend([true, false].map(|double| Packed::nf4(&dense, double)));
        for packed in weights {
            let name = packed.encoding();
            let decoded = Weight::from(packed.to_tensor());
            let weight = Weight::Packed(packed).to_device(self.device, self.dtype);
            let ids = [0, 7, n as u32 - 1];
            let inputs = [self.random(&[3, k]), self.random(&[many, k]), self.random(&[many, n])];
            let run = |w: &Weight, x: &[Tensor]| {
                let [mut rows, mut few, mut all, mut d_x] = [(); 4].map(|()| Tensor::default());
                embedding::forward(w, &ids, &mut rows);
                linear::forward(&x[0], w, 1.0, &mut few, Store::Overwrite);
                linear::forward(&x[1], w, 1.0, &mut all, Store::Overwrite);
                linear::input_gradient(&x[2], w, 1.0, &mut d_x, Store::Overwrite);
                [rows, few, all, d_x]
            };
            let want = run(&decoded, &inputs);
            let got = run(&weight, &inputs.map(|x| x.to_device(self.device, self.dtype)));
            self.device.synchronize()?;
            let error = worst(got.iter().zip(&want).map(|(a, b)| of_largest(a.to_host().data(), b.data())));
            self.observe(
                "quantised weights",
                format!("{name}: rows, products, gradient of the input"),
                error,
                self.bound(),
            );
        }
        Ok(())
    }

    /// Tokens that are chosen from the same logits with the same numbers.
    pub(super) fn choices(&mut self) -> Result<()> {
        let (rows, vocab, rounds) = (self.pick(3, 16), self.pick(300, 50_000), self.pick(2, 8));
        let (mut scratch, mut differing) = (Scratch::default(), 0);
        for round in 0..rounds {
            let mut logits = self.random(&[rows, vocab]);
            let history: Vec<u32> = (0..40).map(|_| self.rng.below(vocab as u32)).collect();
            let choices: Vec<Choice<'_>> = (0..rows)
                .map(|row| {
                    let draw = Draw {
                        temperature: [0.7, 1.0, 1.5][row % 3],
                        top_k: [0, 50, 7][(row + round) % 3],
                        top_p: [0.9, 1.0][(row + round) % 2],
                        min_p: [0.0, 0.05][round % 2],
                        uniform: self.rng.uniform_f64(),
                    };
                    Choice { repetition_penalty: 1.2, history: &history, draw: (row > 0).then_some(draw) }
                })
                .collect();
            let mut up = logits.to_device(self.device, Dtype::F32);
            let want = sample::rows(&mut logits, &choices, &mut scratch);
            let got = sample::rows(&mut up, &choices, &mut scratch);
            differing += got.iter().zip(&want).filter(|(a, b)| a != b).count();
        }
        self.device.synchronize()?;
        let all = rows * rounds;
        // A number may fall onto the border between two tokens.
        self.observe("chosen tokens", format!("those of {all} that differ"), differing as f64, (all / 100) as f64);
        Ok(())
    }

    /// Five updates with moments in f32 and in 8 bits; in bf16 the weights keep the rest of their f32.
    pub(super) fn updates(&mut self) -> Result<()> {
        let Some(gpu) = self.device.gpu().cloned() else { return Ok(()) };
        let n = self.pick(1000, 1_000_003);
        for small in [false, true] {
            let start = Tensor::from_slice(&[n], &self.rng.normals(n, 1.0));
            let mut value = start.clone();
            let (mut upper, mut low) = match self.dtype {
                Dtype::F32 => (start.to_device(self.device, Dtype::F32), None),
                Dtype::BF16 => {
                    let (upper, low) = start.split_master(self.device);
                    (upper, Some(low))
                }
            };
            let (mut m, mut v) = (Tensor::zeros(&[n]), Tensor::zeros(&[n]));
            let [mut gm, mut gv] = [(); 2].map(|()| Tensor::zeros_on(self.device, Dtype::F32, &[n]));
            let (mut m8, mut r8) = (Moment::zeros(n, Sign::Signed), Moment::zeros(n, Sign::Unsigned));
            let [mut gm8, mut gr8] = [&m8, &r8].map(|moment| DeviceMoment::new(&gpu, moment));
            for number in 1..=5 {
                let step = adamw::Step {
                    number,
                    learning_rate: 0.01,
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    grad_scale: 0.5,
                };
                let grad = Tensor::from_slice(&[n], &self.rng.normals(n, 0.1));
                let on_gpu = grad.to_device(self.device, Dtype::F32);
                match (small, &mut low) {
                    (true, low) => {
                        adamw_8bit::update(&mut value, &grad, &mut m8, &mut r8, &step);
                        adamw_8bit::update_on_device(&mut upper, low.as_mut(), &on_gpu, &mut gm8, &mut gr8, &step);
                    }
                    (false, low) => {
                        adamw::update(&mut value, &grad, &mut m, &mut v, &step);
                        match low {
                            Some(low) => adamw::update_split(&mut upper, low, &on_gpu, &mut gm, &mut gv, &step),
                            None => adamw::update(&mut upper, &on_gpu, &mut gm, &mut gv, &step),
                        }
                    }
                }
            }
            let got = low.as_ref().map_or_else(|| upper.to_host(), |low| upper.join_master(low));
            self.device.synchronize()?;
            let error = of_largest(got.data(), value.data());
            // A sum rounded otherwise may fall on the other side of a code's end.
            let (moments, bound) = if small { ("8-bit", 2e-3) } else { ("f32", 1e-6) };
            self.observe("updates", format!("weights after 5, moments in {moments}"), error, bound);
        }
        Ok(())
    }

    /// Planned bytes of a training step against the allocator's peak.
    pub(super) fn plan(&mut self) -> Result<()> {
        super::plan::check(self.device, self.dtype, self.size == Size::Small, self.observe)
    }
}
