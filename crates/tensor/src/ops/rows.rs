//! Rows of a matrix by their numbers: y[i] = x[index[i]], and the reverse.

use crate::tensor::Tensor;
use crate::{cpu, cuda};

/// `y` [N, d] = rows `index` [N] of `x` [T, d].
///
/// # Panics
/// When a number is not below T.
pub fn gather(x: &Tensor, index: &[u32], y: &mut Tensor) {
    check(x, index);
    if let Some(gpu) = x.gpu() {
        return cuda::rows::gather(gpu, x, index, y);
    }
    y.resize_like(x, &[index.len(), x.cols()]);
    cpu::rows::gather(x, index, y);
}

/// Rows `index` [N] of `y` [T, d] = `x` [N, d]; the others keep what they hold. No number may occur twice.
///
/// # Panics
/// When a number is not below T.
pub fn scatter(x: &Tensor, index: &[u32], y: &mut Tensor) {
    assert_eq!((x.rows(), x.cols()), (index.len(), y.cols()));
    check(y, index);
    if let Some(gpu) = x.gpu() {
        return cuda::rows::scatter(gpu, x, index, y);
    }
    cpu::rows::scatter(x, index, y);
}

fn check(x: &Tensor, index: &[u32]) {
    let rows = x.rows();
    assert!(index.iter().all(|row| (*row as usize) < rows), "a row lies outside the {rows} there are");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let x = Tensor::from_slice(&[4, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let mut y = Tensor::default();
        gather(&x, &[3, 1], &mut y);
        assert_eq!((y.shape(), y.data()), (&[2, 2][..], &[6.0, 7.0, 2.0, 3.0][..]));
        let mut z = Tensor::zeros(&[4, 2]);
        scatter(&y, &[3, 1], &mut z);
        assert_eq!(z.data(), [0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 6.0, 7.0]);
        assert!(std::panic::catch_unwind(|| gather(&x, &[4], &mut Tensor::default())).is_err());
    }
}
