//! `tunesmith merge` as a user runs it: what it writes computes what base and adapter computed.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

#[path = "../../hub/tests/moto/mod.rs"]
mod moto;
mod tiny;

use moto::Moto;
use tiny::{fixture, refused, run};
use tunesmith_model::{AdapterFile, Checkpoint, Llama, Storage};
use tunesmith_text::Tokenizer;

#[test]
fn merged_models_give_the_reference_logits() {
    for name in ["tiny-llama2", "tiny-llama3"] {
        let model = tiny::model(name);
        let base = model.path().to_str().unwrap();
        for (adapter, reference) in [
            ("lora_start", "lora_forward"),
            ("lora_final", "lora_merged_forward"),
            ("rslora_start", "rslora_forward"),
            ("rslora_final", "rslora_merged_forward"),
        ] {
            let place = tempfile::tempdir().unwrap();
            let out = place.path().join("sub/merged");
            let out = out.to_str().unwrap();
            let adapter = fixture(&format!("{name}/{adapter}"));
            let ran = run(&["merge", "--model", base, "--adapter", &adapter, "--out", out]);
            assert_eq!(ran.code, 0, "{ran:?}");
            assert!(ran.stdout.contains(out) && ran.stdout.contains("float32"), "{ran:?}");
            assert!(!ran.stdout.contains("note"), "an f32 base loses nothing: {ran:?}");
            let reference = fixture(&format!("{name}/{reference}.safetensors"));
            let ran = run(&["verify", "--model", out, "--reference", &reference]);
            assert_eq!(ran.code, 0, "{ran:?}");

            // To the bit what merging in memory gives.
            let mut llama = Llama::load(&Checkpoint::open(model.path()).unwrap(), Storage::F32, |_, _| ()).unwrap();
            llama.attach_adapter(AdapterFile::open(adapter.as_ref()).unwrap(), false).unwrap();
            llama.merge_adapter().unwrap();
            let merged = Checkpoint::open(out.as_ref()).unwrap();
            for parameter in &llama.parameters {
                assert_eq!(
                    merged.read(&parameter.name).unwrap().data(),
                    parameter.value.tensor().data(),
                    "{}",
                    parameter.name
                );
            }
        }
    }
}

#[test]
fn tokenizer_template_and_generation_config_come_along() {
    let model = tiny::model("tiny-llama3");
    std::fs::write(model.path().join("generation_config.json"), r#"{"eos_token_id": [2, 9], "temperature": 0.6}"#)
        .unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("merged");
    let adapter = fixture("tiny-llama3/lora_final");
    let base = model.path().to_str().unwrap();
    let args = ["merge", "--model", base, "--adapter", &adapter, "--out", out.to_str().unwrap(), "--dtype", "bf16"];
    let ran = run(&args);
    assert!(ran.code == 0 && ran.stdout.contains("bfloat16"), "{ran:?}");
    let (old, new) = (Tokenizer::from_folder(model.path()).unwrap(), Tokenizer::from_folder(&out).unwrap());
    assert_eq!(new.fingerprint().unwrap(), old.fingerprint().unwrap());
    assert_eq!(new.chat_template(), old.chat_template());
    let checkpoint = Checkpoint::open(&out).unwrap();
    let generation = checkpoint.generation_config().unwrap();
    assert_eq!((&generation["eos_token_id"], &generation["temperature"]), (&[2, 9].into(), &0.6.into()));
    let bytes = std::fs::metadata(out.join("model.safetensors")).unwrap().len();
    let f32_bytes = std::fs::metadata(model.path().join("model.safetensors")).unwrap().len();
    assert!(bytes * 2 < f32_bytes + 20_000, "{bytes} {f32_bytes}");
    let prompt = ["generate", "--model", out.to_str().unwrap(), "--chat", "--greedy", "Who is there?"];
    assert_eq!(run(&prompt).code, 0);
    // What is there is never overwritten.
    refused(&args, 2, "is not empty");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn an_adapter_of_another_model_is_refused_before_anything_is_written() {
    let model = tiny::model("tiny-llama2");
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("merged");
    let (base, out) = (model.path().to_str().unwrap(), out.to_str().unwrap());
    let other = fixture("tiny-llama3/lora_final");
    let said = "made for another model: it adapts model.layers.0.mlp.down_proj";
    refused(&["merge", "--model", base, "--adapter", &other, "--out", out], 2, said);
    refused(&["merge", "--model", base, "--adapter", base, "--out", out], 2, "holds no adapter_config.json");
    let adapter = fixture("tiny-llama2/lora_final");
    refused(&["merge", "--model", &adapter, "--adapter", &adapter, "--out", out], 2, "is an adapter, not a model");
    refused(&["merge", "--model", base, "--adapter", &adapter], 2, "--out");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn a_merged_model_goes_to_a_bucket() {
    let Some(moto) = Moto::start() else { return };
    moto.put("models", b"");
    let model = tiny::model("tiny-llama3");
    let (base, adapter) = (model.path().to_str().unwrap(), fixture("tiny-llama3/lora_final"));
    let place = tempfile::tempdir().unwrap();
    let here = place.path().join("merged");
    let cache = place.path().join("cache");
    let merge = |out: &str| {
        let mut command = tiny::binary();
        command.env_remove("TUNESMITH_OFFLINE").env("TUNESMITH_CACHE", &cache).envs(moto.variables());
        let output = command.args(["merge", "--model", base, "--adapter", &adapter, "--out", out]).output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(merge(here.to_str().unwrap()).0, 0);
    let (code, stdout, stderr) = merge("s3://models/merged/");
    assert!(code == 0 && stdout.starts_with("s3://models/merged"), "{stdout}{stderr}");
    let names: Vec<String> =
        std::fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(moto.keys("models", "").len(), names.len());
    for name in names {
        let there = moto.get(&format!("models/merged/{name}"));
        assert!(there == Some(std::fs::read(here.join(&name)).unwrap()), "{name}");
    }
    let left = std::fs::read_dir(&cache).unwrap().filter(|e| e.as_ref().unwrap().file_name() != "locks").count();
    assert_eq!(left, 0, "what was made on the way is gone");
    let (code, _, stderr) = merge("s3://models/merged");
    assert!(code == 2 && stderr.contains("s3://models/merged is not empty"), "{stderr}");
    let (code, _, stderr) = merge("s3://nobody/merged");
    assert!(code == 2 && stderr.contains("there is no such bucket"), "{stderr}");

    // What is written to local paths only.
    for args in [
        &["init", "--config", "c.json", "--out", "s3://b/a"][..],
        &["prepare", "--model", base, "--data", "a.jsonl", "--out", "gs://b/a"],
        &["quickstart", "--dir", "s3://b/a"],
        &["selftest", "--json", "az://b/a"],
    ] {
        refused(args, 2, "local paths only");
    }
}
