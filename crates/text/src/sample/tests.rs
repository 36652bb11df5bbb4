use super::*;
use crate::{
    Message, SpecialTokens,
    fixture::{chatml, llama_tokenizer, tokenizer},
};
use proptest::prelude::*;

const OPTIONS: SampleOptions = SampleOptions {
    train_on: TrainOn::Completions,
    prompt_loss_weight: 0.0,
    max_length: 1024,
    overlong: Overlong::Auto,
    preferences: Preferences::Refuse,
};

fn row(kind: RowKind) -> Row {
    Row { kind, file: "d.jsonl".into(), line: 3 }
}

fn chat(messages: &[(&str, &str)]) -> Row {
    let messages = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
    row(RowKind::Messages { messages, trained_from: 0, tools: None })
}

fn one(row: &Row, options: &SampleOptions) -> Sample {
    let template = chatml();
    let (mut samples, _) = samples(row, &tokenizer(), Some(&template), options).unwrap();
    assert_eq!(samples.len(), 1);
    samples.remove(0)
}

/// The trained tokens as text, runs separated by "|".
fn trained_text(sample: &Sample, tokenizer: &Tokenizer) -> String {
    let indexed: Vec<usize> = (0..sample.ids.len()).filter(|&index| sample.trained[index]).collect();
    let runs = indexed.chunk_by(|a, b| a + 1 == *b);
    let text = |run: &[usize]| {
        let ids: Vec<u32> = run.iter().map(|&index| sample.ids[index]).collect();
        tokenizer.decode(&ids, false).unwrap()
    };
    runs.map(text).collect::<Vec<_>>().join("|")
}

fn refusal(row: &Row, template: Option<&ChatTemplate>) -> String {
    let error = samples(row, &tokenizer(), template, &OPTIONS).unwrap_err();
    assert!(matches!(error, Error::Input(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with("d.jsonl, line 3: "), "{text}");
    text
}

#[test]
fn text_is_trained_whole_and_ends() {
    let sample = one(&row(RowKind::Text("the héll".into())), &OPTIONS);
    let tokenizer = tokenizer();
    assert_eq!(sample.ids.last(), tokenizer.eos_id().as_ref());
    assert_eq!(tokenizer.decode(&sample.ids, true).unwrap(), "the héll");
    assert!(!sample.trained[0] && sample.trained[1..].iter().all(|&trained| trained));
    // All bytes but those of the first token, which nothing predicts.
    let first = tokenizer.decode(&sample.ids[..1], false).unwrap().len();
    assert_eq!(sample.bytes, "the héll".len() - first);
}

#[test]
fn a_tokenizer_that_adds_bos_gets_one_and_only_one() {
    let tokenizer = llama_tokenizer();
    for text in ["hell", "<s>hell"] {
        let (samples, _) = samples(&row(RowKind::Text(text.into())), &tokenizer, None, &OPTIONS).unwrap();
        let ids = &samples[0].ids;
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1, "{text}");
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
        assert!(samples[0].trained[1..].iter().all(|&trained| trained));
        assert_eq!(samples[0].bytes, 4);
    }
    let error = super::samples(&row(RowKind::Text("<s><s>hell".into())), &tokenizer, None, &OPTIONS).unwrap_err();
    assert!(error.to_string().contains("two BOS tokens (\"<s>\")"), "{error}");
}

#[test]
fn completions_are_trained_and_prompts_are_not() {
    let kind = || RowKind::PromptCompletion { prompt: "t z".into(), completion: "he ll".into() };
    let sample = one(&row(kind()), &OPTIONS);
    assert_eq!(trained_text(&sample, &tokenizer()), "he ll<|im_end|>");
    assert_eq!(sample.bytes, 5);
    let all = one(&row(kind()), &SampleOptions { train_on: TrainOn::All, ..OPTIONS });
    assert_eq!(all.ids, sample.ids);
    assert!(all.trained[1..].iter().all(|&trained| trained));
    let ended = RowKind::PromptCompletion { prompt: "t z".into(), completion: "he ll<|im_end|>".into() };
    assert_eq!(one(&row(ended), &OPTIONS), sample);
}

#[test]
fn a_token_across_the_border_belongs_to_the_completion() {
    let sample = one(&row(RowKind::PromptCompletion { prompt: "xxh".into(), completion: "e".into() }), &OPTIONS);
    assert_eq!(trained_text(&sample, &tokenizer()), "he<|im_end|>");
}

#[test]
fn assistant_turns_are_trained_with_their_end_and_without_the_line_break() {
    let row = chat(&[("user", "he"), ("assistant", "ll "), ("user", "t"), ("assistant", "é 11")]);
    let sample = one(&row, &OPTIONS);
    let tokenizer = tokenizer();
    assert_eq!(trained_text(&sample, &tokenizer), "ll <|im_end|>|é 11<|im_end|>");
    assert_eq!(sample.bytes, "ll é 11".len());
    let whole = tokenizer.decode(&sample.ids, false).unwrap();
    assert!(whole.starts_with("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhe<|im_end|>\n"), "{whole}");
    let all = one(&row, &SampleOptions { train_on: TrainOn::All, ..OPTIONS });
    assert_eq!(all.num_trained(), all.ids.len() - 1);
}

#[test]
fn only_the_completion_of_a_conversation_is_trained() {
    let messages = ["user", "assistant", "user", "assistant"].map(|role| Message::new(role, "he")).into();
    let sample = one(&row(RowKind::Messages { messages, trained_from: 2, tools: None }), &OPTIONS);
    assert_eq!(trained_text(&sample, &tokenizer()), "he<|im_end|>");
}

#[test]
fn a_turn_without_an_end_token_is_counted() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                  {% if add_generation_prompt %}assistant: {% endif %}";
    let template = ChatTemplate::new(&format!("{source}{{# #}}"), &SpecialTokens::default(), None).unwrap();
    let row = chat(&[("user", "a"), ("assistant", "he")]);
    let (samples, counts) = samples(&row, &tokenizer(), Some(&template), &OPTIONS).unwrap();
    assert_eq!(counts.turns_without_end, 1);
    assert!(trained_text(&samples[0], &tokenizer()).contains("he"));
}

