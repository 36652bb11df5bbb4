//! AdamW on 8-bit moments; contract in `ops/adamw_8bit.rs`.

use crate::contract::{Factors, Step};
use crate::cpu::simd::multiversion;
use crate::moments::{BLOCK, Moment, Sign, dequantize, quantize};
use rayon::prelude::*;

/// Blocks that one task takes.
const BLOCKS: usize = 64;

pub(crate) fn update(value: &mut [f32], grad: &[f32], m: &mut Moment, r: &mut Moment, step: &Step) {
    const CHUNK: usize = BLOCK * BLOCKS;
    let factors = Factors::new(step);
    let tasks = (
        value.par_chunks_mut(CHUNK),
        grad.par_chunks(CHUNK),
        (m.codes.par_chunks_mut(CHUNK), m.scales.par_chunks_mut(BLOCKS)),
        (r.codes.par_chunks_mut(CHUNK), r.scales.par_chunks_mut(BLOCKS)),
    );
    tasks.into_par_iter().for_each(|(value, grad, (m_codes, m_scales), (r_codes, r_scales))| {
        let (mut m, mut r) = ([0.0; BLOCK], [0.0; BLOCK]);
        let blocks = value.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
        let codes = m_codes.chunks_mut(BLOCK).zip(r_codes.chunks_mut(BLOCK));
        let scales = m_scales.iter_mut().zip(r_scales);
        for (((value, grad), (m_codes, r_codes)), (m_scale, r_scale)) in blocks.zip(codes).zip(scales) {
            let (m, r) = (&mut m[..value.len()], &mut r[..value.len()]);
            dequantize(m_codes, *m_scale, Sign::Signed, m);
            dequantize(r_codes, *r_scale, Sign::Unsigned, r);
            update_block(value, grad, m, r, &factors);
            *m_scale = quantize(m, Sign::Signed, m_codes);
            *r_scale = quantize(r, Sign::Unsigned, r_codes);
        }
    });
}

multiversion! {
    fn update_block(value: &mut [f32], grad: &[f32], m: &mut [f32], r: &mut [f32], factors: &Factors) {
        for i in 0..value.len() {
            let mut v = r[i] * r[i];
            factors.apply(&mut value[i], grad[i], &mut m[i], &mut v);
            r[i] = v.sqrt();
        }
    }
}
