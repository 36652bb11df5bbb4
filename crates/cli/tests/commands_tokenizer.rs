//! `tunesmith tokenizer train`, and a new model with what it writes.
#![allow(clippy::unwrap_used)]

mod tiny;

use tiny::{refused, run};
use tunesmith_model::Checkpoint;
use tunesmith_text::Tokenizer;

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

/// Rows of several formats, as `prepare` reads them.
fn data(folder: &std::path::Path) -> std::path::PathBuf {
    let data = folder.join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("plain.txt"), "the mill stands by the river, and the miller counts sacks\n\n".repeat(30))
        .unwrap();
    let rows = (0..60).map(|i| {
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"count {i} sacks\"}}, {{\"role\": \"assistant\", \"content\": \"the miller counts {}\"}}]}}\n", i + 1)
    });
    std::fs::write(data.join("chats.jsonl"), rows.collect::<String>()).unwrap();
    data
}

#[test]
fn a_tokenizer_is_learned_and_a_model_made_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let template = folder.path().join("t.jinja");
    std::fs::write(&template, "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}")
        .unwrap();
    let tokenizers = [folder.path().join("one"), folder.path().join("two")];
    for out in &tokenizers {
        let args = [
            ["tokenizer", "train", "--data", text(&data)],
            ["--vocab-size", "320", "--out", text(out)],
            ["--eos", "<|end|>", "--special", "<|turn|>"],
            ["--chat-template", text(&template), "--set", "data.text_rows=\"paragraph\""],
        ];
        let ran = run(&args.concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.stdout.contains("320 tokens, learned from"), "{ran:?}");
    }
    let files = tokenizers.each_ref().map(|folder| std::fs::read(folder.join("tokenizer.json")).unwrap());
    assert_eq!(files[0], files[1]);
    let tokenizer = Tokenizer::from_folder(&tokenizers[0]).unwrap();
    assert_eq!((tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.adds_bos()), (Some(0), None, false));
    assert!(tokenizer.chat_template().unwrap().contains("<|turn|>"));
    assert_eq!(tokenizer.encode(" miller<|turn|>", false).unwrap().len(), 2);

    let model = tiny::model("tiny-llama3");
    let config = model.path().join("config.json");
    let made = folder.path().join("model");
    let init = ["init", "--config", text(&config), "--out", text(&made), "--tokenizer", text(&tokenizers[0])];
    let ran = run(&init);
    assert_eq!(ran.code, 0, "{ran:?}");
    let checkpoint = Checkpoint::open(&made).unwrap();
    assert_eq!((checkpoint.config().bos_token_id, &checkpoint.config().eos_token_id[..]), (None, &[0][..]));
    let ran = run(&["generate", "--model", text(&made), "--greedy", "--max-new-tokens", "4", "the mill"]);
    assert_eq!(ran.code, 0, "{ran:?}");

    refused(
        &["tokenizer", "train", "--data", text(&data), "--vocab-size", "300", "--out", text(&tokenizers[0])],
        2,
        "exists already",
    );
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let out = folder.path().join("out");
    let train = |more: &[&str], says: &str| {
        let base = ["tokenizer", "train", "--data", text(&data), "--out", text(&out)];
        refused(&[&base, more].concat(), 2, says);
    };
    train(&["--vocab-size", "100"], "at least 257");
    train(&["--vocab-size", "300", "--special", " "], "cannot be a special token");
    train(&["--vocab-size", "300", "--chat-template", "none.jinja"], "none.jinja");
    refused(&["tokenizer", "train", "--vocab-size", "300", "--out", text(&out)], 2, "data.train");
    assert!(!out.exists());
}