#[test]
fn rows_that_cannot_be_trained_are_named() {
    let template = chatml();
    let some = Some(&template);
    assert!(refusal(&chat(&[("user", "a")]), some).contains("nothing in this row is trained"));
    assert!(refusal(&row(RowKind::Text(String::new())), None).contains("nothing in this row is trained"));
    assert!(refusal(&chat(&[("assistant", "a")]), None).contains("chat_template = \"file.jinja\""));
    let forgets = ChatTemplate::new(
        "{% for m in messages %}{{ m.role }}{% if loop.last or m.role != 'assistant' %}:{{ m.content }}{% endif %};{% endfor %}",
        &SpecialTokens::default(),
        None,
    )
    .unwrap();
    let long = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    assert!(
        refusal(&long, Some(&forgets))
            .contains("differently when the conversation goes on (after \"user:a;assistant\")")
    );
    let strict = ChatTemplate::new("\n{{ raise_exception('no') }}", &SpecialTokens::default(), None).unwrap();
    assert!(refusal(&chat(&[("user", "a")]), Some(&strict)).contains("the chat template, line 2: no"));
}

#[test]
fn a_tokenizer_without_an_end_token_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    tokenizer().save(folder.path()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let error = samples(&row(RowKind::Text("a".into())), &tokenizer, None, &OPTIONS).unwrap_err();
    assert!(error.to_string().contains("eos_token"), "{error}");
}

