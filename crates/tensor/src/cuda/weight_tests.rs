//! Products, losses and updates on the emulated device against the processor.

use super::lab::labs;
use crate::ops::adamw_8bit::{self, DeviceMoment, Moment, Sign};
use crate::ops::linear::{self, Adapter, HeadRows, Store};
use crate::ops::linear_cross_entropy::{self, Gradients, Head, Scratch};
use crate::ops::{adamw, dropout, embedding, grad_norm, rows, sample};
use crate::quant::BlockType;
use crate::quant_encode::quantize;
use crate::{Bytes, Dtype, Packed, Tensor, Weight};

#[test]
fn linear_layers_with_adapters_and_biases() {
    for mut lab in labs(21) {
        let (t, n, k, r) = (5, 24, 40, 4);
        let (x, d_y, w) = (lab.random(&[t, k], 1.0), lab.random(&[t, n], 1.0), lab.random(&[n, k], 0.3));
        let (a, b, bias) = (lab.random(&[r, k], 0.3), lab.random(&[n, r], 0.3), lab.random(&[n], 1.0));
        let (inner, d_inner) = (lab.random(&[t, r], 1.0), lab.random(&[t, r], 1.0));
        let mut results = Vec::new();
        for on_device in [false, true] {
            let place = |t: &Tensor| if on_device { lab.up(t) } else { t.clone() };
            let [x, d_y, w, a, b, bias, inner, d_inner] = [&x, &d_y, &w, &a, &b, &bias, &inner, &d_inner].map(place);
            let device = x.device();
            let [mut y, mut d_x, mut xa] = [(); 3].map(|()| Tensor::default());
            let mut d_w = Tensor::zeros_on(&device, Dtype::F32, &[n, k]);
            let mut d_bias = Tensor::zeros_on(&device, Dtype::F32, &[n]);
            let weight = Weight::from(w);
            linear::forward_adapted(
                &x,
                &weight,
                Adapter { inner: &inner, outer: &b, scale: 0.5 },
                &mut y,
                Store::Overwrite,
            );
            linear::forward(&x, &weight, 0.5, &mut y, Store::Accumulate);
            linear::add_bias(&bias, &mut y);
            let adapter = Adapter { inner: &d_inner, outer: &a, scale: 1.0 };
            linear::input_gradient_adapted(&d_y, &weight, adapter, &mut d_x, Store::Overwrite);
            linear::input_gradient(&d_y, &weight, 1.0, &mut d_x, Store::Accumulate);
            linear::matmul(&x, &a, 1.0, &mut xa, Store::Overwrite);
            linear::matmul_input_gradient(&inner, &a, 2.0, &mut d_x, Store::Accumulate);
            for _ in 0..2 {
                linear::matmul_weight_gradient(&d_y, &x, 1.5, &mut d_w);
                linear::bias_gradient(&d_y, &mut d_bias);
            }
            let mut logits = Tensor::default();
            linear::logits(&x, &weight, &mut logits);
            assert_eq!(logits.dtype(), Dtype::F32);
            results.push([y, d_x, xa, d_w, d_bias, logits]);
        }
        for (want, got) in results[0].iter().zip(&results[1]) {
            lab.close("linear", got, want, 1e-6);
        }
    }
}

