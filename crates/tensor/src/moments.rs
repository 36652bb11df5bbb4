//! Moments of an optimizer in 8 bits per element, and their code; the reasons are in `ops/adamw_8bit.rs`.

use std::sync::OnceLock;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// What a moment is: it decides the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The first moment: a sign bit and 7 bits of magnitude.
    Signed,
    /// The root of the second moment, never below 0: 8 bits of magnitude.
    Unsigned,
}

/// A moment of `len` elements in about `len` · (1 + 4 / [`BLOCK`]) bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// One code per element.
    pub codes: Vec<u8>,
    /// The largest magnitude of each block.
    pub scales: Vec<f32>,
    pub(crate) sign: Sign,
}

impl Moment {
    /// `len` zeros.
    pub fn zeros(len: usize, sign: Sign) -> Self {
        Self { codes: vec![0; len], scales: vec![0.0; len.div_ceil(BLOCK)], sign }
    }

    /// Bytes that a moment of `len` elements takes.
    pub fn bytes(len: usize) -> usize {
        len + 4 * len.div_ceil(BLOCK)
    }

    /// The values that the moment stands for.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values.chunks_mut(BLOCK).zip(self.codes.chunks(BLOCK)).zip(&self.scales);
        blocks.for_each(|((values, codes), scale)| dequantize(codes, *scale, self.sign, values));
        values
    }
}

/// Decades that the dynamic code covers below the scale.
const DECADES: i32 = 7;

/// A code for magnitudes from 0 to 1.
struct Code {
    /// What each code stands for, ascending, from 0 to 1. Beyond the last: 1.
    levels: [f32; 256],
    /// Up to here a code is the nearest; infinite for the last.
    ends: [f32; 256],
    /// The code of the smallest number whose upper 16 bits are the index. Such numbers lie within 2⁻⁷ of each other,
    /// relatively, and steps of the code are wider, so that the code of any of them is this one or the next.
    starts: Vec<u8>,
}

fn code(sign: Sign) -> &'static Code {
    static CODES: OnceLock<[Code; 2]> = OnceLock::new();
    let codes = CODES.get_or_init(|| [Sign::Signed, Sign::Unsigned].map(|sign| Code::new(&levels(sign))));
    &codes[usize::from(sign == Sign::Unsigned)]
}

/// Levels and ends of the signed code, then of the unsigned one, 256 each.
pub(crate) fn tables() -> [f32; 1024] {
    let mut tables = [0.0; 1024];
    for (sign, table) in [Sign::Signed, Sign::Unsigned].into_iter().zip(tables.chunks_exact_mut(512)) {
        table[..256].copy_from_slice(&code(sign).levels);
        table[256..].copy_from_slice(&code(sign).ends);
    }
    tables
}

/// The magnitudes of the dynamic code: decade i of seven holds the middles of 2^i (signed) or 2^(i + 1) (unsigned)
/// equal parts; 0 comes before them. The unsigned code has room for 1; the signed one is stretched to end there.
pub(crate) fn levels(sign: Sign) -> Vec<f32> {
    let more = i32::from(sign == Sign::Unsigned);
    let mut levels = vec![0.0f64];
    for decade in 0..DECADES {
        let parts = 1 << (decade + more);
        let start = 10f64.powi(decade - DECADES);
        levels.extend((0..parts).map(|i| start * (1.0 + 9.0 * (i as f64 + 0.5) / parts as f64)));
    }
    if sign == Sign::Unsigned {
        levels.push(1.0);
    }
    let largest = levels[levels.len() - 1];
    levels.iter().map(|l| (l / largest) as f32).collect()
}

impl Code {
    fn new(levels: &[f32]) -> Self {
        let mut code = Self { levels: [1.0; 256], ends: [f32::INFINITY; 256], starts: Vec::new() };
        code.levels[..levels.len()].copy_from_slice(levels);
        for (end, pair) in code.ends.iter_mut().zip(levels.windows(2)) {
            *end = 0.5 * (pair[0] + pair[1]);
        }
        let nearest = |x: f32| code.ends.iter().position(|end| x <= *end).unwrap_or(0) as u8;
        code.starts = (0..=1.0f32.to_bits() >> 16).map(|upper| nearest(f32::from_bits(upper << 16))).collect();
        code
    }

    /// The code of `x`, from 0 to 1.
    #[inline(always)]
    fn nearest(&self, x: f32) -> u8 {
        let start = self.starts[(x.to_bits() >> 16) as usize];
        start + u8::from(x > self.ends[start as usize])
    }
}

/// Dequantises a block.
pub(crate) fn dequantize(codes: &[u8], scale: f32, sign: Sign, values: &mut [f32]) {
    let levels = &code(sign).levels;
    match sign {
        Sign::Unsigned => values.iter_mut().zip(codes).for_each(|(x, c)| *x = levels[*c as usize] * scale),
        Sign::Signed => values.iter_mut().zip(codes).for_each(|(x, c)| {
            let magnitude = levels[(c & 0x7f) as usize] * scale;
            *x = f32::from_bits(magnitude.to_bits() | u32::from(c & 0x80) << 24);
        }),
    }
}

/// Quantises a block and returns its scale.
pub(crate) fn quantize(values: &[f32], sign: Sign, codes: &mut [u8]) -> f32 {
    let scale = largest(values);
    if scale == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let code = code(sign);
    // Rounding may carry a quotient past 1, where the table ends.
    match sign {
        Sign::Unsigned => codes.iter_mut().zip(values).for_each(|(c, x)| {
            *c = code.nearest((x / scale).min(1.0)).max(u8::from(*x > 0.0));
        }),
        Sign::Signed => codes.iter_mut().zip(values).for_each(|(c, x)| {
            *c = code.nearest((x.abs() / scale).min(1.0)) | (x.to_bits() >> 24) as u8 & 0x80;
        }),
    }
    scale
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |m, x| m.max(x.abs()))
}
