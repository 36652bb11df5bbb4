//! The tokenizer that a GGUF file describes (`tokenizer.ggml.*`), rebuilt as a Hugging Face tokenizer.
//!
//! Byte-level BPE ("gpt2") takes its merges from the file and the splitting rule from the name in `tokenizer.ggml.pre`.
//! SentencePiece ("llama") has only pieces with scores; the merges follow from them, because SentencePiece always joins
//! the two neighbours whose union scores best.
use crate::{Error, Result, SpecialTokens};
use base64::Engine;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::{AddedToken, models::bpe};

/// The vocabulary part of a GGUF file's metadata, as it stands there.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE with byte fallback).
    pub model: String,
    /// `tokenizer.ggml.pre`: the name of the rule that cuts text into words (gpt2 only).
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, indexed by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: one a token (llama only).
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; or empty.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: "left right", best first (gpt2 only).
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: end of turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: end of message.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; absent means true for llama and for Llama 3, false otherwise.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; absent means false.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; absent means true for llama, false for gpt2.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

pub(crate) const UNKNOWN: i32 = 2;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const NORMAL: i32 = 1;

/// No vocabulary has pieces near this size; rebuilding merges takes time quadratic in it.
const MAX_TOKEN_BYTES: usize = 4096;

/// How a byte-level tokenizer cuts text into words before it joins bytes: by the rule of the model of that name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WordRule {
    /// Runs of letters, of digits and of other characters, each with the blank before it.
    Gpt2,
    /// The same, and every ASCII digit stands alone.
    SmolLm,
    /// Digits in groups of three, line ends with what stands before them.
    #[default]
    Llama3,
    /// As Llama 3, but every digit stands alone, and text is in normal form C.
    Qwen2,
}

impl WordRule {
    /// The parts of a tokenizer that cut by this rule: normalizer, if there is one, and pre-tokenizer.
    pub(crate) fn parts(self, prefix: bool) -> (Option<Value>, Value) {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        match self {
            Self::Gpt2 => (None, bytes(true)),
            // Every digit stands alone, also after spaces, as in the model's own training. Only ASCII digits: other
            // numerals ("½") stay as the reference conversion of these files has them.
            Self::SmolLm => (None, json!({"type": "Sequence", "pretokenizers": [split("[0-9]"), bytes(true)]})),
            Self::Llama3 => (None, json!({"type": "Sequence", "pretokenizers": [split(LLAMA3_PATTERN), bytes(false)]})),
            Self::Qwen2 => (
                Some(json!({"type": "NFC"})),
                json!({"type": "Sequence", "pretokenizers": [split(QWEN2_PATTERN), bytes(false)]}),
            ),
        }
    }
}

/// The names under which files of architecture llama ask for each rule.
const PRE_TOKENIZERS: &[(&str, WordRule)] = &[
    ("default", WordRule::Gpt2),
    ("gpt-2", WordRule::Gpt2),
    ("gpt2", WordRule::Gpt2),
    ("smollm", WordRule::SmolLm),
    ("llama-bpe", WordRule::Llama3),
    ("llama3", WordRule::Llama3),
    ("llama-v3", WordRule::Llama3),
    ("falcon3", WordRule::Llama3),
    ("qwen2", WordRule::Qwen2),
    ("deepseek-r1-qwen", WordRule::Qwen2),
];

const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

type Parts = (tokenizers::Tokenizer, SpecialTokens, Option<String>);

/// What a SentencePiece model says beyond what a GGUF file repeats of it.
#[derive(Clone, Debug)]
pub(crate) struct PieceRules {
    /// Characters without a piece become their bytes; otherwise they are unknown.
    pub(crate) byte_fallback: bool,
    /// Table of replacements of characters, as SentencePiece compiles it; empty for none.
    pub(crate) charsmap: Vec<u8>,
    /// Spaces at both ends go, and several become one.
    pub(crate) remove_extra_spaces: bool,
    /// User-defined pieces are cut out of the text after its leading space and take part in no merge, as SentencePiece
    /// does; otherwise they are tokens added beside the vocabulary.
    pub(crate) isolate_user_defined: bool,
}

