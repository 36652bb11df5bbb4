//! Row-major, contiguous f32 tensors in cache-line-aligned memory.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use rayon::prelude::*;

/// One cache line: the unit of allocation, so that every buffer starts on a 64-byte boundary.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

const LINE: usize = 16;

/// Bytes from which a buffer is a mapping of its own instead of a piece of the heap.
const LARGE: usize = 4 << 20;

/// Memory that is zero when it is new.
enum Memory {
    Heap(Vec<Line>),
    /// Pages of its own: given back at once when dropped, not touched before they are used (the heap writes zeros into memory that
    /// has to be aligned), and of 2 MB where Linux can, since products stride over more small pages than a processor remembers.
    Pages(MmapMut),
}

impl Memory {
    fn zeros(lines: usize) -> Self {
        let bytes = lines * size_of::<Line>();
        if bytes >= LARGE
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            // A wish: whatever the answer, the memory is there.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
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

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

/// Elements that a thread copies or clears at a time.
const CHUNK: usize = 1 << 16;

/// A dense f32 tensor: a shape and row-major elements.
///
/// Memory is kept when a tensor is resized to something smaller, so that a buffer can be reused for micro-batches of
/// different lengths without going back to the operating system (fresh pages have to be zeroed, which costs more than
/// most of the ops).
#[derive(Default)]
pub struct Tensor {
    shape: Vec<usize>,
    len: usize,
    memory: Memory,
}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.assign(self);
        copy
    }
}

impl Tensor {
    /// A tensor of `shape` filled with zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        let mut tensor = Self::default();
        tensor.resize(shape);
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
        let lines = len.div_ceil(LINE);
        if lines * LINE > self.memory.floats().len() {
            // What was there need not survive, so the old memory goes first.
            self.memory = Memory::default();
            self.memory = Memory::zeros(lines);
        }
        self.len = len;
        self.shape.clear();
        self.shape.extend_from_slice(shape);
    }

    /// Sets every element to zero, on all threads.
    pub fn clear(&mut self) {
        self.data_mut().par_chunks_mut(CHUNK).for_each(|part| part.fill(0.0));
    }

    /// Takes the shape and elements of `from`, on all threads.
    pub fn assign(&mut self, from: &Self) {
        self.resize(&from.shape);
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
    pub fn data(&self) -> &[f32] {
        &self.memory.floats()[..self.len]
    }

    /// The elements in row-major order, to be changed.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.memory.floats_mut()[..self.len]
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

    /// Bytes of memory held (at least 4 times [`Tensor::len`]).
    pub fn capacity_bytes(&self) -> usize {
        size_of_val(self.memory.floats())
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor{:?}{:?}", self.shape, &self.data()[..self.len.min(8)])
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
        assert!(matches!(t.memory, Memory::Pages(_)) && t.data().iter().all(|x| *x == 0.0));
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
