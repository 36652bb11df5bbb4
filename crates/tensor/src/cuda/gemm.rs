//! A matrix product as both back ends are asked for it.

use super::gpu::{Buffer, Gpu, backend};
use super::work::{Operand, Product};
use crate::dtype::Dtype;
use std::sync::atomic::Ordering;

/// A row-major matrix in a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    pub(crate) buffer: &'a Buffer,
    /// Elements before the first.
    pub(crate) offset: usize,
    pub(crate) dtype: Dtype,
    /// Elements from the start of a stored row to the next.
    pub(crate) stride: usize,
    /// Whether the product reads it transposed.
    pub(crate) transposed: bool,
}

impl<'a> Matrix<'a> {
    pub(crate) fn new(buffer: &'a Buffer, dtype: Dtype, stride: usize) -> Self {
        Self { buffer, offset: 0, dtype, stride, transposed: false }
    }

    pub(crate) fn at(self, offset: usize) -> Self {
        Self { offset, ..self }
    }

    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn operand(&self) -> Operand {
        let Self { buffer, offset, dtype, stride, transposed } = *self;
        Operand { address: buffer.address + (offset * dtype.bytes()) as u64, dtype, stride, transposed }
    }

    /// Panics unless [rows, cols] as the product sees it lies within the buffer.
    pub(super) fn check(&self, rows: usize, cols: usize) {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        if rows > 0 && cols > 0 {
            let last = self.offset + (rows - 1) * self.stride + cols;
            assert!(
                cols <= self.stride && last * self.dtype.bytes() <= self.buffer.bytes(),
                "[{rows}, {cols}] of {self:?}"
            );
        }
    }
}

/// [`Product`] of matrices in buffers.
pub(crate) struct Gemm<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) a: Matrix<'a>,
    pub(crate) b: Matrix<'a>,
    pub(crate) beta: f32,
    pub(crate) c: Matrix<'a>,
}

impl Gemm<'_> {
    fn check(&self) {
        self.a.check(self.m, self.k);
        self.b.check(self.k, self.n);
        self.c.check(self.m, self.n);
        assert!(self.a.dtype == self.b.dtype && !self.c.transposed, "{:?} times {:?}", self.a, self.b);
        // What cuBLASLt offers: a result of the operands' type, or f32.
        assert!(self.c.dtype == Dtype::F32 || self.c.dtype == self.a.dtype, "{:?} from {:?}", self.c, self.a);
    }
}

impl Gpu {
    /// Asks for a matrix product; an empty result is nothing to do.
    pub(crate) fn gemm(&self, gemm: &Gemm<'_>) {
        gemm.check();
        let Gemm { m, n, k, alpha, beta, .. } = *gemm;
        let tf32 = gemm.a.dtype == Dtype::F32 && self.tf32.load(Ordering::Relaxed);
        let [a, b, c] = [&gemm.a, &gemm.b, &gemm.c].map(Matrix::operand);
        if m > 0 && n > 0 {
            self.attempt(|| backend!(self, gemm(Product { m, n, k, alpha, a, b, beta, c, tf32 })));
        }
    }
}
