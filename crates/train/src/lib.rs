//! The training loop, optimizer, schedules, checkpoints and evaluation.
mod error;
pub use error::{Error, Result};
