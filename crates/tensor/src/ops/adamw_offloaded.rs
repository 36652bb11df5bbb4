//! AdamW on a GPU with moments offloaded to host memory: they are copied to the GPU in pieces, updated, and copied
//! back, while the next piece is on its way. What is computed is what [`super::adamw`] and [`super::adamw_8bit`]
//! compute, to the bit.

use crate::cuda::gpu::{Arg, Buffer, Gpu};
use crate::cuda::offload::{Event, HostBuffer};
use crate::cuda::work::allocated;
use crate::cuda::{adamw, adamw_8bit};
use crate::moments::{BLOCK, Moment, Sign};
use crate::{contract::Step, tensor::Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Elements whose moments are on the GPU at a time: large enough for the whole speed of the bus, small beside
/// everything else.
const PIECE: usize = 1 << 23;

/// Moments of a tensor of a GPU, in pinned host memory.
#[derive(Debug)]
pub struct OffloadedMoments {
    memory: HostBuffer,
    len: usize,
    bits8: bool,
}

/// Bytes of an element of each part: the first moment and the second, or codes of both. Scales of blocks come after
/// codes.
fn element_bytes(bits8: bool) -> usize {
    if bits8 { 1 } else { 4 }
}

/// Where the four parts begin that the moments of `len` elements have: both moments, and with 8 bits the scales of
/// both; then the end.
fn layout(len: usize, bits8: bool) -> [usize; 5] {
    let scales = if bits8 { 4 * len.div_ceil(BLOCK) } else { 0 };
    let moment = element_bytes(bits8) * len;
    // Scales are read as f32.
    let codes_end = (2 * moment).next_multiple_of(16);
    [0, moment, codes_end, codes_end + scales, codes_end + 2 * scales]
}

impl OffloadedMoments {
    fn new(gpu: &Arc<Gpu>, len: usize, bits8: bool, parts: [&[u8]; 4]) -> Self {
        let starts = layout(len, bits8);
        let memory = gpu.allocate_host(starts[4]);
        starts.iter().zip(parts).for_each(|(start, part)| memory.write(*start, part));
        Self { memory, len, bits8 }
    }

    /// Copies of f32 moments.
    ///
    /// # Panics
    /// When they differ in length.
    pub fn from_f32(gpu: &Arc<Gpu>, m: &Tensor, v: &Tensor) -> Self {
        assert_eq!(m.len(), v.len());
        let [m_bytes, v_bytes] = [m, v].map(|t| bytemuck::cast_slice(t.data()));
        Self::new(gpu, m.len(), false, [m_bytes, v_bytes, &[], &[]])
    }

    /// Copies of a first moment and of the root of a second one in 8 bits.
    ///
    /// # Panics
    /// When they differ in length, or are not these two.
    pub fn from_8bit(gpu: &Arc<Gpu>, m: &Moment, r: &Moment) -> Self {
        assert!(m.codes.len() == r.codes.len() && (m.sign, r.sign) == (Sign::Signed, Sign::Unsigned));
        let [m_scales, r_scales] = [m, r].map(|moment| bytemuck::cast_slice(&moment.scales));
        Self::new(gpu, m.codes.len(), true, [&m.codes, &r.codes, m_scales, r_scales])
    }

    /// Bytes of host memory for the moments of `len` elements.
    pub fn bytes(len: usize, bits8: bool) -> usize {
        layout(len, bits8)[4]
    }

    /// Whether the moments have 8 bits.
    pub fn is_8bit(&self) -> bool {
        self.bits8
    }

    /// Copies of both moments, of `shape`. Waits for the device.
    ///
    /// # Panics
    /// When they have 8 bits, or another number of elements.
    pub fn to_f32(&self, shape: &[usize]) -> (Tensor, Tensor) {
        assert!(!self.bits8, "the moments have 8 bits");
        let starts = layout(self.len, false);
        let read = |start: usize| {
            let mut moment = Tensor::zeros(shape);
            assert_eq!(moment.len(), self.len);
            self.memory.read(start, bytemuck::cast_slice_mut(moment.data_mut()));
            moment
        };
        (read(starts[0]), read(starts[1]))
    }

    /// Copies of the first moment and the root of the second. Waits for the device.
    ///
    /// # Panics
    /// When they have 32 bits.
    pub fn to_8bit(&self) -> (Moment, Moment) {
        assert!(self.bits8, "the moments have 32 bits");
        let starts = layout(self.len, true);
        let read = |codes: usize, scales: usize, sign: Sign| {
            let mut moment = Moment::zeros(self.len, sign);
            self.memory.read(codes, &mut moment.codes);
            self.memory.read(scales, bytemuck::cast_slice_mut(&mut moment.scales));
            moment
        };
        (read(starts[0], starts[2], Sign::Signed), read(starts[1], starts[3], Sign::Unsigned))
    }

    /// Where the parts of the moments of elements `range` are: here, in a piece, and how long.
    fn parts(&self, range: &Range<usize>) -> [(usize, usize, usize); 4] {
        let (n, bits8) = (range.len(), self.bits8);
        let (here, there) = (layout(self.len, bits8), layout(n, bits8));
        let (element, blocks) = (element_bytes(bits8), if bits8 { n.div_ceil(BLOCK) } else { 0 });
        std::array::from_fn(|i| match i {
            0 | 1 => (here[i] + element * range.start, there[i], element * n),
            _ => (here[i] + if bits8 { 4 * (range.start / BLOCK) } else { 0 }, there[i], 4 * blocks),
        })
    }
}

/// One tensor to be updated.
#[derive(Debug)]
pub struct Update<'a> {
    /// The weights, on a GPU.
    pub value: &'a mut Tensor,
    /// Residual of their f32 master weights, where they are bf16 ([`Tensor::split_master`]).
    pub residual: Option<&'a mut Tensor>,
    /// Their gradient.
    pub grad: &'a Tensor,
    /// Their moments.
    pub moments: &'a OffloadedMoments,
    /// The numbers of the update.
    pub step: Step,
}