impl Default for PieceRules {
    fn default() -> Self {
        Self { byte_fallback: true, charsmap: Vec::new(), remove_extra_spaces: false, isolate_user_defined: false }
    }
}

pub(crate) fn build(vocabulary: GgufVocabulary) -> Result<Parts> {
    build_with(vocabulary, &PieceRules::default()).map_err(|e| match e {
        Error::Input(what) => Error::Input(format!("the tokenizer inside the GGUF file: {what}")),
        e => e,
    })
}

/// The tokenizer of `vocabulary`, from whatever file; messages do not name the file.
pub(crate) fn build_with(vocabulary: GgufVocabulary, rules: &PieceRules) -> Result<Parts> {
    check(&vocabulary)?;
    let mut ids = HashMap::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if let Some(earlier) = ids.insert(token.as_str(), id as u32) {
            return Err(bad(format!("tokens {earlier} and {id} are both {token:?}")));
        }
    }
    let mut tokenizer = match vocabulary.model.as_str() {
        "gpt2" => byte_level(&vocabulary, &ids)?,
        "llama" => sentence_piece(&vocabulary, &ids, rules)?,
        other => return Err(bad(format!("tokenizer.ggml.model is {other:?}; supported are \"gpt2\" and \"llama\""))),
    };
    let is_llama3 = words(&vocabulary).is_ok_and(|rule| rule == WordRule::Llama3);
    let add_bos = vocabulary.add_bos.unwrap_or(vocabulary.model == "llama" || is_llama3);
    let token = |id: Option<u32>| id.map(|id| (id, vocabulary.tokens[id as usize].as_str()));
    let bos = token(vocabulary.bos.filter(|_| add_bos));
    let eos = token(vocabulary.eos.filter(|_| vocabulary.add_eos == Some(true)));
    if bos.is_some() || eos.is_some() || vocabulary.model != "llama" {
        tokenizer.with_post_processor(Some(surround(bos, eos)?));
    }
    let ends = [vocabulary.bos, vocabulary.eos, vocabulary.eot, vocabulary.eom];
    let mut special = Vec::new();
    let mut plain = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        match vocabulary.token_types.get(id) {
            Some(&(CONTROL | UNKNOWN)) => special.push(AddedToken::from(token.as_str(), true)),
            _ if ends.contains(&Some(id as u32)) => special.push(AddedToken::from(token.as_str(), true)),
            Some(&USER_DEFINED) if !rules.isolate_user_defined => {
                plain.push(AddedToken::from(token.as_str(), false).normalized(false))
            }
            _ => {}
        }
    }
    let failed = |e: tokenizers::Error| bad(format!("the special tokens cannot be added: {e}"));
    tokenizer.add_special_tokens(special).map_err(failed)?;
    tokenizer.add_tokens(plain).map_err(failed)?;
    let text = |id: Option<u32>| id.and_then(|id| vocabulary.tokens.get(id as usize).cloned());
    let special = SpecialTokens {
        bos: text(vocabulary.bos),
        eos: text(vocabulary.eos),
        pad: text(vocabulary.padding),
        unk: text(vocabulary.unknown),
    };
    Ok((tokenizer, special, vocabulary.chat_template))
}

fn bad(what: String) -> Error {
    Error::Input(what)
}

