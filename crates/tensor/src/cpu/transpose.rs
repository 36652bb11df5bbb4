//! Transposition of matrices that are about to be used many times.

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Level, level};

/// `dst[c * dst_stride + r] = src[r * src_stride + c]` for `rows` x `cols` elements of `src`.
#[allow(unsafe_code)]
pub(crate) fn transpose(
    (rows, cols): (usize, usize),
    src: &[f32],
    src_stride: usize,
    dst: &mut [f32],
    dst_stride: usize,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!((rows - 1) * src_stride + cols <= src.len(), "source {rows} x {cols} exceeds its slice");
    assert!((cols - 1) * dst_stride + rows <= dst.len(), "destination {cols} x {rows} exceeds its slice");
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Baseline {
        // SAFETY: every level above the baseline has AVX2, and both matrices lie inside their slices (checked above).
        return unsafe { blocks((rows, cols), src, src_stride, dst, dst_stride) };
    }
    scalar((0..rows, 0..cols), src, src_stride, dst, dst_stride);
}

#[inline(always)]
fn scalar(
    (rows, cols): (std::ops::Range<usize>, std::ops::Range<usize>),
    src: &[f32],
    src_stride: usize,
    dst: &mut [f32],
    dst_stride: usize,
) {
    for c in cols {
        for r in rows.clone() {
            dst[c * dst_stride + r] = src[r * src_stride + c];
        }
    }
}

/// Blocks of 8 x 8 in registers, the rest one by one.
///
/// # Safety
/// The CPU has AVX2 and both matrices lie inside their slices.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
unsafe fn blocks((rows, cols): (usize, usize), src: &[f32], src_stride: usize, dst: &mut [f32], dst_stride: usize) {
    let (whole_rows, whole_cols) = (rows / 8 * 8, cols / 8 * 8);
    for c in (0..whole_cols).step_by(8) {
        for r in (0..whole_rows).step_by(8) {
            // SAFETY: the block's rows r..r + 8 and columns c..c + 8 lie inside both matrices.
            unsafe {
                block(
                    src.as_ptr().add(r * src_stride + c),
                    src_stride,
                    dst.as_mut_ptr().add(c * dst_stride + r),
                    dst_stride,
                );
            }
        }
    }
    scalar((0..rows, whole_cols..cols), src, src_stride, dst, dst_stride);
    scalar((whole_rows..rows, 0..whole_cols), src, src_stride, dst, dst_stride);
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's 8 rows of 8 numbers on either side.
    unsafe {
        // Rows i and i + 4 share a register, so that nothing has to cross its halves afterwards.
        let half = |r: usize, c: usize| _mm_loadu_ps(src.add(r * src_stride + c));
        for c in [0, 4] {
            let [a, b, d, e] = [0, 1, 2, 3].map(|i| _mm256_set_m128(half(i + 4, c), half(i, c)));
            let (low0, high0) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (low1, high1) = (_mm256_unpacklo_ps(d, e), _mm256_unpackhi_ps(d, e));
            let columns = [
                _mm256_shuffle_ps::<0b01_00_01_00>(low0, low1),
                _mm256_shuffle_ps::<0b11_10_11_10>(low0, low1),
                _mm256_shuffle_ps::<0b01_00_01_00>(high0, high1),
                _mm256_shuffle_ps::<0b11_10_11_10>(high0, high1),
            ];
            for (i, column) in columns.into_iter().enumerate() {
                _mm256_storeu_ps(dst.add((c + i) * dst_stride), column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_moves() {
        for (rows, cols) in [(1, 1), (8, 8), (7, 9), (32, 24), (33, 17), (3, 40)] {
            let src: Vec<f32> = (0..rows * (cols + 3)).map(|i| i as f32).collect();
            let mut dst = vec![-1.0; cols * (rows + 1)];
            transpose((rows, cols), &src, cols + 3, &mut dst, rows + 1);
            for c in 0..cols {
                for r in 0..rows {
                    assert_eq!(dst[c * (rows + 1) + r], src[r * (cols + 3) + c]);
                }
                assert_eq!(dst[c * (rows + 1) + rows], -1.0, "padding is left alone");
            }
        }
    }
}
