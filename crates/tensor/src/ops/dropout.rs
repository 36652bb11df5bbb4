//! Inverted dropout: y = x · mask / (1 − p). The mask is a function of (seed, stream, row, column), so it is never
//! stored: the backward pass recomputes it, every device draws the same one, and rows that are taken in several parts
//! get what they would have got together.

pub use crate::contract::Mask;
use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// `y` [T, d] = masked and rescaled `x`.
pub fn forward(x: &Tensor, mask: Mask, y: &mut Tensor) {
    if let Some(gpu) = x.gpu() {
        return cuda::dropout::apply(gpu, x, mask, y, false);
    }
    y.resize_like(x, x.shape());
    cpu::dropout::forward(x.data(), x.cols(), mask, y.data_mut());
}

/// `d_x` **+=** masked and rescaled `d_y`.
pub fn backward(d_y: &Tensor, mask: Mask, d_x: &mut Tensor) {
    assert_eq!(d_y.shape(), d_x.shape());
    if let Some(gpu) = d_y.gpu() {
        return cuda::dropout::apply(gpu, d_y, mask, d_x, true);
    }
    cpu::dropout::backward(d_y.data(), d_y.cols(), mask, d_x.data_mut());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn rate_scale_and_backward() {
        let n = 50_001 / 7 * 7;
        let mask = Mask { p: 0.25, seed: 9, stream: 1 << 40, first_row: 0 };
        let x = Tensor::from_slice(&[n / 7, 7], &Rng::new(1, 1).normals(n, 1.0));
        let mut y = Tensor::default();
        forward(&x, mask, &mut y);
        let dropped = y.data().iter().filter(|y| **y == 0.0).count() as f64 / n as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        for (x, y) in x.data().iter().zip(y.data()) {
            assert!(*y == 0.0 || (y / x - 4.0 / 3.0).abs() < 1e-5);
        }
        // Linear in x, so the backward pass is the forward pass on gradients.
        let mut d_x = Tensor::zeros(x.shape());
        backward(&x, mask, &mut d_x);
        assert_eq!(d_x.data(), y.data());
        let mut other = Tensor::default();
        forward(&x, Mask { stream: 2, ..mask }, &mut other);
        assert_ne!(other.data(), y.data());
        forward(&x, Mask { p: 0.0, ..mask }, &mut other);
        assert_eq!(other.data(), x.data());
    }

    #[test]
    fn parts_get_the_mask_of_the_whole() {
        let mask = Mask { p: 0.5, seed: 3, stream: 7, first_row: 0 };
        let x = Tensor::from_slice(&[2000, 6], &[1.0; 12_000]);
        let (mut whole, mut part) = (Tensor::default(), Tensor::default());
        forward(&x, mask, &mut whole);
        for (first, rows) in [(0, 5), (5, 1200), (1205, 795)] {
            let x = Tensor::from_slice(&[rows, 6], &vec![1.0; rows * 6]);
            forward(&x, Mask { first_row: first as u64, ..mask }, &mut part);
            assert_eq!(part.data(), &whole.data()[first * 6..(first + rows) * 6]);
        }
    }
}
