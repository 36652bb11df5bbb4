use super::*;
use crate::{GgufVocabulary, fixture};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Pieces of text in which the rules, the tables of characters and the merges can go wrong.
const PIECES: &[&str] = &[
    "the",
    " the",
    "he",
    "ll",
    "l",
    "hell",
    "hello",
    "Hello",
    " world",
    "don't",
    "I'LL",
    "we've",
    "'s",
    "'S",
    "'ſ",
    "'re",
    "'RE",
    "'",
    "''",
    "1",
    "12",
    "1234567",
    "½",
    "²",
    "٣",
    "१",
    "Ⅷ",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n ",
    "\u{a0}",
    "\u{2003}",
    "\u{3000}",
    "\u{85}",
    "\u{200b}",
    "\u{feff}",
    ".",
    "...",
    "!?",
    "({[",
    "--",
    "_",
    "é",
    "e\u{301}",
    "\u{301}",
    "ß",
    "ǅ",
    "ª",
    "ﬆ",
    "İ",
    "K",
    "中文",
    "日本語。",
    "ไทย",
    "한국",
    "हिन्दी",
    "עברית",
    "🙂",
    "👩‍👩‍👧",
    "𝔘",
    "\u{10ffff}",
    "\0",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "|>",
    "<",
    "x<|im_end|>y",
    "Ġ",
    "Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => proptest::sample::select(PIECES).prop_map(str::to_owned),
        2 => "[a-h ']{1,6}",
        1 => any::<char>().prop_map(String::from),
        1 => "\\PC{1,3}",
    ];
    proptest::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// A vocabulary of all bytes and of pairs of what stands before them, with merges in a random order.
fn vocabulary(pairs: &[(prop::sample::Index, prop::sample::Index)], order: &[u16], pre: &str) -> GgufVocabulary {
    let mut vocabulary = fixture::byte_level_vocabulary();
    vocabulary.pre = Some(pre.into());
    let fits = |token: &String| token.chars().count() <= 12;
    let mut merges = Vec::new();
    for (left, right) in pairs {
        // Not the special tokens; the letters of words more often than rare bytes.
        let common: Vec<&String> = vocabulary.tokens[3..]
            .iter()
            .filter(|token| fits(token) && token.chars().all(|c| "Ġabcdefghlorstw'1ÃÂ¤Ċ".contains(c)))
            .collect();
        let (left, right) = (left.get(&common).to_string(), right.get(&common).to_string());
        let joined = format!("{left}{right}");
        if !vocabulary.tokens.contains(&joined) {
            vocabulary.tokens.push(joined);
            vocabulary.token_types.push(1);
        }
        merges.push(format!("{left} {right}"));
    }
    vocabulary.merges.extend(merges);
    let mut merges: Vec<(u16, String)> = vocabulary
        .merges
        .iter()
        .enumerate()
        .map(|(i, m)| (order[i % order.len()].rotate_left(i as u32), m.clone()))
        .collect();
    merges.sort();
    merges.dedup_by(|a, b| a.1 == b.1);
    vocabulary.merges = merges.into_iter().map(|(_, merge)| merge).collect();
    vocabulary
}

/// The tokenizer of `vocabulary`, with parts of its `tokenizer.json` put in place of others.
fn library(vocabulary: GgufVocabulary, parts: &[(&str, Value)]) -> tokenizers::Tokenizer {
    let (tokenizer, ..) = crate::gguf::build(vocabulary).unwrap();
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap();
    for (name, part) in parts {
        *json.pointer_mut(name).unwrap() = part.clone();
    }
    tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
}

/// Both ways give the same, or the encoder leaves the text to the library.
fn same(tokenizer: &tokenizers::Tokenizer, encoder: &Encoder, text: &str) -> bool {
    let want = tokenizer.encode(text, false).unwrap();
    let Some(got) = encoder.encode(text, true) else { return false };
    assert_eq!(got.ids, want.get_ids(), "{text:?}");
    assert_eq!(got.offsets, want.get_offsets(), "{text:?}");
    // A second time from the table, and without places.
    assert_eq!(encoder.encode(text, false).unwrap().ids, got.ids, "{text:?}");
    true
}

fn byte_level(regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex})
}

