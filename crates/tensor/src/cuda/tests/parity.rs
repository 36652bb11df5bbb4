//! Every op on every device from one body: what it computes on the CPU, it computes elsewhere.

use super::lab::{Lab, parity};
use crate::cuda::dequantize;
use crate::cuda::kernels::Source;
use crate::ops::adamw_8bit::{BLOCK, DeviceMoment, Moment, Sign};
use crate::ops::attention::{Heads, Qkv, Segment};
use crate::ops::linear::{Adapter, Store};
use crate::ops::linear_cross_entropy::{Gradients, HeadRows};
use crate::ops::sample::{Choice, Draw, Scratch};
use crate::ops::*;
use crate::quant::BlockType;
use crate::quant_encode::quantize;
use crate::{Bytes, Dtype, Packed, Tensor, Weight};

macro_rules! cases {
    ($($name:ident)*) => {
        /// Names of the ops that are compared.
        pub(crate) const CASES: &[&str] = &[$(stringify!($name),)*];

        mod on_every_device {
            $(#[test]
            fn $name() {
                super::parity(super::bodies::$name);
            })*
        }
    };
}

cases! {
    adamw adamw_8bit attention attention_decode dropout embedding grad_norm linear linear_cross_entropy
    rmsnorm rope rows sample swiglu
}

#[test]
fn quantised_weights() {
    parity(bodies::quantised_weights);
}

#[test]
fn products_with_quantised_weights() {
    parity(bodies::products_with_quantised_weights);
}

#[test]
#[should_panic(expected = "head_dim is 48")]
fn other_heads_are_refused() {
    let [_, mut lab] = super::lab::labs(14);
    bodies::documents(&mut lab, Heads { num_heads: 1, num_kv_heads: 1, head_dim: 48 }, &[4]);
}

mod bodies {
    use super::*;

    pub(super) fn rmsnorm(lab: &mut Lab) {
        for (rows, d) in [(1, 8), (5, 64), (3, 264), (2, 4112)] {
            let [x, d_y, mut d_x] = [2.0, 1.0, 1.0].map(|std| lab.input(&[rows, d], std));
            let (weight, mut d_weight) = (lab.input(&[d], 1.0), lab.input_f32(&[d], 1.0));
            let [mut y, mut rstd, mut again] = [(); 3].map(|()| Tensor::default());
            rmsnorm::forward(&x, &weight, 1e-5, &mut y, &mut rstd);
            rmsnorm::apply(&x, &weight, &rstd, &mut again);
            rmsnorm::backward(&x, &weight, &rstd, &d_y, &mut d_x, Some(&mut d_weight));
            lab.outputs([("y", &y), ("rstd", &rstd), ("d_x", &d_x)], 1e-6);
            lab.output("d_weight", &d_weight, 1e-5);
            rmsnorm::backward(&x, &weight, &rstd, &d_y, &mut d_x, None);
            lab.output("d_x twice", &d_x, 1e-6);
            assert_eq!(again.to_host().data(), y.to_host().data(), "to the bit");
        }
    }

    pub(super) fn swiglu(lab: &mut Lab) {
        for shape in [[1, 1], [3, 37], [16, 64], [5, 4096]] {
            let [mut gate, mut up, d_y] = [3.0, 1.0, 1.0].map(|std| lab.input(&shape, std));
            let mut y = Tensor::default();
            swiglu::forward(&gate, &up, &mut y);
            swiglu::backward(&mut gate, &mut up, &d_y);
            lab.outputs([("y", &y), ("d_gate", &gate), ("d_up", &up)], 1e-6);
        }
        let mut gate = lab.up(&Tensor::from_slice(&[1, 4], &[-1e4, -90.0, 90.0, 1e4]));
        let one = lab.up(&Tensor::from_slice(&[1, 4], &[1.0; 4]));
        let (mut y, mut up) = (Tensor::default(), one.clone());
        swiglu::forward(&gate, &one, &mut y);
        swiglu::backward(&mut gate, &mut up, &one);
        for t in [y, gate, up] {
            assert!(t.to_host().data().iter().all(|x| x.is_finite()), "{:?}", t.to_host());
        }
    }

