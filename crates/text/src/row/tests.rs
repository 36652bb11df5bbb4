use super::*;
use proptest::prelude::*;

fn rows_of(name: &str, content: &[u8], options: RowOptions) -> Result<Vec<Row>> {
    parse(Path::new(name), content.to_vec(), options)
}

fn json(content: &str) -> Result<Vec<Row>> {
    rows_of("d.jsonl", content.as_bytes(), RowOptions::default())
}

fn refusal(content: &str) -> String {
    let error = json(content).unwrap_err();
    assert!(matches!(error, Error::Input(_)), "{error:?}");
    error.to_string()
}

fn kinds(rows: Vec<Row>) -> Vec<RowKind> {
    rows.into_iter().map(|row| row.kind).collect()
}

fn texts(rows: Vec<Row>) -> Vec<(usize, String)> {
    rows.into_iter()
        .map(|row| match row.kind {
            RowKind::Text(text) => (row.line, text),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn all_formats_are_read() {
    assert_eq!(kinds(json("{\"text\": \"a\", \"id\": 7}\n").unwrap()), [RowKind::Text("a".into())]);
    let pair = RowKind::PromptCompletion { prompt: "p".into(), completion: "c".into() };
    assert_eq!(kinds(json(r#"{"prompt": "p", "completion": "c"}"#).unwrap()), [pair]);
    let (user, assistant) = (Message::new("user", "u"), Message::new("assistant", "a"));
    let both = vec![user.clone(), assistant.clone()];
    let row =
        r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "tools": [1]}"#;
    let tools = Some(serde_json::json!([1]));
    assert_eq!(kinds(json(row).unwrap()), [RowKind::Messages { messages: both.clone(), trained_from: 0, tools }]);
    let row =
        r#"{"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]}"#;
    assert_eq!(kinds(json(row).unwrap()), [RowKind::Messages { messages: both, trained_from: 1, tools: None }]);
    let row = r#"{"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u", "a"]]}"#;
    let messages = vec![
        Message::new("system", "s"),
        user,
        assistant,
        Message::new("user", "i\nx"),
        Message::new("assistant", "o"),
    ];
    assert_eq!(kinds(json(row).unwrap()), [RowKind::Messages { messages, trained_from: 0, tools: None }]);
    let row = r#"{"instruction": "i", "input": "", "output": "o", "history": null}"#;
    let messages = vec![Message::new("user", "i"), Message::new("assistant", "o")];
    assert_eq!(kinds(json(row).unwrap()), [RowKind::Messages { messages, trained_from: 0, tools: None }]);
}

#[test]
fn marks_blank_lines_and_line_ends_of_other_systems_are_tolerated() {
    let rows = json("\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n").unwrap();
    assert_eq!(texts(rows), [(1, "a".into()), (3, "b".into())]);
}

#[test]
fn a_json_list_is_read_with_its_lines() {
    let rows = json("\n[\n  {\"text\": \"a\"},\n  {\n  \"text\": \"b\"}\n]").unwrap();
    assert_eq!(texts(rows), [(3, "a".into()), (4, "b".into())]);
    assert!(refusal("[\n{\"text\": 3}]").contains("line 2: \"text\" must be a string, this is a number"));
    let text = refusal("[\n{\"text\": \"a\"\n");
    assert!(text.contains("line 3") && text.contains("broken JSON"), "{text}");
}

#[test]
fn text_files_are_cut_as_asked() {
    let content = "\u{feff}one\r\ntwo\r\n\r\n \r\nthree\r\n";
    let run = |text_rows| texts(rows_of("d.txt", content.as_bytes(), RowOptions { text_rows, format: None }).unwrap());
    assert_eq!(run(TextRows::File), [(1, "one\ntwo\n\n \nthree\n".into())]);
    assert_eq!(run(TextRows::Line), [(1, "one".into()), (2, "two".into()), (5, "three".into())]);
    assert_eq!(run(TextRows::Paragraph), [(1, "one\ntwo".into()), (5, "three".into())]);
    assert!(rows_of("d.TXT", b" \n", RowOptions::default()).unwrap().is_empty());
}

#[test]
fn broken_json_has_line_and_column() {
    let text = refusal("{\"text\": \"a\"}\n{\"text\": \"b\",}\n");
    assert!(text.starts_with("d.jsonl, line 2, column 14: broken JSON: trailing comma;"), "{text}");
    assert!(refusal("{\n\"text\": \"a\"}").contains("one complete JSON object"));
    assert!(refusal("3").contains("a row must be a JSON object, this is a number"));
}

#[test]
fn broken_utf8_has_its_offset() {
    let error = rows_of("d.txt", b"ab\xff", RowOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "d.txt: byte 2 is not valid UTF-8; save the file as UTF-8");
}

#[test]
fn wrong_keys_are_named_with_the_nearest_known_one() {
    let text = refusal("{\"text\": \"a\"}\n{\"txet\": \"b\"}");
    assert!(text.contains("line 2: the keys are \"txet\"; expected are text, or prompt + completion"), "{text}");
    assert!(text.ends_with("did you mean \"text\" instead of \"txet\"?"), "{text}");
    assert!(refusal(r#"{"prompt": "p", "Completions": "c"}"#).contains("did you mean \"completion\""));
    assert!(refusal(r#"{"instruction": "i", "inputs": "x", "output": "o"}"#).contains("did you mean \"input\"?"));
    assert!(refusal("{}").contains("there are no keys"));
    assert!(refusal(r#"{"text": null}"#).contains("expected are"));
    let text = refusal(r#"{"conversations": []}"#);
    assert!(text.contains("\"conversations\"") && !text.contains("did you mean"), "{text}");
}

#[test]
fn mixed_and_ambiguous_rows_are_refused() {
    let text = refusal("{\"messages\": [{\"role\": \"user\"}]}\n{\"text\": \"a\"}\n{\"text\": \"b\"}");
    assert!(text.starts_with("d.jsonl, line 1: ") && text.contains("2 of text (first at line 2)"), "{text}");
    let both = r#"{"instruction": "i", "output": "o", "text": "t"}"#;
    assert!(refusal(both).contains("fit several formats (text, alpaca); say which with row_format"));
    let options = RowOptions { format: Some(RowFormat::Text), ..RowOptions::default() };
    assert_eq!(texts(rows_of("d.jsonl", both.as_bytes(), options).unwrap()), [(1, "t".into())]);
    let error = rows_of("d.jsonl", br#"{"prompt": "p", "completion": "c"}"#, options).unwrap_err().to_string();
    assert!(error.ends_with("expected are text"), "{error}");
}

#[test]
fn wrong_values_are_named() {
    assert!(
        refusal(r#"{"prompt": "p", "completion": []}"#).contains("\"prompt\" is a string and \"completion\" is a list")
    );
    assert!(refusal(r#"{"messages": []}"#).contains("empty list"));
    assert!(refusal(r#"{"messages": "hi"}"#).contains("must be a list of messages, this is a string"));
    let text = refusal(r#"{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}"#);
    assert!(text.contains("message 2 of \"messages\"") && text.contains("role"), "{text}");
    assert!(refusal(r#"{"messages": [{"role": "user", "content": 5}]}"#).contains("must be a string or a list"));
    assert!(refusal(r#"{"instruction": 1, "output": "o"}"#).contains("\"instruction\" must be a string"));
    assert!(refusal(r#"{"instruction": "i", "output": "o", "history": [["a"]]}"#).contains("[user, assistant] pairs"));
}

#[test]
fn an_empty_data_set_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.jsonl"), "\n\n").unwrap();
    let error = read(&[folder.path().display().to_string()], RowOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Input(text) if text.contains("no rows")), "{error:?}");
}

#[test]
fn equal_rows_hash_alike_wherever_they_stand() {
    let rows = json("{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \"a\", \"id\": 3}").unwrap();
    let hashes: Vec<_> = rows.iter().map(|row| row.content_hash().unwrap()).collect();
    assert_eq!(hashes[0], hashes[2]);
    assert_ne!(hashes[0], hashes[1]);
}

proptest! {
    #[test]
    fn any_bytes_give_rows_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = rows_of("d.jsonl", &bytes, RowOptions::default());
        let _ = rows_of("d.txt", &bytes, RowOptions::default());
    }

    #[test]
    fn texts_survive_json(texts_in in proptest::collection::vec(".{0,20}", 1..8)) {
        let lines: Vec<_> = texts_in.iter().map(|t| serde_json::json!({"text": t}).to_string()).collect();
        let rows = json(&lines.join("\n")).unwrap();
        let out: Vec<_> = texts(rows).into_iter().map(|(_, text)| text).collect();
        prop_assert_eq!(out, texts_in.clone());
        let rows = json(&format!("[{}]", lines.join(",\r\n"))).unwrap();
        let out: Vec<_> = texts(rows).into_iter().map(|(_, text)| text).collect();
        prop_assert_eq!(out, texts_in);
    }
}
