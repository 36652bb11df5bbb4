//! The int8 tile for 256-bit registers: with the dot products of AVX-VNNI, or by `vpmaddubsw` on AVX2 alone.

use crate::cpu::int8_tile::{GROUP, Tile};
use std::arch::x86_64::*;

/// Computes `t` with AVX2.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C, and no other thread touches the tile's elements of the destination.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn tile(t: &Tile<'_>) {
    // |w| ≤ 128 and |x| ≤ 127, so that a sum of two products stays below 2¹⁵: 2 · 128 · 127 = 32,512.
    let step = |acc: __m256i, w: __m256i, x: __m256i| {
        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    };
    // SAFETY: the caller's promises, handed on.
    unsafe {
        match t.num_rows {
            1 => kernel::<1>(t, false, step),
            2 => kernel::<2>(t, false, step),
            rows => unreachable!("no tile of {rows} rows"),
        }
    }
}

/// Computes `t` with AVX-VNNI.
///
/// # Safety
/// As [`tile`], and the CPU has AVX-VNNI.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(crate) unsafe fn tile_vnni(t: &Tile<'_>) {
    let step = |acc: __m256i, w: __m256i, x: __m256i| _mm256_dpbusd_avx_epi32(acc, w, x);
    // SAFETY: the caller's promises, handed on.
    unsafe {
        match t.num_rows {
            1 => kernel::<1>(t, true, step),
            2 => kernel::<2>(t, true, step),
            rows => unreachable!("no tile of {rows} rows"),
        }
    }
}

/// `step` adds four products to each lane; with `offset` it multiplies codes as they are stored, 128 too large.
///
/// # Safety
/// As [`tile`]. Inlined into a function that enables the features.
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn kernel<const ROWS: usize>(t: &Tile<'_>, offset: bool, step: impl Fn(__m256i, __m256i, __m256i) -> __m256i) {
    assert!(t.num_rows == ROWS && t.num_groups == 1);
    t.check(1);
    // SAFETY: `check` has seen that every block of every row lies inside the slices, and offsets below stay within a
    // block; the destination is copied through an array as long as a group.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); 2]; ROWS];
        if t.accumulate {
            for r in 0..ROWS {
                let mut line = [0.0f32; GROUP];
                line[..t.width].copy_from_slice(t.y_row(r));
                let per_unit = _mm256_set1_ps(1.0 / t.unit);
                for h in 0..2 {
                    sum[r][h] = _mm256_mul_ps(_mm256_loadu_ps(line.as_ptr().add(8 * h)), per_unit);
                }
            }
        }
        for b in 0..t.blocks {
            let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
            if offset {
                for r in 0..ROWS {
                    acc[r] = [_mm256_set1_epi32(*t.x_offsets.as_ptr().add(r * t.x_blocks + b)); 2];
                }
            }
            let x = t.x.as_ptr().add(b * t.steps * 4);
            let codes = t.codes.as_ptr().add(b * t.steps * 64);
            for s in 0..t.steps {
                let w: [__m256i; 2] = std::array::from_fn(|h| _mm256_loadu_si256(codes.add(s * 64 + 32 * h).cast()));
                for r in 0..ROWS {
                    let x = _mm256_set1_epi32(x.add(r * t.x_stride + s * 4).cast::<i32>().read_unaligned());
                    for h in 0..2 {
                        acc[r][h] = step(acc[r][h], w[h], x);
                    }
                }
            }
            for h in 0..2 {
                let at = b * GROUP + 8 * h;
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(t.scales.as_ptr().add(at).cast()));
                for r in 0..ROWS {
                    let x_scale = _mm256_set1_ps(*t.x_scales.as_ptr().add(r * t.x_blocks + b));
                    let factor = _mm256_mul_ps(scale, x_scale);
                    sum[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][h]), factor, sum[r][h]);
                }
                if let Some(minima) = t.minima {
                    let minimum = _mm256_cvtph_ps(_mm_loadu_si128(minima.as_ptr().add(at).cast()));
                    for r in 0..ROWS {
                        let x_sum = _mm256_set1_ps(*t.x_sums.as_ptr().add(r * t.x_blocks + b));
                        sum[r][h] = _mm256_fmadd_ps(minimum, x_sum, sum[r][h]);
                    }
                }
            }
        }
        for r in 0..ROWS {
            let mut line = [0.0f32; GROUP];
            for h in 0..2 {
                let value = _mm256_mul_ps(sum[r][h], _mm256_set1_ps(t.unit));
                _mm256_storeu_ps(line.as_mut_ptr().add(8 * h), value);
            }
            t.y_row(r).copy_from_slice(&line[..t.width]);
        }
    }
}
