//! Buffers, fused operations and CPU kernels.
