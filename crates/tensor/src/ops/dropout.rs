//! Inverted dropout: y = x · mask / (1 − p). The mask is a function of (seed, stream, element), so it is never stored: the
//! backward pass makes it again, and every device draws the same one.

use crate::{Tensor, cpu};

/// Which mask: a probability of dropping, a seed for the run, and a stream for (step, micro-batch, layer, module).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    /// Probability that an element is dropped, in [0, 1).
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the use within the run.
    pub stream: u64,
}

/// `y` = masked and rescaled `x`, any shape.
pub fn forward(x: &Tensor, mask: Mask, y: &mut Tensor) {
    y.resize(x.shape());
    cpu::dropout::forward(x.data(), mask.p, mask.seed, mask.stream, y.data_mut());
}

/// `d_x` **+=** masked and rescaled `d_y`.
pub fn backward(d_y: &Tensor, mask: Mask, d_x: &mut Tensor) {
    assert_eq!(d_y.shape(), d_x.shape());
    cpu::dropout::backward(d_y.data(), mask.p, mask.seed, mask.stream, d_x.data_mut());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn rate_scale_and_backward() {
        let n = 50_001;
        let mask = Mask { p: 0.25, seed: 9, stream: 1 << 40 };
        let x = Tensor::from_slice(&[n], &Rng::new(1, 1).normals(n, 1.0));
        let mut y = Tensor::default();
        forward(&x, mask, &mut y);
        let dropped = y.data().iter().filter(|y| **y == 0.0).count() as f64 / n as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        for (x, y) in x.data().iter().zip(y.data()) {
            assert!(*y == 0.0 || (y / x - 4.0 / 3.0).abs() < 1e-5);
        }
        // Linear in x, so the backward pass is the forward pass on gradients.
        let mut d_x = Tensor::zeros(&[n]);
        backward(&x, mask, &mut d_x);
        assert_eq!(d_x.data(), y.data());
        let mut other = Tensor::default();
        forward(&x, Mask { stream: 2, ..mask }, &mut other);
        assert_ne!(other.data(), y.data());
        forward(&x, Mask { p: 0.0, ..mask }, &mut other);
        assert_eq!(other.data(), x.data());
    }
}
