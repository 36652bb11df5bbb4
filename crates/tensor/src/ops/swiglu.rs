//! SwiGLU: y = silu(gate) · up with silu(z) = z / (1 + e⁻ᶻ) (Shazeer 2020).

use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// `y` [T, f] from `gate` and `up` [T, f].
pub fn forward(gate: &Tensor, up: &Tensor, y: &mut Tensor) {
    assert_eq!(gate.shape(), up.shape());
    if let Some(gpu) = gate.gpu() {
        return cuda::swiglu::forward(gpu, gate, up, y);
    }
    y.resize_like(gate, gate.shape());
    cpu::swiglu::forward(gate.data(), up.data(), y.data_mut());
}

/// `gate` and `up` [T, f] become their own gradients for `d_y` [T, f]: nothing needs them after this.
pub fn backward(gate: &mut Tensor, up: &mut Tensor, d_y: &Tensor) {
    assert!(gate.shape() == d_y.shape() && up.shape() == d_y.shape());
    if let Some(gpu) = d_y.gpu() {
        return cuda::swiglu::backward(gpu, gate, up, d_y);
    }
    cpu::swiglu::backward(gate.data_mut(), up.data_mut(), d_y.data());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, to_f64, weighted};
    use crate::rng::Rng;

    fn naive(g: &[f64], u: &[f64]) -> Vec<f64> {
        g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(6, 0);
        let [g, u, d_y] = [3.0, 1.0, 1.0].map(|std| Tensor::from_slice(&[3, 37], &rng.normals(111, std)));
        let (g64, u64) = (to_f64(g.data()), to_f64(u.data()));
        let mut y = Tensor::default();
        forward(&g, &u, &mut y);
        check_close("y", y.data(), &naive(&g64, &u64), 1e-6);
        let (mut d_g, mut d_u) = (g.clone(), u.clone());
        backward(&mut d_g, &mut d_u, &d_y);
        check("d_gate", g.data(), d_g.data(), 1e-5, |g| weighted(&naive(g, &u64), d_y.data()));
        check("d_up", u.data(), d_u.data(), 1e-5, |u| weighted(&naive(&g64, u), d_y.data()));
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let g = Tensor::from_slice(&[1, 4], &[-1e4, -90.0, 90.0, 1e4]);
        let one = Tensor::from_slice(&[1, 4], &[1.0; 4]);
        let (mut y, mut d_g, mut d_u) = (Tensor::default(), g.clone(), one.clone());
        forward(&g, &one, &mut y);
        backward(&mut d_g, &mut d_u, &one);
        for t in [&y, &d_g, &d_u] {
            assert!(t.data().iter().all(|x| x.is_finite()), "{t:?}");
        }
        assert_eq!(y.data()[3], 1e4);
        assert!(y.data()[0].abs() < 1e-30);
    }
}
