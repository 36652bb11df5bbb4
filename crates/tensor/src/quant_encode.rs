//! Encoding of f32 weights into the simple block formats of GGUF files, rounded as the formats' reference encoder
//! rounds.

use crate::quant::BlockType;
use half::{bf16, f16};
use rayon::prelude::*;

/// The formats that [`quantize`] writes.
pub const ENCODABLE: [BlockType; 5] =
    [BlockType::F32, BlockType::F16, BlockType::BF16, BlockType::Q8_0, BlockType::Q4_0];

/// `values`, whole blocks of `kind`, encoded.
///
/// # Panics
/// When `kind` is not among [`ENCODABLE`], or the values do not fill whole blocks.
pub fn quantize(kind: BlockType, values: &[f32]) -> Vec<u8> {
    let bytes = kind.bytes_for(values.len()).unwrap_or_else(|| panic!("{} of {} values", kind.name(), values.len()));
    let mut out = vec![0u8; bytes];
    let (len, size) = (kind.block_len(), kind.block_bytes());
    let blocks = 4096 / len;
    let tasks = out.par_chunks_mut(blocks * size).zip(values.par_chunks(blocks * len));
    tasks.for_each(|(out, values)| {
        for (out, block) in out.chunks_exact_mut(size).zip(values.chunks_exact(len)) {
            match kind {
                BlockType::F32 => out.copy_from_slice(&block[0].to_le_bytes()),
                BlockType::F16 => out.copy_from_slice(&f16::from_f32(block[0]).to_le_bytes()),
                BlockType::BF16 => out.copy_from_slice(&bf16::from_f32(block[0]).to_le_bytes()),
                BlockType::Q8_0 => q8_0(block, out),
                BlockType::Q4_0 => q4_0(block, out),
                other => panic!("{} is not written", other.name()),
            }
        }
    });
    out
}

/// Scale: largest magnitude / 127; codes rounded half away from zero.
fn q8_0(block: &[f32], out: &mut [u8]) {
    let scale = block.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (out, x) in out[2..].iter_mut().zip(block) {
        *out = (x * inverse).round() as i8 as u8;
    }
}

/// Scale: the element of largest magnitude becomes code 0, which stands for −8; the others are rounded half up.
fn q4_0(block: &[f32], out: &mut [u8]) {
    let largest = block.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let scale = largest / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    // The reference takes the product in f64, so that the rounding is not rounded itself.
    let code = |x: f32| (f64::from(x) * f64::from(inverse) + 8.5).clamp(0.0, 15.0) as u8;
    for (i, out) in out[2..].iter_mut().enumerate() {
        *out = code(block[i]) | code(block[16 + i]) << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::dequantize;
    use crate::rng::Rng;

    #[test]
    fn decoding_comes_back_within_half_a_step() {
        let values = Rng::new(2, 0).normals(4096 * 3 + 64, 0.4);
        // Steps between codes, as shares of a block's largest magnitude. The f16 scale is off by up to 2⁻¹¹, which adds
        // 127 · 2⁻¹¹ of a step in Q8_0; in Q4_0 the side opposite to the largest element ends a whole step early.
        for (kind, step) in ENCODABLE.into_iter().zip([0.0f32, 1e-3, 8e-3, 1.13 / 127.0, 1.01 / 4.0]) {
            let bytes = quantize(kind, &values);
            let mut back = vec![f32::NAN; values.len()];
            dequantize(kind, &bytes, &mut back);
            for (block, decoded) in values.chunks(32).zip(back.chunks(32)) {
                let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (a, b) in block.iter().zip(decoded) {
                    assert!((a - b).abs() <= 0.5 * step * largest, "{}: {a} {b} of {largest}", kind.name());
                }
            }
        }
        assert_eq!(quantize(BlockType::Q4_0, &[0.0; 32])[2..], [0x88; 16]);
    }
}
