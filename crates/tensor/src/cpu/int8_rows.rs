//! Quantisation of activations, block by block; contract in `packed_int.rs`.

#[cfg(target_arch = "x86_64")]
use crate::cpu::int8_avx512;
use crate::cpu::int8_tile::{Level, QuantizedRow, scale_of};
use crate::cpu::simd::multiversion;

/// Quantises `row` in blocks of `block_len` elements, a multiple of 32. Every level gives the same codes.
#[allow(unsafe_code)]
pub(crate) fn quantize_row(level: Level, row: &[f32], block_len: usize, out: QuantizedRow<'_>) {
    match level {
        // SAFETY: the level comes from `Level::available`, which has seen its features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { int8_avx512::quantize_row(row, block_len, out) },
        _ => plain(row, block_len, out),
    }
}

multiversion! {
    fn plain(row: &[f32], block_len: usize, out: QuantizedRow<'_>) {
        // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        for (b, codes) in out.codes.chunks_exact_mut(block_len).enumerate() {
            let row = &row[b * block_len..((b + 1) * block_len).min(row.len())];
            let mut largest = [0i32; 32];
            let (lines, rest) = row.as_chunks::<32>();
            for line in lines {
                for i in 0..32 {
                    largest[i] = largest[i].max((line[i].to_bits() & 0x7fff_ffff) as i32);
                }
            }
            for (i, x) in rest.iter().enumerate() {
                largest[i] = largest[i].max((x.to_bits() & 0x7fff_ffff) as i32);
            }
            let mut width = 16;
            while width > 0 {
                for i in 0..width {
                    largest[i] = largest[i].max(largest[i + width]);
                }
                width /= 2;
            }
            let (scale, inverse) = scale_of(largest[0]);
            let mut sum = 0i32;
            for (code, x) in codes.iter_mut().zip(row) {
                let q = (x * inverse + ROUND).to_bits() as i8;
                *code = q;
                sum += i32::from(q);
            }
            codes[row.len()..].fill(0);
            out.scales[b] = scale;
            out.offsets[b] = -128 * sum;
            out.sums[b] = scale * sum as f32;
        }
    }
}
