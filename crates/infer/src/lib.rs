//! A model in use: weights, tokenizer and chat template opened together, and the text that it writes.

mod opened;
mod placement;
mod stop_strings;
mod writer;

pub use opened::Opened;
pub use placement::Placement;
pub use stop_strings::StopStrings;
pub use writer::{Continuation, Finish, GrowingText, Limits, Writer};
