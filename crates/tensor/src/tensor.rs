//! Row-major, contiguous tensors: f32 in cache-line-aligned host memory, f32 or bf16 in that of a GPU.

use crate::cuda::gpu::{Buffer, Gpu};
use crate::{device::Device, dtype::Dtype};
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use rayon::prelude::*;
use std::sync::Arc;

/// One cache line: the unit of allocation, so that every buffer starts on a 64-byte boundary.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

const LINE: usize = 16;

/// Bytes from which a buffer is a mapping of its own instead of a piece of the heap. Buffers of a layer grow by a
/// little when a longer pass comes; on the heap each would leave a hole that none of the others, grown too, fits into.
const LARGE: usize = 256 << 10;

/// Bytes from which pages of 2 MB are asked for.
const HUGE: usize = 4 << 20;

/// Host memory that is zero when it is new.
enum Host {
    Heap(Vec<Line>),
    /// Pages of its own: given back at once when dropped, not touched before they are used (the heap writes zeros into
    /// memory that has to be aligned), and of 2 MB where Linux can, since products stride over more small pages than a
    /// TLB holds.
    Pages(MmapMut),
}

impl Host {
    fn zeros(lines: usize) -> Self {
        let bytes = lines * size_of::<Line>();
        if bytes >= LARGE
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            // A wish: whatever the answer, the memory is there.
            #[cfg(target_os = "linux")]
            if bytes >= HUGE {
                let _ = pages.advise(memmap2::Advice::HugePage);
            }
            return Self::Pages(pages);
        }
        Self::Heap(bytemuck::zeroed_vec(lines))
    }

    fn floats(&self) -> &[f32] {
        match self {
            Self::Heap(lines) => bytemuck::cast_slice(lines),
            Self::Pages(pages) => bytemuck::cast_slice(pages),
        }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Self::Pages(pages) => bytemuck::cast_slice_mut(pages),
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

/// Elements that a thread copies or clears at a time.
const CHUNK: usize = 1 << 16;

/// A dense tensor: a shape and row-major elements, on one device.
///
/// Memory is kept when a tensor is resized to something smaller, so that a buffer can be reused for micro-batches of
/// different lengths without going back to the operating system (fresh pages have to be zeroed, which costs more than
/// most of the ops).
///
/// The elements of a tensor on the CPU are f32 and can be looked at ([`Tensor::data`]). Those of a tensor on a GPU are
/// what operations and [`Tensor::to_host`] make of them.
#[derive(Default)]
pub struct Tensor {
    shape: Vec<usize>,
    len: usize,
    memory: Memory,
}

enum Memory {
    Host(Host),
    Device(Buffer, Dtype),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Host(Host::default())
    }
}

