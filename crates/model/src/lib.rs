//! LLaMA forward and backward, LoRA, generation, import and export. Sees token ids, never strings.
mod error;
pub use error::{Error, Result};
