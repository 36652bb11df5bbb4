//! Records, chat templates, tokens, loss masks, splits and packing: text in, token shards out. Knows no tensors.
//!
//! In the order of the data's way: [`row`] reads files into rows, [`clean`] cleans them, [`split`] sends each row to train, validation or
//! test, [`template`] renders conversations, [`tokenizer`] makes token ids, [`sample`] decides which of them are
//! trained, [`pack`] lays documents into blocks, [`mix`] mixes several data sets, [`shard`] stores them, and [`prepare`](mod@prepare) drives it all.
mod bpe;
pub mod clean;
mod data_page;
pub mod gguf;
mod input;
pub mod mix;
mod model_file;
pub mod options;
pub mod pack;
pub mod prepare;
pub mod preview;
mod read;
pub mod row;
pub mod sample;
pub mod shard;
mod similar;
pub mod source;
pub mod split;
pub mod stream;
pub mod template;
pub mod tokenizer;

#[cfg(test)]
mod fixture;

pub use clean::{CleanOptions, CleanReport, Reason, Same, Step};
pub use data_page::{PAGE, escape, write_page};
pub use gguf::{GgufVocabulary, WordRule};
pub use input::Encoding;
pub use mix::{DataSource, SourceReport};
pub use options::{Balance, OnBadRow, Overlong, Preferences, PrepareOptions, TextRows, TrainOn};
pub use pack::Block;
pub use prepare::{
    Balanced, BlockStream, Check, Diagnosis, Finding, LengthClass, Lengths, PrepareProgress, Report, SplitReport,
    StreamCounts, TokenizerOptions, TrainedTokenizer, examine, prepare, train_tokenizer,
};
pub use preview::{PreviewDocument, PreviewToken, preview};
pub use row::{Row, RowFormat, RowKind, RowOptions, Turns};
pub use sample::{RowCounts, Sample, SampleOptions, Side, Source, samples};
pub use shard::PreparedSplit;
pub use split::Split;
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, Conversation, Message};
pub use tokenizer::{Encoded, SpecialTokens, Tokenizer};
pub use tunesmith_files::{Error, Result};
