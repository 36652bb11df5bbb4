//! NF4, the 4-bit code of QLoRA (Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", 2023), laid out and
//! rounded as bitsandbytes does: blocks of 64 elements with one absolute maximum each. With double quantisation the
//! maxima are themselves stored in 8 bits, in groups of 256 around their mean: 4.127 bits per weight instead of 4.5.

use rayon::prelude::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Elements that share a scale.
pub const BLOCK: usize = 64;
/// Scales that share a scale of their own under double quantisation.
pub(crate) const GROUP: usize = 256;

/// The sixteen values: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Elements in NF4: two per byte, the first in the high nibble, and the scales of their blocks.
#[derive(Clone, Debug)]
pub struct Nf4 {
    len: usize,
    packed: Vec<u8>,
    scales: Scales,
}

/// What [`Nf4`] consists of.
#[derive(Clone, Copy)]
pub(crate) enum Nf4Parts<'a> {
    /// With the absolute maximum of each block.
    Plain { packed: &'a [u8], maxima: &'a [f32] },
    /// With maxima rounded to [`dynamic_code`] in groups.
    Double { packed: &'a [u8], codes: &'a [u8], groups: &'a [f32], offset: f32 },
}

#[derive(Clone, Debug)]
enum Scales {
    /// The absolute maximum of each block.
    Plain(Vec<f32>),
    /// maximum = [`dynamic_code`]\[code\] · (scale of its group) + offset.
    Double { codes: Vec<u8>, groups: Vec<f32>, offset: f32 },
}

impl Nf4 {
    /// Rounds `values` to the nearest code; `double` also rounds the scales.
    pub fn quantize(values: &[f32], double: bool) -> Self {
        let absmax: Vec<f32> = values.par_chunks(BLOCK).map(|b| b.iter().fold(0.0f32, |m, x| m.max(x.abs()))).collect();
        let mut packed = vec![0u8; values.len().div_ceil(2)];
        packed.par_chunks_mut(BLOCK / 2).zip(values.par_chunks(BLOCK)).zip(&absmax).for_each(
            |((out, block), scale)| {
                let inverse = if *scale > 0.0 { 1.0 / scale } else { 0.0 };
                for (out, pair) in out.iter_mut().zip(block.chunks(2)) {
                    let low = pair.get(1).map_or(7, |x| nearest(x * inverse));
                    *out = nearest(pair[0] * inverse) << 4 | low;
                }
            },
        );
        let scales = if double { Scales::double(&absmax) } else { Scales::Plain(absmax) };
        Self { len: values.len(), packed, scales }
    }

    /// Codes and scales as they are stored.
    pub(crate) fn parts(&self) -> Nf4Parts<'_> {
        let packed = self.packed.as_slice();
        match &self.scales {
            Scales::Plain(maxima) => Nf4Parts::Plain { packed, maxima },
            Scales::Double { codes, groups, offset } => Nf4Parts::Double { packed, codes, groups, offset: *offset },
        }
    }

    /// The two codes of each pair of elements, the first in the high nibble.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// Bytes of codes and scales.
    pub fn num_bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Plain(absmax) => 4 * absmax.len(),
            Scales::Double { codes, groups, .. } => codes.len() + 4 * groups.len(),
        };
        self.packed.len() + scales
    }

    /// What [`Nf4::num_bytes`] will be for `len` elements with doubly quantised scales.
    pub fn bytes_for(len: usize) -> usize {
        let blocks = len.div_ceil(BLOCK);
        len.div_ceil(2) + blocks + 4 * blocks.div_ceil(GROUP)
    }

    /// Dequantises the elements `range` into `out`: code · scale of the block.
    ///
    /// # Panics
    /// When `range` exceeds the elements, or `out` has another length.
    pub fn dequantize(&self, range: Range<usize>, out: &mut [f32]) {
        assert!(range.end <= self.len && out.len() == range.len(), "elements {range:?} of {}", self.len);
        let (mut at, mut rest) = (range.start, out);
        while !rest.is_empty() {
            let count = (BLOCK - at % BLOCK).min(rest.len());
            let (part, after) = rest.split_at_mut(count);
            let scale = self.scales.get(at / BLOCK);
            if at.is_multiple_of(2) && count.is_multiple_of(2) {
                for (pair, byte) in part.chunks_exact_mut(2).zip(&self.packed[at / 2..]) {
                    pair[0] = CODE[usize::from(byte >> 4)] * scale;
                    pair[1] = CODE[usize::from(byte & 15)] * scale;
                }
            } else {
                for (i, x) in part.iter_mut().enumerate() {
                    let byte = self.packed[(at + i) / 2];
                    let code = if (at + i).is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    *x = CODE[usize::from(code)] * scale;
                }
            }
            at += count;
            rest = after;
        }
    }
}

