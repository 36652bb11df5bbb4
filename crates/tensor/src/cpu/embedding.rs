//! Token embedding; contract in `ops/embedding.rs`.

use crate::{tensor::Tensor, weight::Weight};

pub(crate) fn forward(table: &Weight, ids: &[u32], x: &mut Tensor) {
    for (t, id) in ids.iter().enumerate() {
        table.row_into(*id as usize, x.row_mut(t));
    }
}

/// Row `r` of `d_table` += row `t` of `d_x` for each (r, t) of `pairs`, in their order on one thread: rows that occur
/// twice are summed in one order, and this is a sliver of the step.
pub(crate) fn backward(d_x: &[f32], pairs: impl Iterator<Item = (u32, u32)>, d_table: &mut Tensor) {
    let cols = d_table.cols();
    for (row, t) in pairs {
        let d_x = &d_x[t as usize * cols..][..cols];
        d_table.row_mut(row as usize).iter_mut().zip(d_x).for_each(|(sum, g)| *sum += g);
    }
}
