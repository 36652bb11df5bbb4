//! Matrices inside slices, and buffers that several threads write.

/// A read-only matrix inside a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix with `cols` columns.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose: no data moves.
    pub(crate) fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// Whether its columns, not its rows, lie in one piece.
    pub(crate) fn is_transposed(&self) -> bool {
        self.row_stride == 1 && self.col_stride != 1
    }

    /// The matrix without its first `row` rows and `col` columns.
    pub(crate) fn part(&self, row: usize, col: usize) -> Self {
        Self { data: &self.data[row * self.row_stride + col * self.col_stride..], ..*self }
    }

    /// Prefetches the first `rows` x `cols` elements of a row-major matrix into the L2 cache.
    #[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
    pub(crate) fn prefetch(&self, rows: usize, cols: usize) {
        #[cfg(target_arch = "x86_64")]
        for row in self.data.chunks(self.row_stride).take(rows) {
            for line in row[..cols.min(row.len())].chunks(16) {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                // SAFETY: every x86-64 CPU has the instruction, and it reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, cols);
    }

    pub(crate) fn check(&self, rows: usize, cols: usize) {
        let last = (rows.max(1) - 1) * self.row_stride + (cols.max(1) - 1) * self.col_stride;
        assert!(rows == 0 || cols == 0 || last < self.data.len(), "matrix {rows} x {cols} exceeds its slice");
    }
}

/// Threads of the current pool.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// A pointer that tasks share to write disjoint parts of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32, usize);

// SAFETY: a `Shared` is only dereferenced through `slice`, whose caller promises that concurrent ranges are disjoint.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len())
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// The buffer given to [`Shared::new`] is still borrowed, and while the returned slice lives no other thread
    /// touches an element of it that this thread writes.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1, "a task reaches past its buffer");
        // SAFETY: inside the buffer (checked); exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
