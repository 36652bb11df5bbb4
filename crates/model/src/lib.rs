//! LLaMA forward and backward, LoRA, generation, import and export. Sees token ids, never strings.
//!
//! Read [`llama`] first: the model is an explicit list of fused ops with the backward pass beside the forward pass.

mod adapter;
mod batch;
mod cache;
mod config;
mod error;
mod export;
mod export_gguf;
mod generate;
mod import;
mod int8;
pub mod llama;
pub mod memory;
mod parameter;
mod sequences;
pub mod token_rows;

pub use adapter::{Adapter, AdapterConfig, AdapterFile, Modules, save_adapter};
pub use batch::{Batch, largest_part};
pub use cache::KvCache;
pub use config::{Config, Rope, RopeScaling};
pub use error::{Error, Result};
pub use export::{Dtype, SaveOptions, save_model};
pub use export_gguf::{GgufOptions, save_gguf};
pub use generate::{End, FinishReason, Sampler, Sampling, generate, generate_together};
pub use import::{Checkpoint, GgufMetadata, Storage};
pub use llama::{Head, LINEAR_NAMES, Llama, LossOptions, Masks, Pass, Workspace, initial_rows};
pub use memory::Recompute;
pub use parameter::{Gradients, Parameter, num_trained, trained};
pub use sequences::Sequences;
