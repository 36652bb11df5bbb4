//! Storage formats of weights as GGUF files hold them, and their dequantisation to f32.
//!
//! A row is a sequence of blocks; a block packs [`BlockType::block_len`] consecutive elements with their scales into
//! [`BlockType::block_bytes`] little-endian bytes. Products and differences are taken in f32 in the order that the
//! formats' reference decoder uses, so that results are equal bit for bit.

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// How the elements of a stored tensor are encoded.
///
/// The names are those of the format. In `Q<n>_0` an element is `d * q` (signed q), in `Q<n>_1` it is `d * q + m`; the
/// `_K` types hold 256 elements in a super-block whose sub-blocks have quantised scales (and minima) of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Elements that one task dequantises: a multiple of every block length, large enough to hide the scheduling.
const TASK: usize = 64 * 1024;

impl BlockType {
    /// Every type.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The type that GGUF files number `id`, `None` for one that is not supported.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == id)
    }

    /// The number of this type in GGUF files.
    pub fn ggml(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// The name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Elements in a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes that `elements` elements take; `None` when they do not fill whole blocks or the number overflows.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl BlockType {
    /// Scale, minimum (0 where the format has none) and signed codes of one block of 32: an element is d · code + m.
    ///
    /// # Panics
    /// For other types than Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, and when `b` is shorter than a block.
    pub(crate) fn codes(self, b: &[u8]) -> (f16, f16, [i8; 32]) {
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]);
        let nibble = |i: usize, first: usize| if i < 16 { b[first + i] & 15 } else { b[first + i - 16] >> 4 };
        let (d, none) = (half(0), f16::ZERO);
        match self {
            Self::Q4_0 => (d, none, std::array::from_fn(|i| nibble(i, 2) as i8 - 8)),
            Self::Q4_1 => (d, half(2), std::array::from_fn(|i| nibble(i, 4) as i8)),
            Self::Q5_0 => {
                let high = bits_at(b, 2);
                (d, none, std::array::from_fn(|i| (nibble(i, 6) | fifth(high, i)) as i8 - 16))
            }
            Self::Q5_1 => {
                let high = bits_at(b, 4);
                (d, half(2), std::array::from_fn(|i| (nibble(i, 8) | fifth(high, i)) as i8))
            }
            Self::Q8_0 => (d, none, std::array::from_fn(|i| b[2 + i] as i8)),
            _ => panic!("{} has no codes of its own in blocks of 32", self.name()),
        }
    }
}

/// Dequantises `bytes`, whole blocks of `kind`, into `out`, on all cores when there is much of it.
///
/// # Panics
/// When `bytes` is not [`BlockType::bytes_for`] the length of `out`.
pub fn dequantize(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(kind.bytes_for(out.len()), Some(bytes.len()), "{} elements of {}", out.len(), kind.name());
    if out.len() <= TASK {
        return decode(kind, bytes, out);
    }
    let task_bytes = TASK / kind.block_len() * kind.block_bytes();
    out.par_chunks_mut(TASK).zip(bytes.par_chunks(task_bytes)).for_each(|(out, bytes)| decode(kind, bytes, out));
}

/// Whether every element of `bytes`, whole blocks of `kind`, dequantises to a finite number. Of quantised blocks only
/// the scales are looked at: their codes are finite whatever they are.
pub fn all_finite(kind: BlockType, bytes: &[u8]) -> bool {
    let scales: &[usize] = match kind {
        BlockType::F32 => {
            let infinite = |b: &[u8; 4]| !f32::from_le_bytes(*b).is_finite();
            return !bytes.par_chunks(TASK).any(|part| part.as_chunks().0.iter().any(infinite));
        }
        BlockType::BF16 => {
            let infinite = |b: &[u8; 2]| !half::bf16::from_le_bytes(*b).is_finite();
            return !bytes.par_chunks(TASK).any(|part| part.as_chunks().0.iter().any(infinite));
        }
        BlockType::F16 | BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4_K | BlockType::Q5_K => &[0, 2],
        BlockType::Q2_K => &[80, 82],
        BlockType::Q3_K => &[108],
        BlockType::Q6_K => &[208],
    };
    let infinite = |block: &[u8]| scales.iter().any(|at| !f16::from_le_bytes([block[*at], block[at + 1]]).is_finite());
    let size = kind.block_bytes();
    !bytes.par_chunks(size * 4096).any(|part| part.chunks_exact(size).any(infinite))
}

