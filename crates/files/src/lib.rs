//! What every crate needs and none should write again: errors, atomic writes, hashes, sizes in bytes.

pub mod atomic;
pub mod bytes;
mod error;
pub mod hash;
pub mod kind;
mod progress;
pub mod table;

pub use error::{Blame, Error, Result};
pub use progress::{Observer, Progress, Unit};
