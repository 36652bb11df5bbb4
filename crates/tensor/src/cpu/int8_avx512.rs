//! The int8 tile for AVX-512 with VNNI: `vpdpbusd` adds four products u8 · i8 to each 32-bit lane.

use crate::cpu::int8_tile::{GROUP, QuantizedRow, Tile, scale_of};
use std::arch::x86_64::*;

/// Computes `t`; `nibble_zero` is given when codes are two per byte (then of one group only).
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and VNNI, and no other thread touches the tile's elements of the destination.
#[allow(unsafe_code)]
pub(crate) unsafe fn tile(t: &Tile<'_>, nibble_zero: Option<u8>) {
    // SAFETY: the caller's promises, handed on.
    unsafe {
        match (t.num_rows, t.num_groups, nibble_zero) {
            (1, 1, None) => kernel::<1, 1, false>(t, 0),
            (2, 1, None) => kernel::<2, 1, false>(t, 0),
            (3, 1, None) => kernel::<3, 1, false>(t, 0),
            (4, 1, None) => kernel::<4, 1, false>(t, 0),
            (1, 2, None) => kernel::<1, 2, false>(t, 0),
            (2, 2, None) => kernel::<2, 2, false>(t, 0),
            (3, 2, None) => kernel::<3, 2, false>(t, 0),
            (4, 2, None) => kernel::<4, 2, false>(t, 0),
            (1, 3, None) => kernel::<1, 3, false>(t, 0),
            (2, 3, None) => kernel::<2, 3, false>(t, 0),
            (3, 3, None) => kernel::<3, 3, false>(t, 0),
            (4, 3, None) => kernel::<4, 3, false>(t, 0),
            (1, 1, Some(zero)) => kernel::<1, 1, true>(t, zero),
            (2, 1, Some(zero)) => kernel::<2, 1, true>(t, zero),
            (3, 1, Some(zero)) => kernel::<3, 1, true>(t, zero),
            (4, 1, Some(zero)) => kernel::<4, 1, true>(t, zero),
            (rows, groups, _) => unreachable!("no tile of {rows} rows and {groups} groups"),
        }
    }
}

/// # Safety
/// As [`tile`].
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn kernel<const ROWS: usize, const GROUPS: usize, const NIBBLES: bool>(t: &Tile<'_>, zero: u8) {
    assert!(t.num_rows == ROWS && t.num_groups == GROUPS);
    t.check(if NIBBLES { 2 } else { 1 });
    let block_bytes = t.steps * 4 * GROUP / if NIBBLES { 2 } else { 1 };
    // Lanes of the last group that exist.
    let lanes = t.width - (GROUPS - 1) * GROUP;
    let mask = (u32::MAX >> (32 - lanes)) as u16;
    let mut sum = [[_mm512_setzero_ps(); GROUPS]; ROWS];
    // SAFETY: `check` has seen that every block of every row and group lies inside the slices, and offsets below stay
    // within a block; rows of the destination come as slices of `width` elements, of which the last group's masked
    // lanes are not touched.
    unsafe {
        if t.accumulate {
            let per_unit = _mm512_set1_ps(1.0 / t.unit);
            for r in 0..ROWS {
                let y = t.y_row(r).as_ptr();
                for g in 0..GROUPS {
                    let m = if g + 1 == GROUPS { mask } else { u16::MAX };
                    sum[r][g] = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, y.add(g * GROUP)), per_unit);
                }
            }
        }
        for b in 0..t.blocks {
            let mut acc = [[_mm512_setzero_si512(); GROUPS]; ROWS];
            for r in 0..ROWS {
                let offset = *t.x_offsets.as_ptr().add(r * t.x_blocks + b);
                // Codes of two per byte have a zero of 8 or 0 instead of 128.
                let offset = if NIBBLES { offset / 128 * i32::from(zero) } else { offset };
                acc[r] = [_mm512_set1_epi32(offset); GROUPS];
            }
            let x = t.x.as_ptr().add(b * t.steps * 4);
            let codes = t.codes.as_ptr().add(b * block_bytes);
            if NIBBLES {
                let low = _mm512_set1_epi8(15);
                for s in 0..t.steps / 2 {
                    let pairs = _mm512_loadu_si512(codes.add(s * 64).cast());
                    let first = _mm512_and_si512(pairs, low);
                    let second = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low);
                    for r in 0..ROWS {
                        let x = x.add(r * t.x_stride + s * 8).cast::<i32>();
                        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], first, _mm512_set1_epi32(x.read_unaligned()));
                        acc[r][0] =
                            _mm512_dpbusd_epi32(acc[r][0], second, _mm512_set1_epi32(x.add(1).read_unaligned()));
                    }
                }
            } else {
                for s in 0..t.steps {
                    let mut w = [_mm512_setzero_si512(); GROUPS];
                    for g in 0..GROUPS {
                        w[g] = _mm512_loadu_si512(codes.add(g * t.codes_stride + s * 64).cast());
                    }
                    for r in 0..ROWS {
                        let x = x.add(r * t.x_stride + s * 4).cast::<i32>().read_unaligned();
                        let x = _mm512_set1_epi32(x);
                        for g in 0..GROUPS {
                            acc[r][g] = _mm512_dpbusd_epi32(acc[r][g], w[g], x);
                        }
                    }
                }
            }
            for g in 0..GROUPS {
                let at = g * t.scales_stride + b * GROUP;
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(t.scales.as_ptr().add(at).cast()));
                for r in 0..ROWS {
                    let x_scale = _mm512_set1_ps(*t.x_scales.as_ptr().add(r * t.x_blocks + b));
                    let factor = _mm512_mul_ps(scale, x_scale);
                    sum[r][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][g]), factor, sum[r][g]);
                }
                if let Some(minima) = t.minima {
                    let minimum = _mm512_cvtph_ps(_mm256_loadu_si256(minima.as_ptr().add(at).cast()));
                    for r in 0..ROWS {
                        let x_sum = _mm512_set1_ps(*t.x_sums.as_ptr().add(r * t.x_blocks + b));
                        sum[r][g] = _mm512_fmadd_ps(minimum, x_sum, sum[r][g]);
                    }
                }
            }
        }
        let unit = _mm512_set1_ps(t.unit);
        for r in 0..ROWS {
            let y = t.y_row(r).as_mut_ptr();
            for g in 0..GROUPS {
                let value = _mm512_mul_ps(sum[r][g], unit);
                // Masked stores are slow on some CPUs; full groups do without.
                if g + 1 < GROUPS || lanes == GROUP {
                    _mm512_storeu_ps(y.add(g * GROUP), value);
                } else {
                    _mm512_mask_storeu_ps(y.add(g * GROUP), mask, value);
                }
            }
        }
    }
}