fn check(vocabulary: &GgufVocabulary) -> Result<()> {
    let len = vocabulary.tokens.len();
    if len == 0 {
        return Err(bad("tokenizer.ggml.tokens is empty or missing".into()));
    }
    if !vocabulary.token_types.is_empty() && vocabulary.token_types.len() != len {
        let have = vocabulary.token_types.len();
        return Err(bad(format!("tokenizer.ggml.token_type has {have} entries for {len} tokens")));
    }
    for (name, id) in [
        ("bos", vocabulary.bos),
        ("eos", vocabulary.eos),
        ("eot", vocabulary.eot),
        ("eom", vocabulary.eom),
        ("unknown", vocabulary.unknown),
        ("padding", vocabulary.padding),
    ] {
        if let Some(id) = id.filter(|&id| id as usize >= len) {
            return Err(bad(format!("tokenizer.ggml.{name}_token_id is {id}, but there are only {len} tokens")));
        }
    }
    if let Some(id) = vocabulary.tokens.iter().position(|token| token.is_empty() || token.len() > MAX_TOKEN_BYTES) {
        let bytes = vocabulary.tokens[id].len();
        return Err(bad(format!("token {id} has {bytes} bytes; between 1 and {MAX_TOKEN_BYTES} are allowed")));
    }
    Ok(())
}

fn words(vocabulary: &GgufVocabulary) -> Result<WordRule> {
    let name = vocabulary.pre.as_deref().unwrap_or("default");
    match PRE_TOKENIZERS.iter().find(|(known, _)| *known == name) {
        Some(&(_, rule)) => Ok(rule),
        None => {
            let known: Vec<_> = PRE_TOKENIZERS.iter().map(|(known, _)| *known).collect();
            Err(bad(format!(
                "tokenizer.ggml.pre is {name:?}, a way of splitting words that is not known here; supported are {}. \
                 Use the model's Hugging Face folder instead: its tokenizer.json says how to split",
                known.join(", ")
            )))
        }
    }
}