/// Every encoding, whole and by rows, as the processor decodes it; q and k of GGUF files in their order of rows.
#[test]
fn quantised_weights() {
    let rounded = |values: &[f32], dtype: Dtype| -> Vec<f32> {
        let round = |x: &f32| if dtype == Dtype::BF16 { half::bf16::from_f32(*x).to_f32() } else { *x };
        values.iter().map(round).collect()
    };
    for mut lab in labs(22) {
        let Some(gpu) = lab.device.gpu().cloned() else { unreachable!() };
        let dense = lab.random(&[16, 512], 0.5);
        let mut weights = vec![Packed::nf4(&dense, true), Packed::nf4(&dense, false)];
        for kind in BlockType::ALL.into_iter().filter(|k| k.block_len() > 1) {
            // Random bytes exercise every bit; the scales are set to finite numbers by going through halves of 1.
            let mut bytes: Vec<u8> = (0..kind.bytes_for(16 * 512).unwrap()).map(|_| lab.rng.below(256) as u8).collect();
            let at: &[usize] = match kind {
                BlockType::Q2_K => &[80, 82],
                BlockType::Q3_K => &[108],
                BlockType::Q6_K => &[208],
                BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
                _ => &[0, 2],
            };
            for block in bytes.chunks_exact_mut(kind.block_bytes()) {
                for i in at {
                    let scale = half::f16::from_f32(lab.rng.normal() * 0.01).to_le_bytes();
                    block[*i..i + 2].copy_from_slice(&scale);
                }
            }
            for heads in [None, Some(2)] {
                weights.push(Packed::from_blocks([16, 512], kind, Bytes::Owned(bytes.clone()), heads));
            }
        }
        let f16 = quantize(BlockType::Q8_0, dense.data());
        weights.push(Packed::from_blocks([16, 512], BlockType::Q8_0, Bytes::Owned(f16), None));
        for packed in weights {
            let (decoded, name) = (packed.to_tensor(), packed.encoding());
            let weight = Weight::Packed(packed).to_device(&lab.device, lab.dtype);
            let Weight::Device(on_device) = &weight else { panic!("{name} became dense") };
            let out = Tensor::zeros_on(&lab.device, lab.dtype, &[11, 512]);
            super::dequantize::rows(&gpu, on_device, 3, 11, out.device_buffer(), lab.dtype);
            lab.device.synchronize().unwrap();
            assert_eq!(out.to_host().data(), rounded(&decoded.data()[3 * 512..14 * 512], lab.dtype), "{name}");
            let mut x = Tensor::default();
            embedding::forward(&weight, &[7, 0, 7], &mut x);
            let want: Vec<f32> = [7, 0, 7].iter().flat_map(|i| decoded.row(*i).to_vec()).collect();
            assert_eq!(x.to_host().data(), rounded(&want, lab.dtype), "{name}");
            assert_eq!(
                (weight.encoding(), weight.shape(), weight.device()),
                (name, &[16, 512][..], lab.device.clone())
            );
        }
    }
}

/// Few rows are multiplied with the blocks as they are, more with decoded tiles.
#[test]
fn products_with_quantised_weights() {
    for mut lab in labs(23) {
        let dense = lab.random(&[48, 512], 0.5);
        let q4 = quantize(BlockType::Q4_0, dense.data());
        let q4 = |heads| Packed::from_blocks([48, 512], BlockType::Q4_0, Bytes::Owned(q4.clone()), heads);
        for packed in [Packed::nf4(&dense, true), Packed::nf4(&dense, false), q4(None), q4(Some(3))] {
            let decoded = Weight::from(packed.to_tensor());
            let weight = Weight::Packed(packed).to_device(&lab.device, lab.dtype);
            for t in [1, 3, 8, 11] {
                let (x, d_y) = (lab.random(&[t, 512], 1.0), lab.random(&[t, 48], 1.0));
                let [mut y, mut d_x, mut gy, mut gd_x, mut logits] = [(); 5].map(|()| Tensor::default());
                linear::forward(&x, &decoded, 1.0, &mut y, Store::Overwrite);
                linear::logits(&lab.up(&x), &weight, &mut logits);
                lab.close("logits", &logits, &y, 1e-6);
                linear::forward(&x, &decoded, 0.5, &mut y, Store::Accumulate);
                linear::input_gradient(&d_y, &decoded, 1.0, &mut d_x, Store::Overwrite);
                linear::forward(&lab.up(&x), &weight, 1.0, &mut gy, Store::Overwrite);
                linear::forward(&lab.up(&x), &weight, 0.5, &mut gy, Store::Accumulate);
                linear::input_gradient(&lab.up(&d_y), &weight, 1.0, &mut gd_x, Store::Overwrite);
                lab.close("y", &gy, &y, 1e-6);
                lab.close("d_x", &gd_x, &d_x, 1e-6);
            }
        }
    }
}

