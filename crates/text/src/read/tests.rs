//! Files written by pyarrow and `datasets` (`fixtures/formats/make.py`), and damaged ones.
use crate::{Error, Message, PrepareOptions, Row, RowFormat, RowKind, RowOptions, Turns, fixture::read_file, source};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name)
}

fn options() -> RowOptions {
    RowOptions::of(&PrepareOptions::default()).expect("the defaults are in range")
}

fn rows(path: &Path, options: &RowOptions) -> Result<Vec<Row>, Error> {
    read_file(path, options)?.collect()
}

fn kinds(name: &str, options: &RowOptions) -> Vec<RowKind> {
    rows(&fixture(name), options).expect("the fixture is sound").into_iter().map(|row| row.kind).collect()
}

#[test]
fn nested_columns_become_conversations_in_every_codec() {
    let names = ["snappy", "zstd", "gzip", "lz4", "none"].map(|codec| format!("chats-{codec}.parquet"));
    let names = names.into_iter().chain(["lz4", "zstd"].map(|codec| format!("chats-{codec}.feather")));
    for name in names {
        let [first, second] = &kinds(&name, &options())[..] else { panic!("{name} has two rows") };
        let hello = vec![Message::new("user", "Hi"), Message::new("assistant", "Hello.")];
        let expected = RowKind::Messages { messages: hello, trained_from: 0, tools: None };
        assert_eq!(*first, expected, "{name}: fields that a message does not have are not there");
        let RowKind::Messages { messages, tools: Some(tools), .. } = second else { panic!("{name}: {second:?}") };
        assert_eq!(tools[0]["function"]["name"], "weather");
        assert_eq!(messages[2].content, "");
        assert_eq!(messages[2].extra["tool_calls"][0]["function"]["arguments"]["city"], "Köln");
        assert_eq!(messages[4], Message::new("assistant", "18 °C."));
    }
}

#[test]
fn strings_are_read_in_every_form_and_rows_without_one_are_named() {
    for name in ["large", "view", "dictionary"] {
        let path = fixture(&format!("text-{name}.parquet"));
        let found: Vec<_> = read_file(&path, &options()).unwrap().collect();
        let text = |index: usize| match &found[index] {
            Ok(Row { kind: RowKind::Text(text), line, .. }) => (text.clone(), *line),
            other => panic!("{other:?}"),
        };
        assert_eq!([text(0), text(2), text(3)], [("one".into(), 1), ("three".into(), 3), ("one".into(), 4)]);
        let error = found[1].as_ref().unwrap_err().to_string();
        assert!(error.contains(&format!("text-{name}.parquet, row 2: the keys are \"text\"")), "{error}");
    }
    let mut options = options();
    options.columns.insert("text".into(), "picture".into());
    let error = rows(&fixture("text-view.parquet"), &options).unwrap_err().to_string();
    assert!(error.contains("column \"picture\" has the type Binary, which cannot be read as text"), "{error}");
}

#[test]
fn class_labels_have_their_names() {
    let expected = [("Dull.", "negative"), ("Great!", "positive"), ("Meh.", "negative")]
        .map(|(text, label)| RowKind::Labelled { text: Turns::Text(text.into()), label: label.into() });
    assert_eq!(kinds("reviews.parquet", &options()), expected);
    assert_eq!(kinds("reviews/train/data-00000-of-00001.arrow", &options()), expected);
    let numbered = ["0", "1", "0"];
    for name in ["reviews.csv", "reviews.jsonl.gz"] {
        let labels = kinds(name, &options()).into_iter().map(|kind| match kind {
            RowKind::Labelled { label, .. } => label,
            other => panic!("{other:?}"),
        });
        assert_eq!(labels.collect::<Vec<_>>(), numbered, "{name}");
    }
    let mut text = options();
    text.format = Some(RowFormat::Text);
    assert_eq!(kinds("reviews.csv", &text)[1], RowKind::Text("Great!".into()));
}

#[test]
fn a_saved_dataset_is_its_arrow_files_and_splits_are_not_mixed() {
    let place = |name: &str| fixture(name).display().to_string();
    let [file] = &source::files(&[place("reviews/train")]).unwrap()[..] else { panic!("one file") };
    assert_eq!(file.path(), fixture("reviews/train/data-00000-of-00001.arrow"));
    assert!(source::files(&[place("reviews")]).unwrap_err().to_string().contains("holds several splits"));
}

#[test]
fn lists_of_structures_and_pairs_are_understood() {
    let hello = vec![Message::new("user", "Hi"), Message::new("assistant", "Hello.")];
    let expected = [RowKind::Messages { messages: hello, trained_from: 0, tools: None }];
    assert_eq!(kinds("sharegpt-columns.parquet", &options()), expected);
    let answer = |text: &str| Turns::Messages(vec![Message::new("assistant", text)]);
    let prompt = Turns::Messages(vec![Message::new("user", "2 + 2?")]);
    let pair = RowKind::Preference { prompt, chosen: answer("4"), rejected: answer("5"), tools: None };
    assert_eq!(kinds("pairs.parquet", &options()), [pair]);
}

#[test]
fn a_file_that_is_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.parquet", "a.arrow", "a.feather"] {
        for content in ["", "{\"text\": \"a\"}\n", "ARROW1\0\0", "PAR1PAR1"] {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            let error = rows(&path, &options()).unwrap_err();
            assert!(matches!(&error, Error::Input(text) if text.contains(name)), "{name} {content:?}: {error:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn no_damage_to_a_columnar_file_makes_it_crash(
        which in 0_usize..5,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let names = [
            "chats-snappy.parquet", "chats-zstd.feather", "reviews/train/data-00000-of-00001.arrow",
            "text-dictionary.parquet", "chats-lz4.feather",
        ];
        let original = fixture(names[which]);
        let mut bytes = std::fs::read(&original).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(original.file_name().unwrap());
        std::fs::write(&path, bytes).unwrap();
        if let Ok(found) = read_file(&path, &options()) {
            for row in found {
                if let Err(error) = row {
                    prop_assert!(matches!(error, Error::Input(_)), "{error:?}");
                }
            }
        }
    }
}