fn decode(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        BlockType::F32 => each(bytes, out, |b: &[u8; 4], o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        BlockType::F16 => halves(bytes, out),
        BlockType::BF16 => each(bytes, out, |b: &[u8; 2], o: &mut [f32; 1]| {
            o[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }),
        BlockType::Q4_0 => each(bytes, out, q4_0),
        BlockType::Q4_1 => each(bytes, out, q4_1),
        BlockType::Q5_0 => each(bytes, out, q5_0),
        BlockType::Q5_1 => each(bytes, out, q5_1),
        BlockType::Q8_0 => each(bytes, out, q8_0),
        BlockType::Q2_K => each(bytes, out, q2_k),
        BlockType::Q3_K => each(bytes, out, q3_k),
        BlockType::Q4_K => each(bytes, out, q4_k),
        BlockType::Q5_K => each(bytes, out, q5_k),
        BlockType::Q6_K => each(bytes, out, q6_k),
    }
}

/// Runs `block` over all blocks of `B` bytes and `N` elements.
fn each<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], block: impl Fn(&[u8; B], &mut [f32; N])) {
    for (b, o) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        block(b, o);
    }
}

/// F16 goes through an aligned line, because the conversion is several times faster over a slice than element-wise.
fn halves(bytes: &[u8], out: &mut [f32]) {
    let mut line = [f16::ZERO; 64];
    for (bytes, out) in bytes.chunks(2 * line.len()).zip(out.chunks_mut(line.len())) {
        for (half, pair) in line.iter_mut().zip(bytes.as_chunks().0) {
            *half = f16::from_le_bytes(*pair);
        }
        line[..out.len()].convert_to_f32_slice(out);
    }
}

/// The f16 at byte `at`.
fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// The 32 bits at byte `at`.
fn bits_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Bit `i` of `bits`, moved to bit 4: the fifth bit of an element.
fn fifth(bits: u32, i: usize) -> u8 {
    (((bits >> i) & 1) as u8) << 4
}

/// d: f16; 16 bytes: low nibbles are elements 0-15, high ones 16-31. Element: d * (q - 8).
fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for i in 0..16 {
        out[i] = d * (i32::from(b[2 + i] & 15) - 8) as f32;
        out[16 + i] = d * (i32::from(b[2 + i] >> 4) - 8) as f32;
    }
}

/// d, m: f16; nibbles as in Q4_0. Element: d * q + m.
fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for i in 0..16 {
        out[i] = d * f32::from(b[4 + i] & 15) + m;
        out[16 + i] = d * f32::from(b[4 + i] >> 4) + m;
    }
}

/// d: f16; fifth bits: 4 bytes, bit i is that of element i; nibbles as in Q4_0. Element: d * (q - 16).
fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (half_at(b, 0), bits_at(b, 2));
    for i in 0..16 {
        out[i] = d * (i32::from(b[6 + i] & 15 | fifth(high, i)) - 16) as f32;
        out[16 + i] = d * (i32::from(b[6 + i] >> 4 | fifth(high, 16 + i)) - 16) as f32;
    }
}

/// d, m: f16; fifth bits and nibbles as in Q5_0. Element: d * q + m.
fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high) = (half_at(b, 0), half_at(b, 2), bits_at(b, 4));
    for i in 0..16 {
        out[i] = d * f32::from(b[8 + i] & 15 | fifth(high, i)) + m;
        out[16 + i] = d * f32::from(b[8 + i] >> 4 | fifth(high, 16 + i)) + m;
    }
}

/// d: f16; 32 signed bytes. Element: d * q.
fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for i in 0..32 {
        out[i] = d * f32::from(b[2 + i] as i8);
    }
}

/// Bytes 0-15: scale (low nibble) and minimum (high) of each run of 16; 16-79: two bits per element; 80: d; 82: dmin.
/// Each half of 128 elements is in 32 bytes, from the lowest bit pair to the highest in runs of 32.
fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    for (run, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(b[run] & 15);
        let min = dmin * f32::from(b[run] >> 4);
        let first = 16 + run / 8 * 32 + run % 2 * 16;
        let shift = run % 8 / 2 * 2;
        for (o, q) in out.iter_mut().zip(&b[first..first + 16]) {
            *o = scale * f32::from((q >> shift) & 3) - min;
        }
    }
}

/// Bytes 0-31: third bits (bit `run / 2` of byte `element % 32`; a clear bit subtracts 4); 32-95: two low bits as in
/// Q2_K; 96-107: sixteen 6-bit scales, biased by 32, low nibbles in the first 8 bytes and top pairs in the last 4;
/// 108: d. Element: d * scale * q.
fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(b, 108);
    for (run, out) in out.chunks_exact_mut(16).enumerate() {
        let low = if run < 8 { b[96 + run] & 15 } else { b[96 + run - 8] >> 4 };
        let top = (b[104 + run % 4] >> (run / 4 * 2)) & 3;
        let scale = d * (i32::from(low | top << 4) - 32) as f32;
        let column = run % 2 * 16;
        let first = 32 + run / 8 * 32 + column;
        let shift = run % 8 / 2 * 2;
        for i in 0..16 {
            let q = i32::from((b[first + i] >> shift) & 3);
            let clear = 1 - i32::from((b[column + i] >> (run / 2)) & 1);
            out[i] = scale * (q - 4 * clear) as f32;
        }
    }
}

