//! The second device: NVIDIA GPUs through the driver's interface.
//!
//! An operation's launcher (`<op>.rs`) checks sizes, chooses grid and block, and calls `Gpu::launch`; its kernels
//! (`<op>.cu`) lie beside it and are compiled at first use. Launchers do not know which back end runs them: tests use
//! the [`emulator`], which compiles the same sources as C++.
//!
//! The device works asynchronously, so operations do not return errors: the first failure is kept, everything after it
//! does nothing, and [`Gpu::synchronize`] reports it.

pub mod archive;
pub(crate) mod arguments;
pub mod compiler;
mod cublaslt;
mod driver;
#[cfg(any(test, feature = "emulator"))]
mod emulator;
pub(crate) mod error;
pub(crate) mod gemm;
pub(crate) mod gpu;
pub mod graph;
pub mod kernels;
mod library;
pub(crate) mod work;

pub(crate) mod adamw;
pub(crate) mod adamw_8bit;
pub(crate) mod attention;
pub(crate) mod attention_decode;
pub(crate) mod dequantize;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod grad_norm;
pub(crate) mod linear;
pub(crate) mod linear_cross_entropy;
pub(crate) mod offload;
pub(crate) mod rmsnorm;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod sample;
pub mod sizes;
pub(crate) mod swiglu;

#[cfg(test)]
mod driver_tests;
#[cfg(test)]
pub(crate) mod tests;

pub use dequantize::DeviceWeight;
pub use driver::Options;
pub use error::Error;
pub use gpu::Gpu;
pub use library::{Library, Search};
pub use sizes::unsupported;
