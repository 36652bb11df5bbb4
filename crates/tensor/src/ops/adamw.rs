//! AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), in the order of operations of PyTorch.

pub use crate::contract::Step;
use crate::cuda::arguments::argument;
use crate::{cpu, cuda};
use crate::{dtype::Dtype, tensor::Tensor};

/// Updates `value`, first moment `m` and second moment `v` (all of one shape) with `grad`.
pub fn update(value: &mut Tensor, grad: &Tensor, m: &mut Tensor, v: &mut Tensor, step: &Step) {
    assert!(value.len() == grad.len() && value.len() == m.len() && value.len() == v.len());
    assert!(step.number > 0, "updates count from 1");
    if let Some(gpu) = value.gpu().cloned() {
        let moments = [&*m, v].map(|t| argument(t, Dtype::F32));
        return cuda::adamw::update(&gpu, value, None, grad, 0..grad.len(), moments, step);
    }
    cpu::adamw::update(value.data_mut(), grad.data(), m.data_mut(), v.data_mut(), step);
}

/// As [`update`], of a bf16 weight on a GPU whose f32 master weight is `value` plus its `residual` (16 bits per
/// element), so that steps too small for bf16 add up ([`Tensor::split_master`]).
///
/// # Panics
/// When the tensors are on the CPU.
pub fn update_split(
    value: &mut Tensor,
    residual: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: &Step,
) {
    assert!(value.len() == grad.len() && value.len() == m.len() && value.len() == v.len());
    assert!(step.number > 0, "updates count from 1");
    let Some(gpu) = value.gpu().cloned() else { panic!("{value:?} must be on a GPU") };
    let moments = [&*m, v].map(|t| argument(t, Dtype::F32));
    cuda::adamw::update(&gpu, value, Some(residual), grad, 0..grad.len(), moments, step);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn matches_f64_over_steps() {
        let mut rng = Rng::new(11, 0);
        let n = 1000;
        let mut value = Tensor::from_slice(&[n], &rng.normals(n, 1.0));
        let (mut m, mut v) = (Tensor::zeros(&[n]), Tensor::zeros(&[n]));
        let mut p: Vec<f64> = value.data().iter().map(|x| *x as f64).collect();
        let (mut m64, mut v64) = (vec![0.0f64; n], vec![0.0f64; n]);
        for number in 1..=20 {
            let grad = rng.normals(n, 0.1);
            let step = Step {
                number,
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.1,
                grad_scale: 0.5,
            };
            update(&mut value, &Tensor::from_slice(&[n], &grad), &mut m, &mut v, &step);
            for i in 0..n {
                let g = grad[i] as f64 * 0.5;
                p[i] *= 1.0 - 0.01 * 0.1;
                m64[i] = 0.9 * m64[i] + 0.1 * g;
                v64[i] = 0.999 * v64[i] + 0.001 * g * g;
                let (mh, vh) =
                    (m64[i] / (1.0 - 0.9f64.powi(number as i32)), v64[i] / (1.0 - 0.999f64.powi(number as i32)));
                p[i] -= 0.01 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (a, b) in value.data().iter().zip(&p) {
            assert!((*a as f64 - b).abs() < 2e-6, "{a} {b}");
        }
    }
}
