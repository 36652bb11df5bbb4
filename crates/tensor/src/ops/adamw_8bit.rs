//! AdamW with moments of one byte per element (Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit optimizers via
//! block-wise quantization", 2022): each block of [`BLOCK`] elements has a scale, and its elements are stored in the
//! dynamic code of Dettmers, "8-bit approximations for parallelism in deep learning" (2016), whose steps are finest
//! relative to the largest elements and which reaches down over seven decades.
//!
//! Three things differ from the paper. The second moment is stored as its root, which is what a step is divided by and
//! spreads over half as many decades. A root that is not 0 is never stored as 0: dividing by it would make a step that
//! explodes, while the smallest code makes one that is merely too short. And the code of the first moment is a sign and
//! 7 bits of magnitude, so that the largest element of a block is exact whatever its sign.

use crate::cuda::gpu::{Arg, Buffer, Gpu};
pub use crate::moments::{BLOCK, Moment, Sign};
use crate::{contract::Step, tensor::Tensor};
use crate::{cpu, cuda};
use std::sync::Arc;

/// A moment on a GPU.
#[derive(Debug)]
pub struct DeviceMoment {
    pub(crate) codes: Buffer,
    pub(crate) scales: Buffer,
    len: usize,
    sign: Sign,
}

impl DeviceMoment {
    /// A copy of `moment` on `gpu`.
    pub fn new(gpu: &Arc<Gpu>, moment: &Moment) -> Self {
        let Moment { codes, scales, sign } = moment;
        Self { codes: gpu.upload(codes), scales: gpu.upload(scales), len: codes.len(), sign: *sign }
    }

    /// A copy in host memory.
    pub fn to_host(&self) -> Moment {
        let mut moment = Moment::zeros(self.len, self.sign);
        self.codes.read(0, &mut moment.codes);
        self.scales.read(0, bytemuck::cast_slice_mut(&mut moment.scales));
        moment
    }
}

/// [`update`] on a GPU; `residual` as in [`crate::ops::adamw::update_split`].
pub fn update_on_device(
    value: &mut Tensor,
    residual: Option<&mut Tensor>,
    grad: &Tensor,
    m: &mut DeviceMoment,
    r: &mut DeviceMoment,
    step: &Step,
) {
    assert!(value.len() == grad.len() && value.len() == m.len && value.len() == r.len);
    assert!((m.sign, r.sign) == (Sign::Signed, Sign::Unsigned) && step.number > 0, "updates count from 1");
    let gpu = m.codes.gpu().clone();
    let moments = [&m.codes, &m.scales, &r.codes, &r.scales].map(|b| Arg::Buffer(b, 0));
    cuda::adamw_8bit::update(&gpu, value, residual, grad, 0..grad.len(), moments, step);
}

