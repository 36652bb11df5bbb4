//! Rows by their numbers; contract in `ops/rows.rs`.

use crate::tensor::Tensor;

pub(crate) fn gather(x: &Tensor, index: &[u32], y: &mut Tensor) {
    for (i, row) in index.iter().enumerate() {
        y.row_mut(i).copy_from_slice(x.row(*row as usize));
    }
}

pub(crate) fn scatter(x: &Tensor, index: &[u32], y: &mut Tensor) {
    for (i, row) in index.iter().enumerate() {
        y.row_mut(*row as usize).copy_from_slice(x.row(i));
    }
}
