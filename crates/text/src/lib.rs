//! Records, chat templates, tokens, loss masks, splits and packing: text in, token shards out. Knows no tensors.
//!
//! In the order of the data's way: [`row`] reads files into rows, [`clean`] cleans them, [`split`] sends each row to
//! train, validation or test, [`template`] renders conversations, [`tokenizer`] makes token ids, [`sample`] decides
//! which of them are trained, [`pack`] lays documents into blocks, [`mix`] mixes several data sets, [`shard`] stores
//! them, and [`prepare`](mod@prepare) drives it all.
mod atomic;
mod block;
mod bpe;
pub mod clean;
mod data_page;
mod error;
pub mod gguf;
mod input;
pub mod mix;
mod model_file;
pub mod options;
pub mod pack;
pub mod page;
pub mod prepare;
pub mod preview;
mod read;
pub mod report;
pub mod row;
pub mod sample;
pub mod shard;
mod similar;
pub mod source;
mod special;
pub mod split;
pub mod stream;
pub mod template;
pub mod tokenizer;

#[cfg(test)]
mod fixture;

pub use block::Block;
pub use bpe::Encoded;
pub use clean::{CleanReport, Reason, Step};
pub use data_page::{PAGE, write_page};
pub use error::{Error, Result};
pub use gguf::{GgufVocabulary, WordRule};
pub use input::Encoding;
pub use mix::SourceReport;
pub use options::{
    Balance, CleanOptions, DataSource, OnBadRow, Overlong, Preferences, PrepareOptions, Same, TextRows, TrainOn,
};
pub use page::{escape, grouped};
pub use prepare::{
    BlockStream, Check, Diagnosis, Finding, LengthClass, Lengths, StreamCounts, TokenizerOptions, TrainedTokenizer,
    examine, prepare, train_tokenizer,
};
pub use preview::{PreviewDocument, PreviewToken, preview};
pub use report::{Balanced, PrepareProgress, Report, SplitReport};
pub use row::{Row, RowFormat, RowKind, RowOptions, Turns};
pub use sample::{Preference, RowCounts, Sample, SampleOptions, Source, samples};
pub use shard::PreparedSplit;
pub use special::SpecialTokens;
pub use split::Split;
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, Conversation, Message};
pub use tokenizer::Tokenizer;
