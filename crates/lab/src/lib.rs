//! What proves and measures the rest: speed and memory of steps, of generation and of their parts.

pub mod bench;
pub mod generation;
pub mod gpu_bench;
pub mod machine;
