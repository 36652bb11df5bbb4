//! `tokenizer.model` files against the ids of the implementations that made them (fixtures/tokenizer_model/make.py).
#![allow(clippy::unwrap_used)]

use serde::Deserialize;
use std::{fs, path::PathBuf};
use tunesmith_text::{Error, Tokenizer};

#[derive(Deserialize)]
struct Expected {
    rows: Vec<Row>,
    special: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    text: String,
    ids: Vec<u32>,
    #[serde(default)]
    decoded: Option<String>,
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer_model").join(name)
}

/// A folder with the fixture's `tokenizer.model` and `config` as tokenizer_config.json.
fn folder(name: &str, config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture(name).join("tokenizer.model"), folder.path().join("tokenizer.model")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    folder
}

/// Every text gives the reference's ids and, where that can be said, its text again; so does what is saved.
fn check(name: &str, decodes: impl Fn(&Row) -> bool) {
    let expected = fs::read_to_string(fixture(name).join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_str(&expected).unwrap();
    assert!(expected.rows.len() > 100, "{}", expected.rows.len());
    let read = Tokenizer::from_folder(&fixture(name)).unwrap();
    let saved = tempfile::tempdir().unwrap();
    read.save(saved.path()).unwrap();
    let again = Tokenizer::from_folder(saved.path()).unwrap();
    assert_eq!(read.special_tokens(), again.special_tokens());
    assert_eq!((read.adds_bos(), again.adds_bos()), (true, true));
    let mut wrong = Vec::new();
    for (which, tokenizer) in [("read", &read), ("saved", &again)] {
        for row in expected.rows.iter().chain(&expected.special) {
            let ids = tokenizer.encode(&row.text, false).unwrap();
            if ids != row.ids {
                wrong.push(format!("{which}: {:?}: {ids:?} instead of {:?}", row.text, row.ids));
            }
            let with_bos = tokenizer.encode(&row.text, true).unwrap();
            assert_eq!(with_bos[1..], ids, "{:?}", row.text);
            assert_eq!(Some(with_bos[0]), tokenizer.bos_id());
            if let Some(text) = row.decoded.as_ref().filter(|_| decodes(row)) {
                let decoded = tokenizer.decode(&row.ids, false).unwrap();
                if decoded != *text {
                    wrong.push(format!("{which}: {:?} is decoded as {decoded:?} instead of {text:?}", row.ids));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_sentencepiece_model_gives_sentencepieces_ids() {
    check("llama", |_| true);
    let tokenizer = Tokenizer::from_folder(&fixture("llama")).unwrap();
    let special = tokenizer.special_tokens();
    assert_eq!(
        (special.bos.as_deref(), special.eos.as_deref(), special.unk.as_deref(), special.pad.as_deref()),
        (Some("<s>"), Some("</s>"), Some("<unk>"), None)
    );
    assert_eq!(tokenizer.vocab_size(), 500);
}

#[test]
fn flags_of_the_normalizer_and_user_defined_symbols_are_kept() {
    // SentencePiece shows the unknown token, id 0, as another text than its name.
    check("spaces", |row| !row.ids.contains(&0));
    check("bare", |_| true);
}

#[test]
fn a_rank_file_gives_tiktokens_ids() {
    check("ranks", |_| true);
    let tokenizer = Tokenizer::from_folder(&fixture("ranks")).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.vocab_size()), (Some(500), Some(501), 756));
    assert_eq!(tokenizer.token_to_id("<|eom_id|>"), None);
    let folder = folder("ranks", r#"{"eos_token": "<|eot_id|>", "add_bos_token": false, "add_eos_token": true}"#);
    fs::write(folder.path().join("config.json"), r#"{"rope_scaling": {"rope_type": "llama3"}}"#).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.token_to_id("<|eom_id|>"), Some(508));
    assert_eq!(tokenizer.encode("", true).unwrap(), [509]);
}

#[test]
fn configurations_add_and_rename_tokens() {
    let first = folder(
        "llama",
        r#"{"pad_token": "<pad>", "added_tokens_decoder": {
            "0": {"content": "<none>", "special": true}, "500": {"content": "<pad>", "special": true},
            "501": {"content": "<call>", "special": false, "normalized": false}}}"#,
    );
    let tokenizer = Tokenizer::from_folder(first.path()).unwrap();
    assert_eq!((tokenizer.pad_id(), tokenizer.vocab_size()), (Some(500), 502));
    assert_eq!(tokenizer.token_to_id("<none>"), Some(0));
    assert_eq!(tokenizer.encode("<call><pad><none>", false).unwrap(), [501, 500, 0]);
    assert_eq!(tokenizer.decode(&[501, 500], true).unwrap(), "<call>");
    fs::write(first.path().join("tokenizer_config.json"), r#"{"pad_token": "[PAD]"}"#).unwrap();
    fs::write(first.path().join("added_tokens.json"), r#"{"[PAD]": 500}"#).unwrap();
    assert_eq!(Tokenizer::from_folder(first.path()).unwrap().pad_id(), Some(500));

    let ranks = r#"{"bos_token": "<b>", "added_tokens_decoder": {"500": {"content": "<b>", "special": true}}}"#;
    let tokenizer = Tokenizer::from_folder(folder("ranks", ranks).path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.vocab_size()), (Some(500), None, 501));
    assert_eq!(tokenizer.encode("", true).unwrap(), [500]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let refused = |content: &[u8], config: &str| {
        let folder = folder("llama", config);
        if !content.is_empty() {
            fs::write(folder.path().join("tokenizer.model"), content).unwrap();
        }
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error:?}");
        error.to_string()
    };
    assert!(refused(b"version https://git-lfs.github.com/spec/v1\n", "{}").contains("git lfs pull"));
    assert!(refused(b"nonsense", "{}").contains("neither a SentencePiece model nor a tiktoken file"));
    let half = fs::read(fixture("llama").join("tokenizer.model")).unwrap();
    assert!(refused(&half[..3000], "{}").contains("damaged or incomplete"));
    // A model of type unigram: one piece, and model_type (field 3 of field 2) 1.
    let text = refused(b"\x0a\x03\x0a\x01a\x12\x02\x18\x01", "{}");
    assert!(
        text.contains("tokenizer.model: a SentencePiece model of type unigram") && text.contains("save_pretrained"),
        "{text}"
    );
    let gap = refused(b"", r#"{"added_tokens_decoder": {"700": {"content": "<x>"}}}"#);
    assert!(gap.contains("\"<x>\" the id 700, but it would get 500"), "{gap}");
    assert!(refused(b"", r#"{"added_tokens_decoder": {"a": {}}}"#).contains("added_tokens_decoder.a is {}"));
    assert!(refused(b"", r#"{"eos_token": "<nope>"}"#).contains("eos_token is \"<nope>\""));
}
