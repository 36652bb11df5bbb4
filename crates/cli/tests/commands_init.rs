//! `tunesmith init`, and training on what it writes.
#![allow(clippy::unwrap_used)]

mod tiny;

use tiny::{refused, run};
use tunesmith_model::{Checkpoint, Storage};

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_folder_and_a_quantised_file_of_the_same_weights() {
    let tokenizer = tiny::model("tiny-llama3");
    let folder = tempfile::tempdir().unwrap();
    let config = tokenizer.path().join("config.json");
    let (whole, packed) = (folder.path().join("whole"), folder.path().join("packed.gguf"));
    let source = ["--tokenizer", text(tokenizer.path())];
    let ran = run(&[&["init", "--config", text(&config), "--out", text(&whole)], &source[..]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(whole.join("tokenizer.json").exists() && ran.stdout.contains("random weights"), "{ran:?}");
    let ran = run(&["init", "--config", text(&config), "--out", text(&packed), "--dtype", "q8_0"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.contains("without a tokenizer"), "{ran:?}");
    let (whole, packed) = (Checkpoint::open(&whole).unwrap(), Checkpoint::open(&packed).unwrap());
    for name in whole.tensor_names() {
        let (a, b) = (whole.read(name).unwrap(), packed.load(name, Storage::Stored).unwrap());
        let largest = a.data().iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (a, b) in a.data().iter().zip(b.to_tensor().data()) {
            assert!((a - b).abs() <= largest / 200.0, "{name}: {a} {b}");
        }
    }
}

#[test]
fn mistakes_are_named() {
    let tokenizer = tiny::model("tiny-llama3");
    let folder = tempfile::tempdir().unwrap();
    let config = tokenizer.path().join("config.json");
    fn init<'a>(config: &'a std::path::Path, more: &[&'a str]) -> Vec<&'a str> {
        [&["init", "--config", text(config)], more].concat()
    }
    let exists = text(folder.path());
    refused(&init(&config, &["--out", exists]), 2, "exists already");
    let out = folder.path().join("new");
    refused(&init(&config, &["--out", text(&out), "--dtype", "q4_0"]), 2, "format of gguf files");
    let file = folder.path().join("new.gguf");
    refused(&init(&config, &["--out", text(&file), "--tokenizer", text(tokenizer.path())]), 2, "is a folder");
    refused(&["init", "--config", "no-such.json", "--out", text(&out)], 2, "no-such.json");
    assert!(!out.exists() && !file.exists());
}
