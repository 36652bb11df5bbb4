//! What the launchers of a GPU ask for besides the tensors they are given, for those who plan its memory.

use super::gpu::TABLES_KEPT;
pub use super::work::allocated;
use super::{attention, attention_decode, cublaslt, dequantize, grad_norm, linear, linear_cross_entropy};
use crate::{contract::Heads, dtype::Dtype};
use crate::{moments, nf4};

/// Why a model of these sizes cannot run on a GPU in `dtype`; `None` when it can.
pub fn unsupported(dtype: Dtype, hidden_size: usize, intermediate_size: usize, head_dim: usize) -> Option<String> {
    if let Some((name, size)) = [("hidden_size", hidden_size), ("intermediate_size", intermediate_size)]
        .into_iter()
        .find(|(_, size)| !size.is_multiple_of(16 / dtype.bytes()))
    {
        return Some(format!(
            "{name} is {size}; on a GPU in {} it must be a multiple of {}",
            dtype.name(),
            16 / dtype.bytes()
        ));
    }
    attention::unsupported(dtype, head_dim)
}

/// Bytes that cuBLASLt's products work in, from the first one on.
pub const PRODUCTS: usize = cublaslt::WORKSPACE;

/// Bytes that the driver keeps for loaded code, the kernels of this program and those of cuBLASLt that are used. An
/// assumption on the safe side: the driver decides, and its allocator gives out pages of 2 MiB besides.
pub const MODULES: usize = 256 << 20;

/// Bytes that a context takes before anything is allocated, as `nvidia-smi` shows them for the process. An assumption
/// on the safe side, not measured: GPUs and drivers differ.
pub const CONTEXT: usize = 512 << 20;

/// Bytes of the process's own memory that the driver and the libraries take. An assumption on the safe side, not
/// measured.
pub const HOST: usize = 512 << 20;

/// Bytes of the tables that launches have sent and that are kept, when they are of up to `tokens` numbers each.
pub fn tables(tokens: usize) -> usize {
    TABLES_KEPT * allocated(4 * tokens)
}

/// Bytes of the dequantised part of a quantised matrix of `elements` elements while it is multiplied.
pub fn dequantized(elements: usize, dtype: Dtype) -> usize {
    allocated(elements.min(linear::TILE) * dtype.bytes())
}

/// Bytes of one sum for each row and head in the backward pass of attention over `tokens` tokens.
pub fn attention_sums(tokens: usize, heads: Heads) -> usize {
    allocated(attention::delta_bytes(tokens, heads))
}

/// Bytes of the partial results of attention of `rows` tokens over up to `num_keys` cached ones each.
pub fn decoding(rows: usize, num_keys: usize, heads: Heads) -> usize {
    allocated(attention_decode::parts_bytes(rows, num_keys, heads))
}

/// Whether a quantised matrix is dequantised to multiply `rows` rows.
pub fn dequantizes(rows: usize) -> bool {
    rows > dequantize::MOST_ROWS
}

/// Bytes of the partial sums of the norm of `tensors` gradients.
pub fn norm(tensors: usize) -> usize {
    allocated(grad_norm::norm_bytes(tensors))
}

/// Bytes of head and loss for `n` tokens over a vocabulary of `vocab`: losses, and logits of a chunk, whose gradient
/// takes their place.
pub fn loss(n: usize, vocab: usize, head_trains: bool) -> usize {
    allocated(4 * n) + allocated(4 * linear_cross_entropy::chunk_rows(n, vocab, head_trains) * vocab)
}

/// Bytes of what head and loss need besides when `rows` rows of the head train by themselves.
pub fn loss_rows(n: usize, vocab: usize, rows: usize, element: Dtype) -> usize {
    allocated(linear_cross_entropy::columns_bytes(n, vocab, rows, element))
}

/// Bytes of a matrix of `len` elements in NF4 with doubly quantised scales.
pub fn nf4(len: usize) -> usize {
    let blocks = len.div_ceil(nf4::BLOCK);
    let parts = [len.div_ceil(2), 4 * nf4::CODE.len(), blocks, 4 * 256, 4 * blocks.div_ceil(nf4::GROUP)];
    parts.map(allocated).iter().sum()
}

/// Bytes of a moment of `len` elements in 8 bits.
pub fn moment_8bit(len: usize) -> usize {
    allocated(len) + allocated(4 * len.div_ceil(moments::BLOCK))
}
