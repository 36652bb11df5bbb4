//! Folders that have a `tokenizer.model` and no `tokenizer.json`: Llama 2's SentencePiece model, Llama 3's tiktoken
//! file.
//!
//! Both become a Hugging Face tokenizer that gives the same ids, so that everything written from then on has a
//! `tokenizer.json`. Further tokens come from `tokenizer_config.json` (`added_tokens_decoder`) and `added_tokens.json`.
mod sentencepiece;
mod tiktoken;

use crate::gguf::{self, GgufVocabulary, PieceRules};
use crate::{Error, Result, SpecialTokens, special::read_object};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, path::Path};
use tokenizers::AddedToken;

/// Name of the file.
pub(crate) const MODEL_FILE: &str = "tokenizer.model";

/// What a file says, in the terms of GGUF.
#[derive(Debug)]
struct Vocabulary {
    vocabulary: GgufVocabulary,
    rules: PieceRules,
}

/// Reads `folder`'s `tokenizer.model` with what its configuration (`tokenizer_config.json`, `special_tokens_map.json`)
/// adds.
///
/// # Errors
/// A damaged file, a kind of model that is not supported, or a configuration that contradicts it.
pub(crate) fn read(
    folder: &Path,
    config: &Map<String, Value>,
    special: SpecialTokens,
) -> Result<(tokenizers::Tokenizer, SpecialTokens)> {
    let path = folder.join(MODEL_FILE);
    let bytes = fs::read(&path).map_err(|e| Error::io("cannot read the tokenizer", &path, e))?;
    let unusable = |e: String| Error::Input(format!("{}: {e}", path.display()));
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(unusable("only a pointer of Git LFS; fetch the file itself with `git lfs pull`".into()));
    }
    let added = added_tokens(folder, config, &special)?;
    let Vocabulary { mut vocabulary, rules } = if tiktoken::is_rank_file(&bytes) {
        let model = read_object(&folder.join("config.json"))?;
        let scaling = ["rope_scaling", "rope_parameters"].iter().find_map(|key| model.get(*key)?.get("rope_type"));
        let named = !added.is_empty();
        tiktoken::parse(&bytes, named, scaling.and_then(Value::as_str) == Some("llama3"))
    } else {
        sentencepiece::parse(&bytes)
    }
    .map_err(unusable)?;
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let add_bos = flag("add_bos_token").unwrap_or(true);
    let add_eos = flag("add_eos_token").unwrap_or(false);
    if let Some(prefix) = flag("add_prefix_space") {
        vocabulary.add_space_prefix = Some(prefix);
    }
    // The processor around a text is made below, when all tokens are known.
    (vocabulary.add_bos, vocabulary.add_eos) = (Some(false), Some(false));
    for (id, token) in &added {
        // A configuration may give a piece another name, as for a reserved one that was put to use.
        if let Some(name) = vocabulary.tokens.get_mut(*id as usize) {
            name.clone_from(&token.content);
        }
    }
    let (mut inner, own, _) = gguf::build_with(vocabulary, &rules).map_err(|e| match e {
        Error::Input(what) => unusable(what),
        e => e,
    })?;
    for (id, token) in added {
        let name = token.content.clone();
        inner.add_tokens([token]).map_err(|e| Error::Failure(format!("the tokenizer failed: {e}")))?;
        if let Some(other) = inner.token_to_id(&name).filter(|found| *found != id) {
            return Err(Error::Input(format!(
                "{}: the configuration gives the token {name:?} the id {id}, but it would get {other}; the ids of added \
                 tokens must follow the vocabulary without a gap. Bring a tokenizer.json, as transformers' save_pretrained \
                 writes it",
                folder.display()
            )));
        }
    }
    let special = SpecialTokens {
        bos: special.bos.or(own.bos),
        eos: special.eos.or(own.eos),
        pad: special.pad.or(own.pad),
        unk: special.unk.or(own.unk),
    };
    let token = |wanted: bool, text: &Option<String>| {
        let text = text.clone().filter(|_| wanted)?;
        inner.token_to_id(&text).map(|id| (id, text))
    };
    let (bos, eos) = (token(add_bos, &special.bos), token(add_eos, &special.eos));
    let bos = bos.as_ref().map(|(id, text)| (*id, text.as_str()));
    let eos = eos.as_ref().map(|(id, text)| (*id, text.as_str()));
    inner.with_post_processor(Some(gguf::surround(bos, eos)?));
    Ok((inner, special))
}

/// Tokens that the configuration adds or renames, by id.
fn added_tokens(
    folder: &Path,
    config: &Map<String, Value>,
    special: &SpecialTokens,
) -> Result<BTreeMap<u32, AddedToken>> {
    let mut added = BTreeMap::new();
    let file = folder.join("added_tokens.json");
    let more = config.get("additional_special_tokens").and_then(Value::as_array).into_iter().flatten();
    let mut specials: Vec<String> = more.filter_map(|token| token.as_str().map(str::to_owned)).collect();
    specials.extend([&special.bos, &special.eos, &special.pad, &special.unk].into_iter().flatten().cloned());
    for (text, id) in read_object(&file)? {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.ok_or_else(|| Error::Input(format!("{}: the id of {text:?} is {id}", file.display())))?;
        let is_special = specials.contains(&text);
        added.insert(number, AddedToken::from(text, is_special));
    }
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
    for (id, token) in decoder {
        let wrong = || {
            let file = folder.join("tokenizer_config.json");
            Error::Input(format!(
                "{}: added_tokens_decoder.{id} is {token}, not a token with its content",
                file.display()
            ))
        };
        let number: u32 = id.parse().map_err(|_| wrong())?;
        let content = token.get("content").and_then(Value::as_str).ok_or_else(wrong)?;
        let flag = |key: &str| token.get(key).and_then(Value::as_bool);
        let is_special = flag("special").unwrap_or(false);
        let token = AddedToken::from(content, is_special)
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!is_special));
        added.insert(number, token);
    }
    Ok(added)
}