impl Scales {
    fn double(absmax: &[f32]) -> Self {
        let offset = (absmax.iter().map(|x| f64::from(*x)).sum::<f64>() / absmax.len().max(1) as f64) as f32;
        let code = dynamic_code();
        let mut codes = Vec::with_capacity(absmax.len());
        let mut groups = Vec::with_capacity(absmax.len().div_ceil(GROUP));
        for group in absmax.chunks(GROUP) {
            let scale = group.iter().fold(0.0f32, |m, x| m.max((x - offset).abs()));
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            groups.push(scale);
            codes.extend(group.iter().map(|x| nearest_of(code, (x - offset) * inverse)));
        }
        Self::Double { codes, groups, offset }
    }

    fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Double { codes, groups, offset } => {
                dynamic_code()[usize::from(codes[block])] * groups[block / GROUP] + offset
            }
        }
    }
}

/// The nearest of [`CODE`] to `x` in [-1, 1]: one comparison with each midpoint.
fn nearest(x: f32) -> u8 {
    let mut code = 0;
    for i in 0..15 {
        code += u8::from(x > (CODE[i] + CODE[i + 1]) * 0.5);
    }
    code
}

/// The 256 values of dynamic 8-bit quantisation, ascending in [-1, 1] (Dettmers et al., "8-bit optimizers via
/// block-wise quantization", 2022): for each of seven powers of ten, twice as many values as for the one below, evenly
/// spread over [0.1, 1] of it; both signs; 0 and 1.
pub fn dynamic_code() -> &'static [f32; 256] {
    static CODE: OnceLock<[f32; 256]> = OnceLock::new();
    CODE.get_or_init(|| {
        let mut values = vec![0.0f32, 1.0];
        for exponent in 0..7 {
            // In f32 and in the order of PyTorch's linspace, so that the code is bitsandbytes' to the bit.
            let count = 1usize << exponent;
            let step = (1.0f32 - 0.1) / count as f32;
            let bound = |i: usize| {
                if i < count.div_ceil(2) {
                    step.mul_add(i as f32, 0.1)
                } else {
                    step.mul_add(-((count - i) as f32), 1.0)
                }
            };
            let power = 10f64.powi(exponent - 6) as f32;
            for i in 0..count {
                let value = power * ((bound(i) + bound(i + 1)) / 2.0);
                values.extend([value, -value]);
            }
        }
        values.sort_by(f32::total_cmp);
        std::array::from_fn(|i| values[i])
    })
}

/// Index of the value of the ascending `code` that is nearest to `x`.
fn nearest_of(code: &[f32; 256], x: f32) -> u8 {
    let above = code.partition_point(|c| *c < x).min(255);
    let below = above.saturating_sub(1);
    if x - code[below] <= code[above] - x { below as u8 } else { above as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn any_range_decodes_as_the_whole() {
        let values = Rng::new(3, 0).normals(64 * 5 + 17, 0.3);
        for double in [false, true] {
            let nf4 = Nf4::quantize(&values, double);
            let mut whole = vec![0.0; values.len()];
            nf4.dequantize(0..values.len(), &mut whole);
            for range in [0..1, 1..2, 63..66, 7..300, 320..337] {
                let mut part = vec![0.0; range.len()];
                nf4.dequantize(range.clone(), &mut part);
                assert_eq!(part, whole[range]);
            }
            // The widest gap between codes is 0.304 of the block's maximum; rounding scales adds a little.
            for (block, decoded) in values.chunks(BLOCK).zip(whole.chunks(BLOCK)) {
                let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (a, b) in block.iter().zip(decoded) {
                    assert!((a - b).abs() < 0.17 * largest, "{a} {b} of {largest}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zero() {
        let nf4 = Nf4::quantize(&[0.0; 130], false);
        let mut out = [1.0; 130];
        nf4.dequantize(0..130, &mut out);
        assert_eq!(out, [0.0; 130]);
        assert_eq!(nf4.num_bytes(), 65 + 3 * 4);
    }
}
