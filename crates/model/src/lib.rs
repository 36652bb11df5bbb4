//! LLaMA forward and backward, LoRA, generation, import and export. Sees token ids, never strings.
//!
//! Read [`llama`] first: the model is an explicit list of fused ops with the backward pass beside the forward pass.

mod adapter;
mod batch;
pub mod block;
mod config;
mod error;
mod export;
mod export_gguf;
mod import;
mod int8;
pub mod llama;
mod lora;
pub mod memory;
pub mod token_rows;

pub use adapter::{AdapterConfig, AdapterFile, Modules, save_adapter, save_adapter_with_rows};
pub use batch::{Batch, largest_part};
pub use block::LINEAR_NAMES;
pub use config::{Config, Rope, RopeScaling};
pub use error::{Error, Result};
pub use export::{Dtype, SaveOptions, save_model};
pub use export_gguf::{GgufOptions, save_gguf};
pub use import::{Checkpoint, GgufMetadata, Storage};
pub use llama::infer::{InferWorkspace, Tokens};
pub use llama::{Gradients, Llama, LossOptions, Parameter, Workspace, initial_rows};
pub use memory::Recompute;