fn byte_level(vocabulary: &GgufVocabulary, ids: &HashMap<&str, u32>) -> Result<tokenizers::Tokenizer> {
    let rule = words(vocabulary)?;
    if vocabulary.merges.is_empty() {
        return Err(bad("tokenizer.ggml.merges is empty or missing, which byte-level BPE needs".into()));
    }
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    let mut joined = String::new();
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(bad(format!("merge {index} is {merge:?}; two tokens with a space between are expected")));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if let Some(missing) = [left, right, &joined].iter().find(|token| !ids.contains_key(**token)) {
            return Err(bad(format!("merge {index} is {merge:?}, but {missing:?} is not in the vocabulary")));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = bpe::BPE::builder()
        .vocab_and_merges(owned(ids), merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix(String::new())
        // Llama 3 takes a whole word that is in the vocabulary before it looks at any merge.
        .ignore_merges(rule == WordRule::Llama3)
        .build()
        .map_err(|e| bad(e.to_string()))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    cut_bytes(&mut tokenizer, rule, vocabulary.add_space_prefix.unwrap_or(false))?;
    Ok(tokenizer)
}

/// Makes `tokenizer` one of bytes whose words are cut by `rule`.
pub(crate) fn cut_bytes(tokenizer: &mut tokenizers::Tokenizer, rule: WordRule, prefix: bool) -> Result<()> {
    let (normalizer, pre) = rule.parts(prefix);
    tokenizer.with_pre_tokenizer(Some(part::<tokenizers::PreTokenizerWrapper>(pre)?));
    if let Some(normalizer) = normalizer {
        let normalizer = part::<tokenizers::NormalizerWrapper>(normalizer)?;
        tokenizer.with_normalizer(Some(normalizer)).map_err(|e| bad(e.to_string()))?;
    }
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    tokenizer.with_decoder(Some(part::<tokenizers::DecoderWrapper>(decoder)?));
    Ok(())
}

/// SentencePiece writes spaces as this.
const SPACE: &str = "\u{2581}";

fn sentence_piece(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<&str, u32>,
    rules: &PieceRules,
) -> Result<tokenizers::Tokenizer> {
    let (len, scores) = (vocabulary.tokens.len(), vocabulary.scores.len());
    if scores != len {
        return Err(bad(format!("tokenizer.ggml.scores has {scores} entries for {len} tokens")));
    }
    if let Some(id) = vocabulary.scores.iter().position(|score| !score.is_finite()) {
        return Err(bad(format!("the score of token {id} is {}", vocabulary.scores[id])));
    }
    let mut isolated: Vec<&str> = Vec::new();
    if rules.isolate_user_defined {
        let tokens = vocabulary.tokens.iter().zip(&vocabulary.token_types);
        isolated.extend(tokens.filter(|(_, kind)| **kind == USER_DEFINED).map(|(token, _)| token.as_str()));
    }
    // The longest first: of two that begin alike, SentencePiece takes the longer one.
    isolated.sort_by_key(|token| std::cmp::Reverse(token.len()));
    let unknown = vocabulary.unknown.unwrap_or(0);
    let model = bpe::BPE::builder()
        .vocab_and_merges(owned(ids), merges_from_scores(vocabulary, ids, rules))
        .unk_token(vocabulary.tokens[unknown as usize].clone())
        .fuse_unk(true)
        .byte_fallback(rules.byte_fallback)
        // What is cut out of the text is looked up whole.
        .ignore_merges(!isolated.is_empty())
        .build()
        .map_err(|e| bad(e.to_string()))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let replace = |pattern: Value, with: &str| json!({"type": "Replace", "pattern": pattern, "content": with});
    let mut normalizers = Vec::new();
    if !rules.charsmap.is_empty() {
        let table = base64::engine::general_purpose::STANDARD.encode(&rules.charsmap);
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": table}));
    }
    if rules.remove_extra_spaces {
        // Only spaces: SentencePiece leaves other white space, such as line ends, alone.
        normalizers.push(replace(json!({"Regex": r"\A +"}), ""));
        normalizers.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
    }
    normalizers.push(replace(json!({"String": " "}), SPACE));
    if rules.remove_extra_spaces {
        // At the end SentencePiece takes away what a space has become, and with it what the text wrote like that.
        normalizers.push(replace(json!({"Regex": format!(r"{SPACE}+\z")}), ""));
    }
    let normalizer = match &mut normalizers[..] {
        [one] => one.take(),
        _ => json!({"type": "Sequence", "normalizers": normalizers}),
    };
    let normalizer = part::<tokenizers::NormalizerWrapper>(normalizer)?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| bad(e.to_string()))?;
    if !isolated.is_empty() {
        // What the normalizer makes of them is what stands in the text.
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let pattern = isolated.iter().map(|token| regex::escape(token)).collect::<Vec<_>>().join("|");
        let mut cuts = vec![split(&pattern)];
        if rules.byte_fallback {
            // Text that spells the name of a byte is text: cut, it is not looked up whole.
            cuts.push(split(r"\A<(?=0x[0-9A-F]{2}>\z)"));
        }
        let cuts = json!({"type": "Sequence", "pretokenizers": cuts});
        tokenizer.with_pre_tokenizer(Some(part::<tokenizers::PreTokenizerWrapper>(cuts)?));
    }
    let mut decoders = vec![replace(json!({"String": SPACE}), " ")];
    if rules.byte_fallback {
        decoders.push(json!({"type": "ByteFallback"}));
    }
    decoders.push(json!({"type": "Fuse"}));
    if rules.remove_extra_spaces {
        decoders.push(json!({"type": "Strip", "content": " ", "start": u32::MAX, "stop": 0}));
    } else if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let decoder = part::<tokenizers::DecoderWrapper>(json!({"type": "Sequence", "decoders": decoders}))?;
    tokenizer.with_decoder(Some(decoder));
    Ok(tokenizer)
}

/// Every way to make a piece from two others, best-scored piece first; among equal scores the longer left half first,
/// then the longer right half, then the order of the vocabulary (the order of transformers' `generate_merges`).
fn merges_from_scores(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<&str, u32>,
    rules: &PieceRules,
) -> Vec<(String, String)> {
    let joinable = |id: usize| match vocabulary.token_types.get(id) {
        None | Some(&NORMAL) => true,
        Some(&USER_DEFINED) => !rules.isolate_user_defined,
        _ => false,
    };
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|(id, _)| joinable(*id)) {
        let first = merges.len();
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right))
                && joinable(left_id as usize)
                && joinable(right_id as usize)
            {
                merges.push((vocabulary.scores[id], left, right, left_id, right_id));
            }
        }
        merges[first..].sort_by_key(|merge| (merge.3, merge.4));
    }
    let rank = |merge: &(f32, &str, &str, u32, u32)| (merge.1.chars().count(), merge.2.chars().count());
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| rank(b).cmp(&rank(a))));
    merges.into_iter().map(|(_, left, right, ..)| (left.to_owned(), right.to_owned())).collect()
}

