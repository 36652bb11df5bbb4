//! RMSNorm: y = x · rstd · weight with rstd = 1 / √(mean(x²) + eps) (Zhang and Sennrich 2019).

use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// `y` [T, d] from `x` [T, d] and `weight` [d]; `rstd` [T] is kept for the backward pass.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f32, y: &mut Tensor, rstd: &mut Tensor) {
    assert_eq!(x.cols(), weight.len());
    if let Some(gpu) = x.gpu() {
        return cuda::rmsnorm::forward(gpu, x, weight, eps, y, rstd);
    }
    y.resize_like(x, x.shape());
    rstd.resize_like(x, &[x.rows()]);
    cpu::rmsnorm::forward(x.data(), weight.data(), eps, y.data_mut(), rstd.data_mut());
}

/// `y` [T, d] again, to the bit, from the `rstd` [T] that [`forward`] left.
pub fn apply(x: &Tensor, weight: &Tensor, rstd: &Tensor, y: &mut Tensor) {
    assert!(x.cols() == weight.len() && x.rows() == rstd.len());
    if let Some(gpu) = x.gpu() {
        return cuda::rmsnorm::apply(gpu, x, weight, rstd, y);
    }
    y.resize_like(x, x.shape());
    cpu::rmsnorm::apply(x.data(), weight.data(), rstd.data(), y.data_mut());
}

/// `d_x` [T, d] **+=** the gradient through the norm (the residual branch has put its own gradient there), and
/// `d_weight` [d] += its gradient when it trains. `d_y` is [T, d].
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    d_y: &Tensor,
    d_x: &mut Tensor,
    d_weight: Option<&mut Tensor>,
) {
    assert!(x.shape() == d_y.shape() && x.shape() == d_x.shape() && rstd.len() == x.rows());
    if let Some(gpu) = x.gpu() {
        return cuda::rmsnorm::backward(gpu, x, weight, rstd, d_y, d_x, d_weight);
    }
    let d_weight = d_weight.map(|t| t.data_mut());
    cpu::rmsnorm::backward(x.data(), weight.data(), rstd.data(), d_y.data(), d_x.data_mut(), d_weight);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, to_f64, weighted};
    use crate::rng::Rng;

    fn naive(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        x.chunks(w.len())
            .flat_map(|row| {
                let r = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt();
                row.iter().zip(w).map(move |(x, w)| x * r * w).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(2, 0);
        for d in [3, 7, 60, 96] {
            let x = Tensor::from_slice(&[5, d], &rng.normals(5 * d, 1.5));
            let w = Tensor::from_slice(&[d], &rng.normals(d, 1.0));
            let d_y = Tensor::from_slice(&[5, d], &rng.normals(5 * d, 1.0));
            let (mut y, mut rstd) = (Tensor::default(), Tensor::default());
            forward(&x, &w, 1e-3, &mut y, &mut rstd);
            check_close("y", y.data(), &naive(&to_f64(x.data()), &to_f64(w.data()), 1e-3f32 as f64), 1e-6);
            let mut again = Tensor::default();
            apply(&x, &w, &rstd, &mut again);
            assert_eq!(again.data(), y.data());
            let before = rng.normals(5 * d, 1.0);
            let mut d_x = Tensor::from_slice(&[5, d], &before);
            let mut d_w = Tensor::zeros(&[d]);
            backward(&x, &w, &rstd, &d_y, &mut d_x, Some(&mut d_w));
            let added: Vec<f32> = d_x.data().iter().zip(&before).map(|(a, b)| a - b).collect();
            let (xs, ws) = (to_f64(x.data()), to_f64(w.data()));
            check("d_x", x.data(), &added, 1e-5, |x| weighted(&naive(x, &ws, 1e-3f32 as f64), d_y.data()));
            check("d_w", w.data(), d_w.data(), 1e-5, |w| weighted(&naive(&xs, w, 1e-3f32 as f64), d_y.data()));
        }
    }
}