/// Buffers on the GPU for pieces of moments: two, so that one can be on its way while the other is in use.
#[derive(Debug)]
pub struct Pieces {
    buffers: [Piece; 2],
    /// Elements of a piece, whole blocks.
    elements: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Self { buffers: Default::default(), elements: PIECE }
    }
}

#[derive(Debug, Default)]
struct Piece {
    memory: Option<Buffer>,
    arrived: Option<Event>,
    left: Option<Event>,
}

impl Pieces {
    /// Bytes of the GPU that updates of tensors of up to `longest` elements take, as its allocator counts them.
    pub fn bytes(longest: usize, bits8: bool) -> usize {
        2 * allocated(layout(longest.min(PIECE), bits8)[4])
    }
}

impl Drop for Piece {
    /// Memory of the GPU that is given back may be used again at once.
    fn drop(&mut self) {
        self.arrived.iter().chain(&self.left).for_each(Event::wait);
    }
}

/// Does all of `updates`.
///
/// # Panics
/// When a tensor is on the CPU, or lengths differ.
pub fn update(updates: &mut [Update<'_>], pieces: &mut Pieces) {
    let elements = pieces.elements;
    let whole = |(i, u): (usize, &Update<'_>)| {
        let len = u.moments.len;
        assert!(u.value.len() == len && u.grad.len() == len && u.step.number > 0, "{:?}", u.value);
        (0..len).step_by(elements).map(move |start| (i, start..len.min(start + elements)))
    };
    let jobs: Vec<(usize, Range<usize>)> = updates.iter().enumerate().flat_map(whole).collect();
    let fetch = |piece: &mut Piece, moments: &OffloadedMoments, range: &Range<usize>, gpu: &Arc<Gpu>| {
        let bytes = layout(range.len(), moments.bits8)[4];
        let memory = match &mut piece.memory {
            Some(memory) if memory.bytes() >= bytes => memory,
            memory => {
                // What leaves the smaller one must be gone before its memory is used for something else.
                piece.left.iter().for_each(Event::wait);
                *memory = None;
                memory.insert(gpu.allocate(bytes))
            }
        };
        for (here, there, bytes) in moments.parts(range) {
            moments.memory.copy_in(here, memory, there, bytes);
        }
        piece.arrived.get_or_insert_with(|| gpu.event()).record();
    };
    for (k, (i, range)) in jobs.iter().enumerate() {
        let gpu = match updates[*i].value.gpu() {
            Some(gpu) => gpu.clone(),
            None => panic!("{:?} must be on a GPU", updates[*i].value),
        };
        if k == 0 {
            fetch(&mut pieces.buffers[0], updates[*i].moments, range, &gpu);
        }
        if let Some((next, range)) = jobs.get(k + 1) {
            fetch(&mut pieces.buffers[(k + 1) % 2], updates[*next].moments, range, &gpu);
        }
        let piece = &mut pieces.buffers[k % 2];
        let (Some(memory), Some(arrived)) = (&piece.memory, &piece.arrived) else { continue };
        arrived.wait();
        let Update { value, residual, grad, moments, step } = &mut updates[*i];
        let parts = moments.parts(range);
        let residual = residual.as_deref_mut();
        if moments.bits8 {
            let [m, r, m_scales, r_scales] = parts.map(|(_, there, _)| Arg::Buffer(memory, there));
            adamw_8bit::update(&gpu, value, residual, grad, range.clone(), [m, m_scales, r, r_scales], step);
        } else {
            let [m, v, ..] = parts.map(|(_, there, _)| Arg::Buffer(memory, there));
            adamw::update(&gpu, value, residual, grad, range.clone(), [m, v], step);
        }
        for (here, there, bytes) in parts {
            moments.memory.copy_out(here, memory, there, bytes);
        }
        piece.left.get_or_insert_with(|| gpu.event()).record();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;
    use crate::cuda::tests::lab::{Lab, labs};
    use crate::ops::{adamw, adamw_8bit};

    fn step(number: u64) -> Step {
        let (learning_rate, beta1, beta2, epsilon) = (0.01, 0.9, 0.999, 1e-8);
        Step { number, learning_rate, beta1, beta2, epsilon, weight_decay: 0.1, grad_scale: 0.5 }
    }

    /// Weights of `lens` elements as the device has them, with what rounding leaves in bf16.
    fn weights(lab: &mut Lab, lens: &[usize]) -> Vec<(Tensor, Option<Tensor>)> {
        let values: Vec<Tensor> = lens.iter().map(|n| lab.random(&[*n], 1.0)).collect();
        let up = |x: &Tensor| match lab.dtype {
            Dtype::F32 => (lab.up(x), None),
            Dtype::BF16 => {
                let (upper, residual) = x.split_master(&lab.device);
                (upper, Some(residual))
            }
        };
        values.iter().map(up).collect()
    }

    #[test]
    fn as_with_moments_on_the_device() {
        for mut lab in labs(33) {
            for bits8 in [false, true] {
                let lens = [700, 2 * 512 + 300, 256, 1];
                let mut here = weights(&mut lab, &lens);
                let mut offloaded: Vec<(Tensor, Option<Tensor>)> = here.clone();
                let gpu = lab.device.gpu().unwrap().clone();
                let zeros = |n: usize| [Sign::Signed, Sign::Unsigned].map(|sign| Moment::zeros(n, sign));
                let [mut m, mut v] = [(); 2].map(|()| lens.map(|n| Tensor::zeros_on(&lab.device, Dtype::F32, &[n])));
                let mut bits = lens.map(|n| zeros(n).map(|moment| adamw_8bit::DeviceMoment::new(&gpu, &moment)));
                let moments = lens.map(|n| match (bits8, zeros(n)) {
                    (true, [m, r]) => OffloadedMoments::from_8bit(&gpu, &m, &r),
                    (false, _) => OffloadedMoments::from_f32(&gpu, &Tensor::zeros(&[n]), &Tensor::zeros(&[n])),
                });
                let mut pieces = Pieces { elements: 512, ..Pieces::default() };
                for number in 1..=2 {
                    let grads = lens.map(|n| {
                        let grad = lab.random(&[n], 0.1);
                        lab.up_f32(&grad)
                    });
                    for (i, (value, residual)) in here.iter_mut().enumerate() {
                        match (bits8, residual) {
                            (true, residual) => {
                                let [m, r] = &mut bits[i];
                                adamw_8bit::update_on_device(value, residual.as_mut(), &grads[i], m, r, &step(number));
                            }
                            (false, None) => adamw::update(value, &grads[i], &mut m[i], &mut v[i], &step(number)),
                            (false, Some(residual)) => {
                                adamw::update_split(value, residual, &grads[i], &mut m[i], &mut v[i], &step(number));
                            }
                        }
                    }
                    let weights = offloaded.iter_mut().zip(&grads).zip(&moments);
                    let mut updates: Vec<Update<'_>> = weights
                        .map(|(((value, residual), grad), moments)| Update {
                            value,
                            residual: residual.as_mut(),
                            grad,
                            moments,
                            step: step(number),
                        })
                        .collect();
                    update(&mut updates, &mut pieces);
                }
                for (i, (value, residual)) in here.iter().enumerate() {
                    let all = |value: &Tensor, residual: &Option<Tensor>| match residual {
                        Some(residual) => value.join_master(residual),
                        None => value.to_host(),
                    };
                    assert_eq!(all(value, residual).data(), all(&offloaded[i].0, &offloaded[i].1).data(), "tensor {i}");
                    if bits8 {
                        let [m, r] = &bits[i];
                        assert_eq!(moments[i].to_8bit(), (m.to_host(), r.to_host()), "tensor {i}");
                    } else {
                        let (m_back, v_back) = moments[i].to_f32(&[lens[i]]);
                        assert_eq!(m_back.data(), m[i].to_host().data(), "tensor {i}");
                        assert_eq!(v_back.data(), v[i].to_host().data(), "tensor {i}");
                    }
                }
                let held: usize = pieces.buffers.iter().map(|p| p.memory.as_ref().map_or(0, Buffer::bytes)).sum();
                assert!(held > 0 && held <= Pieces::bytes(512, bits8), "{held}");
                drop(pieces);
                lab.device.synchronize().unwrap();
            }
        }
    }
}
