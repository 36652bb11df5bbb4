//! The training loop, optimizer, schedules, checkpoints and evaluation.
//!
//! Read [`train`] first: one loop for every method.

pub mod checkpoint;
pub mod config;
pub mod evaluate;
mod feed;
pub mod gpu_bench;
pub mod gpu_check;
pub mod memory;
pub mod metrics;
pub mod open;
pub mod optimizer;
mod order;
pub mod report;
pub mod schedule;
pub mod selftest;
pub mod statistics;
pub mod train;
pub mod trainer_state;
pub mod upload;
pub mod verify;

pub use tunesmith_files::{Error, Result};