/// Ways to cut words that must be supported.
fn pre_tokenizers() -> Vec<Value> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let digits = |each: bool| json!({"type": "Digits", "individual_digits": each});
    let sequence = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
    vec![
        byte_level(true),
        byte_level(false),
        sequence(&[digits(true), byte_level(true)]),
        sequence(&[digits(false), byte_level(true)]),
        sequence(&[digits(false), byte_level(false)]),
        sequence(&[split("[0-9]"), byte_level(true)]),
        sequence(&[split(words::LLAMA3), byte_level(false)]),
        sequence(&[split(words::QWEN2), byte_level(false)]),
        sequence(&[split(words::GPT2), byte_level(false)]),
        sequence(&[digits(true), sequence(&[split(words::LLAMA3), byte_level(false)])]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn ids_and_places_are_those_of_the_library(
        pairs in proptest::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..60),
        order in proptest::collection::vec(any::<u16>(), 1..40),
        pre in proptest::sample::select(pre_tokenizers()),
        ignore_merges: bool,
        nfc: bool,
        post in 0..4,
        normalized: bool,
        texts in proptest::collection::vec(texts(), 1..6),
    ) {
        let template = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}});
        let trim = |prefix: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true});
        let post = match post {
            0 => Value::Null,
            1 => trim(true),
            2 => json!({"type": "Sequence", "processors": [trim(false), template]}),
            _ => template,
        };
        let parts = [
            ("/pre_tokenizer", pre),
            ("/model/ignore_merges", ignore_merges.into()),
            ("/normalizer", if nfc { json!({"type": "NFC"}) } else { Value::Null }),
            ("/post_processor", post),
            ("/added_tokens/0/normalized", normalized.into()),
        ];
        let tokenizer = library(vocabulary(&pairs, &order, "gpt2"), &parts);
        let encoder = Encoder::new(&tokenizer).unwrap();
        for text in &texts {
            let done = same(&tokenizer, &encoder, text);
            prop_assert!(done || nfc, "{:?} was left to the library", text);
        }
    }
}

#[test]
fn every_character_is_cut_as_the_library_does() {
    for pre in pre_tokenizers() {
        let tokenizer = library(vocabulary(&[], &[1], "gpt2"), &[("/pre_tokenizer", pre)]);
        let encoder = Encoder::new(&tokenizer).unwrap();
        // Many characters in one text, each in every surrounding that a rule looks at.
        let characters: Vec<char> = ('\0'..='\u{2ffff}').step_by(31).collect();
        for part in characters.chunks(200) {
            let text: String = part.iter().map(|c| format!("a{c}{c}b '{c} {c}1{c}\n{c} \r{c}")).collect();
            assert!(same(&tokenizer, &encoder, &text));
        }
    }
}

#[test]
fn contractions_ignore_case_as_the_library_does() {
    let parts = [("/pre_tokenizer", pre_tokenizers()[6].clone())];
    let tokenizer = library(vocabulary(&[], &[1], "gpt2"), &parts);
    let encoder = Encoder::new(&tokenizer).unwrap();
    let letters: Vec<char> = "sStTrReEvVmMlLdDſﬀﬁﬂﬃﬄﬅﬆßẞKİıŉ".chars().collect();
    for a in &letters {
        for b in &letters {
            assert!(same(&tokenizer, &encoder, &format!("x'{a}{b}'{a} '{b}x'{a}{b}e")));
        }
    }
}

