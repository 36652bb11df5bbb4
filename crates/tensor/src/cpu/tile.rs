//! Products of small matrices whose result lives in registers: what `matmul.rs` and `attention.rs` are built of.
//!
//! A tile of the result, 12 x 32 numbers with AVX-512 and 6 x 16 with AVX2, stays in registers while the inner
//! dimension runs. Each step of it loads one row of `b` (two vectors) and multiplies it by one number of each of the
//! tile's rows of `a`, broadcast from wherever it lies: 24 multiply-adds for 14 loads, so that the multipliers never
//! wait. Therefore `a` may have any strides and is never copied. `b` must have its columns side by side.
//!
//! Every element is summed over the inner dimension in order by one fused multiply-add per step, whatever tile it falls
//! in: results do not depend on how a product is cut into tiles, or tiles are dealt to threads.

use crate::cpu::library;
use crate::cpu::simd::{Level, level};
use crate::cpu::view::View;

/// The right-hand side of a product: element (l, j) is `data[l * row_stride + j / width * panel_stride + j % width]`
/// with the `width` of [`panel_width`].
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub panel_stride: usize,
}

impl<'a> Panels<'a> {
    /// A matrix that lies row by row, `row_stride` apart.
    pub(crate) fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride, panel_stride: panel_width() }
    }

    /// A matrix that [`pack`] made of one with `k` rows.
    pub(crate) fn packed(data: &'a [f32], k: usize) -> Self {
        Self { data, row_stride: panel_width(), panel_stride: k * panel_width() }
    }

    fn check(&self, k: usize, n: usize) {
        let last = n - 1;
        let reach = (k - 1) * self.row_stride + last / panel_width() * self.panel_stride + last % panel_width();
        assert!(reach < self.data.len(), "matrix {k} x {n} exceeds its slice");
    }
}

/// Columns of the widest tile.
pub(crate) fn panel_width() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 2 * avx2::LANES,
        _ => 32,
    }
}

/// Rows of the tallest tile.
pub(crate) fn tile_rows() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 6,
        _ => 12,
    }
}