fn owned(ids: &HashMap<&str, u32>) -> bpe::Vocab {
    ids.iter().map(|(token, id)| ((*token).to_owned(), *id)).collect()
}

/// The processor that puts BOS before and EOS after a text, each given as id and text. Without either it passes texts
/// on.
pub(crate) fn surround(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Result<tokenizers::PostProcessorWrapper> {
    let special = |token: Option<(u32, &str)>, type_id: u32| {
        token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
    };
    let piece = |name: &str, type_id: u32| {
        let sequence = json!({"Sequence": {"id": name, "type_id": type_id}});
        [special(bos, type_id), Some(sequence), special(eos, type_id)].into_iter().flatten().collect::<Vec<_>>()
    };
    let table: serde_json::Map<_, _> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, text)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair: Vec<_> = piece("A", 0).into_iter().chain(piece("B", 1)).collect();
    part(json!({"type": "TemplateProcessing", "single": piece("A", 0), "pair": pair, "special_tokens": table}))
}

fn part<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::Failure(format!("a tokenizer part cannot be built: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Tokenizer,
        fixture::{byte_level_vocabulary, llama_tokenizer, llama_vocabulary},
    };
    use proptest::prelude::*;

    fn refusal(vocabulary: GgufVocabulary) -> String {
        let error = Tokenizer::from_gguf(vocabulary).unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error:?}");
        error.to_string()
    }

    fn pieces(pre: &str, text: &str) -> Vec<String> {
        let mut vocabulary = byte_level_vocabulary();
        vocabulary.pre = Some(pre.into());
        vocabulary.add_bos = Some(false);
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        let encoded = tokenizer.encode_with_offsets(text, false).unwrap();
        assert_eq!(tokenizer.decode(&encoded.ids, false).unwrap(), text);
        encoded.ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect()
    }

    #[test]
    fn words_are_split_as_the_name_says() {
        // The vocabulary joins "11", "111", "ĠĠ" and "Ġ1": which of them come out shows where the text was cut.
        assert_eq!(pieces("gpt-2", "  11"), ["Ġ", "Ġ1", "1"]);
        assert_eq!(pieces("smollm", "  11"), ["ĠĠ", "1", "1"]);
        assert_eq!(pieces("llama-bpe", "1111"), ["111", "1"]);
        assert_eq!(pieces("llama-bpe", " 11"), ["Ġ", "11"]);
        assert_eq!(pieces("qwen2", "11"), ["1", "1"]);
        assert_eq!(pieces("gpt-2", "<|im_start|>11<|im_end|>"), ["<|im_start|>", "11", "<|im_end|>"]);
    }

    #[test]
    fn llama3_takes_whole_words_first_and_adds_bos() {
        let mut vocabulary = byte_level_vocabulary();
        vocabulary.tokens.push("zzz".into());
        vocabulary.token_types.push(NORMAL);
        vocabulary.pre = Some("llama-bpe".into());
        let whole = vocabulary.tokens.len() as u32 - 1;
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        assert_eq!(tokenizer.encode("zzz", true).unwrap(), [1, whole]);
        assert!(tokenizer.adds_bos());
    }

    #[test]
    fn user_defined_tokens_stay_whole_and_are_kept_in_text() {
        let mut vocabulary = byte_level_vocabulary();
        vocabulary.tokens.push("<think>".into());
        vocabulary.token_types.push(USER_DEFINED);
        vocabulary.add_eos = Some(true);
        let id = vocabulary.tokens.len() as u32 - 1;
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        assert_eq!(tokenizer.encode("<think>", true).unwrap(), [id, 2]);
        assert_eq!(tokenizer.decode(&[id, 2], true).unwrap(), "<think>");
        assert!(tokenizer.is_added(id));
    }

    #[test]
    fn sentence_piece_text_round_trips_through_bytes() {
        let tokenizer = llama_tokenizer();
        for text in ["hello", " hello", "hell hole", "é\n🙂", ""] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(ids[0], 1, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        let names: Vec<_> = tokenizer.encode("hello", false).unwrap();
        let names: Vec<_> = names.into_iter().map(|id| tokenizer.id_to_token(id).unwrap()).collect();
        assert_eq!(names, ["▁h", "e", "ll", "o"]);
        let mut vocabulary = llama_vocabulary();
        vocabulary.add_space_prefix = Some(false);
        vocabulary.add_bos = Some(false);
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        let ids = tokenizer.encode("hell", true).unwrap();
        assert_eq!(tokenizer.id_to_token(ids[0]).unwrap(), "hell");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hell");
    }

    #[test]
    fn a_vocabulary_that_contradicts_itself_is_refused() {
        let with = |change: fn(&mut GgufVocabulary)| {
            let mut vocabulary = byte_level_vocabulary();
            change(&mut vocabulary);
            refusal(vocabulary)
        };
        let text = with(|v| v.pre = Some("viking".into()));
        assert!(text.contains("\"viking\"") && text.contains("smollm, llama-bpe"), "{text}");
        assert!(with(|v| v.model = "bert".into()).contains("supported are \"gpt2\" and \"llama\""));
        assert!(with(|v| v.eot = Some(9999)).contains("eot_token_id is 9999"));
        assert!(with(|v| v.tokens.clear()).contains("empty or missing"));
        assert!(with(|v| v.merges.clear()).contains("merges is empty"));
        assert!(with(|v| v.merges.push("h".into())).contains("\"h\""));
        assert!(with(|v| v.merges.push("h zqzq".into())).contains("\"zqzq\" is not in the vocabulary"));
        assert!(with(|v| v.tokens[5] = v.tokens[6].clone()).contains("tokens 5 and 6"));
        assert!(with(|v| v.token_types.truncate(3)).contains("token_type has 3 entries"));
        assert!(with(|v| v.tokens[7] = "x".repeat(5000)).contains("token 7 has 5000 bytes"));
        let mut vocabulary = llama_vocabulary();
        vocabulary.scores.pop();
        assert!(refusal(vocabulary).contains("scores has"));
        let mut vocabulary = llama_vocabulary();
        vocabulary.scores[4] = f32::NAN;
        assert!(refusal(vocabulary).contains("score of token 4 is NaN"));
    }

    /// SentencePiece as its paper has it: join the best-scoring neighbours, leftmost among equals, until none joins.
    fn naive(vocabulary: &GgufVocabulary, text: &str) -> Vec<u32> {
        let id = |piece: &str| vocabulary.tokens.iter().position(|token| token == piece);
        let mut parts: Vec<String> = format!("▁{}", text.replace(' ', "▁")).chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for at in 0..parts.len().saturating_sub(1) {
                if let Some(id) = id(&format!("{}{}", parts[at], parts[at + 1]))
                    && best.is_none_or(|(score, _)| vocabulary.scores[id] > score)
                {
                    best = Some((vocabulary.scores[id], at));
                }
            }
            let Some((_, at)) = best else { break };
            let right = parts.remove(at + 1);
            parts[at].push_str(&right);
        }
        parts.iter().map(|part| id(part).unwrap() as u32).collect()
    }

    proptest! {
        #[test]
        fn merges_from_scores_do_what_sentence_piece_does(text in "[helo ]{1,24}") {
            let expected = naive(&llama_vocabulary(), &text);
            prop_assert_eq!(llama_tokenizer().encode(&text, false).unwrap(), expected);
        }
    }
}
