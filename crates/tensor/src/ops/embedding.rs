//! Token embedding: x[t] = table[ids[t]].

use crate::{cpu, cuda};
use crate::{device::Device, dtype::Dtype, tensor::Tensor, weight::Weight};

/// `x` [T, d] = rows `ids` [T] of `table` [V, d].
///
/// # Panics
/// When an id is not below V.
pub fn forward(table: &Weight, ids: &[u32], x: &mut Tensor) {
    if let Some(gpu) = table.device().gpu() {
        assert!(ids.iter().all(|id| (*id as usize) < table.rows()), "an id lies outside the table of {}", table.rows());
        return cuda::embedding::forward(gpu, table, ids, x);
    }
    x.resize_on(&Device::Cpu, Dtype::F32, &[ids.len(), table.cols()]);
    cpu::embedding::forward(table, ids, x);
}

/// As [`forward`], where the table may be on the CPU and `x` on a GPU: its rows are sent there, in `dtype`.
///
/// # Panics
/// When an id is not below V, or the table is on another GPU.
pub fn forward_on(table: &Weight, ids: &[u32], device: &Device, dtype: Dtype, x: &mut Tensor) {
    if table.device() == *device {
        return forward(table, ids, x);
    }
    let mut rows = Tensor::default();
    forward(table, ids, &mut rows);
    x.resize_on(device, dtype, rows.shape());
    x.write(&rows);
}

/// `d_table` [V, d] += `d_x` [T, d] at rows `ids` [T].
pub fn backward(d_x: &Tensor, ids: &[u32], d_table: &mut Tensor) {
    assert_eq!((d_x.rows(), d_x.cols()), (ids.len(), d_table.cols()));
    if let Some(gpu) = d_x.gpu() {
        let rows = ids.iter().copied().zip(0..).collect();
        return cuda::embedding::backward(gpu, d_x, rows, d_table);
    }
    cpu::embedding::backward(d_x.data(), ids.iter().copied().zip(0..), d_table);
}

/// `d_rows` [n, d] += `d_x` [T, d] where `ids` [T] is one of `rows` [n], which ascend: the gradient of a part of the
/// table.
pub fn backward_rows(d_x: &Tensor, ids: &[u32], rows: &[u32], d_rows: &mut Tensor) {
    assert_eq!((d_x.rows(), d_x.cols(), rows.len()), (ids.len(), d_rows.cols(), d_rows.rows()));
    let found = ids.iter().zip(0..).filter_map(|(id, t)| Some((rows.binary_search(id).ok()? as u32, t)));
    if let Some(gpu) = d_x.gpu() {
        return cuda::embedding::backward(gpu, d_x, found.collect(), d_rows);
    }
    cpu::embedding::backward(d_x.data(), found, d_rows);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, weighted};
    use crate::rng::Rng;

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(1, 0);
        let ids = [3u32, 0, 3, 4];
        let table = Tensor::from_slice(&[5, 3], &rng.normals(15, 1.0));
        let naive = |t: &[f64]| ids.iter().flat_map(|i| t[*i as usize * 3..][..3].to_vec()).collect::<Vec<f64>>();
        let mut x = Tensor::default();
        forward(&Weight::Dense(table.clone()), &ids, &mut x);
        check_close("x", x.data(), &naive(&table.data().iter().map(|x| *x as f64).collect::<Vec<_>>()), 1e-9);
        let d_x = Tensor::from_slice(&[4, 3], &rng.normals(12, 1.0));
        let mut d_table = Tensor::zeros(&[5, 3]);
        backward(&d_x, &ids, &mut d_table);
        check("d_table", table.data(), d_table.data(), 1e-6, |t| weighted(&naive(t), d_x.data()));
        let mut d_rows = Tensor::zeros(&[2, 3]);
        backward_rows(&d_x, &ids, &[1, 3], &mut d_rows);
        assert_eq!((d_rows.row(0), d_rows.row(1)), (&[0.0; 3][..], d_table.row(3)));
    }
}