/// `dst[m, n] = accumulate · dst + alpha · a[m, k] · b[k, n]` on the calling thread; rows of `dst` are `stride` apart.
#[allow(unsafe_code)]
pub(crate) fn product(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    alpha: f32,
    a: View<'_>,
    b: Panels<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len() && stride >= n, "destination {m} x {n} exceeds its slice");
    if k == 0 {
        if !accumulate {
            dst.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    a.check(m, k);
    b.check(k, n);
    match level() {
        // SAFETY: `level` has seen the instructions on this CPU; all three matrices lie inside their slices (checked
        // above), and `dst` is borrowed mutably, so that it overlaps neither operand.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::product((m, n, k), dst, stride, accumulate, alpha, a, b) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::product((m, n, k), dst, stride, accumulate, alpha, a, b) },
        Level::Baseline => {
            for (panel, j) in (0..n).step_by(panel_width()).enumerate() {
                let cols = panel_width().min(n - j);
                let b = View { data: &b.data[panel * b.panel_stride..], row_stride: b.row_stride, col_stride: 1 };
                let dst = &mut dst[j..(m - 1) * stride + j + cols];
                library::product((m, cols, k), dst, stride, accumulate, alpha, a, b, 1);
            }
        }
    }
}

/// Defines `product` for one instruction set. The module it is used in has `Vector`, `LANES`, the row counts of its
/// tiles and the operations on vectors.
#[cfg(target_arch = "x86_64")]
macro_rules! tiles {
    ($features:literal, { $($remaining:pat => $rows:literal),* $(,)? }) => {
        /// A tile of `M` rows and `V` vectors; with `PART`, the last vector has `part` live columns only.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn tile<const M: usize, const V: usize, const PART: bool>(
            k: usize,
            (mut a, a_row, a_col): (*const f32, usize, usize),
            (mut b, b_row): (*const f32, usize),
            (dst, stride): (*mut f32, usize),
            part: usize,
            accumulate: bool,
            alpha: f32,
        ) {
            // SAFETY: the caller's matrices hold M rows, the live columns of V vectors, and k steps.
            unsafe {
                let mut sums = [[zero(); V]; M];
                for _ in 0..k {
                    let mut row = [zero(); V];
                    for v in 0..V {
                        let at = b.add(v * LANES);
                        row[v] = if PART && v + 1 == V { load_part(at, part) } else { load(at) };
                    }
                    for i in 0..M {
                        let x = splat(*a.add(i * a_row));
                        for v in 0..V {
                            sums[i][v] = multiply_add(x, row[v], sums[i][v]);
                        }
                    }
                    a = a.wrapping_add(a_col);
                    b = b.wrapping_add(b_row);
                }
                let alpha = splat(alpha);
                for i in 0..M {
                    for v in 0..V {
                        let at = dst.add(i * stride + v * LANES);
                        let partial = PART && v + 1 == V;
                        let old = match (accumulate, partial) {
                            (false, _) => zero(),
                            (true, false) => load(at),
                            (true, true) => load_part(at, part),
                        };
                        let new = multiply_add(sums[i][v], alpha, old);
                        if partial { store_part(at, part, new) } else { store(at, new) }
                    }
                }
            }
        }

        /// See [`super::product`].
        ///
        /// # Safety
        /// The CPU has the instructions, m, n and k are not 0, and the matrices lie inside their slices.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn product(
            (m, n, k): (usize, usize, usize),
            dst: &mut [f32],
            stride: usize,
            accumulate: bool,
            alpha: f32,
            a: View<'_>,
            b: Panels<'_>,
        ) {
            let mut i = 0;
            while i < m {
                let a_at = a.data[i * a.row_stride..].as_ptr();
                let a_at = (a_at, a.row_stride, a.col_stride);
                let mut done = 0;
                for (panel, j) in (0..n).step_by(2 * LANES).enumerate() {
                    let b_at = (b.data[panel * b.panel_stride..].as_ptr(), b.row_stride);
                    let to = (dst[i * stride + j..].as_mut_ptr(), stride);
                    let cols = n - j;
                    macro_rules! run {
                        ($m:literal) => {
                            // SAFETY: rows i..i + m and the live columns from j lie inside the matrices.
                            unsafe {
                                if cols >= 2 * LANES {
                                    tile::<$m, 2, false>(k, a_at, b_at, to, 0, accumulate, alpha);
                                } else if cols > LANES {
                                    tile::<$m, 2, true>(k, a_at, b_at, to, cols - LANES, accumulate, alpha);
                                } else if cols == LANES {
                                    tile::<$m, 1, false>(k, a_at, b_at, to, 0, accumulate, alpha);
                                } else {
                                    tile::<$m, 1, true>(k, a_at, b_at, to, cols, accumulate, alpha);
                                }
                            }
                        };
                    }
                    done = match m - i {
                        $($remaining => {
                            run!($rows);
                            $rows
                        })*
                    };
                }
                i += done;
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512 {
    use super::{Panels, View};
    use std::arch::x86_64::*;

    pub(super) const LANES: usize = 16;
    type Vector = __m512;

    tiles!("avx512f", { 1 => 1, 2..=3 => 2, 4..=7 => 4, 8..=11 => 8, _ => 12 });

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zero() -> Vector {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn splat(x: f32) -> Vector {
        _mm512_set1_ps(x)
    }

    /// a · b + c, rounded once.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_add(a: Vector, b: Vector, c: Vector) -> Vector {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(at: *const f32) -> Vector {
        // SAFETY: the caller's 16 numbers.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(at: *mut f32, x: Vector) {
        // SAFETY: the caller's 16 numbers.
        unsafe { _mm512_storeu_ps(at, x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_part(at: *const f32, part: usize) -> Vector {
        // SAFETY: the caller's `part` numbers; the mask leaves the others alone.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << part) - 1) as u16, at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_part(at: *mut f32, part: usize, x: Vector) {
        // SAFETY: the caller's `part` numbers; the mask leaves the others alone.
        unsafe { _mm512_mask_storeu_ps(at, ((1u32 << part) - 1) as u16, x) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx2 {
    use super::{Panels, View};
    use std::arch::x86_64::*;

    pub(super) const LANES: usize = 8;
    type Vector = __m256;

    tiles!("avx2,fma", { 1 => 1, 2..=3 => 2, 4..=5 => 4, _ => 6 });

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn zero() -> Vector {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn splat(x: f32) -> Vector {
        _mm256_set1_ps(x)
    }

    /// a · b + c, rounded once.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn multiply_add(a: Vector, b: Vector, c: Vector) -> Vector {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(at: *const f32) -> Vector {
        // SAFETY: the caller's 8 numbers.
        unsafe { _mm256_loadu_ps(at) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn store(at: *mut f32, x: Vector) {
        // SAFETY: the caller's 8 numbers.
        unsafe { _mm256_storeu_ps(at, x) }
    }

    /// All bits set in the first `part` lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn mask(part: usize) -> __m256i {
        _mm256_cmpgt_epi32(_mm256_set1_epi32(part as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load_part(at: *const f32, part: usize) -> Vector {
        // SAFETY: the caller's `part` numbers; the mask leaves the others alone.
        unsafe { _mm256_maskload_ps(at, mask(part)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn store_part(at: *mut f32, part: usize, x: Vector) {
        // SAFETY: the caller's `part` numbers; the mask leaves the others alone.
        unsafe { _mm256_maskstore_ps(at, mask(part), x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    type Product = fn((usize, usize, usize), &mut [f32], usize, bool, f32, View<'_>, Panels<'_>);

    /// The product of every instruction set that this CPU has, with its panel width.
    fn products() -> Vec<(usize, Product)> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut all: Vec<(usize, Product)> = vec![(panel_width(), product)];
        #[cfg(target_arch = "x86_64")]
        if level() != Level::Baseline {
            #[allow(unsafe_code)]
            fn narrow(
                mnk: (usize, usize, usize),
                dst: &mut [f32],
                stride: usize,
                add: bool,
                alpha: f32,
                a: View<'_>,
                b: Panels<'_>,
            ) {
                // SAFETY: the CPU has AVX2; the test's matrices lie inside their slices.
                unsafe { avx2::product(mnk, dst, stride, add, alpha, a, b) }
            }
            all.push((2 * avx2::LANES, narrow));
        }
        all
    }

    #[test]
    fn every_tile_matches_f64() {
        let mut rng = Rng::new(31, 0);
        for (width, product) in products() {
            for m in (1..=26).chain([48]) {
                for n in [1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 64, 65] {
                    let k = 1 + (m * 7 + n) % 19;
                    let (a, b) = (rng.normals(m * k, 1.0), rng.normals(k * n, 1.0));
                    let before = rng.normals(m * (n + 2), 1.0);
                    let mut want: Vec<f64> = before.iter().map(|x| *x as f64).collect();
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|l| a[i * k + l] as f64 * b[l * n + j] as f64).sum();
                            want[i * (n + 2) + j] += 0.5 * sum;
                        }
                    }
                    let transposed: Vec<f32> = (0..m * k).map(|at| a[at % m * k + at / m]).collect();
                    let panels = Panels { data: &b, row_stride: n, panel_stride: width };
                    for a in [View::rows(&a, k), View::rows(&transposed, m).t()] {
                        let mut dst = before.clone();
                        product((m, n, k), &mut dst, n + 2, true, 0.5, a, panels);
                        for (x, y) in dst.iter().zip(&want) {
                            assert!((*x as f64 - y).abs() < 1e-5, "{m} {n} {k}: {x} {y}");
                        }
                        let mut fresh = vec![f32::NAN; m * n];
                        product((m, n, k), &mut fresh, n, false, 1.0, a, panels);
                        assert!(fresh.iter().all(|x| x.is_finite()));
                    }
                }
            }
        }
    }
}