#[test]
fn long_rows_are_shortened_as_asked_and_counted() {
    let tokenizer = tokenizer();
    // Ten tokens of text and EOS.
    let text = row(RowKind::Text("zyxwvutsrq".into()));
    let run = |overlong, max_length| {
        samples(&text, &tokenizer, None, &SampleOptions { overlong, max_length, ..OPTIONS }).unwrap()
    };
    let (parts, counts) = run(Overlong::Auto, 4);
    assert_eq!(parts.iter().map(|part| part.ids.len()).collect::<Vec<_>>(), [4, 4, 3]);
    assert!(parts.iter().all(|part| !part.trained[0] && part.trained[1..].iter().all(|&trained| trained)));
    let expected = RowCounts {
        rows: 1,
        longest_row: 11,
        overlong_rows: 1,
        split_rows: 1,
        trained_tokens_lost: 2,
        ..RowCounts::default()
    };
    assert_eq!(counts, expected);
    // A last window of one token has no label.
    let (parts, counts) = run(Overlong::Split, 5);
    assert_eq!((parts.len(), counts.tokens_lost, counts.trained_tokens_lost), (2, 1, 2));
    let (parts, counts) = run(Overlong::Truncate, 4);
    assert_eq!((parts.len(), parts[0].bytes), (1, 3));
    assert_eq!((counts.truncated_rows, counts.tokens_lost, counts.trained_tokens_lost), (1, 7, 7));
    let (parts, counts) = run(Overlong::Drop, 4);
    assert_eq!((parts.len(), counts.dropped_rows, counts.tokens_lost, counts.trained_tokens_lost), (0, 1, 11, 10));
    let (parts, counts) = run(Overlong::Drop, 11);
    assert_eq!((parts.len(), counts.overlong_rows), (1, 0));
    // Conversations are truncated by default, and dropped when that leaves nothing to train.
    let row = chat(&[("user", "he"), ("assistant", "ll")]);
    let (parts, counts) =
        samples(&row, &tokenizer, Some(&chatml()), &SampleOptions { max_length: 5, ..OPTIONS }).unwrap();
    assert_eq!((parts.len(), counts.dropped_rows, counts.truncated_rows), (0, 1, 0));
    assert_eq!(counts.trained_tokens_lost, 2);
}

proptest! {
    #[test]
    fn what_is_trained_is_what_the_assistant_says(
        turns in proptest::collection::vec(("[a-zé 1]{1,12}", "[a-zé 1🙂]{1,12}"), 1..4)
    ) {
        let turns: Vec<_> = turns.iter().flat_map(|(u, a)| [("user", u.as_str()), ("assistant", a.as_str())]).collect();
        let sample = one(&chat(&turns), &OPTIONS);
        let said: Vec<_> = turns.iter().filter(|t| t.0 == "assistant").map(|t| t.1).collect();
        let expected: Vec<_> = said.iter().map(|text| format!("{text}<|im_end|>")).collect();
        prop_assert_eq!(trained_text(&sample, &tokenizer()), expected.join("|"));
        prop_assert_eq!(sample.bytes, said.concat().len());
    }

    #[test]
    fn windows_lose_only_what_is_counted(text in "[a-z 1]{1,80}", max_length in 2_usize..20) {
        let row = row(RowKind::Text(text));
        let whole = one(&row, &OPTIONS);
        for overlong in [Overlong::Split, Overlong::Truncate, Overlong::Drop] {
            let options = SampleOptions { max_length, overlong, ..OPTIONS };
            let (parts, counts) = samples(&row, &tokenizer(), None, &options).unwrap();
            let tokens: usize = parts.iter().map(|part| part.ids.len()).sum();
            let trained: usize = parts.iter().map(Sample::num_trained).sum();
            prop_assert_eq!(tokens + counts.tokens_lost, whole.ids.len());
            prop_assert_eq!(trained + counts.trained_tokens_lost, whole.num_trained());
            prop_assert!(parts.iter().all(|part| part.ids.len() <= max_length && part.num_trained() > 0));
        }
    }
}

