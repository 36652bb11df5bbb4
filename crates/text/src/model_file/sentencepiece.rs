//! SentencePiece models of type BPE, as Llama 2 has them.
//!
//! Field numbers and defaults are those of `sentencepiece_model.proto` in SentencePiece's repository.
use super::Vocabulary;
use crate::gguf::{GgufVocabulary, PieceRules};

/// The file as a whole.
#[derive(Clone, PartialEq, prost::Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

/// A piece; its id is its place.
#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// The numbers that GGUF repeats: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

/// What training left in the file: which kind of model it is, and the ids with a meaning (-1: none).
#[derive(Clone, PartialEq, prost::Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43", default = "-1")]
    pad_id: Option<i32>,
}

/// What is done to a text before it is cut into pieces.
#[derive(Clone, PartialEq, prost::Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// Names of `model_type`, which begins at 1.
const MODEL_TYPES: [&str; 4] = ["unigram", "bpe", "word", "char"];

/// Reads `bytes`. The message of an error does not name the file.
pub(super) fn parse(bytes: &[u8]) -> Result<Vocabulary, String> {
    let model = <Model as prost::Message>::decode(bytes).map_err(|e| {
        format!("neither a SentencePiece model nor a tiktoken file: {e}; it may be damaged or incomplete")
    })?;
    if model.pieces.is_empty() {
        return Err("neither a SentencePiece model nor a tiktoken file: it has no pieces".into());
    }
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    if trainer.model_type() != 2 {
        let kind = usize::try_from(trainer.model_type() - 1).ok().and_then(|kind| MODEL_TYPES.get(kind));
        let kind = kind.map_or_else(|| trainer.model_type().to_string(), |kind| (*kind).to_owned());
        return Err(format!(
            "a SentencePiece model of type {kind}; type bpe is read. Load it once with transformers' AutoTokenizer and \
             save_pretrained, which writes the tokenizer.json that is read here"
        ));
    }
    if trainer.treat_whitespace_as_suffix() || !normalizer.escape_whitespaces() {
        return Err(
            "a SentencePiece model that writes spaces behind words, or as themselves (treat_whitespace_as_suffix, \
                    escape_whitespaces), which is not supported; bring a tokenizer.json"
                .into(),
        );
    }
    let len = model.pieces.len();
    let id = |name: &str, id: i32| match u32::try_from(id) {
        Err(_) => Ok(None),
        Ok(id) if (id as usize) < len => Ok(Some(id)),
        Ok(id) => Err(format!("{name} is {id}, but there are only {len} pieces")),
    };
    let vocabulary = GgufVocabulary {
        model: "llama".into(),
        scores: model.pieces.iter().map(Piece::score).collect(),
        token_types: model.pieces.iter().map(Piece::kind).collect(),
        bos: id("bos_id", trainer.bos_id())?,
        eos: id("eos_id", trainer.eos_id())?,
        unknown: id("unk_id", trainer.unk_id())?,
        padding: id("pad_id", trainer.pad_id())?,
        add_bos: Some(true),
        add_space_prefix: Some(normalizer.add_dummy_prefix()),
        tokens: model.pieces.into_iter().map(|piece| piece.piece.unwrap_or_default()).collect(),
        ..GgufVocabulary::default()
    };
    let rules = PieceRules {
        byte_fallback: trainer.byte_fallback(),
        remove_extra_spaces: normalizer.remove_extra_whitespaces(),
        charsmap: normalizer.precompiled_charsmap.unwrap_or_default(),
        isolate_user_defined: true,
    };
    Ok(Vocabulary { vocabulary, rules })
}
