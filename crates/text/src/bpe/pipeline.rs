//! Which tokenizers [`Encoder`] can stand in for, and how one is made.
use super::{
    Encoder, Merges, Trim, next_identity, words,
    words::{Digits, Rule, Words},
};
use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::ModelWrapper;

/// What a byte-level model says of itself in `tokenizer.json`.
#[derive(Deserialize)]
struct Model {
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
}

pub(super) fn encoder(tokenizer: &tokenizers::Tokenizer) -> Result<Encoder, String> {
    let model = match tokenizer.get_model() {
        ModelWrapper::BPE(model) => serde_json::to_string(model).and_then(|json| serde_json::from_str::<Model>(&json)),
        _ => return Err("the model is not byte-pair encoding".into()),
    };
    let model = model.map_err(|e| format!("the model does not say what it is: {e}"))?;
    if model.dropout.is_some() {
        return Err("merges are dropped at random".into());
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("parts of words are marked by a prefix or suffix".into());
    }
    let rule = rule(&flat(json(tokenizer.get_pre_tokenizer())?, "pretokenizers"))?;
    let nfc = normalises(&flat(json(tokenizer.get_normalizer())?, "normalizers"))?;
    let size = model.vocab.values().max().map_or(0, |&id| id as usize + 1);
    if size > 1 << 24 || model.vocab.len() * 4 < size {
        return Err("the ids of tokens have large gaps".into());
    }
    let alphabet: HashMap<char, u8> = (0..=255).map(|byte| (character(byte), byte)).collect();
    let mut bytes = [None; 256];
    let mut lengths = vec![0; size];
    let mut blanks = vec![(0, 0); size];
    let mut taken = vec![false; size];
    let mut whole = HashMap::new();
    for (token, &id) in &model.vocab {
        if std::mem::replace(&mut taken[id as usize], true) {
            return Err(format!("several tokens have the id {id}"));
        }
        // A token with other characters, as special tokens may have, is in no word.
        let Some(content) = token.chars().map(|c| alphabet.get(&c).copied()).collect::<Option<Vec<u8>>>() else {
            continue;
        };
        lengths[id as usize] = content.len() as u32;
        blanks[id as usize] = blank_ends(token);
        if let [byte] = content[..] {
            bytes[usize::from(byte)] = Some(id);
        }
        if model.ignore_merges {
            whole.insert(content.into_boxed_slice(), id);
        }
    }
    let id =
        |token: &str| model.vocab.get(token).copied().ok_or_else(|| format!("{token:?} is in a merge but no token"));
    let mut merges = HashMap::with_capacity(model.merges.len());
    for (rank, (left, right)) in model.merges.iter().enumerate() {
        merges.insert((id(left)?, id(right)?), (rank as u32, id(&format!("{left}{right}"))?));
    }
    let trim = trim(&flat(json(tokenizer.get_post_processor())?, "processors"))?;
    let added = added(tokenizer, nfc, &mut lengths, &mut blanks)?;
    Ok(Encoder {
        identity: next_identity(),
        rule,
        nfc,
        added,
        bytes,
        merges: Merges::new(&merges),
        whole: model.ignore_merges.then_some(whole),
        lengths,
        trim: trim.map(|keeps_first| Trim { keeps_first, blanks }),
    })
}

/// The character that stands for a byte in the vocabulary: itself where it is printable Latin-1, else one from 256 on.
pub(super) fn character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// How many blanks a token begins and ends with.
fn blank_ends(token: &str) -> (u16, u16) {
    let is_blank = |c: &char| *c == character(b' ') || c.is_whitespace();
    let count = |blanks: usize| u16::try_from(blanks).unwrap_or(u16::MAX);
    (count(token.chars().take_while(is_blank).count()), count(token.chars().rev().take_while(is_blank).count()))
}

fn json(part: Option<&impl serde::Serialize>) -> Result<Value, String> {
    serde_json::to_value(part).map_err(|e| format!("a step does not say what it is: {e}"))
}

/// The steps of a part of `tokenizer.json`, with those of sequences in their places.
fn flat(part: Value, list: &str) -> Vec<Value> {
    match part {
        Value::Null => Vec::new(),
        Value::Object(mut step) if step.get("type").is_some_and(|name| name == "Sequence") => match step.remove(list) {
            Some(Value::Array(steps)) => steps.into_iter().flat_map(|step| flat(step, list)).collect(),
            _ => vec![Value::Object(step)],
        },
        step => vec![step],
    }
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("?")
}

