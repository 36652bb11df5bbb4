use super::*;
use crate::{PrepareOptions, TextRows, fixture::read_file, input::Encoding};
use proptest::prelude::*;
use serde_json::json;
use std::fs;

fn defaults() -> RowOptions {
    RowOptions::of(&PrepareOptions::default()).unwrap()
}

/// The rows of a file that is called `name` and holds `content`; errors name it without its folder.
fn rows_of(name: &str, content: &[u8], options: &RowOptions) -> Result<Vec<Row>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    let rows = read_file(&path, options).and_then(|rows| rows.collect());
    rows.map_err(|error| match error {
        Error::Input(text) => Error::Input(text.replace(&format!("{}/", folder.path().display()), "")),
        other => other,
    })
}

fn read(content: &str) -> Result<Vec<Row>> {
    rows_of("d.jsonl", content.as_bytes(), &defaults())
}

fn with(change: impl FnOnce(&mut RowOptions)) -> RowOptions {
    let mut options = defaults();
    change(&mut options);
    options
}

fn refusal(content: &str) -> String {
    let error = read(content).unwrap_err();
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
    assert_eq!(kinds(read("{\"text\": \"a\", \"id\": 7}\n").unwrap()), [RowKind::Text("a".into())]);
    let pair = RowKind::PromptCompletion { prompt: "p".into(), completion: "c".into() };
    assert_eq!(kinds(read(r#"{"prompt": "p", "completion": "c"}"#).unwrap()), [pair]);
    let (user, assistant) = (Message::new("user", "u"), Message::new("assistant", "a"));
    let both = vec![user.clone(), assistant.clone()];
    let row =
        r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "tools": [1]}"#;
    let tools = Some(serde_json::json!([1]));
    assert_eq!(kinds(read(row).unwrap()), [RowKind::Messages { messages: both.clone(), trained_from: 0, tools }]);
    let row =
        r#"{"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]}"#;
    assert_eq!(kinds(read(row).unwrap()), [RowKind::Messages { messages: both, trained_from: 1, tools: None }]);
    let row = r#"{"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u", "a"]]}"#;
    let messages = vec![
        Message::new("system", "s"),
        user,
        assistant,
        Message::new("user", "i\nx"),
        Message::new("assistant", "o"),
    ];
    assert_eq!(kinds(read(row).unwrap()), [RowKind::Messages { messages, trained_from: 0, tools: None }]);
    let row = r#"{"instruction": "i", "input": "", "output": "o", "history": null}"#;
    let messages = vec![Message::new("user", "i"), Message::new("assistant", "o")];
    assert_eq!(kinds(read(row).unwrap()), [RowKind::Messages { messages, trained_from: 0, tools: None }]);
}

#[test]
fn marks_blank_lines_and_line_ends_of_other_systems_are_tolerated() {
    let rows = read("\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n").unwrap();
    assert_eq!(texts(rows), [(1, "a".into()), (3, "b".into())]);
}

#[test]
fn a_json_list_is_read_with_its_lines() {
    let rows = read("\n[\n  {\"text\": \"a\"},\n  {\n  \"text\": \"b\"}\n]").unwrap();
    assert_eq!(texts(rows), [(3, "a".into()), (4, "b".into())]);
    assert!(refusal("[\n{\"text\": 3}]").contains("line 2: \"text\" must be a string, this is a number"));
    let text = refusal("[\n{\"text\": \"a\"\n");
    assert!(text.contains("line 3") && text.contains("broken JSON"), "{text}");
}

#[test]
fn text_files_are_cut_as_asked() {
    let content = "\u{feff}one\r\ntwo\r\n\r\n \r\nthree\r\n";
    let run = |rows| texts(rows_of("d.txt", content.as_bytes(), &with(|o| o.text_rows = rows)).unwrap());
    assert_eq!(run(TextRows::File), [(1, "one\ntwo\n\n \nthree\n".into())]);
    assert_eq!(run(TextRows::Line), [(1, "one".into()), (2, "two".into()), (5, "three".into())]);
    assert_eq!(run(TextRows::Paragraph), [(1, "one\ntwo".into()), (5, "three".into())]);
    assert!(rows_of("d.TXT", b" \n", &defaults()).unwrap().is_empty());
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
    let text = rows_of("d.txt", b"ab\xff", &defaults()).unwrap_err().to_string();
    assert!(text.starts_with("d.txt, line 1: byte 2 is not valid UTF-8; save the file as UTF-8"), "{text}");
    let auto = with(|o| o.encoding = Encoding::Auto);
    let mixed = b"{\"text\": \"\xe4\"}\n{\"text\": \"\xc3\xa4\"}";
    assert_eq!(texts(rows_of("d.jsonl", mixed, &auto).unwrap()), [(1, "ä".into()), (2, "ä".into())]);
    assert!(rows_of("d.jsonl", mixed, &defaults()).unwrap_err().to_string().contains("d.jsonl, line 1: byte 10"));
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
    let text = refusal(r#"{"question": "q"}"#);
    assert!(
        text.contains("\"question\"") && text.ends_with("name yours with columns = { prompt = \"...\" }"),
        "{text}"
    );
}

#[test]
fn ambiguous_rows_are_refused() {
    let both = r#"{"instruction": "i", "output": "o", "text": "t"}"#;
    assert!(refusal(both).contains("fit several formats (text, alpaca); say which with row_format"));
    let options = with(|o| o.format = Some(RowFormat::Text));
    assert_eq!(texts(rows_of("d.jsonl", both.as_bytes(), &options).unwrap()), [(1, "t".into())]);
    let error = rows_of("d.jsonl", br#"{"prompt": "p", "completion": "c"}"#, &options).unwrap_err().to_string();
    assert!(error.contains("expected are text;"), "{error}");
}

#[test]
fn wrong_values_are_named() {
    assert!(
        refusal(r#"{"prompt": "p", "completion": [{"role": "user", "content": "c"}]}"#)
            .contains("\"prompt\" is a string and \"completion\" is a list")
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
fn equal_rows_hash_alike_wherever_they_stand() {
    let rows = read("{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \"a\", \"id\": 3}").unwrap();
    let hashes: Vec<_> = rows.iter().map(|row| row.content_hash().unwrap()).collect();
    assert_eq!(hashes[0], hashes[2]);
    assert_ne!(hashes[0], hashes[1]);
}

fn one(row: Value) -> RowKind {
    kinds(read(&row.to_string()).unwrap()).remove(0)
}

fn says(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

#[test]
fn sharegpt_rows_with_their_roles_tools_and_calls() {
    let row = json!({"system": "s", "tools": "[{\"name\": \"f\"}]", "conversations": [
        {"from": "human", "value": "h"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"a\": 1}}"},
        {"from": "observation", "value": "o"}, {"from": "gpt", "value": "g"}]});
    let RowKind::Messages { messages, tools, trained_from: 0 } = one(row) else { panic!("messages") };
    assert_eq!(tools, Some(json!([{"name": "f"}])));
    assert_eq!([&messages[0], &messages[1]], [&Message::new("system", "s"), &Message::new("user", "h")]);
    assert_eq!((&messages[2].role[..], &messages[2].content[..]), ("assistant", ""));
    assert_eq!(messages[2].extra["tool_calls"][0]["function"], json!({"name": "f", "arguments": {"a": 1}}));
    assert_eq!(messages[3..], says(&[("tool", "o"), ("assistant", "g")]));
    assert!(
        refusal(r#"{"conversations": [{"from": "function_call", "value": "f()"}]}"#).contains("must be the JSON of")
    );
    let mapped = with(|o| {
        o.roles.insert("Kunde".into(), "user".into());
        o.columns =
            [("messages", "dialog"), ("role", "wer"), ("content", "was")].map(|(a, b)| (a.into(), b.into())).into();
    });
    let row = json!({"dialog": [{"wer": "Kunde", "was": "k"}, {"wer": "gpt", "was": "g"}]}).to_string();
    let RowKind::Messages { messages, .. } = kinds(rows_of("d.jsonl", row.as_bytes(), &mapped).unwrap()).remove(0)
    else {
        panic!("messages")
    };
    assert_eq!(messages, says(&[("user", "k"), ("assistant", "g")]));
}

#[test]
fn empty_fields_of_messages_are_not_there() {
    let row = json!({"messages": [{"role": "user", "content": "u", "tool_calls": null},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]}]});
    let RowKind::Messages { messages, .. } = one(row) else { panic!("messages") };
    assert!(messages[0].extra.is_empty());
    assert_eq!(messages[1].extra["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
    assert!(
        refusal(r#"{"messages": [{"role": "user"}]}"#).contains("message 1 of \"messages\": there is no \"content\"")
    );
}

#[test]
fn columns_are_mapped() {
    let options =
        with(|o| o.columns = [("prompt", "q"), ("completion", "a")].map(|(a, b)| (a.into(), b.into())).into());
    let run = |row: &str| rows_of("d.jsonl", row.as_bytes(), &options);
    let pair = RowKind::PromptCompletion { prompt: "Q".into(), completion: "A".into() };
    assert_eq!(kinds(run(r#"{"q": "Q", "a": "A", "id": 1}"#).unwrap()), [pair]);
    let text = run(r#"{"q": "Q"}"#).unwrap_err().to_string();
    assert!(text.contains("there is no \"a\", which columns.completion names; the keys are \"q\""), "{text}");
    let wrong = PrepareOptions { columns: [("promt".to_owned(), "q".to_owned())].into(), ..PrepareOptions::default() };
    assert!(RowOptions::of(&wrong).unwrap_err().to_string().contains("columns.promt: there is no such key"));
}

#[test]
fn preferences_in_every_form() {
    let text = |text: &str| Turns::Text(text.into());
    let user = Turns::Messages(says(&[("user", "p")]));
    let answer = |text: &str| Turns::Messages(says(&[("assistant", text)]));
    let messages = |c: &str| json!([{"role": "user", "content": "p"}, {"role": "assistant", "content": c}]);
    let pair = |prompt, chosen, rejected| RowKind::Preference { prompt, chosen, rejected, tools: None };
    let (c, r) = (|| answer("c"), || answer("r"));
    for (row, expected) in [
        (json!({"prompt": "p", "chosen": "c", "rejected": "r"}), pair(text("p"), text("c"), text("r"))),
        (json!({"chosen": "p c", "rejected": "p r"}), pair(text("p"), text(" c"), text(" r"))),
        (json!({"chosen": messages("c"), "rejected": messages("r")}), pair(user.clone(), c(), r())),
        (json!({"prompt": "p", "chosen": messages("c"), "rejected": messages("r")}), pair(user.clone(), c(), r())),
        (
            json!({"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "c"}],
                "rejected": [{"role": "assistant", "content": "r"}]}),
            pair(user.clone(), c(), r()),
        ),
        (json!({"instruction": "p", "chosen": "c", "rejected": "r"}), pair(user.clone(), c(), r())),
        (
            json!({"conversations": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "c"},
                "rejected": {"from": "gpt", "value": "r"}}),
            pair(user.clone(), c(), r()),
        ),
    ] {
        assert_eq!(one(row.clone()), expected, "{row}");
    }
    assert!(refusal(r#"{"prompt": "p", "chosen": "c", "rejected": "c"}"#).contains("nothing to prefer"));
    let text =
        refusal(r#"{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}"#);
    assert!(text.contains("begin differently"), "{text}");
    assert!(refusal(r#"{"chosen": "a", "rejected": []}"#).contains("\"rejected\" is an empty list"));
}

#[test]
fn judged_and_labelled_rows() {
    let judged = |prompt, completion, label| RowKind::Judged { prompt, completion, label, tools: None };
    let text = |text: &str| Turns::Text(text.into());
    let row = json!({"prompt": "p", "completion": "c", "label": true});
    assert_eq!(one(row), judged(text("p"), text("c"), true));
    let row = json!({"instruction": "i", "output": "o", "kto_tag": false});
    let (user, assistant) = (Turns::Messages(says(&[("user", "i")])), Turns::Messages(says(&[("assistant", "o")])));
    assert_eq!(one(row), judged(user, assistant, false));
    let text = refusal(r#"{"messages": [{"role": "user", "content": "u"}], "kto_tag": true}"#);
    assert!(text.contains("does not end with the assistant"), "{text}");
    // Some other label beside a prompt and its completion is none of these.
    let row = json!({"prompt": "p", "completion": "c", "label": "easy"});
    assert_eq!(one(row), RowKind::PromptCompletion { prompt: "p".into(), completion: "c".into() });
    let label = |label: Value| match one(json!({"text": "t", "label": label})) {
        RowKind::Labelled { text: Turns::Text(text), label } if text == "t" => label,
        other => panic!("{other:?}"),
    };
    assert_eq!([label(json!("good")), label(json!(3)), label(json!(true))], ["good", "3", "true"]);
    assert!(refusal(r#"{"text": "t", "label": [1]}"#).contains("\"label\" must be a name or a number"));
}

#[test]
fn tables_are_read_with_their_quotes_and_separators() {
    let table = |name: &str, content: &str| rows_of(name, content.as_bytes(), &defaults());
    let pair = |p: &str, c: &str| RowKind::PromptCompletion { prompt: p.into(), completion: c.into() };
    let rows = table("d.csv", "\u{feff}prompt,completion\r\n\"a, \"\"b\"\"\",\"c\nd\"\r\n\r\ne,f\r\n").unwrap();
    assert_eq!((rows[0].line, rows[1].line), (2, 5));
    assert_eq!(kinds(rows), [pair("a, \"b\"", "c\nd"), pair("e", "f")]);
    assert_eq!(kinds(table("d.csv", "prompt;completion\na,b;c\n").unwrap()), [pair("a,b", "c")]);
    assert_eq!(kinds(table("d.tsv", "prompt\tcompletion\na,b\tc;d\n").unwrap()), [pair("a,b", "c;d")]);
    let row = "messages,tools\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"u\"\"}]\",\n";
    let expected = RowKind::Messages { messages: says(&[("user", "u")]), trained_from: 0, tools: None };
    assert_eq!(kinds(table("d.csv", row).unwrap()), [expected]);
    let text = |content: &str| table("d.csv", content).unwrap_err().to_string();
    assert!(text("prompt,completion\na\n").contains("d.csv, line 2: 1 fields, but the header has 2"));
    assert!(text("text,text\na,b\n").contains("two columns are called \"text\""));
    let mut options = defaults();
    options.max_row_bytes = 100;
    let open = format!("text\n\"a\n{}", "b\n".repeat(100_000));
    let error = rows_of("d.csv", open.as_bytes(), &options).unwrap_err().to_string();
    assert!(error.contains("d.csv, line 2") && error.contains("is a quote not closed?"), "{error}");
}

#[test]
fn long_rows_are_named_and_not_held() {
    let options = with(|o| o.max_row_bytes = 20);
    let long = "x".repeat(40);
    let text = |name: &str, content: &str| rows_of(name, content.as_bytes(), &options).unwrap_err().to_string();
    assert!(
        text("d.jsonl", &format!("{{\"text\": \"a\"}}\n{long}")).contains("line 2: the row has 40 bytes, more than")
    );
    assert!(text("d.json", &format!("[{{\"text\": \"{long}\"}}]")).contains("line 1: the row has 52 bytes"));
    assert!(text("d.txt", &long).contains("or set text_rows = \"paragraph\""));
    let lines = RowOptions { text_rows: TextRows::Line, ..options.clone() };
    let found = |content: &str, options: &RowOptions| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.txt");
        fs::write(&path, content).unwrap();
        read_file(&path, options).unwrap().map(|row| row.is_ok()).collect::<Vec<_>>()
    };
    assert_eq!(found(&format!("a\n{long}\nb"), &lines), [true, false, true]);
    let paragraphs = RowOptions { text_rows: TextRows::Paragraph, ..options.clone() };
    assert_eq!(found(&format!("a\n\n{long}\nc\n\nb\nb\n"), &paragraphs), [true, false, true]);
}

#[test]
fn a_list_that_is_broken_is_named() {
    let text = |content: &str| rows_of("d.json", content.as_bytes(), &defaults()).unwrap_err().to_string();
    assert!(text("[{\"text\": \"a\"}\n{\"text\": \"b\"}]").contains("line 2: broken JSON: a comma is missing"));
    assert!(text("[{\"text\": \"a\"},\n]").contains("line 2: broken JSON: a comma with no row after it"));
    assert!(text("[{\"text\": \"a\"}] x").contains("something after the list"));
    assert!(text("[{\"text\": \"a\"}").contains("the list is not closed"));
    assert!(text("[{\"text\": \"a\"}, 3]").contains("a row must be a JSON object"));
    assert!(rows_of("d.json", b" [ ] ", &defaults()).unwrap().is_empty());
    let nested = r#"[{"text": "a]}\",{[", "x": [[1, 2], {"y": "}"}]}, {"text": "b"}]"#;
    assert_eq!(
        texts(rows_of("d.json", nested.as_bytes(), &defaults()).unwrap()),
        [(1, "a]}\",{[".into()), (1, "b".into())]
    );
}

proptest! {
    #[test]
    fn any_bytes_give_rows_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        for name in ["d.jsonl", "d.txt", "d.csv", "d.tsv.gz", "d.json.zst"] {
            if let Err(error) = rows_of(name, &bytes, &defaults()) {
                prop_assert!(matches!(&error, Error::Input(text) if text.starts_with(name)), "{}", error);
            }
        }
    }

    #[test]
    fn texts_survive_json(texts_in in proptest::collection::vec(".{0,20}", 1..8)) {
        let lines: Vec<_> = texts_in.iter().map(|t| serde_json::json!({"text": t}).to_string()).collect();
        let rows = read(&lines.join("\n")).unwrap();
        let out: Vec<_> = texts(rows).into_iter().map(|(_, text)| text).collect();
        prop_assert_eq!(out, texts_in.clone());
        let rows = read(&format!("[{}]", lines.join(",\r\n"))).unwrap();
        let out: Vec<_> = texts(rows).into_iter().map(|(_, text)| text).collect();
        prop_assert_eq!(out, texts_in);
    }
}
