//! Models and data from the hub and from a bucket, by the command line.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

#[path = "../../hub/tests/apart/mod.rs"]
mod apart;
#[path = "../../hub/tests/fake_hub/mod.rs"]
mod fake_hub;
#[path = "../../hub/tests/moto/mod.rs"]
mod moto;
mod tiny;

use fake_hub::{File, Hub, MAIN, Place};
use moto::Moto;
use std::{fs, path::Path, process::Command};

#[test]
fn rows_of_the_hub_are_prepared() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixture = |name: &str| fs::read(root.join("../hub/tests/fixtures/hub-dataset").join(name)).unwrap().leak();
    let names = [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
    ];
    let files: Vec<File> = names.iter().map(|name| (*name, &*fixture(name))).collect();
    let hub = Hub::start(&[(MAIN, &files)]);
    let place = Place::new(&hub);
    let model = root.join("../../configs/tiny/model");
    let out = place.folder.path().join("out");
    let run = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(["prepare", "--data", "hf:datasets/org/tiny", "--model"])
        .arg(&model)
        .arg("--out")
        .arg(&out)
        .args(["--set", "data.validation=[\"hf:datasets/org/tiny\"]", "--set", "data.max_length=64"])
        .env("HF_ENDPOINT", &place.settings.hf_endpoint)
        .env("HF_HUB_CACHE", &place.settings.hf_cache)
        .env("TUNESMITH_CACHE", &place.settings.cache)
        .env_remove("TUNESMITH_OFFLINE")
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(out.join("prepared.json")).unwrap()).unwrap();
    assert_eq!((report["train"]["rows"].as_u64(), report["validation"]["rows"].as_u64()), (Some(5), Some(1)));
}

#[test]
fn a_bucket_gives_model_and_data() {
    let Some(moto) = Moto::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    moto.put("texts", b"");
    moto.put("texts/run/a.jsonl", b"{\"text\": \"one\"}\n");
    let model = tiny::model("tiny-llama3");
    for file in fs::read_dir(model.path()).unwrap().flatten() {
        moto.put(&format!("texts/models/tiny/{}", file.file_name().display()), &fs::read(file.path()).unwrap());
    }
    let run = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = tiny::binary();
        command.env_remove("TUNESMITH_OFFLINE").env("TUNESMITH_CACHE", at("c"));
        command.envs(variables.iter().copied()).args(args).output().unwrap()
    };
    let generate = ["generate", "--greedy", "--max-new-tokens", "4", "--model"];
    let far = run(&[&generate[..], &["s3://texts/models/tiny", "Hello"]].concat(), &moto.variables());
    let near = run(&[&generate[..], &[model.path().to_str().unwrap(), "Hello"]].concat(), &[]);
    assert!(far.status.success() && !far.stdout.is_empty(), "{far:?}");
    assert_eq!(far.stdout, near.stdout);
    let config = at("run.toml");
    let text = "[model]\nsource = \"s3://texts/models/tiny\"\n[data]\nmax_length = 128\ntrain = [\"s3://texts/run/*.jsonl\"]\n";
    fs::write(&config, text).unwrap();
    let out = at("prepared");
    let prepared = run(&["prepare", config.to_str().unwrap(), "--out", out.to_str().unwrap()], &moto.variables());
    assert!(prepared.status.success() && out.is_dir(), "{prepared:?}");

    moto.lock();
    let refused = run(&[&generate[..], &["s3://texts/models/tiny", "Hello"]].concat(), &moto.variables());
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}