    pub(super) fn rope(lab: &mut Lab) {
        for (tokens, heads, head_dim) in [(4, 2, 16), (7, 3, 64), (5, 5, 12)] {
            let positions: Vec<u32> = (0..tokens as u32).map(|t| t * 131 % 977).collect();
            let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.7f32.powi(i)).collect();
            let mut angles = rope::Angles::default();
            angles.fill_on(&lab.device, &positions, &frequencies);
            let mut x = lab.input(&[tokens, heads * head_dim as usize], 1.0);
            let before = x.to_host();
            rope::forward(&mut x, &angles);
            lab.output("y", &x, 1e-6);
            rope::backward(&mut x, &angles);
            lab.output("x", &x, 1e-6);
            lab.close("there and back", &x, &before, 1e-6);
        }
    }

    /// Forward and backward over documents of these `lengths`.
    pub(super) fn documents(lab: &mut Lab, heads: Heads, lengths: &[usize]) {
        let n = lengths.iter().sum();
        let segments = Segment::documents(lengths);
        let [q, d_o] = [(); 2].map(|()| lab.input(&[n, heads.q_cols()], 1.0));
        let [k, v] = [(); 2].map(|()| lab.input(&[n, heads.kv_cols()], 1.0));
        let [mut o, mut lse, mut d_q, mut d_k, mut d_v] = [(); 5].map(|()| Tensor::default());
        attention::forward(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut o, &mut lse);
        attention::backward(
            Qkv { q: &q, k: &k, v: &v, segments: &segments, heads },
            &o,
            &lse,
            &d_o,
            [&mut d_q, &mut d_k, &mut d_v],
        );
        for (what, t) in [("o", &o), ("lse", &lse), ("d_q", &d_q), ("d_k", &d_k), ("d_v", &d_v)] {
            lab.output(&format!("{what} of {heads:?} over {lengths:?}"), t, 2e-6);
        }
    }

    pub(super) fn attention(lab: &mut Lab) {
        for (num_heads, num_kv_heads) in [(2, 2), (4, 1)] {
            documents(lab, Heads { num_heads, num_kv_heads, head_dim: 16 }, &[3, 1, 70, 64, 130]);
        }
        let sizes: &[usize] =
            if lab.dtype == Dtype::BF16 { Source::Attention.head_dims() } else { &[12, 33, 128, 256] };
        for head_dim in sizes {
            documents(lab, Heads { num_heads: 2, num_kv_heads: 1, head_dim: *head_dim }, &[37, 68]);
        }
    }

    /// Sequences of (new queries, keys, rows of the cache before the first key), whose keys may lie anywhere.
    fn cached(lab: &mut Lab, heads: [usize; 3], sequences: &[(usize, usize, usize)]) {
        let heads = Heads { num_heads: heads[0], num_kv_heads: heads[1], head_dim: heads[2] };
        let mut segments = Vec::new();
        let (mut num_queries, mut rows) = (0, 0);
        for (queries, keys, before) in sequences {
            let first = rows + before;
            segments.push(Segment { queries: num_queries..num_queries + queries, keys: first..first + keys });
            (num_queries, rows) = (num_queries + queries, first + keys);
        }
        let q = lab.input(&[num_queries, heads.q_cols()], 1.0);
        let [k, v] = [(); 2].map(|()| lab.input(&[rows + 3, heads.kv_cols()], 1.0));
        let mut o = Tensor::default();
        attention::forward_cached(Qkv { q: &q, k: &k, v: &v, segments: &segments, heads }, &mut o);
        lab.output(&format!("{heads:?}, {sequences:?}"), &o, 2e-6);
    }

    pub(super) fn attention_decode(lab: &mut Lab) {
        for (num_queries, num_keys) in [(1, 1), (1, 300), (5, 70), (17, 40), (70, 200)] {
            cached(lab, [4, 2, 32], &[(num_queries, num_keys, 0)]);
        }
        for heads in [[4, 2, 32], [2, 1, 16], [9, 1, 16]] {
            cached(lab, heads, &[(1, 5, 0), (1, 700, 9), (1, 1, 70), (1, 256, 0), (1, 257, 1)]);
            cached(lab, heads, &[(3, 3, 0), (1, 300, 9), (16, 20, 0)]);
        }
        cached(lab, [4, 2, 16], &[(70, 90, 4), (2, 300, 0), (1, 1, 0)]);
    }

    pub(super) fn linear(lab: &mut Lab) {
        let (t, n, k, r) = (5, 24, 40, 4);
        let (x, d_y, w) = (lab.input(&[t, k], 1.0), lab.input(&[t, n], 1.0), Weight::from(lab.input(&[n, k], 0.3)));
        let (a, b, bias) = (lab.input(&[r, k], 0.3), lab.input(&[n, r], 0.3), lab.input(&[n], 1.0));
        let (inner, d_inner) = (lab.input(&[t, r], 1.0), lab.input(&[t, r], 1.0));
        let [mut y, mut d_x, mut xa, mut logits] = [(); 4].map(|()| Tensor::default());
        let adapter = Adapter { inner: &inner, outer: &b, scale: 0.5 };
        linear::forward_adapted(&x, &w, adapter, &mut y, Store::Overwrite);
        linear::forward(&x, &w, 0.5, &mut y, Store::Accumulate);
        linear::add_bias(&bias, &mut y);
        let adapter = Adapter { inner: &d_inner, outer: &a, scale: 1.0 };
        linear::input_gradient_adapted(&d_y, &w, adapter, &mut d_x, Store::Overwrite);
        linear::input_gradient(&d_y, &w, 1.0, &mut d_x, Store::Accumulate);
        linear::matmul(&x, &a, 1.0, &mut xa, Store::Overwrite);
        linear::matmul_input_gradient(&inner, &a, 2.0, &mut d_x, Store::Accumulate);
        let [mut d_w, mut d_bias] = [&[n, k][..], &[n]].map(|s| Tensor::zeros_on(&lab.device, Dtype::F32, s));
        for _ in 0..2 {
            linear::matmul_weight_gradient(&d_y, &x, 1.5, &mut d_w);
            linear::bias_gradient(&d_y, &mut d_bias);
        }
        linear::logits(&x, &w, &mut logits);
        assert_eq!(logits.dtype(), Dtype::F32);
        lab.outputs(
            [("y", &y), ("d_x", &d_x), ("xa", &xa), ("d_w", &d_w), ("d_bias", &d_bias), ("logits", &logits)],
            1e-6,
        );
    }

    /// Every encoding, by a range of rows and by a list of rows; q and k of GGUF files in their order of rows.
    pub(super) fn quantised_weights(lab: &mut Lab) {
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
        let q8 = quantize(BlockType::Q8_0, dense.data());
        weights.push(Packed::from_blocks([16, 512], BlockType::Q8_0, Bytes::Owned(q8), None));
        for packed in weights {
            let name = packed.encoding();
            let weight = Weight::Packed(packed).to_device(&lab.device, lab.dtype);
            assert_eq!((weight.encoding(), weight.shape()), (name, &[16, 512][..]));
            assert_eq!(weight.device(), lab.device);
            let (mut listed, mut range) = (Tensor::default(), Tensor::default());
            embedding::forward(&weight, &[7, 0, 7], &mut listed);
            lab.output(name, &listed, 0.0);
            match &weight {
                Weight::Device(w) => {
                    range = Tensor::zeros_on(&lab.device, lab.dtype, &[11, 512]);
                    dequantize::rows(w.gpu(), w, 3, 11, range.device_buffer(), lab.dtype);
                }
                _ => embedding::forward(&weight, &(3..14).collect::<Vec<_>>(), &mut range),
            }
            lab.output(name, &range, 0.0);
        }
    }

    /// Few rows are multiplied with the blocks as they are, more with dequantised tiles.
    pub(super) fn products_with_quantised_weights(lab: &mut Lab) {
        let dense = lab.random(&[48, 512], 0.5);
        let q4 = quantize(BlockType::Q4_0, dense.data());
        let q4 = |heads| Packed::from_blocks([48, 512], BlockType::Q4_0, Bytes::Owned(q4.clone()), heads);
        for packed in [Packed::nf4(&dense, true), Packed::nf4(&dense, false), q4(None), q4(Some(3))] {
            let weight = Weight::Packed(packed).to_device(&lab.device, lab.dtype);
            for t in [1, 3, 8, 11] {
                let (x, d_y) = (lab.input(&[t, 512], 1.0), lab.input(&[t, 48], 1.0));
                let [mut y, mut d_x, mut logits] = [(); 3].map(|()| Tensor::default());
                linear::logits(&x, &weight, &mut logits);
                linear::forward(&x, &weight, 1.0, &mut y, Store::Overwrite);
                linear::forward(&x, &weight, 0.5, &mut y, Store::Accumulate);
                linear::input_gradient(&d_y, &weight, 1.0, &mut d_x, Store::Overwrite);
                lab.outputs([("logits", &logits), ("y", &y), ("d_x", &d_x)], 1e-6);
            }
        }
    }

    pub(super) fn linear_cross_entropy(lab: &mut Lab) {
        for (n, d, vocab, smoothing) in [(3, 8, 11, 0.0), (4, 16, 70, 0.1), (2, 8, 5000, 0.0), (4, 8, 13, 0.2)] {
            let weights = (vocab == 13).then_some(&[0.25, 1.0, 0.0, 3.0][..]);
            let (h, w) = (lab.input(&[n, d], 2.0), Weight::from(lab.input(&[vocab, d], 1.0)));
            let targets: Vec<u32> = (0..n).map(|_| lab.rng.below(vocab as u32)).collect();
            let (mut scratch, mut loss) = (linear_cross_entropy::Scratch::default(), Vec::new());
            let (mut d_h, mut d_w) = (Tensor::default(), Tensor::zeros_on(&lab.device, Dtype::F32, &[vocab, d]));
            // Rows that train by themselves get the same, added to what was there.
            let (ids, mut d_own) = ([0, 3, vocab as u32 - 1], lab.input_f32(&[3, d], 0.1));
            let d_rows = Some(HeadRows { ids: &ids, d_w: &mut d_own });
            let gradients = Gradients { scale: 0.25, weights, d_h: &mut d_h, d_w: Some(&mut d_w), d_rows };
            linear_cross_entropy::forward_backward(&h, &w, &targets, smoothing, &mut scratch, &mut loss, gradients);
            let mut only = Vec::new();
            linear_cross_entropy::forward(&h, &w, &targets, smoothing, &mut scratch, &mut only);
            assert_eq!(only, loss);
            // The logits are f32 in both precisions, so that the loss is as exact in one as in the other.
            lab.output_in_both("loss", &Tensor::from_slice(&[n], &loss), 3e-6, 1.0);
            lab.outputs([("d_h", &d_h), ("d_w", &d_w), ("d_rows", &d_own)], 2e-6);
        }
    }

    pub(super) fn embedding(lab: &mut Lab) {
        let (table, d_x) = (Weight::from(lab.input(&[9, 24], 1.0)), lab.input(&[6, 24], 1.0));
        let ids = [3u32, 0, 8, 3, 3, 0];
        let (mut x, mut d_table) = (Tensor::default(), lab.input_f32(&[9, 24], 1.0));
        embedding::forward(&table, &ids, &mut x);
        embedding::backward(&d_x, &ids, &mut d_table);
        // The same sums in the same order.
        lab.outputs([("x", &x), ("d_table", &d_table)], 0.0);
        for rows in [&[0u32, 2, 8][..], &[3], &[5], &[]] {
            let mut d_rows = lab.input_f32(&[rows.len(), 24], 1.0);
            embedding::backward_rows(&d_x, &ids, rows, &mut d_rows);
            lab.output(&format!("rows {rows:?}"), &d_rows, 0.0);
        }
    }

    pub(super) fn rows(lab: &mut Lab) {
        let (x, mut z, mut y) = (lab.input(&[9, 24], 1.0), lab.input(&[9, 24], 1.0), Tensor::default());
        rows::gather(&x, &[8, 1, 5], &mut y);
        rows::scatter(&y, &[2, 0, 7], &mut z);
        lab.outputs([("gathered", &y), ("scattered", &z)], 0.0);
    }

    pub(super) fn dropout(lab: &mut Lab) {
        for cols in [24, 7] {
            let (x, mut y) = (lab.input(&[50, cols], 1.0), Tensor::default());
            let mask = dropout::Mask { p: 0.25, seed: 7 << 40 | 9, stream: 5 << 33 | 3, first_row: 1 << 32 };
            dropout::forward(&x, mask, &mut y);
            lab.output("y", &y, 1e-7);
            let dropped: Vec<f32> = y.to_host().data().iter().map(|y| f32::from(*y == 0.0)).collect();
            lab.output("dropped elements", &Tensor::from_slice(y.shape(), &dropped), 0.0);
            let mut d_x = x.clone();
            dropout::backward(&x, mask, &mut d_x);
            lab.output("d_x", &d_x, 1e-6);
        }
    }

    fn step(number: u64) -> adamw::Step {
        let (learning_rate, beta1, beta2, epsilon) = (0.01, 0.9, 0.999, 1e-8);
        adamw::Step { number, learning_rate, beta1, beta2, epsilon, weight_decay: 0.1, grad_scale: 0.5 }
    }

    /// f32 master weights: in bf16 on a GPU, rounded, and the residual of rounding.
    struct Master(Tensor, Option<Tensor>);

    impl Master {
        fn random(lab: &mut Lab, n: usize) -> Self {
            let start = Tensor::from_slice(&[n], &lab.rng.normals(n, 1.0));
            if lab.dtype == Dtype::F32 || lab.device.gpu().is_none() {
                return Self(lab.up_f32(&start), None);
            }
            let (upper, residual) = start.split_master(&lab.device);
            assert_eq!(upper.join_master(&residual).data(), start.data(), "no bit is lost");
            Self(upper, Some(residual))
        }

        fn whole(&self) -> Tensor {
            let whole = self.1.as_ref().map_or_else(|| self.0.to_host(), |residual| self.0.join_master(residual));
            // The upper half is the nearest bf16.
            for (a, b) in self.0.to_host().data().iter().zip(whole.data()) {
                assert!((a - b).abs() <= b.abs() / 256.0, "{a} {b}");
            }
            whole
        }
    }

    pub(super) fn adamw(lab: &mut Lab) {
        let n = 1000;
        let mut master = Master::random(lab, n);
        let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros_on(&lab.device, Dtype::F32, &[n]));
        for number in 1..=5 {
            let grad = Tensor::from_slice(&[n], &lab.rng.normals(n, 0.1));
            let grad = lab.up_f32(&grad);
            let Master(value, residual) = &mut master;
            match residual {
                None => adamw::update(value, &grad, &mut m, &mut v, &step(number)),
                Some(residual) => adamw::update_split(value, residual, &grad, &mut m, &mut v, &step(number)),
            }
        }
        for (what, t) in [("value", &master.whole()), ("m", &m), ("v", &v)] {
            lab.output_in_both(what, t, 1e-6, 1.0);
        }
    }

    pub(super) fn adamw_8bit(lab: &mut Lab) {
        let n = 3 * BLOCK + 17;
        let mut master = Master::random(lab, n);
        let mut moments = [Sign::Signed, Sign::Unsigned].map(|sign| Moment::zeros(n, sign));
        let gpu = lab.device.gpu().cloned();
        let mut on_gpu = gpu.map(|gpu| moments.each_ref().map(|moment| DeviceMoment::new(&gpu, moment)));
        for number in 1..=4 {
            let mut grad = lab.rng.normals(n, 0.1);
            grad[..BLOCK].fill(0.0);
            let grad = lab.up_f32(&Tensor::from_slice(&[n], &grad));
            let (Master(value, residual), [m, r]) = (&mut master, &mut moments);
            match &mut on_gpu {
                Some([m, r]) => adamw_8bit::update_on_device(value, residual.as_mut(), &grad, m, r, &step(number)),
                None => adamw_8bit::update(value, &grad, m, r, &step(number)),
            }
        }
        if let Some(on_gpu) = &on_gpu {
            moments = on_gpu.each_ref().map(DeviceMoment::to_host);
        }
        for Moment { codes, scales, .. } in moments {
            // A sum rounded otherwise may fall on the other side of a code's end; steps stay close all the same.
            let codes: Vec<f32> = codes.iter().map(|code| f32::from(*code)).collect();
            let largest = codes.iter().fold(1.0f32, |m, x| m.max(*x));
            lab.output_in_both("codes", &Tensor::from_slice(&[n], &codes), 1.01 / largest, 0.01);
            lab.output_in_both("scales", &Tensor::from_slice(&[scales.len()], &scales), 1e-5, 1.0);
        }
        lab.output_in_both("value", &master.whole(), 5e-4, 1.0);
    }

    pub(super) fn grad_norm(lab: &mut Lab) {
        let tensors = [5, 70_000, 1].map(|n| lab.input_f32(&[n], 1.0));
        let on_cpu: Vec<Tensor> = tensors.iter().map(Tensor::to_host).collect();
        let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
        let norm = |tensors: &[Tensor]| grad_norm::norm(&tensors.iter().collect::<Vec<_>>());
        close(norm(&tensors), norm(&on_cpu));
        close(grad_norm::sum_of_squares(&tensors[0]), grad_norm::sum_of_squares(&on_cpu[0]));
    }

    /// The same token for the same logits and number, whatever cuts the list off.
    pub(super) fn sample(lab: &mut Lab) {
        let (vocab, mut scratch) = (3000, Scratch::default());
        let mut choose = |lab: &mut Lab, logits: &Tensor, choices: &[Choice<'_>]| {
            let tokens = sample::rows(&mut lab.up_f32(logits), choices, &mut scratch);
            let tokens: Vec<f32> = tokens.iter().map(|token| *token as f32).collect();
            Tensor::from_slice(&[tokens.len()], &tokens)
        };
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
            let tokens = choose(lab, &logits, &choices);
            lab.output(&format!("round {round}: {choices:?}"), &tokens, 0.0);
        }
        let mut logits = lab.random(&[3, 5000], 1.0);
        logits.row_mut(1)[4321] = 99.0;
        logits.row_mut(2)[17] = 99.0;
        logits.row_mut(2)[4000] = 99.0;
        let greedy = Choice { repetition_penalty: 1.0, history: &[], draw: None };
        let tokens = choose(lab, &logits, &[greedy; 3]);
        lab.output("greedy", &tokens, 0.0);
        // What no softmax can be made of still gives a token.
        let draw = Draw { temperature: 1.0, top_k: 0, top_p: 0.5, min_p: 0.1, uniform: 0.5 };
        let broken = Tensor::from_slice(&[1, 40], &[f32::NAN; 40]);
        assert!(choose(lab, &broken, &[Choice { draw: Some(draw), ..greedy }]).data()[0] < 40.0);
    }
}