/// Scale and minimum of sub-block `j` (of 8) in the 12 bytes that Q4_K and Q5_K pack them in, 6 bits each: the first
/// four scales in bytes 0-3, minima in 4-7; of the last four, low nibbles in 8-11 and top pairs above the first four.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[4 + j] & 63)
    } else {
        let nibbles = packed[4 + j];
        (nibbles & 15 | (packed[j - 4] >> 6) << 4, nibbles >> 4 | (packed[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// 0: d; 2: dmin; 4-15: scales and minima; 16-143: nibbles, 64 elements in 32 bytes, low nibbles first.
/// Element: d * scale * q - dmin * min.
fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let first = 16 + j / 2 * 32;
        let shift = j % 2 * 4;
        for (o, q) in out.iter_mut().zip(&b[first..first + 32]) {
            *o = scale * f32::from((q >> shift) & 15) - min;
        }
    }
}

/// As Q4_K with the fifth bits in 16-47 (bit j of byte i: element i of sub-block j) and the nibbles in 48-175.
fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let first = 48 + j / 2 * 32;
        let shift = j % 2 * 4;
        for i in 0..32 {
            let q = (b[first + i] >> shift) & 15 | ((b[16 + i] >> j) & 1) << 4;
            out[i] = scale * f32::from(q) - min;
        }
    }
}

/// 0-127: low nibbles; 128-191: two top bits; 192-207: signed scales of runs of 16; 208: d.
/// In each half of 128 elements, runs of 32 alternate over 64 bytes of nibbles (low nibbles first) while their top
/// bits go through 32 bytes from the lowest bit pair to the highest. Element: d * scale * (q - 32).
fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(b, 208);
    for (run, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(b[192 + run] as i8);
        let (side, quarter, column) = (run / 8, run % 8 / 2, run % 2 * 16);
        let low = side * 64 + quarter % 2 * 32 + column;
        let top = 128 + side * 32 + column;
        for i in 0..16 {
            let q = (b[low + i] >> (quarter / 2 * 4)) & 15 | ((b[top + i] >> (quarter * 2)) & 3) << 4;
            out[i] = scale * (i32::from(q) - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_and_names_are_unique() {
        for kind in BlockType::ALL {
            assert_eq!(BlockType::from_ggml(kind.ggml()), Some(kind));
            assert_eq!(BlockType::ALL.iter().filter(|other| other.name() == kind.name()).count(), 1);
            assert_eq!(TASK % kind.block_len(), 0);
        }
        assert_eq!(BlockType::from_ggml(4), None);
        assert_eq!(BlockType::from_ggml(u32::MAX), None);
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(BlockType::Q4_K.bytes_for(512), Some(288));
        assert_eq!(BlockType::Q4_K.bytes_for(300), None);
        assert_eq!(BlockType::F32.bytes_for(usize::MAX / 2), None);
        assert_eq!(BlockType::Q8_0.bytes_for(usize::MAX / 32 * 32), None);
    }

    /// Decoding in parallel tasks gives what decoding block by block gives.
    #[test]
    fn tasks_do_not_change_the_result() {
        for kind in BlockType::ALL {
            let len = TASK * 2 + kind.block_len() * 3;
            let bytes: Vec<u8> = (0..kind.bytes_for(len).unwrap()).map(|i| (i * 31 % 251) as u8).collect();
            let (mut whole, mut single) = (vec![0.0; len], vec![0.0; len]);
            dequantize(kind, &bytes, &mut whole);
            for (b, o) in bytes.chunks(kind.block_bytes()).zip(single.chunks_mut(kind.block_len())) {
                dequantize(kind, b, o);
            }
            assert!(whole.iter().zip(&single).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", kind.name());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode(kind in prop::sample::select(&BlockType::ALL[..]), bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let blocks = bytes.len() / kind.block_bytes();
            let mut out = vec![7.5; blocks * kind.block_len()];
            dequantize(kind, &bytes[..blocks * kind.block_bytes()], &mut out);
            prop_assert!(!bytes.iter().all(|b| *b == 0) || out.iter().all(|v| *v == 0.0));
        }
    }
}
