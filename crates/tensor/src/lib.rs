//! Buffers, fused operations and CPU kernels of tunesmith: the only crate with `unsafe` code.
//!
//! [`ops`] holds one module per op with its contract (formula, shapes, checks), its forward and its backward; their
//! kernels are in `cpu` and `cuda`. Gradients are added to (`d_x += ...`) or written (`d_x = ...`) as each function
//! says.

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
mod offloaded_activations;
pub mod ops;
pub mod packed_int;
pub mod pool;
pub mod quant;
pub mod quant_encode;
pub mod rng;
pub mod team;
mod tensor;
mod weight;
pub use cpu::view::threads as num_threads;
pub use cuda::graph::CapturedGraph;
pub use device::Device;
pub use dtype::Dtype;
pub use freed::release_freed_memory;
pub use int8_weight::Int8Weight;
pub use mapped::MappedFile;
pub use offloaded_activations::OffloadedActivations;
pub use tensor::Tensor;
pub use weight::{Bytes, Packed, Weight};

/// Name of the instruction set that the kernels use on this CPU: `baseline`, `AVX2` or `AVX-512`.
pub fn simd_level() -> &'static str {
    cpu::simd::level().name()
}