/// See `int8_rows::quantize_row`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) unsafe fn quantize_row(row: &[f32], block_len: usize, out: QuantizedRow<'_>) {
    let QuantizedRow { codes, scales, offsets, sums } = out;
    let blocks = scales.len();
    assert!(block_len.is_multiple_of(32) && codes.len() == blocks * block_len && row.len() <= codes.len());
    assert!(offsets.len() == blocks && sums.len() == blocks);
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for b in 0..blocks {
        // The lanes of the line at `start` that exist, and what they hold; other lanes are zero.
        let load = |start: usize| {
            let left = row.len().saturating_sub(start);
            let mask = if left >= 16 { u16::MAX } else { (1 << left) - 1 };
            // SAFETY: masked lanes are not read, and the others lie inside `row`; an address past its end is only
            // formed, by wrapping arithmetic, and not used.
            unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(start)) }
        };
        let start = b * block_len;
        let mut largest = [_mm512_setzero_si512(); 2];
        for at in (start..start + block_len).step_by(32) {
            for (i, largest) in largest.iter_mut().enumerate() {
                let bits = _mm512_and_si512(_mm512_castps_si512(load(at + 16 * i)), magnitude);
                *largest = _mm512_max_epi32(*largest, bits);
            }
        }
        let (scale, inverse) = scale_of(_mm512_reduce_max_epi32(_mm512_max_epi32(largest[0], largest[1])));
        let inverse = _mm512_set1_ps(inverse);
        let mut sum = _mm512_setzero_si512();
        for at in (start..start + block_len).step_by(16) {
            // Rounds to the nearest even integer, as the default mode is.
            let q = _mm512_cvtps_epi32(_mm512_mul_ps(load(at), inverse));
            sum = _mm512_add_epi32(sum, q);
            // SAFETY: `at + 16` is at most the number of blocks times their length, which is the length of `codes`.
            unsafe { _mm_storeu_si128(codes.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(q)) };
        }
        let sum = _mm512_reduce_add_epi32(sum);
        scales[b] = scale;
        offsets[b] = sum.wrapping_mul(-128);
        sums[b] = scale * sum as f32;
    }
}
