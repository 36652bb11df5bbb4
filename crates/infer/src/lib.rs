//! Generation of text, as token ids: one engine that every caller uses.

mod engine;
mod pages;
mod sampling;

pub use engine::{Completion, End, Engine, Event, FinishReason, Request, RequestId, complete};
pub use sampling::{Sampler, Sampling};