#[test]
fn head_and_loss() {
    for mut lab in labs(24) {
        for (n, d, vocab, smoothing) in [(3, 8, 11, 0.0), (4, 16, 70, 0.1), (2, 8, 5000, 0.0), (4, 8, 13, 0.2)] {
            let weights = (vocab == 13).then_some(&[0.25, 1.0, 0.0, 3.0][..]);
            let (h, w) = (lab.random(&[n, d], 2.0), lab.random(&[vocab, d], 1.0));
            let targets: Vec<u32> = (0..n).map(|_| lab.rng.below(vocab as u32)).collect();
            let (own, d_own) = (lab.random(&[3, d], 1.0), lab.random(&[3, d], 0.1));
            let mut results = Vec::new();
            for on_device in [false, true] {
                let place = |t: &Tensor| if on_device { lab.up(t) } else { t.clone() };
                let (h, w, own) = (place(&h), Weight::from(place(&w)), place(&own));
                let (mut scratch, mut loss, mut d_h) = (Scratch::default(), Vec::new(), Tensor::default());
                let mut d_w = Tensor::zeros_on(&h.device(), Dtype::F32, &[vocab, d]);
                let ids = [0, 3, vocab as u32 - 1];
                let mut d_own = d_own.to_device(&h.device(), Dtype::F32);
                let d_rows = Some(&mut d_own);
                let gradients = Gradients { scale: 0.25, weights, d_h: &mut d_h, d_w: Some(&mut d_w), d_rows };
                let head = Head { w: &w, rows: Some(HeadRows { ids: &ids, w: &own }) };
                let run = linear_cross_entropy::forward_backward;
                run(&h, head, &targets, smoothing, &mut scratch, &mut loss, gradients);
                let mut only = Vec::new();
                linear_cross_entropy::forward(&h, head, &targets, smoothing, &mut scratch, &mut only);
                assert_eq!(only, loss);
                results.push((loss, d_h, d_w, d_own));
            }
            let [(loss, d_h, d_w, d_own), (gloss, gd_h, gd_w, gd_own)] = &results[..] else { unreachable!() };
            // The logits are f32 in both precisions, so that the loss is as exact in one as in the other.
            for (a, b) in gloss.iter().zip(loss) {
                assert!((a - b).abs() < 3e-6 * b.abs().max(1.0), "{a} {b}");
            }
            lab.close("d_h", gd_h, d_h, 2e-6);
            lab.close("d_w", gd_w, d_w, 2e-6);
            lab.close("d_rows", gd_own, d_own, 2e-6);
        }
    }
}

#[test]
fn embeddings_rows_and_dropout() {
    for mut lab in labs(25) {
        let (table, d_x, before) = (lab.random(&[9, 24], 1.0), lab.random(&[6, 24], 1.0), lab.random(&[9, 24], 1.0));
        let ids = [3u32, 0, 8, 3, 3, 0];
        let (mut x, mut gx) = (Tensor::default(), Tensor::default());
        embedding::forward(&Weight::from(table.clone()), &ids, &mut x);
        embedding::forward(&Weight::from(lab.up(&table)), &ids, &mut gx);
        assert_eq!(gx.to_host().data(), x.data());
        let (mut d_table, mut gd_table) = (before.clone(), lab.up_f32(&before));
        embedding::backward(&d_x, &ids, &mut d_table);
        embedding::backward(&lab.up(&d_x), &ids, &mut gd_table);
        assert_eq!(gd_table.to_host().data(), d_table.data(), "the same sums in the same order");
        for rows in [&[0u32, 2, 8][..], &[3], &[5], &[]] {
            let before = lab.random(&[rows.len(), 24], 1.0);
            let (mut d_rows, mut gd_rows) = (before.clone(), lab.up_f32(&before));
            embedding::backward_rows(&d_x, &ids, rows, &mut d_rows);
            embedding::backward_rows(&lab.up(&d_x), &ids, rows, &mut gd_rows);
            assert_eq!(gd_rows.to_host().data(), d_rows.data(), "rows {rows:?}");
        }

        let (mut y, mut gy) = (Tensor::default(), Tensor::default());
        rows::gather(&table, &[8, 1, 5], &mut y);
        rows::gather(&lab.up(&table), &[8, 1, 5], &mut gy);
        assert_eq!(gy.to_host().data(), y.data());
        let (mut z, mut gz) = (before.clone(), lab.up(&before));
        rows::scatter(&y, &[2, 0, 7], &mut z);
        rows::scatter(&gy, &[2, 0, 7], &mut gz);
        assert_eq!(gz.to_host().data(), z.data());

        for cols in [24, 7] {
            let x = lab.random(&[50, cols], 1.0);
            let mask = dropout::Mask { p: 0.25, seed: 7 << 40 | 9, stream: 5 << 33 | 3, first_row: 1 << 32 };
            let (mut y, mut gy) = (Tensor::default(), Tensor::default());
            dropout::forward(&x, mask, &mut y);
            dropout::forward(&lab.up(&x), mask, &mut gy);
            lab.close("dropped", &gy, &y, 1e-7);
            let zeros = |t: &Tensor| t.data().iter().map(|x| *x == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros(&gy.to_host()), zeros(&y), "the same elements are dropped");
            let (mut d_x, mut gd_x) = (x.clone(), lab.up(&x));
            dropout::backward(&y, mask, &mut d_x);
            dropout::backward(&lab.up(&y), mask, &mut gd_x);
            lab.close("d_x", &gd_x, &d_x, 1e-6);
        }
    }
}

