//! Matrix products by the `gemm` crate, and the product with few rows that decoding needs.

use crate::Packed;
use crate::cpu::simd::{multiversion, reduce2};
use rayon::prelude::*;
use std::ops::Range;

/// A read-only matrix inside a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix with `cols` columns.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose: no data moves.
    pub(crate) fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    fn check(&self, rows: usize, cols: usize) {
        let last = (rows.max(1) - 1) * self.row_stride + (cols.max(1) - 1) * self.col_stride;
        assert!(rows == 0 || cols == 0 || last < self.data.len(), "matrix {rows} x {cols} exceeds its slice");
    }
}

/// `dst[m, n] = accumulate · dst + alpha · a[m, k] · b[k, n]`, where `dst` has rows `dst_stride` apart.
///
/// Cuts the work among `threads` threads of the current rayon pool; one thread computes each element.
#[allow(unsafe_code)]
pub(crate) fn gemm(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
    threads: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_stride + n <= dst.len() && dst_stride >= n, "destination {m} x {n} exceeds its slice");
    a.check(m, k);
    b.check(k, n);
    if k == 0 {
        if !accumulate {
            for row in dst.chunks_mut(dst_stride).take(m) {
                row[..n].fill(0.0);
            }
        }
        return;
    }
    let parallelism = if threads <= 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    // SAFETY: the three matrices lie inside their slices (checked above), `dst` is borrowed mutably and so overlaps
    // neither `a` nor `b`, and all strides are those of live f32 memory.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Products with up to this many rows of activations read the weights once, row by row, instead of packing them.
pub(crate) const FEW_ROWS: usize = 4;

/// `y[m, n] = accumulate · y + alpha · x[m, k] · w[n, k]ᵀ`: the shape of every linear layer.
pub(crate) fn matmul_nt(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    accumulate: bool,
    alpha: f32,
    x: &[f32],
    w: &[f32],
) {
    if m > FEW_ROWS || n < 64 {
        return gemm((m, n, k), y, n, accumulate, alpha, View::rows(x, k), View::rows(w, k).t(), threads());
    }
    few_rows((m, n), y, accumulate, alpha, |columns, out| {
        for j in columns {
            dots(out, x, &w[j * k..(j + 1) * k]);
        }
    });
}

/// As [`matmul_nt`] for few rows of `x` and a packed weight, whose rows are decoded one by one.
pub(crate) fn matmul_nt_packed(m: usize, y: &mut [f32], accumulate: bool, alpha: f32, x: &[f32], w: &Packed) {
    let [n, k] = w.shape();
    few_rows((m, n), y, accumulate, alpha, |columns, out| {
        let mut row = vec![0.0; k];
        for j in columns {
            w.decode_rows(j..j + 1, &mut row);
            dots(out, x, &row);
        }
    });
}

/// One pass over the weights, cut into strips of output columns: `strip` appends the `m` products of each column of its range,
/// which are then copied out.
fn few_rows(
    (m, n): (usize, usize),
    y: &mut [f32],
    accumulate: bool,
    alpha: f32,
    strip: impl Fn(Range<usize>, &mut Vec<f32>) + Sync,
) {
    let width = n.div_ceil(threads() * 4).max(16);
    let strips: Vec<Vec<f32>> = (0..n.div_ceil(width))
        .into_par_iter()
        .map(|s| {
            let columns = s * width..((s + 1) * width).min(n);
            let mut out = Vec::with_capacity(columns.len() * m);
            strip(columns, &mut out);
            out
        })
        .collect();
    for (s, values) in strips.iter().enumerate() {
        for (j, column) in values.chunks_exact(m).enumerate() {
            for (i, value) in column.iter().enumerate() {
                let slot = &mut y[i * n + s * width + j];
                *slot = if accumulate { *slot } else { 0.0 } + alpha * value;
            }
        }
    }
}

multiversion! {
    /// Appends the product of `w` with each row of `x` (rows as long as `w`).
    fn dots(out: &mut Vec<f32>, x: &[f32], w: &[f32]) {
        for row in x.chunks_exact(w.len()) {
            out.push(reduce2(row, w, |a, b| a * b));
        }
    }
}

/// Threads of the current pool.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// A pointer that tasks share to write disjoint parts of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32, usize);

// SAFETY: a `Shared` is only dereferenced through `slice`, whose caller promises that concurrent ranges are disjoint.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len())
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// The buffer given to [`Shared::new`] is still borrowed, and while the returned slice lives no other thread touches
    /// an element of it that this thread writes.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1, "a task reaches past its buffer");
        // SAFETY: inside the buffer (checked); exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn naive(m: usize, n: usize, k: usize, x: &[f32], w: &[f32]) -> Vec<f64> {
        let mut y = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                y[i * n + j] = (0..k).map(|l| x[i * k + l] as f64 * w[j * k + l] as f64).sum();
            }
        }
        y
    }

    #[test]
    fn products_match_f64() {
        let mut rng = Rng::new(7, 0);
        for (m, n, k) in [(1, 64, 33), (4, 200, 64), (5, 100, 17), (33, 47, 61), (3, 5, 2), (2, 130, 1)] {
            let x = rng.normals(m * k, 1.0);
            let w = rng.normals(n * k, 1.0);
            let want = naive(m, n, k, &x, &w);
            let mut y = vec![f32::NAN; m * n];
            matmul_nt((m, n, k), &mut y, false, 1.0, &x, &w);
            for (a, b) in y.iter().zip(&want) {
                assert!((*a as f64 - b).abs() < 1e-4, "{m} {n} {k}: {a} {b}");
            }
            matmul_nt((m, n, k), &mut y, true, 2.0, &x, &w);
            for (a, b) in y.iter().zip(&want) {
                assert!((*a as f64 - 3.0 * b).abs() < 3e-4);
            }
        }
    }

    #[test]
    fn empty_inner_dimension_clears() {
        let mut y = vec![f32::NAN; 6];
        gemm((2, 3, 0), &mut y, 3, false, 1.0, View::rows(&[], 0), View::rows(&[], 3), 1);
        assert_eq!(y, [0.0; 6]);
    }
}
