//! CPU kernels: one file per op, called by `ops/<op>.rs` after it has checked the shapes.
//!
//! Loops are written so that the compiler vectorises them, and compiled for several instruction sets by
//! `simd::multiversion`; which one runs is decided once, at run time. Results do not depend on how work is cut among
//! threads: every output element is computed by one thread in a fixed order.

pub(crate) mod adamw;
pub(crate) mod adamw_8bit;
pub(crate) mod attention;
pub(crate) mod attention_decode;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod grad_norm;
pub(crate) mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_avx2;
#[cfg(target_arch = "x86_64")]
mod int8_avx512;
pub(crate) mod int8_rows;
pub(crate) mod int8_tile;
pub(crate) mod library;
pub(crate) mod linear;
pub(crate) mod linear_cross_entropy;
pub(crate) mod matmul;
pub(crate) mod products;
pub(crate) mod rmsnorm;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod simd;
pub(crate) mod swiglu;
pub(crate) mod tile;
pub(crate) mod transpose;
pub(crate) mod view;

/// Rows of a block that one thread takes at a time, so that a block of `cols` columns is about 16 KiB and stays in L1.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (4096 / cols.max(1)).max(1)
}
