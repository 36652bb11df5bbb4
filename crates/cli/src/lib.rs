//! Command line.
pub mod error;
pub mod source;
