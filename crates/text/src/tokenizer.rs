//! One tokenizer for training, evaluation, generation and serving, over the `tokenizers` crate.
use crate::{
    Encoded, Error, GgufVocabulary, Result, SpecialTokens, atomic,
    bpe::Encoder,
    gguf, model_file,
    special::{read_object, token_text},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    sync::{Arc, OnceLock},
};
use tokenizers::AddedToken;

/// A tokenizer with its special tokens and chat template. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Made when it is asked for: it takes a moment, which one prompt is not worth.
    bulk: Arc<OnceLock<Result<Encoder, String>>>,
    special: SpecialTokens,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    pad_id: Option<u32>,
    adds_bos: bool,
    vocab_size: usize,
    /// By id. It is asked about every token of a data set.
    is_added: Arc<[bool]>,
    chat_template: Option<String>,
    model_max_length: Option<u64>,
}

impl Tokenizer {
    /// Reads a Hugging Face folder: `tokenizer.json`, or without one `tokenizer.model` (SentencePiece BPE as Llama 2
    /// has it, or Llama 3's tiktoken file); special tokens from `tokenizer_config.json`, then
    /// `special_tokens_map.json`; the chat template from `chat_template.jinja`, then `tokenizer_config.json`.
    /// Truncation and padding stored in `tokenizer.json` are switched off: they would shorten rows silently.
    ///
    /// # Errors
    /// A missing or malformed file, or a special token that is not in the vocabulary.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let map = read_object(&folder.join("special_tokens_map.json"))?;
        let token = |key: &str| token_text(&config, key).or_else(|| token_text(&map, key));
        let special = SpecialTokens {
            bos: token("bos_token"),
            eos: token("eos_token"),
            pad: token("pad_token"),
            unk: token("unk_token"),
        };
        let path = folder.join("tokenizer.json");
        let (inner, special) = if !path.exists() && folder.join(model_file::MODEL_FILE).exists() {
            model_file::read(folder, &config, special)?
        } else {
            let bytes = fs::read(&path).map_err(|e| Error::io("cannot read the tokenizer", &path, e))?;
            let unusable = |e: String| Error::Input(format!("{}: not a tokenizer file: {e}", path.display()));
            check_merges(&bytes).map_err(unusable)?;
            (tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| unusable(e.to_string()))?, special)
        };
        let template_path = folder.join("chat_template.jinja");
        let chat_template = if template_path.exists() {
            let text = fs::read_to_string(&template_path)
                .map_err(|e| Error::io("cannot read the chat template", &template_path, e))?;
            Some(text)
        } else {
            config_template(config.get("chat_template"))
        };
        let mut tokenizer = Self::assemble(inner, special, chat_template)
            .map_err(|e| Error::Input(format!("{}: {e}", folder.join("tokenizer_config.json").display())))?;
        // Hugging Face writes 1e30 for "no limit".
        tokenizer.model_max_length = config.get("model_max_length").and_then(Value::as_u64).filter(|&n| n > 0);
        Ok(tokenizer)
    }

    /// Rebuilds the tokenizer that a GGUF file describes in its metadata.
    ///
    /// # Errors
    /// Metadata that contradicts itself, or a tokenizer model or pre-tokenizer that is not supported (the message lists
    /// those that are).
    pub fn from_gguf(vocabulary: GgufVocabulary) -> Result<Self> {
        let (inner, special, chat_template) = gguf::build(vocabulary)?;
        Self::assemble(inner, special, chat_template)
    }

    pub(crate) fn assemble(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<String>,
    ) -> Result<Self> {
        inner.with_truncation(None).map_err(failure)?;
        inner.with_padding(None);
        let id = |name: &str, token: &Option<String>| match token {
            None => Ok(None),
            Some(text) => inner.token_to_id(text).map(Some).ok_or_else(|| {
                Error::Input(format!("{name} is {text:?}, which is not in the vocabulary of tokenizer.json"))
            }),
        };
        let bos_id = id("bos_token", &special.bos)?;
        let eos_id = id("eos_token", &special.eos)?;
        let pad_id = id("pad_token", &special.pad)?;
        let probe = inner.encode_fast("", true).map_err(failure)?;
        let adds_bos = bos_id.is_some() && probe.get_ids().first().copied() == bos_id;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&highest| highest as usize + 1);
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let is_added = (0..vocab_size as u32).map(|id| added.contains_key(&id)).collect();
        Ok(Self {
            inner: Arc::new(inner),
            bulk: Arc::default(),
            special,
            bos_id,
            eos_id,
            pad_id,
            adds_bos,
            vocab_size,
            is_added,
            chat_template,
            model_max_length: None,
        })
    }

    /// Adds tokens after the vocabulary and returns their ids. They are recognised wherever they stand in a text;
    /// `special` ones can be left out when ids become text. After an error the tokenizer is what it was.
    ///
    /// # Errors
    /// A token that is empty, given twice, or in the vocabulary already.
    pub fn add_tokens(&mut self, texts: &[String], special: bool) -> Result<Vec<u32>> {
        let mut inner = (*self.inner).clone();
        let mut ids = Vec::new();
        for (at, text) in texts.iter().enumerate() {
            if text.trim().is_empty() {
                return Err(Error::Input(format!("{text:?} cannot be added as a token: it has nothing but blanks")));
            }
            if texts[..at].contains(text) {
                return Err(Error::Input(format!("{text:?} is given twice; take one out of the list")));
            }
            if let Some(id) = inner.token_to_id(text) {
                return Err(Error::Input(format!(
                    "{text:?} cannot be added as a token: it is one already (id {id}); take it out of the list"
                )));
            }
            let token = AddedToken::from(text.as_str(), special).normalized(false);
            let added = if special { inner.add_special_tokens([token]) } else { inner.add_tokens([token]) };
            added.map_err(failure)?;
            let id = inner.token_to_id(text).filter(|id| *id as usize >= self.vocab_size);
            ids.push(id.ok_or_else(|| Error::Failure(format!("the tokenizer did not take the token {text:?}")))?);
        }
        self.vocab_size = ids.iter().max().map_or(self.vocab_size, |&highest| highest as usize + 1);
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        self.is_added = (0..self.vocab_size as u32).map(|id| added.contains_key(&id)).collect();
        self.inner = Arc::new(inner);
        // Made again for the new vocabulary; clones made before keep theirs.
        self.bulk = Arc::default();
        Ok(ids)
    }

    /// Token ids of `text`. Special tokens written out in the text are recognised; `add_special` also adds those that
    /// the tokenizer puts around every text (a BOS, where [`Self::adds_bos`]).
    ///
    /// # Errors
    /// The tokenizer's own failure, which a well-formed `tokenizer.json` does not have.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if let Some(encoded) = self.encode_in_bulk(text, add_special, false) {
            return Ok(encoded.ids);
        }
        Ok(self.inner.encode_fast(text, add_special).map_err(failure)?.get_ids().to_vec())
    }

    /// Like [`Self::encode`], with the byte range of each token.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Encoded> {
        if let Some(encoded) = self.encode_in_bulk(text, add_special, true) {
            return Ok(encoded);
        }
        let encoding = self.inner.encode(text, add_special).map_err(failure)?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Makes this tokenizer and its clones ready for much text: [`Self::encode`] and [`Self::encode_with_offsets`]
    /// without special tokens then give the same several times as fast, if the tokenizer is of a kind that is known
    /// (byte-level BPE with the ways to cut words of GPT-2, SmolLM, Llama 3 and Qwen 2).
    ///
    /// # Errors
    /// Why it is of another kind, in words. Nothing changes then.
    pub fn for_bulk(&self) -> Result<(), &str> {
        self.bulk.get_or_init(|| Encoder::new(&self.inner)).as_ref().map(|_| ()).map_err(String::as_str)
    }

    /// The tokens, if [`Self::for_bulk`] was called and the text is none that needs the library.
    fn encode_in_bulk(&self, text: &str, add_special: bool, with_offsets: bool) -> Option<Encoded> {
        let encoder = self.bulk.get().filter(|_| !add_special)?.as_ref().ok()?;
        encoder.encode(text, with_offsets)
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Error::Input(format!("token id {id} is outside the vocabulary of {} tokens", self.vocab_size)));
        }
        self.inner.decode(ids, skip_special).map_err(failure)
    }

    /// One more than the highest token id: the number of rows that an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token given in the vocabulary's own spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's own spelling of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `id` was added beside the learned vocabulary, as the tokens that mark turns are.
    pub fn is_added(&self, id: u32) -> bool {
        self.is_added.get(id as usize).copied().unwrap_or(false)
    }

    /// The id that begins a text, if the tokenizer names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The id that ends a text, if the tokenizer names one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The padding id, if the tokenizer names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad_id
    }

    /// Whether `encode(text, true)` begins with the BOS token.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The special tokens' texts.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The source of the chat template, if the model came with one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Replaces the chat template that [`Self::save`] writes.
    pub fn set_chat_template(&mut self, source: Option<String>) {
        self.chat_template = source;
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, when there is a template, `chat_template.jinja` into
    /// `folder`, each atomically, in the spelling that transformers 4 and 5 both read.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let json = self.inner.to_string(true).map_err(failure)?;
        atomic::write_file(&folder.join("tokenizer.json"), |w| w.write_all(json.as_bytes()))?;
        let mut config = match serde_json::to_value(&self.special) {
            Ok(Value::Object(map)) => map,
            _ => return Err(Error::Failure("the special tokens do not serialise".into())),
        };
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        if let Some(tokens) = self.model_max_length {
            config.insert("model_max_length".into(), tokens.into());
        }
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        let text = format!("{:#}\n", Value::Object(config));
        atomic::write_file(&folder.join("tokenizer_config.json"), |w| w.write_all(text.as_bytes()))?;
        if let Some(template) = &self.chat_template {
            atomic::write_file(&folder.join("chat_template.jinja"), |w| w.write_all(template.as_bytes()))?;
        }
        Ok(())
    }

    /// SHA-256 (hex) of everything that decides how a text becomes ids: equal fingerprints, equal tokens.
    ///
    /// # Errors
    /// The tokenizer does not serialise, which no tokenizer that was read does.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        hasher.update(self.inner.to_string(false).map_err(failure)?);
        for token in [&self.special.bos, &self.special.eos] {
            hasher.update([0]);
            hasher.update(token.as_deref().unwrap_or_default());
        }
        Ok(hex(&hasher.finalize()))
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn failure(error: tokenizers::Error) -> Error {
    Error::Failure(format!("the tokenizer failed: {error}"))
}