fn step(number: u64) -> adamw::Step {
    adamw::Step {
        number,
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        grad_scale: 0.5,
    }
}

/// In both precisions the master weights are f32: bf16 weights with their low halves take the very same steps.
#[test]
fn updates_in_f32_and_in_halves() {
    for mut lab in labs(26) {
        let n = 1000;
        let start = Tensor::from_slice(&[n], &lab.rng.normals(n, 1.0));
        let (mut value, mut m, mut v) = (start.clone(), Tensor::zeros(&[n]), Tensor::zeros(&[n]));
        let [mut gm, mut gv] = [(); 2].map(|()| Tensor::zeros_on(&lab.device, Dtype::F32, &[n]));
        let (mut upper, mut low) = match lab.dtype {
            Dtype::F32 => (lab.up_f32(&start), None),
            Dtype::BF16 => {
                let (upper, low) = start.split(&lab.device);
                assert_eq!(upper.join(&low).data(), start.data(), "no bit is lost");
                (upper, Some(low))
            }
        };
        for number in 1..=5 {
            let grad = Tensor::from_slice(&[n], &lab.rng.normals(n, 0.1));
            adamw::update(&mut value, &grad, &mut m, &mut v, &step(number));
            let grad = lab.up_f32(&grad);
            match &mut low {
                None => adamw::update(&mut upper, &grad, &mut gm, &mut gv, &step(number)),
                Some(low) => adamw::update_split(&mut upper, low, &grad, &mut gm, &mut gv, &step(number)),
            }
        }
        let got = low.as_ref().map_or_else(|| upper.to_host(), |low| upper.join(low));
        lab.device.synchronize().unwrap();
        for (what, got, want) in [("value", &got, &value), ("m", &gm.to_host(), &m), ("v", &gv.to_host(), &v)] {
            let largest = want.data().iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for (a, b) in got.data().iter().zip(want.data()) {
                assert!((a - b).abs() <= 1e-6 * largest, "{what}: {a} {b}");
            }
        }
        // The upper half is the nearest bf16.
        for (a, b) in upper.to_host().data().iter().zip(got.data()) {
            assert!((a - b).abs() <= b.abs() / 256.0, "{a} {b}");
        }
    }
}

#[test]
fn updates_with_moments_of_8_bits() {
    for mut lab in labs(27) {
        let Some(gpu) = lab.device.gpu().cloned() else { unreachable!() };
        let n = 3 * adamw_8bit::BLOCK + 17;
        let start = Tensor::from_slice(&[n], &lab.rng.normals(n, 1.0));
        let mut value = start.clone();
        let (mut m, mut r) = (Moment::zeros(n, Sign::Signed), Moment::zeros(n, Sign::Unsigned));
        let [mut gm, mut gr] = [&m, &r].map(|moment| DeviceMoment::new(&gpu, moment));
        let (mut upper, mut low) = match lab.dtype {
            Dtype::F32 => (lab.up_f32(&start), None),
            Dtype::BF16 => {
                let (upper, low) = start.split(&lab.device);
                (upper, Some(low))
            }
        };
        for number in 1..=4 {
            let mut grad = lab.rng.normals(n, 0.1);
            grad[..adamw_8bit::BLOCK].fill(0.0);
            let grad = Tensor::from_slice(&[n], &grad);
            adamw_8bit::update(&mut value, &grad, &mut m, &mut r, &step(number));
            let grad = lab.up_f32(&grad);
            adamw_8bit::update_on_device(&mut upper, low.as_mut(), &grad, &mut gm, &mut gr, &step(number));
        }
        lab.device.synchronize().unwrap();
        let got = low.as_ref().map_or_else(|| upper.to_host(), |low| upper.join(low));
        // A sum rounded otherwise may fall on the other side of a code's end; steps stay close all the same.
        for (got, want) in [(gm.to_host(), &m), (gr.to_host(), &r)] {
            let differing = got.codes.iter().zip(&want.codes).filter(|(a, b)| a != b).count();
            assert!(differing < n / 100, "{differing} codes differ");
            assert!(got.codes.iter().zip(&want.codes).all(|(a, b)| a.abs_diff(*b) <= 1));
            for (a, b) in got.scales.iter().zip(&want.scales) {
                assert!((a - b).abs() <= 1e-5 * b, "{a} {b}");
            }
        }
        for (a, b) in got.data().iter().zip(value.data()) {
            assert!((a - b).abs() < 2e-3, "{a} {b}");
        }
    }
}

