//! Tokens that a configuration adds: through training, resuming, generating and merging.
#![allow(clippy::unwrap_used)]

mod tiny;

use std::path::Path;
use tiny::{Ran, refused, run};
use tunesmith_model::{AdapterFile, Checkpoint};
use tunesmith_text::Tokenizer;

fn train(folder: &Path, name: &str, more: &[&str]) -> Ran {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let config = folder.join("tiny.toml");
    let text = std::fs::read_to_string(root.join("tiny.toml")).unwrap();
    std::fs::write(&config, text.replace("configs/", &format!("{}/", root.display()))).unwrap();
    let output = format!("output_dir={}", folder.join(name).display());
    let mut args = vec!["train", config.to_str().unwrap(), "--set", &output];
    let tokens = [
        "method=lora",
        "model.add_special_tokens=[\"<|note|>\"]",
        "model.add_tokens=[\"together\"]",
        "training.logging_steps=1",
        "training.save_steps=3",
        "training.eval_steps=3",
        "samples.prompts=[]",
    ];
    tokens.iter().for_each(|set| args.extend(["--set", set]));
    args.extend(more);
    run(&args)
}

fn weights(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn an_adapter_with_tokens_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let ran = train(folder.path(), "whole", &["--set", "training.max_steps=6"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let last = folder.path().join("whole/final");
    let tokenizer = Tokenizer::from_folder(&last).unwrap();
    let size = tokenizer.vocab_size();
    let ids = [tokenizer.token_to_id("<|note|>").unwrap(), tokenizer.token_to_id("together").unwrap()];
    assert_eq!(ids.map(|id| id as usize), [size - 2, size - 1]);
    let adapter = AdapterFile::open(&last).unwrap();
    assert_eq!(adapter.config.trainable_token_indices["embed_tokens"], ids);

    // Interrupted and resumed: the same to the bit.
    let ran = train(folder.path(), "parts", &["--set", "training.max_steps=6"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let parts = folder.path().join("parts");
    std::fs::remove_dir_all(parts.join("checkpoints/step-6")).unwrap();
    std::fs::remove_dir_all(parts.join("final")).unwrap();
    let ran = train(folder.path(), "parts", &["--set", "training.max_steps=6", "--resume"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let file = "adapter_model.safetensors";
    assert!(weights(&last, file) == weights(&parts.join("final"), file));

    // The base model's folder is what the configuration names.
    let config = std::fs::read_to_string(folder.path().join("whole/run.toml")).unwrap();
    let source = config.lines().find_map(|line| line.strip_prefix("source = ")).unwrap().trim_matches('"').to_owned();
    let adapter_path = last.to_str().unwrap();
    let base = ["--model", &source, "--adapter", adapter_path];
    let generate = |model: &[&str]| {
        let more = ["--greedy", "--max-new-tokens", "6", "--json", "<|note|>together we"];
        let ran = run(&[&["generate"], model, &more].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["text"].clone()
    };
    let tuned = generate(&base);
    let merged = folder.path().join("merged");
    let ran = run(&[&["merge"], &base[..], &["--out", merged.to_str().unwrap()]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let checkpoint = Checkpoint::open(&merged).unwrap();
    let before = Checkpoint::open(source.as_ref()).unwrap().config().vocab_size;
    assert_eq!(checkpoint.config().vocab_size, before.max(size));
    let embed = checkpoint.read("model.embed_tokens.weight").unwrap();
    assert_eq!(embed.row(size - 1), adapter.token_rows["embed_tokens"].row(1));
    assert_eq!(Tokenizer::from_folder(&merged).unwrap().fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
    assert_eq!(generate(&["--model", merged.to_str().unwrap()]), tuned);
    // Training goes on with the adapter and its tokens.
    let go_on = format!("model.adapter={adapter_path}");
    let none = ["--set", "model.add_tokens=[]", "--set", "model.add_special_tokens=[]"];
    let int8 = [&["--set", "compute=int8", "--set", &go_on], &none[..]].concat();
    let ran = train(folder.path(), "rounded", &int8);
    assert!(ran.code == 2 && ran.stderr.contains("not rounded to 8 bits; use compute = \"f32\""), "{ran:?}");
    let ran = train(folder.path(), "more", &[&["--set", "training.max_steps=2", "--set", &go_on], &none[..]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let more = AdapterFile::open(&folder.path().join("more/final")).unwrap();
    assert_eq!(more.config.trainable_token_indices, adapter.config.trainable_token_indices);
    assert_ne!(more.token_rows["embed_tokens"].data(), adapter.token_rows["embed_tokens"].data());
}

#[test]
fn full_fine_tuning_with_added_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let ran = train(folder.path(), "full", &["--set", "training.max_steps=3", "--set", "method=full"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let last = folder.path().join("full/final");
    let (checkpoint, tokenizer) = (Checkpoint::open(&last).unwrap(), Tokenizer::from_folder(&last).unwrap());
    assert_eq!(checkpoint.config().vocab_size, tokenizer.vocab_size());
    assert!(tokenizer.token_to_id("together").is_some());
    let ran = run(&[
        "generate",
        "--model",
        last.to_str().unwrap(),
        "--greedy",
        "--max-new-tokens",
        "6",
        "<|note|>together we",
    ]);
    assert!(ran.code == 0 && !ran.stdout.trim().is_empty(), "{ran:?}");
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let ran = train(folder.path(), "a", &["--set", "model.add_tokens=[\"<|note|>\"]"]);
    assert!(
        ran.code == 2
            && ran.stderr.contains("model.add_tokens: \"<|note|>\" cannot be added as a token: it is one already"),
        "{ran:?}"
    );
    let ran = train(folder.path(), "b", &["--set", "compute=int8"]);
    assert!(ran.code == 2 && ran.stderr.contains("not rounded to 8 bits"), "{ran:?}");
    refused(&["train", "no-such.toml"], 2, "no-such.toml");
}
