//! The operations of the model, each with its formula, shapes, checks, forward and backward in one file.
//!
//! Shapes: T tokens of a micro-batch, d hidden size, V vocabulary, f intermediate size, H query heads, K key/value heads,
//! D head size, r LoRA rank. Wrong shapes are programming errors and panic; what a user can get wrong is checked before.

pub mod adamw;
pub mod adamw_8bit;
pub mod adamw_offloaded;
pub mod attention;
pub mod attention_cached;
pub mod attention_decode;
pub mod dropout;
pub mod embedding;
pub mod grad_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod products;
pub mod rmsnorm;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod swiglu;

#[cfg(test)]
pub(crate) mod finite_difference;