#[test]
fn only_the_last_answer_or_what_some_roles_say_is_trained() {
    let talk = chat(&[("user", "aa"), ("assistant", "bb"), ("user", "cc"), ("assistant", "dd")]);
    let trained = |train_on: TrainOn| trained_text(&one(&talk, &SampleOptions { train_on, ..OPTIONS }), &tokenizer());
    let roles = |roles: &[&str]| TrainOn::Roles(roles.iter().map(|role| (*role).into()).collect());
    assert_eq!(trained(TrainOn::Last), "dd<|im_end|>");
    assert_eq!(trained(roles(&["assistant"])), trained(TrainOn::Completions));
    assert_eq!(trained(roles(&["user"])), "aa<|im_end|>|cc<|im_end|>");
    assert_eq!(trained(roles(&["user", "assistant"])), "aa<|im_end|>|bb<|im_end|>|cc<|im_end|>|dd<|im_end|>");
    let template = chatml();
    let options = SampleOptions { train_on: roles(&["tool"]), ..OPTIONS };
    let error = samples(&talk, &tokenizer(), Some(&template), &options).unwrap_err().to_string();
    assert!(error.contains("nothing in this row is trained"), "{error}");
}

#[test]
fn generation_blocks_say_what_is_trained() {
    // The header of an answer is written differently from the generation prompt, so the turns alone could not tell.
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>bot\n\
        {% generation %}\n{{ m.content }}<|im_end|>\n{% endgeneration %}\n\
        {% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}";
    let tokenizer = tokenizer();
    let template = ChatTemplate::new(source, tokenizer.special_tokens(), None).unwrap();
    let talk = |trained_from| {
        let messages = [("user", "aa"), ("assistant", "bb"), ("user", "cc"), ("assistant", "dd")];
        let messages = messages.map(|(role, content)| Message::new(role, content)).into();
        row(RowKind::Messages { messages, trained_from, tools: None })
    };
    let trained = |trained_from, train_on| {
        let options = SampleOptions { train_on, ..OPTIONS };
        let (made, counts) = samples(&talk(trained_from), &tokenizer, Some(&template), &options).unwrap();
        assert_eq!(counts.turns_without_end, 0);
        trained_text(&made[0], &tokenizer)
    };
    assert_eq!(trained(0, TrainOn::Completions), "bb<|im_end|>|dd<|im_end|>");
    assert_eq!(trained(3, TrainOn::Completions), "dd<|im_end|>");
    assert_eq!(trained(0, TrainOn::Last), "dd<|im_end|>");
    assert_eq!(trained(0, TrainOn::Roles(vec!["assistant".into()])), "bb<|im_end|>|dd<|im_end|>");
}

#[test]
fn what_is_not_trained_has_the_weight_of_a_prompt() {
    let talk = chat(&[("user", "aa"), ("assistant", "bb")]);
    let plain = one(&talk, &OPTIONS);
    assert!(plain.weights.is_empty() && plain.num_only_weighted() == 0);
    let weighted = one(&talk, &SampleOptions { prompt_loss_weight: 0.25, ..OPTIONS });
    assert_eq!((&weighted.ids, &weighted.trained), (&plain.ids, &plain.trained), "what is measured stays the same");
    let expected: Vec<f32> = plain.trained.iter().map(|&trained| if trained { 1.0 } else { 0.25 }).collect();
    assert_eq!(weighted.weights[0], 0.0, "nothing predicts the first token");
    assert_eq!(weighted.weights[1..], expected[1..]);
    assert_eq!(weighted.num_only_weighted(), plain.ids.len() - 1 - plain.num_trained());
    // Each window of a long row begins anew.
    let text = row(RowKind::PromptCompletion { prompt: "abcdef".into(), completion: "ghi".into() });
    let options = SampleOptions { max_length: 4, overlong: Overlong::Split, prompt_loss_weight: 0.5, ..OPTIONS };
    let (parts, _) = samples(&text, &tokenizer(), None, &options).unwrap();
    assert!(parts.len() > 1 && parts.iter().all(|part| part.weights.len() == part.ids.len() && part.weights[0] == 0.0));
}