#[test]
fn long_words_are_merged_in_the_same_order() {
    let pairs: Vec<(prop::sample::Index, prop::sample::Index)> = Vec::new();
    let mut vocabulary = vocabulary(&pairs, &[3, 1, 2], "gpt2");
    for merge in ["a a", "aa a", "a b", "b a", "ab a", "aa aa", "aaaa aaaa", "ba ba"] {
        vocabulary.tokens.push(merge.replace(' ', ""));
        vocabulary.token_types.push(1);
        vocabulary.merges.push(merge.into());
    }
    vocabulary.tokens.dedup();
    let (tokenizer, ..) = crate::gguf::build(vocabulary).unwrap();
    let encoder = Encoder::new(&tokenizer).unwrap();
    for length in [1, 15, 16, 17, 39, 40, 41, 42, 100, 1000, 20_000] {
        for step in [1, 2, 3, 5, 7, 1000] {
            let text: String = (0..length).map(|i| if i % step == step - 1 { 'b' } else { 'a' }).collect();
            assert!(same(&tokenizer, &encoder, &text));
        }
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let refusal = |parts: &[(&str, Value)]| Encoder::new(&library(vocabulary(&[], &[1], "gpt2"), parts)).unwrap_err();
    let mut prefix = byte_level(true);
    prefix["add_prefix_space"] = true.into();
    assert!(refusal(&[("/pre_tokenizer", prefix)]).contains("blank is put before"));
    let other = json!({"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": false});
    let removed = json!({"type": "Split", "pattern": {"Regex": words::GPT2}, "behavior": "Removed", "invert": false});
    for step in [other, removed, json!({"type": "Punctuation", "behavior": "Isolated"})] {
        let steps = json!({"type": "Sequence", "pretokenizers": [step, byte_level(false)]});
        assert!(refusal(&[("/pre_tokenizer", steps)]).contains("words are cut by"));
    }
    assert!(refusal(&[("/pre_tokenizer", json!({"type": "Whitespace"}))]).contains("into bytes"));
    assert!(refusal(&[("/normalizer", json!({"type": "Lowercase"}))]).contains("changed by Lowercase"));
    assert!(refusal(&[("/model/dropout", 0.5.into())]).contains("at random"));
    assert!(refusal(&[("/model/end_of_word_suffix", "</w>".into())]).contains("prefix or suffix"));
    assert!(refusal(&[("/added_tokens/1/lstrip", true.into())]).contains("<|im_start|>"));
    let roberta = json!({"type": "RobertaProcessing", "sep": ["h", 3], "cls": ["h", 3], "trim_offsets": true, "add_prefix_space": true});
    assert!(refusal(&[("/post_processor", roberta)]).contains("RobertaProcessing"));
    let (llama, ..) = crate::gguf::build(fixture::llama_vocabulary()).unwrap();
    assert!(Encoder::new(&llama).is_err());
}

#[test]
fn texts_that_need_the_library_are_left_to_it() {
    let mut missing = fixture::byte_level_vocabulary();
    let place = missing.tokens.iter().position(|token| token == "z").unwrap();
    missing.tokens[place] = "zzz".into();
    let (tokenizer, ..) = crate::gguf::build(missing).unwrap();
    let encoder = Encoder::new(&tokenizer).unwrap();
    assert_eq!(encoder.encode("he zoo", false), None);
    assert!(same(&tokenizer, &encoder, "he foo"));
    let tokenizer = library(vocabulary(&[], &[1], "gpt2"), &[("/normalizer", json!({"type": "NFC"}))]);
    let encoder = Encoder::new(&tokenizer).unwrap();
    assert_eq!(encoder.encode("e\u{301}", true), None);
    assert!(same(&tokenizer, &encoder, "é"));
}

#[test]
fn encoders_do_not_share_what_they_have_seen() {
    let mut other = fixture::byte_level_vocabulary();
    other.merges = vec!["h e".into()];
    let both = [fixture::byte_level_vocabulary(), other].map(|vocabulary| {
        let (tokenizer, ..) = crate::gguf::build(vocabulary).unwrap();
        let encoder = Encoder::new(&tokenizer).unwrap();
        (tokenizer, encoder)
    });
    for _ in 0..2 {
        for (tokenizer, encoder) in &both {
            assert!(same(tokenizer, encoder, " the hell hell"));
        }
    }
}

#[test]
fn a_tokenizer_gives_the_same_before_and_after() {
    let tokenizer = fixture::tokenizer();
    let text = "<|im_start|>user\nthe hell  11<|im_end|>\n";
    let before = (tokenizer.encode_with_offsets(text, false).unwrap(), tokenizer.encode(text, true).unwrap());
    let clone = tokenizer.clone();
    assert_eq!(clone.for_bulk(), Ok(()));
    assert!(tokenizer.encode_with_offsets(text, false).unwrap() == before.0);
    assert_eq!(tokenizer.encode(text, false).unwrap(), before.0.ids);
    assert_eq!(tokenizer.encode(text, true).unwrap(), before.1);
    assert!(fixture::llama_tokenizer().for_bulk().unwrap_err().contains("words are not cut"));
}
