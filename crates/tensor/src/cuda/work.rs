//! What both back ends are asked for, by the addresses of its operands, and how both count memory.

use super::kernels::Module;
use crate::dtype::Dtype;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One launch of a kernel.
#[derive(Clone)]
pub(super) struct KernelCall {
    /// The module that the kernel is in, with its definitions.
    pub(super) module: Module,
    /// Its name.
    pub(super) kernel: &'static str,
    /// Blocks in each direction.
    pub(super) grid: [u32; 3],
    /// Threads per block.
    pub(super) block: u32,
    /// Bytes of shared memory.
    pub(super) shared: usize,
    /// The bytes of each parameter, little-endian.
    pub(super) values: Vec<u64>,
}

/// A row-major matrix at an address.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) dtype: Dtype,
    /// Elements from the start of a stored row to the next.
    pub(super) stride: usize,
    /// Whether the product reads it transposed.
    pub(super) transposed: bool,
}

/// c [m, n] = `alpha` · a [m, k] · b [k, n] + `beta` · c, summed in f32. With `beta` 0, c is not read.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) alpha: f32,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) beta: f32,
    pub(super) c: Operand,
    /// Whether f32 factors may be rounded to TF32.
    pub(super) tf32: bool,
}

/// Bytes that a buffer of `bytes` bytes takes: few distinct sizes, so that freed ones fit again.
pub fn allocated(bytes: usize) -> usize {
    const LARGE: usize = 1 << 20;
    match bytes {
        0 => 0,
        1..LARGE => bytes.next_power_of_two().max(512),
        _ => bytes.next_multiple_of(LARGE),
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sizes() {
        let sizes = [0, 1, 512, 513, 100_000, 1 << 20, (1 << 20) + 1].map(allocated);
        assert_eq!(sizes, [0, 512, 512, 1024, 131_072, 1 << 20, 2 << 20]);
    }
}
