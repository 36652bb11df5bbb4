//! Buffers, fused operations and CPU kernels of tunesmith: the only crate with `unsafe` code.
//!
//! [`ops`] holds one module an operation with its contract (formula, shapes, checks), its forward and its backward;
//! the kernels behind them are in `cpu`. Gradients are added to (`d_x += ...`) or written (`d_x = ...`) as each
//! function says.

mod contract;
mod cpu;
pub mod cuda;
mod device;
mod dtype;
mod freed;
mod int8_weight;
mod kv;
mod mapped;
mod moments;
pub mod nf4;
pub mod ops;
pub mod packed_int;
mod parked;
pub mod pool;
pub mod quant;
pub mod quant_encode;
pub mod rng;
pub mod team;
mod tensor;
mod weight;
pub use contract::PAGE;
pub use cpu::view::threads as num_threads;
pub use cuda::graph::Recorded;
pub use device::Device;
pub use dtype::Dtype;
pub use freed::release_freed_memory;
pub use int8_weight::Int8Weight;
pub use kv::PagedCache;
pub use mapped::MappedFile;
pub use parked::Parked;
pub use tensor::Tensor;
pub use weight::{Bytes, Packed, Weight};

/// Name of the instruction set that the kernels use on this processor: `baseline`, `AVX2` or `AVX-512`.
pub fn simd_level() -> &'static str {
    cpu::simd::level().name()
}
