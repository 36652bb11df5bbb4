//! The training loop, optimizer, schedules, checkpoints and evaluation.
//!
//! Read [`step`] first, then [`train`]: one step and one loop for every method.

pub mod checkpoint;
pub mod config;
mod error;
pub mod evaluate;
mod feed;
pub mod gpu_bench;
pub mod gpu_check;
pub mod memory;
pub mod metrics;
pub mod objective;
pub mod optimizer;
mod order;
pub mod report;
mod resume;
pub mod schedule;
pub mod selftest;
pub mod statistics;
pub mod step;
pub mod train;
pub mod trainer_state;
pub mod verify;

pub use error::{Error, Result};