/// Updates `value`, its first moment `m` (signed) and the root `r` of its second moment (unsigned), all of one length,
/// with `grad`.
pub fn update(value: &mut Tensor, grad: &Tensor, m: &mut Moment, r: &mut Moment, step: &Step) {
    assert!(value.len() == grad.len() && value.len() == m.codes.len() && value.len() == r.codes.len());
    assert!((m.sign, r.sign) == (Sign::Signed, Sign::Unsigned) && step.number > 0, "updates count from 1");
    cpu::adamw_8bit::update(value.data_mut(), grad.data(), m, r, step);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moments::{levels, quantize};
    use crate::ops::adamw;
    use crate::rng::Rng;

    fn quantized(values: &[f32], sign: Sign) -> Moment {
        let mut moment = Moment::zeros(values.len(), sign);
        let blocks = values.chunks(BLOCK).zip(moment.codes.chunks_mut(BLOCK)).zip(&mut moment.scales);
        blocks.for_each(|((values, codes), scale)| *scale = quantize(values, sign, codes));
        moment
    }

    #[test]
    fn codes_are_the_nearest() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            let levels = levels(sign);
            assert_eq!(levels.len(), if sign == Sign::Signed { 128 } else { 256 });
            assert!(levels.is_sorted() && levels[0] == 0.0 && levels.last() == Some(&1.0));
            let mut rng = Rng::new(1, 0);
            let mut values = vec![1.0f32];
            // Magnitudes spread over nine decades, and the edges of the code itself.
            values.extend((0..20_000).map(|_| 10f32.powf(-9.0 * rng.uniform())));
            values.extend(levels.windows(2).flat_map(|w| [w[0], 0.5 * (w[0] + w[1])]));
            for block in values[1..].chunks(BLOCK - 1) {
                let block = [&[1.0], block].concat();
                let dequantized = quantized(&block, sign).dequantize();
                for (x, y) in block.iter().zip(dequantized) {
                    let nearest = levels.iter().map(|l| (l - x).abs()).fold(f32::INFINITY, f32::min);
                    let smallest = sign == Sign::Unsigned && y == levels[1];
                    assert!((x - y).abs() <= 1.0001 * nearest + 1e-12 || smallest, "{sign:?} {x} became {y}");
                }
            }
        }
    }

    #[test]
    fn blocks_are_independent_and_extremes_exact() {
        let mut rng = Rng::new(2, 0);
        let mut values = rng.normals(3 * BLOCK + 17, 1e-3);
        values[5] = -40.0;
        values[BLOCK..2 * BLOCK].fill(0.0);
        let moment = quantized(&values, Sign::Signed);
        let dequantized = moment.dequantize();
        assert_eq!(moment.scales.len(), 4);
        assert_eq!(dequantized[5], -40.0);
        assert!(dequantized[BLOCK..2 * BLOCK].iter().all(|x| *x == 0.0));
        // A large element spoils its own block only: elsewhere the error stays below the widest step of the code.
        for (x, y) in values[2 * BLOCK..].iter().zip(&dequantized[2 * BLOCK..]) {
            assert!((x - y).abs() <= 0.0072 * moment.scales[2].max(moment.scales[3]), "{x} {y}");
        }
        assert_eq!(quantized(&dequantized, Sign::Signed), moment, "decoding and encoding again changes nothing");
    }

    #[test]
    fn a_small_root_is_not_zero() {
        let moment = quantized(&[1.0, 1e-12, 0.0], Sign::Unsigned);
        let dequantized = moment.dequantize();
        assert!(dequantized[0] == 1.0 && dequantized[1] > 0.0 && dequantized[2] == 0.0, "{dequantized:?}");
    }

    #[test]
    fn tracks_32_bit_moments() {
        let mut rng = Rng::new(3, 0);
        let n = 4 * BLOCK + 100;
        let start = Tensor::from_slice(&[n], &rng.normals(n, 1.0));
        // Each weight has a gradient scale of its own, over three decades.
        let scales: Vec<f32> = (0..n).map(|_| 10f32.powf(-3.0 * rng.uniform())).collect();
        let (mut exact, mut value) = (start.clone(), start.clone());
        let (mut m32, mut v32) = (Tensor::zeros(&[n]), Tensor::zeros(&[n]));
        let (mut m, mut v) = (Moment::zeros(n, Sign::Signed), Moment::zeros(n, Sign::Unsigned));
        for number in 1..=50 {
            let grad: Vec<f32> = scales.iter().map(|s| s * (0.5 + rng.normal())).collect();
            let grad = Tensor::from_slice(&[n], &grad);
            let step = Step {
                number,
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.1,
                grad_scale: 0.5,
            };
            adamw::update(&mut exact, &grad, &mut m32, &mut v32, &step);
            update(&mut value, &grad, &mut m, &mut v, &step);
        }
        let distance = |a: &Tensor, b: &Tensor| {
            a.data().iter().zip(b.data()).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>().sqrt()
        };
        let (error, moved) = (distance(&exact, &value), distance(&exact, &start));
        assert!(error < 0.07 * moved, "{error} of {moved}");
    }
}
