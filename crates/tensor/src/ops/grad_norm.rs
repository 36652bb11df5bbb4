//! Squared Euclidean norm of a gradient; the global norm for clipping is the root of the sum over all tensors.

use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// Σ x², summed in f64 in an order that does not depend on the number of threads.
pub fn sum_of_squares(x: &Tensor) -> f64 {
    norm_squares(&[x])[0]
}

/// The Euclidean norm over all `tensors` together, which are on one device.
pub fn norm(tensors: &[&Tensor]) -> f64 {
    norm_squares(tensors).iter().sum::<f64>().sqrt()
}

fn norm_squares(tensors: &[&Tensor]) -> Vec<f64> {
    match tensors.first().and_then(|x| x.gpu()) {
        Some(gpu) => cuda::grad_norm::sums_of_squares(gpu, tensors),
        None => tensors.iter().map(|x| cpu::grad_norm::sum_of_squares(x.data())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_everything() {
        let n = 40_001;
        let values: Vec<f32> = (0..n).map(|i| (i % 7) as f32 - 3.0).collect();
        let want: f64 = values.iter().map(|x| (x * x) as f64).sum();
        assert_eq!(sum_of_squares(&Tensor::from_slice(&[n], &values)), want);
        assert!(sum_of_squares(&Tensor::from_slice(&[2], &[f32::NAN, 1.0])).is_nan());
    }
}
