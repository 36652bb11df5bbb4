//! LLaMA forward and backward, LoRA, generation, import and export. Sees token ids, never strings.
//!
//! Read [`llama`] first: the model is an explicit list of fused ops with the backward pass beside the forward pass.

mod adapter;
mod batch;
mod cache;
mod config;
mod export;
mod export_gguf;
mod generate;
mod import;
mod int8;
pub mod llama;
mod lora;
pub mod memory;
mod sequences;
pub mod token_rows;

pub use adapter::{AdapterConfig, AdapterFile, Modules, save_adapter, save_adapter_with_rows};
pub use batch::{Batch, largest_part};
pub use cache::KvCache;
pub use config::{Config, Rope, RopeScaling};
pub use export::{Dtype, SaveOptions, save_model};
pub use export_gguf::{GgufOptions, save_gguf};
pub use generate::{End, FinishReason, Sampler, Sampling, generate, generate_together};
pub use import::{Checkpoint, GgufMetadata, Storage};
pub use llama::{Gradients, LINEAR_NAMES, Llama, LossOptions, Parameter, Workspace, initial_rows};
pub use memory::Recompute;
pub use sequences::Sequences;
pub use tunesmith_files::{Error, Result};