/// How words are cut: perhaps at digits, perhaps by an expression that is known, and bytes at last.
fn rule(steps: &[Value]) -> Result<Rule, String> {
    let Some((bytes, before)) = steps.split_last().filter(|(last, _)| kind(last) == "ByteLevel") else {
        return Err("words are not cut into bytes at last".into());
    };
    if bytes["add_prefix_space"] != Value::Bool(false) {
        return Err("a blank is put before the text".into());
    }
    let (mut digits, mut cut) = (None, None);
    for step in before {
        let pattern = step["pattern"]["Regex"].as_str();
        let isolated = step["behavior"] == "Isolated" && step["invert"] == Value::Bool(false);
        let found_digits = match (kind(step), pattern) {
            ("Digits", _) if step["individual_digits"] == Value::Bool(true) => Some(Digits::Each),
            ("Digits", _) => Some(Digits::Runs),
            ("Split", Some("[0-9]")) if isolated => Some(Digits::EachAscii),
            _ => None,
        };
        let found_words = match (kind(step), pattern) {
            ("Split", Some(words::GPT2)) if isolated => Some(Words::Gpt2),
            ("Split", Some(words::LLAMA3)) if isolated => Some(Words::Llama3 { digits: 3 }),
            ("Split", Some(words::QWEN2)) if isolated => Some(Words::Llama3 { digits: 1 }),
            _ => None,
        };
        match (found_digits, found_words) {
            (Some(found), None) if digits.is_none() && cut.is_none() => digits = Some(found),
            (None, Some(found)) if cut.is_none() => cut = Some(found),
            _ => return Err(format!("words are cut by {} in a way that is not known", kind(step))),
        }
    }
    let words = match (cut, bytes["use_regex"] != Value::Bool(false)) {
        (Some(_), true) => return Err("words are cut twice".into()),
        (Some(cut), false) => cut,
        (None, true) => Words::Gpt2,
        (None, false) => Words::Whole,
    };
    Ok(Rule { digits: digits.unwrap_or(Digits::Joined), words })
}

/// Whether texts are brought to normal form C, which is the only step known.
fn normalises(steps: &[Value]) -> Result<bool, String> {
    match steps.iter().find(|step| kind(step) != "NFC") {
        Some(step) => Err(format!("texts are changed by {}", kind(step))),
        None => Ok(!steps.is_empty()),
    }
}

/// Whether blanks at the ends of tokens are left out of their offsets, and if so whether a first token keeps one.
fn trim(steps: &[Value]) -> Result<Option<bool>, String> {
    let mut trim = None;
    for step in steps {
        match kind(step) {
            "ByteLevel" if step["trim_offsets"] == Value::Bool(false) => {}
            "ByteLevel" if trim.is_none() => trim = Some(step["add_prefix_space"] == Value::Bool(true)),
            // What it puts around a text is not asked for here.
            "TemplateProcessing" if holds_text_once(&step["single"]) => {}
            other => return Err(format!("tokens are changed by {other}")),
        }
    }
    Ok(trim)
}

fn holds_text_once(template: &Value) -> bool {
    let pieces = template.as_array().map_or(&[][..], Vec::as_slice);
    let texts: Vec<_> = pieces.iter().filter_map(|piece| piece.get("Sequence")).collect();
    matches!(texts[..], [text] if text["id"] == "A")
}

type Added = [Option<(AhoCorasick, Vec<u32>)>; 2];

/// The tokens that stand in texts as they are: those looked for before the text is normalised, and those after.
fn added(
    tokenizer: &tokenizers::Tokenizer,
    nfc: bool,
    lengths: &mut Vec<u32>,
    blanks: &mut Vec<(u16, u16)>,
) -> Result<Added, String> {
    let mut sets = [Vec::new(), Vec::new()];
    for (&id, token) in tokenizer.get_added_vocabulary().get_added_tokens_decoder() {
        let content = &token.content;
        if token.single_word || token.lstrip || token.rstrip {
            return Err(format!("the token {content:?} takes blanks or words around it into account"));
        }
        if nfc && token.normalized && !unicode_normalization::is_nfc(content) {
            return Err(format!("the token {content:?} is not in normal form C"));
        }
        let index = id as usize;
        if index >= lengths.len() {
            if index >= 1 << 24 {
                return Err("the ids of tokens have large gaps".into());
            }
            lengths.resize(index + 1, 0);
            blanks.resize(index + 1, (0, 0));
        }
        // As a part of a word, too, it would be written so.
        blanks[index] = blank_ends(content);
        sets[usize::from(token.normalized)].push((content.clone(), id));
    }
    let automaton = |mut tokens: Vec<(String, u32)>| {
        if tokens.is_empty() {
            return Ok(None);
        }
        tokens.sort();
        let (texts, ids): (Vec<String>, Vec<u32>) = tokens.into_iter().unzip();
        AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map(|automaton| Some((automaton, ids)))
            .map_err(|e| format!("the added tokens: {e}"))
    };
    let [first, second] = sets;
    Ok([automaton(first)?, automaton(second)?])
}
