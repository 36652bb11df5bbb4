//! Records, chat templates, tokens, loss masks, splits and packing: text in, token shards out. Knows no tensors.
mod error;
pub use error::{Error, Result};