impl Tensor {
    /// A tensor of `shape` filled with zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        let mut tensor = Self::default();
        tensor.resize(shape);
        tensor
    }

    /// A tensor of `shape` on `device`, filled with zeros. The CPU has f32 only.
    pub fn zeros_on(device: &Device, dtype: Dtype, shape: &[usize]) -> Self {
        let mut tensor = Self::default();
        tensor.resize_on(device, dtype, shape);
        if device.gpu().is_some() {
            tensor.clear();
        }
        tensor
    }

    /// A tensor of `shape` that holds `values` in row-major order.
    ///
    /// # Panics
    /// When `values` does not have as many elements as `shape`.
    pub fn from_slice(shape: &[usize], values: &[f32]) -> Self {
        let mut tensor = Self::zeros(shape);
        assert_eq!(tensor.len, values.len(), "a tensor of shape {shape:?} cannot hold {} values", values.len());
        tensor.data_mut().copy_from_slice(values);
        tensor
    }

    /// Gives the tensor another shape. Memory grows when it must and is never given back; what the elements hold
    /// afterwards is unspecified (new memory is zero), so whoever resizes a tensor must write all of it.
    pub fn resize(&mut self, shape: &[usize]) {
        let len = shape.iter().product::<usize>();
        match &mut self.memory {
            Memory::Host(memory) => {
                let lines = len.div_ceil(LINE);
                if lines * LINE > memory.floats().len() {
                    // What was there need not survive, so the old memory goes first.
                    *memory = Host::default();
                    *memory = Host::zeros(lines);
                }
            }
            Memory::Device(buffer, dtype) => {
                if len * dtype.bytes() > buffer.bytes() {
                    let gpu = buffer.gpu().clone();
                    *buffer = gpu.allocate(0);
                    *buffer = gpu.allocate(len * dtype.bytes());
                }
            }
        }
        self.len = len;
        self.shape.clear();
        self.shape.extend_from_slice(shape);
    }

    /// As [`Tensor::resize`], on `device` in `dtype`: what was elsewhere or in another type is forgotten.
    pub fn resize_on(&mut self, device: &Device, dtype: Dtype, shape: &[usize]) {
        match (device.gpu(), &self.memory) {
            (None, Memory::Host(_)) => {}
            (None, Memory::Device(..)) => self.memory = Memory::default(),
            (Some(gpu), Memory::Device(buffer, found)) if Arc::ptr_eq(gpu, buffer.gpu()) && *found == dtype => {}
            (Some(gpu), _) => self.memory = Memory::Device(gpu.allocate(0), dtype),
        }
        self.resize(shape);
    }

    /// As [`Tensor::resize`], where `like` is and in its type.
    pub fn resize_like(&mut self, like: &Self, shape: &[usize]) {
        match &like.memory {
            Memory::Host(_) => self.resize_on(&Device::Cpu, Dtype::F32, shape),
            Memory::Device(buffer, dtype) => self.resize_on(&Device::Cuda(buffer.gpu().clone()), *dtype, shape),
        }
    }

    /// Makes row `row` of a matrix its only one.
    pub fn keep_row(&mut self, row: usize) {
        let cols = self.cols();
        assert!(row < self.rows(), "row {row} of {:?}", self.shape);
        match &mut self.memory {
            Memory::Host(_) => self.data_mut().copy_within(row * cols..(row + 1) * cols, 0),
            Memory::Device(buffer, dtype) if row > 0 => {
                buffer.copy(0, buffer, row * cols * dtype.bytes(), cols * dtype.bytes());
            }
            Memory::Device(..) => {}
        }
        self.resize(&[1, cols]);
    }

    /// Copies the first `count` rows of `from` to the rows from `at` on. Both are on one device, in one type.
    pub fn copy_rows(&mut self, at: usize, from: &Self, count: usize) {
        let (cols, rows) = (self.cols(), self.rows());
        assert!(
            from.cols() == cols && at + count <= rows && count <= from.rows(),
            "{count} rows of {from:?} to row {at}"
        );
        match (&mut self.memory, &from.memory) {
            (Memory::Host(_), Memory::Host(_)) => {
                self.data_mut()[at * cols..(at + count) * cols].copy_from_slice(&from.data()[..count * cols]);
            }
            (Memory::Device(to, dtype), Memory::Device(source, from_dtype)) if *dtype == *from_dtype => {
                to.copy(at * cols * dtype.bytes(), source, 0, count * cols * dtype.bytes());
            }
            _ => panic!("rows of {from:?} in another memory or type than {self:?}"),
        }
    }

    /// An f32 master weight in host memory as two tensors on a GPU: its bf16 (to nearest, ties away from zero) and the
    /// residual of that rounding in 16 bits per element, so that [`Tensor::join_master`] gives the same bits.
    ///
    /// # Panics
    /// When the tensor or `device` is not where it must be.
    pub fn split_master(&self, device: &Device) -> (Self, Self) {
        let halves = |f: fn(u32) -> u16| {
            let mut half = Self::default();
            half.resize_on(device, Dtype::BF16, &self.shape);
            let values: Vec<u16> = self.data().par_iter().map(|x| f(x.to_bits())).collect();
            half.device_buffer().write(0, bytemuck::cast_slice(&values));
            half
        };
        let upper = |bits: u32| (bits.wrapping_add(0x8000) >> 16) as u16;
        (halves(upper), halves(|bits| bits.wrapping_sub((bits.wrapping_add(0x8000) >> 16) << 16) as u16))
    }

    /// The f32 master weight of a bf16 weight and its `residual`.
    pub fn join_master(&self, residual: &Self) -> Self {
        let read = |half: &Self| {
            let mut values = vec![0u16; half.len];
            half.device_buffer().read(0, bytemuck::cast_slice_mut(&mut values));
            values
        };
        let mut joined = Self::zeros(&self.shape);
        let halves = read(self).into_par_iter().zip(read(residual));
        joined.data_mut().par_iter_mut().zip(halves).for_each(|(x, (upper, residual))| {
            *x = f32::from_bits((u32::from(upper) << 16).wrapping_add_signed(i32::from(residual as i16)));
        });
        joined
    }

    /// Where the elements are.
    pub fn device(&self) -> Device {
        self.gpu().map_or(Device::Cpu, |gpu| Device::Cuda(gpu.clone()))
    }

    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.buffer().map(Buffer::gpu)
    }

    pub(crate) fn buffer(&self) -> Option<&Buffer> {
        match &self.memory {
            Memory::Host(_) => None,
            Memory::Device(buffer, _) => Some(buffer),
        }
    }

    /// The memory of a tensor that must be on a GPU.
    pub(crate) fn device_buffer(&self) -> &Buffer {
        match self.buffer() {
            Some(buffer) => buffer,
            None => panic!("{self:?} must be on the GPU"),
        }
    }

    /// Where the memory is, for telling whether it has changed: 0 on the CPU.
    pub fn address(&self) -> u64 {
        self.buffer().map_or(0, Buffer::address)
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        match &self.memory {
            Memory::Host(_) => Dtype::F32,
            Memory::Device(_, dtype) => *dtype,
        }
    }

    /// A copy of a tensor on the CPU, on `device` in `dtype` (rounded to nearest, ties to even).
    ///
    /// # Panics
    /// When the tensor is on a GPU.
    pub fn to_device(&self, device: &Device, dtype: Dtype) -> Self {
        let mut copy = Self::default();
        copy.resize_on(device, dtype, &self.shape);
        copy.write(self);
        copy
    }

    /// Takes the elements of `from`, which is on the CPU and has this shape, rounded to nearest, ties to even.
    pub(crate) fn write(&mut self, from: &Self) {
        assert_eq!(self.shape, from.shape);
        match &self.memory {
            Memory::Host(_) => self.data_mut().copy_from_slice(from.data()),
            Memory::Device(buffer, Dtype::F32) => buffer.write(0, bytemuck::cast_slice(from.data())),
            Memory::Device(buffer, Dtype::BF16) => {
                for (part, values) in from.data().chunks(CHUNK).enumerate() {
                    let rounded: Vec<half::bf16> = values.par_iter().map(|x| half::bf16::from_f32(*x)).collect();
                    buffer.write(2 * part * CHUNK, bytemuck::cast_slice(&rounded));
                }
            }
        }
    }

    /// A copy in host memory, in f32. Waits for the device.
    pub fn to_host(&self) -> Self {
        let mut copy = Self::zeros(&self.shape);
        self.read(copy.data_mut());
        copy
    }

    /// Copies all elements to `values` as f32. Waits for the device.
    ///
    /// # Panics
    /// When `values` has another length.
    pub fn read(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.len, "a tensor of shape {:?}", self.shape);
        match &self.memory {
            Memory::Host(_) => values.copy_from_slice(self.data()),
            Memory::Device(buffer, Dtype::F32) => buffer.read(0, bytemuck::cast_slice_mut(values)),
            Memory::Device(buffer, Dtype::BF16) => {
                let mut stored = vec![half::bf16::ZERO; self.len];
                buffer.read(0, bytemuck::cast_slice_mut(&mut stored));
                values.par_iter_mut().zip(&stored).for_each(|(value, stored)| *value = stored.to_f32());
            }
        }
    }

    /// Sets every element to zero, on all threads.
    pub fn clear(&mut self) {
        if let Memory::Device(buffer, dtype) = &self.memory {
            return buffer.fill(0, self.len * dtype.bytes());
        }
        self.data_mut().par_chunks_mut(CHUNK).for_each(|part| part.fill(0.0));
    }

    /// Takes the shape and elements of `from`, on all threads; the device and the type too.
    pub fn assign(&mut self, from: &Self) {
        self.resize_like(from, &from.shape);
        if let (Memory::Device(to, dtype), Memory::Device(from, _)) = (&self.memory, &from.memory) {
            return to.copy(0, from, 0, self.len * dtype.bytes());
        }
        let parts = self.data_mut().par_chunks_mut(CHUNK).zip(from.data().par_chunks(CHUNK));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
    }

    /// The extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of rows of a matrix (all extents but the last, multiplied).
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Number of columns of a matrix (the last extent).
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The elements in row-major order.
    ///
    /// # Panics
    /// When they are on a GPU.
    pub fn data(&self) -> &[f32] {
        match &self.memory {
            Memory::Host(memory) => &memory.floats()[..self.len],
            Memory::Device(..) => panic!("a tensor of shape {:?} is on a GPU", self.shape),
        }
    }

    /// The elements in row-major order, to be changed.
    ///
    /// # Panics
    /// When they are on a GPU.
    pub fn data_mut(&mut self) -> &mut [f32] {
        match &mut self.memory {
            Memory::Host(memory) => &mut memory.floats_mut()[..self.len],
            Memory::Device(..) => panic!("a tensor of shape {:?} is on a GPU", self.shape),
        }
    }

    /// Row `i` of a matrix.
    pub fn row(&self, i: usize) -> &[f32] {
        let cols = self.cols();
        &self.data()[i * cols..(i + 1) * cols]
    }

    /// Row `i` of a matrix, to be changed.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let cols = self.cols();
        &mut self.data_mut()[i * cols..(i + 1) * cols]
    }

    /// Bytes of memory held (at least those of [`Tensor::len`] elements), wherever it is.
    pub fn capacity_bytes(&self) -> usize {
        match &self.memory {
            Memory::Host(memory) => size_of_val(memory.floats()),
            Memory::Device(buffer, _) => buffer.bytes(),
        }
    }
}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.assign(self);
        copy
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.memory {
            Memory::Host(_) => write!(f, "Tensor{:?}{:?}", self.shape, &self.data()[..self.len.min(8)]),
            Memory::Device(_, dtype) => write!(f, "Tensor{:?} of {} on a GPU", self.shape, dtype.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_and_alignment() {
        let t = Tensor::from_slice(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((t.rows(), t.cols(), t.len()), (2, 3, 6));
        assert_eq!(t.row(1), &[4.0, 5.0, 6.0]);
        assert_eq!(t.data().as_ptr() as usize % 64, 0);
        assert!(!t.is_empty() && Tensor::zeros(&[0, 4]).is_empty());
    }

    #[test]
    fn assigning_and_clearing_cover_every_chunk() {
        let values: Vec<f32> = (0..2 * CHUNK + 5).map(|i| i as f32).collect();
        let mut t = Tensor::zeros(&[3]);
        t.assign(&Tensor::from_slice(&[1, values.len()], &values));
        assert_eq!((t.shape(), t.data()), (&[1, values.len()][..], &values[..]));
        t.clear();
        assert!(t.data().iter().all(|x| *x == 0.0));
    }

    #[test]
    fn large_tensors_are_zero_and_aligned_too() {
        let mut t = Tensor::zeros(&[LARGE / 4 / 16 + 1, 16]);
        assert!(matches!(t.memory, Memory::Host(Host::Pages(_))) && t.data().iter().all(|x| *x == 0.0));
        assert_eq!((t.data().as_ptr() as usize % 64, t.capacity_bytes()), (0, LARGE + 64));
        t.row_mut(LARGE / 64)[15] = 3.0;
        let copy = t.clone();
        assert_eq!((copy.data(), copy.shape()), (t.data(), t.shape()));
    }

    #[test]
    fn shrinking_keeps_memory() {
        let mut t = Tensor::zeros(&[100, 16]);
        let before = t.capacity_bytes();
        t.resize(&[3, 5]);
        assert_eq!(t.len(), 15);
        t.resize(&[100, 16]);
        assert_eq!(t.capacity_bytes(), before);
    }
}
