use super::*;
use proptest::prelude::*;
use serde_json::json;

fn render(source: &str, messages: &[Message]) -> Result<String> {
    let special = SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..SpecialTokens::default() };
    ChatTemplate::new(source, &special, None)?.render(messages, true)
}

fn refusal(source: &str) -> String {
    let error = render(source, &[Message::new("user", "Hi")]).unwrap_err();
    assert!(matches!(error, Error::Input(_)), "{error:?}");
    error.to_string()
}

#[test]
fn smollm2_conversations_render_as_the_reference_has_them() {
    #[derive(Deserialize)]
    struct Case {
        messages: Vec<Message>,
        add_generation_prompt: bool,
        text: String,
    }
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/fixtures/smollm2/chat.json")).unwrap();
    let source = include_str!("../../tests/fixtures/smollm2/chat_template.jinja");
    let template = ChatTemplate::new(source, &SpecialTokens::default(), None).unwrap();
    assert!(cases.len() >= 6);
    for case in cases {
        assert_eq!(template.render(&case.messages, case.add_generation_prompt).unwrap(), case.text);
    }
}

#[test]
fn blocks_eat_their_line_break_and_indentation() {
    let source = "{%- for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{%- endfor %}\nend\n";
    assert_eq!(render(source, &[Message::new("user", "a"), Message::new("user", "b")]).unwrap(), "a\nb\nend");
}

#[test]
fn loops_can_be_left_and_special_tokens_are_there() {
    let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}\
                  {% if m.role == 'y' %}{% break %}{% endif %}{{ m['content'] + eos_token }}{% endfor %}";
    let messages = [("x", "1"), ("u", "2"), ("y", "3"), ("u", "4")].map(|(r, c)| Message::new(r, c));
    assert_eq!(render(source, &messages).unwrap(), "<s>2</s>");
}

#[test]
fn python_methods_work() {
    let source = "{% set m = messages[0] %}{{ m.content.strip().upper() }}{{ m.content.split('i')[0].lstrip() }}\
        {% for k, v in m.items() %}{{ k }},{% endfor %}{{ m.get('name', 'none') }}{{ 'abc'.startswith('ab') }}\
        {{ m.content is string }}{{ 'role' in m }}{{ messages[1:]|length }}{{ tools is none }}";
    let out = render(source, &[Message::new("user", "  hi "), Message::new("user", "x")]).unwrap();
    assert_eq!(out, "HIhrole,content,noneTrueTrueTrue1True");
}

#[test]
fn json_is_written_as_python_writes_it() {
    let special = SpecialTokens::default();
    let tools = json!([{"type": "function", "b": {"é": "<a & 'b'>", "n": 1.0, "list": [], "map": {}}, "tiny": 1e-7}]);
    let run = |source: &str| {
        let template = ChatTemplate::new(source, &special, None).unwrap();
        template.render_conversation(&Conversation { tools: Some(&tools), ..Conversation::default() }).unwrap()
    };
    assert_eq!(
        run("{{ tools | tojson }}"),
        r#"[{"type": "function", "b": {"é": "<a & 'b'>", "n": 1.0, "list": [], "map": {}}, "tiny": 1e-07}]"#
    );
    assert_eq!(
        run("{{ tools[0].b | tojson(indent=4, sort_keys=true, ensure_ascii=true) }}"),
        "{\n    \"list\": [],\n    \"map\": {},\n    \"n\": 1.0,\n    \"\\u00e9\": \"<a & 'b'>\"\n}"
    );
    assert_eq!(run("{{ [1, [2]] | tojson(separators=(',', ':')) }}"), "[1,[2]]");
    assert_eq!(run("{{ [1, [2, 3]] | tojson(indent=2) }}"), "[\n  1,\n  [\n    2,\n    3\n  ]\n]");
}

#[test]
fn a_generation_block_prints_its_content() {
    let source = "{% for m in messages %}\n{{ m.role }}:\n{%- generation -%}\n{{ m.content }}\n{% endgeneration %}\n\
                  {% endfor %}";
    assert_eq!(render(source, &[Message::new("user", "a")]).unwrap(), "user:a\n");
}

#[test]
fn errors_name_the_line_of_the_template() {
    let text = refusal("a\nb\n{{ raise_exception('roles must alternate') }}");
    assert_eq!(text, "the chat template, line 3: roles must alternate");
    let text = refusal("{% macro f() %}\n{{ raise_exception('inside') }}\n{% endmacro %}\n{{ f() }}");
    assert_eq!(text, "the chat template, line 2: inside");
    assert!(refusal("a\n{% for %}").contains("line 2"));
    assert!(refusal("a\n{{ messages | nosuchfilter }}").contains("line 2"));
    assert!(refusal("{{ strftime_now('%Y') }}").contains("line 1"));
}

#[test]
fn the_date_is_the_callers() {
    let run = |now| {
        ChatTemplate::new(
        "{{ strftime_now('%d %b %Y|%A %B %-d|%Y-%m-%d %H:%M:%S|%I %p|%F %T|%y%%') if strftime_now is defined else 'fixed' }}",
        &SpecialTokens::default(),
        now,
    )
    .unwrap()
    .render(&[], false)
    .unwrap()
    };
    assert_eq!(run(None), "fixed");
    assert_eq!(
        run(Some(1_709_211_845)),
        "29 Feb 2024|Thursday February 29|2024-02-29 13:04:05|01 PM|2024-02-29 13:04:05|24%"
    );
    assert_eq!(
        strftime("%Y %j", 0).unwrap_err().detail(),
        Some("strftime_now(\"%Y %j\"): the code \"%j\" is not supported")
    );
}

#[test]
fn messages_keep_what_else_they_hold() {
    let text = r#"{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}], "name": "bot"}"#;
    let message: Message = serde_json::from_str(text).unwrap();
    assert_eq!(message.content, "");
    let source = "{% for c in messages[0].tool_calls %}{{ c.function.name }}{% endfor %}{{ messages[0].name }}";
    assert_eq!(render(source, &[message]).unwrap(), "fbot");
    let parts = r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
    assert_eq!(serde_json::from_str::<Message>(parts).unwrap().content, "ab");
    let image = r#"{"role": "user", "content": [{"type": "image"}]}"#;
    assert!(serde_json::from_str::<Message>(image).unwrap_err().to_string().contains("list of text parts"));
}

#[test]
fn known_dates() {
    assert_eq!(civil_date(0), (1970, 1, 1));
    assert_eq!(civil_date(-1), (1969, 12, 31));
    assert_eq!(civil_date(11_016), (2000, 2, 29));
    assert_eq!(civil_date(47_540), (2100, 2, 28));
    assert_eq!(civil_date(47_541), (2100, 3, 1));
}

proptest! {
    #[test]
    fn dates_advance_by_one_day(day in -1_000_000_i64..1_000_000) {
        let (year, month, date) = civil_date(day);
        let next = civil_date(day + 1);
        let same_month = next == (year, month, date + 1);
        let next_month = next == (year, month + 1, 1) && date >= 28;
        let next_year = next == (year + 1, 1, 1) && (month, date) == (12, 31);
        prop_assert!(same_month || next_month || next_year, "{:?} -> {:?}", (year, month, date), next);
    }

    #[test]
    fn a_template_without_tags_is_copied(text in "[a-z%# \n]{0,30}x") {
        prop_assert_eq!(generation_tags(&text, true), text.clone());
    }
}
