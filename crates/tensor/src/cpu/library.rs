//! Products by the `gemm` crate: for CPUs that `tile.rs` has no tiles for, and for shapes that it is faster at.

use crate::cpu::view::View;

/// `dst[m, n] = accumulate · dst + alpha · a[m, k] · b[k, n]` on `threads` threads; rows of `dst` are `dst_stride`
/// apart.
#[allow(unsafe_code)]
pub(crate) fn product(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
    threads: usize,
) {
    assert!(m > 0 && n > 0 && k > 0 && dst_stride >= n && (m - 1) * dst_stride + n <= dst.len());
    a.check(m, k);
    b.check(k, n);
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