#[test]
fn norms_of_gradients() {
    let [mut lab, _] = labs(28);
    let tensors = [5, 70_000, 1].map(|n| lab.random(&[n], 1.0));
    let want = grad_norm::norm(&tensors.iter().collect::<Vec<_>>());
    let up: Vec<Tensor> = tensors.iter().map(|t| lab.up(t)).collect();
    let got = grad_norm::norm(&up.iter().collect::<Vec<_>>());
    assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
    assert!((grad_norm::sum_of_squares(&up[0]) / grad_norm::sum_of_squares(&tensors[0]) - 1.0).abs() < 1e-12);
}

/// The same token for the same logits and number, whatever cuts the list off.
#[test]
fn tokens_are_chosen_as_on_the_processor() {
    use sample::{Choice, Draw, Scratch};
    let [mut lab, _] = labs(29);
    let (vocab, mut scratch) = (3000, Scratch::default());
    for round in 0..12 {
        let mut logits = lab.random(&[6, vocab], 2.0);
        if round % 2 > 0 {
            // Many equals, at the cuts too.
            logits.data_mut().iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
        }
        logits.row_mut(1)[2321] = 99.0;
        logits.row_mut(2)[17] = 99.0;
        logits.row_mut(2)[2000] = 99.0;
        let history = [5, 2321, 17, 5, 2999, 0].map(|id| (id + round) % vocab as u32);
        let choices: Vec<Choice<'_>> = (0..6)
            .map(|row| {
                let pick = |values: [f32; 3], at: u32| values[((round + row + at) % 3) as usize];
                let draw = Draw {
                    temperature: pick([0.7, 1.0, 1.3], 0),
                    top_k: [0, 50, 1, 2000, 7, 3000][((round + row) % 6) as usize],
                    top_p: pick([0.9, 1.0, 0.3], 1),
                    min_p: pick([0.0, 0.05, 0.0], 2),
                    uniform: lab.rng.uniform_f64(),
                };
                let repetition_penalty = if row % 2 == 0 { 1.3 } else { 1.0 };
                Choice { repetition_penalty, history: &history, draw: (row < 5).then_some(draw) }
            })
            .collect();
        let mut up = lab.up(&logits);
        let want = sample::rows(&mut logits, &choices, &mut scratch);
        assert_eq!(sample::rows(&mut up, &choices, &mut scratch), want, "round {round}: {choices:?}");
    }
    let mut logits = lab.random(&[3, 5000], 1.0);
    logits.row_mut(1)[4321] = 99.0;
    logits.row_mut(2)[17] = 99.0;
    logits.row_mut(2)[4000] = 99.0;
    let greedy = Choice { repetition_penalty: 1.0, history: &[], draw: None };
    let got = sample::rows(&mut lab.up(&logits), &[greedy; 3], &mut scratch);
    assert_eq!(got[1..], [4321, 17]);
    // What no softmax can be made of still gives a token.
    let mut broken = Tensor::from_slice(&[1, 40], &[f32::NAN; 40]).to_device(&lab.device, Dtype::F32);
    let draw = Draw { temperature: 1.0, top_k: 0, top_p: 0.5, min_p: 0.1, uniform: 0.5 };
    let got = sample::rows(&mut broken, &[Choice { draw: Some(draw), ..greedy }], &mut scratch);
    lab.device.synchronize().unwrap();
    assert!(got[0] < 40);
}
