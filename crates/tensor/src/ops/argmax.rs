//! Greedy sampling: the number of the largest logit of each row.

use crate::{Tensor, cuda};

/// For each row of `logits` [T, V] the number of its largest element, the first where several are.
///
/// # Panics
/// When V is 0.
pub fn rows(logits: &Tensor) -> Vec<u32> {
    assert!(logits.cols() > 0, "no logits");
    if let Some(gpu) = logits.gpu() {
        return cuda::decode::argmax(gpu, logits);
    }
    let first_largest =
        |row: &[f32]| row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best });
    (0..logits.rows()).map(|t| first_largest(logits.row(t)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest() {
        let logits = Tensor::from_slice(&[2, 4], &[1.0, 3.0, 3.0, -1.0, -5.0, -7.0, -5.0, -6.0]);
        assert_eq!(rows(&logits), [1, 0]);
    }
}