/// A merge longer than every token would make the library that reads the file panic, so it is looked for first.
/// Anything else that is wrong with the file, the library says itself.
fn check_merges(json: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        vocab: BTreeMap<String, IgnoredAny>,
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair(String, String),
        Text(String),
    }
    let Ok(File { model }) = serde_json::from_slice(json) else { return Ok(()) };
    let longest = model.vocab.keys().map(String::len).max().unwrap_or(0);
    for (index, merge) in model.merges.into_iter().enumerate() {
        let joined = match merge {
            Merge::Pair(left, right) => left + &right,
            Merge::Text(text) => text.replacen(' ', "", 1),
        };
        if joined.len() > longest {
            return Err(format!("merge {index} makes {joined:?}, which is not in the vocabulary"));
        }
    }
    Ok(())
}

/// The template stored in `tokenizer_config.json`: a string, or a list of `{name, template}` with "default" first in
/// rank.
fn config_template(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first())?.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{llama_tokenizer, tokenizer};
    use proptest::prelude::*;

    #[test]
    fn a_saved_tokenizer_reads_back_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut original = tokenizer();
        original.set_chat_template(Some("{{ bos_token }}é".into()));
        original.model_max_length = Some(2048);
        original.save(folder.path()).unwrap();
        let back = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(back.fingerprint().unwrap(), original.fingerprint().unwrap());
        assert_eq!(back.special_tokens(), original.special_tokens());
        assert_eq!((back.bos_id(), back.eos_id(), back.pad_id()), (Some(1), Some(2), Some(2)));
        assert_eq!(back.chat_template(), Some("{{ bos_token }}é"));
        assert_eq!(back.vocab_size(), original.vocab_size());
        let config = fs::read_to_string(folder.path().join("tokenizer_config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
        assert_eq!(config["model_max_length"], 2048);
        assert_eq!(config["eos_token"], "<|im_end|>");
    }

    #[test]
    fn all_spellings_of_the_configuration_are_read() {
        let folder = tempfile::tempdir().unwrap();
        tokenizer().save(folder.path()).unwrap();
        let config = folder.path().join("tokenizer_config.json");
        fs::write(
            &config,
            r#"{"bos_token": {"content": "<|im_start|>", "lstrip": false}, "eos_token": "<|im_end|>", "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#,
        )
        .unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!((read.bos_id(), read.eos_id(), read.pad_id()), (Some(1), Some(2), None));
        assert_eq!(read.chat_template(), Some("D"));
        fs::write(&config, r#"{"chat_template": "S"}"#).unwrap();
        fs::write(folder.path().join("special_tokens_map.json"), r#"{"eos_token": "<|endoftext|>"}"#).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!((read.chat_template(), read.eos_id()), (Some("S"), Some(0)));
        fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().chat_template(), Some("J"));
    }

    #[test]
    fn stored_truncation_is_switched_off() {
        let folder = tempfile::tempdir().unwrap();
        tokenizer().save(folder.path()).unwrap();
        let path = folder.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        json["truncation"] =
            serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        fs::write(&path, json.to_string()).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(read.encode("zxyw", false).unwrap().len(), 4);
    }

    #[test]
    fn merges_outside_the_vocabulary_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        tokenizer().save(folder.path()).unwrap();
        let path = folder.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let good = json["model"]["merges"].clone();
        for bad in [serde_json::json!(["<|endoftext|>", "<|im_start|>"]), "h q".into(), "x".repeat(99).into()] {
            json["model"]["merges"] = good.clone();
            json["model"]["merges"].as_array_mut().unwrap().push(bad);
            fs::write(&path, json.to_string()).unwrap();
            let error = Tokenizer::from_folder(folder.path()).unwrap_err();
            assert!(matches!(&error, Error::Input(text) if text.contains("not a tokenizer file")), "{error:?}");
        }
    }

    #[test]
    fn bad_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("tokenizer.json") && text.contains("no such file"), "{text}");
        fs::write(folder.path().join("tokenizer.json"), "{\"version\": ").unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("not a tokenizer file") && text.contains("line 1"), "{text}");
        tokenizer().save(folder.path()).unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<nope>"}"#).unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("eos_token") && text.contains("<nope>"), "{text}");
        fs::write(folder.path().join("tokenizer_config.json"), "[]").unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("tokenizer_config.json") && text.contains("JSON object"), "{text}");
    }

    #[test]
    fn added_tokens_follow_the_vocabulary_and_are_kept() {
        for (mut tokenizer, has_encoder) in [(tokenizer(), true), (llama_tokenizer(), false)] {
            let (size, without) = (tokenizer.vocab_size() as u32, tokenizer.fingerprint().unwrap());
            let ids = tokenizer.add_tokens(&["<|call|>".into()], true).unwrap();
            assert_eq!(ids, [size]);
            let ids = tokenizer.add_tokens(&["frobnicate".into(), "東京".into()], false).unwrap();
            assert_eq!(ids, [size + 1, size + 2]);
            assert_eq!(tokenizer.vocab_size() as u32, size + 3);
            let text = "he frobnicate<|call|>東京";
            let folder = tempfile::tempdir().unwrap();
            tokenizer.save(folder.path()).unwrap();
            let read = Tokenizer::from_folder(folder.path()).unwrap();
            for tokenizer in [&tokenizer, &read] {
                let found = tokenizer.encode(text, false).unwrap();
                assert_eq!(found.iter().filter(|id| **id >= size).count(), 3, "{found:?}");
                assert_eq!(tokenizer.for_bulk().is_ok(), has_encoder);
                assert_eq!(tokenizer.encode(text, false).unwrap(), found);
                assert!(tokenizer.decode(&found, true).unwrap().ends_with("frobnicate東京"));
            }
            // Prepared data are known by this: with other tokens they are other data.
            assert_eq!(read.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
            assert_ne!(read.fingerprint().unwrap(), without);
            let mut refused =
                |texts: [&str; 2]| tokenizer.add_tokens(&texts.map(str::to_owned), false).unwrap_err().to_string();
            assert!(refused(["new", "<|call|>"]).contains("it is one already"));
            assert!(refused(["new", " "]).contains("nothing but blanks"));
            assert!(refused(["new", "new"]).contains("given twice"));
            assert_eq!(tokenizer.token_to_id("new").filter(|id| *id >= size), None);
        }
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        assert!(tokenizer().decode(&[1_000_000], false).is_err());
    }

    #[test]
    fn bos_is_added_only_where_the_tokenizer_says_so() {
        assert!(!tokenizer().adds_bos());
        let llama = llama_tokenizer();
        assert!(llama.adds_bos());
        assert_eq!(llama.encode("he", true).unwrap()[0], 1);
        assert_ne!(llama.encode("he", false).unwrap()[0], 1);
    }

    #[test]
    fn special_tokens_are_recognised_and_skipped() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("<|im_start|>he<|im_end|>", false).unwrap();
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_start|>he<|im_end|>");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "he");
        assert!(tokenizer.is_added(2) && !tokenizer.is_added(ids[1]));
    }

    proptest! {
        #[test]
        fn text_survives_and_offsets_cover_it(text in "\\PC{0,40}") {
            let tokenizer = tokenizer();
            let encoded = tokenizer.encode_with_offsets(&text, false).unwrap();
            prop_assert_eq!(&encoded.ids, &tokenizer.encode(&text, false).unwrap());
            prop_assert_eq!(tokenizer.decode(&encoded.ids, false).unwrap(), text.clone());
            let mut covered = 0;
            for (start, end) in encoded.offsets {
                prop_assert!(start <= covered && covered <= end.max(covered) && text.is_char_boundary(start));
                covered = covered.max(end);
            }
            prop_assert_eq!(covered, text.len());
        }
    }
}
