//! Hugging Face folders and adapters: read, written, read again; damage is an error.
#![allow(clippy::unwrap_used)] // Helpers outside #[test] functions are tests too.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tunesmith_model::{Checkpoint, Dtype, Error, SaveOptions, save_model};
use tunesmith_tensor::Tensor;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of tiny-llama3's model files that a test may damage.
fn copy() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    fs::create_dir(&to).unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(fixture("tiny-llama3").join(name), to.join(name)).unwrap();
    }
    (dir, to)
}

fn refused(path: &Path, wanted: &str) {
    let Err(error) = Checkpoint::open(path) else { panic!("accepted, although: {wanted}") };
    assert!(matches!(&error, Error::Input(m) if m.contains(wanted)), "{error}");
}

fn change_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// A safetensors file of f32 zeros with this header.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn weights(model: &Checkpoint) -> BTreeMap<String, Tensor> {
    model.tensor_names().map(|name| (name.to_owned(), model.read(name).unwrap())).collect()
}

fn save(dir: &Path, model: &Checkpoint, options: &SaveOptions) -> Result<(), Error> {
    let weight = |name: &str| Ok(Cow::Owned(model.read(name)?));
    save_model(dir, model.config(), model.generation_config(), weight, options)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_folder_is_read_as_it_is() {
    let model = Checkpoint::open(&fixture("tiny-llama2")).unwrap();
    assert_eq!(model.config().num_params(), 109_500);
    assert!(model.config().tie_word_embeddings && model.gguf_metadata().is_none());
    assert_eq!(model.generation_config().unwrap()["eos_token_id"], 2);
    assert_eq!(model.files().len(), 3);
    assert_eq!(model.tensor_names().next(), Some("model.embed_tokens.weight"));
    let file = fs::read(fixture("tiny-llama2").join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    for (name, tensor) in weights(&model) {
        let bytes: Vec<u8> = tensor.data().iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(file.tensor(&name).unwrap().data(), bytes, "{name}");
    }
    assert!(model.read("lm_head.weight").is_err(), "the head is tied");
}

#[test]
fn a_tied_head_stored_twice_and_old_rope_buffers_are_passed_over() {
    let (_dir, to) = copy();
    change_config(&to, "tie_word_embeddings", json!(true));
    let model = Checkpoint::open(&to).unwrap();
    assert_eq!(model.tensor_names().count(), 29);
    assert!(model.read("lm_head.weight").is_err());

    let bytes = fs::read(to.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file.tensors();
    let inverse = [0; 32];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![8], &inverse).unwrap();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), view));
    fs::write(to.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    assert!(Checkpoint::open(&to).is_ok());
}

#[test]
fn what_is_missing_is_named() {
    refused(Path::new("no/such/model"), "no such file or folder");
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), "neither a config.json nor a .gguf file");
    refused(&fixture("tiny-llama3/lora_start"), "is an adapter, not a model");
    refused(&fixture("tiny-llama3/model.safetensors"), "give the folder");
    let (_dir, to) = copy();
    fs::rename(to.join("model.safetensors"), to.join("pytorch_model.bin")).unwrap();
    refused(&to, "pytorch_model.bin is not supported, convert it to safetensors");
    fs::remove_file(to.join("pytorch_model.bin")).unwrap();
    refused(&to, "holds neither model.safetensors nor");
}

#[test]
fn weights_that_contradict_the_config_are_refused() {
    let with = |key: &str, value: Value, wanted: &str| {
        let (_dir, to) = copy();
        change_config(&to, key, value);
        refused(&to, wanted);
    };
    with("num_hidden_layers", json!(4), "9 weights are missing: model.layers.3.self_attn.q_proj.weight");
    with("num_hidden_layers", json!(2), "9 weights are unknown to a llama model of this config: model.layers.2");
    with("intermediate_size", json!(128), "has the shape [160, 64], but the config asks for [128, 64]");
    with(
        "vocab_size",
        json!(513),
        "model.embed_tokens.weight has the shape [512, 64], but the config asks for [513, 64]",
    );
    with("attention_bias", json!(true), "12 weights are missing");
    let (_dir, to) = copy();
    fs::copy(fixture("tiny-llama2/model.safetensors"), to.join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(&to).is_err());
    let (_dir, to) = copy();
    fs::write(to.join("generation_config.json"), "[]").unwrap();
    refused(&to, "must be a JSON object");
    fs::write(to.join("generation_config.json"), "{").unwrap();
    refused(&to, "generation_config.json: not valid JSON");
    fs::write(to.join("config.json"), [0xff, 0xfe]).unwrap();
    refused(&to, "is not UTF-8");
}

#[test]
fn an_untied_head_that_is_missing_gets_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("tiny-llama2").join(name), to.join(name)).unwrap();
    }
    change_config(to, "tie_word_embeddings", json!(false));
    refused(to, "1 weight is missing: lm_head.weight; if its output head is the embedding");
}

#[test]
fn headers_that_lie_are_refused() {
    let (_dir, to) = copy();
    let with = |bytes: &[u8], wanted: &str| {
        fs::write(to.join("model.safetensors"), bytes).unwrap();
        refused(&to, wanted);
    };
    with(b"", "the file is truncated");
    with(&u64::MAX.to_le_bytes(), "absurd");
    with(&safetensors("{", 0), "its header is damaged");
    let tensor = |dtype: &str, shape: &str, end: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, {end}]}}}}"#)
    };
    with(&safetensors(&tensor("F32", "[2, 2]", "16"), 12), "truncated or damaged");
    with(&safetensors(&tensor("F32", "[2, 2]", "16"), 20), "truncated or damaged");
    with(&safetensors(&tensor("F32", "[2, 3]", "16"), 16), "contradicts its shape");
    with(&safetensors(&tensor("F32", "[4294967296, 4294967296]", "16"), 16), "contradicts its shape");
    with(&safetensors(&tensor("U8", "[1152921504606846976]", "1152921504606846976"), 16), "truncated or damaged");
    with(&safetensors(&tensor("I8", "[16]", "16"), 16), "a is I8; supported are F32, BF16 and F16");
    let two = r#"{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}"#;
    with(&safetensors(two, 24), "overlaps another tensor or leaves a gap");
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (_dir, to) = copy();
    let path = to.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for len in (0..header).step_by(7).chain((header..bytes.len()).step_by(10_007)).chain([bytes.len() - 1]) {
        fs::write(&path, &bytes[..len]).unwrap();
        assert!(matches!(Checkpoint::open(&to), Err(Error::Input(_))), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let (_dir, to) = copy();
    let path = to.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let model = Checkpoint::open(&to).unwrap();
    let error = model.read("model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("model.norm.weight holds -inf at index [63]"), "{error}");
}

#[test]
fn what_is_written_is_read_back_in_one_file_or_in_shards() {
    for name in ["tiny-llama2", "tiny-llama3", "tiny-qwen2", "tiny-qwen3"] {
        let model = Checkpoint::open(&fixture(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (max_shard_bytes, files) in [(usize::MAX, 1), (100_000, 3), (1, 20)] {
            let to = dir.path().join(format!("new/{max_shard_bytes}"));
            save(&to, &model, &SaveOptions { max_shard_bytes, ..Default::default() }).unwrap();
            let read = Checkpoint::open(&to).unwrap();
            assert_eq!(read.config(), model.config());
            assert_eq!(read.generation_config(), model.generation_config());
            let shards = names(&to).iter().filter(|name| name.ends_with(".safetensors")).count();
            assert!(shards >= files && (shards == 1) == (files == 1), "{shards} files");
            for (name, tensor) in weights(&model) {
                assert_eq!(read.read(&name).unwrap().data(), tensor.data(), "{name}");
            }
        }
        assert_eq!(names(dir.path()), ["new"], "no temporary folder is left");
    }
}

#[test]
fn half_precision_is_rounded_to_nearest() {
    let model = Checkpoint::open(&fixture("tiny-llama2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for dtype in [Dtype::BF16, Dtype::F16] {
        let to = dir.path().join(dtype.name());
        save(&to, &model, &SaveOptions { dtype, ..Default::default() }).unwrap();
        let config = fs::read_to_string(to.join("config.json")).unwrap();
        assert!(config.contains(&format!("\"torch_dtype\": \"{}\"", dtype.name())));
        let read = Checkpoint::open(&to).unwrap();
        for (name, tensor) in weights(&model) {
            let rounded: Vec<f32> = match dtype {
                Dtype::BF16 => tensor.data().iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
                _ => tensor.data().iter().map(|v| half::f16::from_f32(*v).to_f32()).collect(),
            };
            assert_eq!(read.read(&name).unwrap().data(), rounded, "{name}");
        }
    }
}

#[test]
fn a_folder_in_use_is_only_replaced_when_asked_and_when_it_is_a_model() {
    let model = Checkpoint::open(&fixture("tiny-llama2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    let once = SaveOptions { extra_files: &[("tokenizer.json", b"{}")], ..Default::default() };
    fs::create_dir(&to).unwrap();
    save(&to, &model, &once).unwrap();
    assert_eq!(fs::read(to.join("tokenizer.json")).unwrap(), b"{}");
    let error = save(&to, &model, &once).unwrap_err().to_string();
    assert!(error.contains("is not empty: name a new folder"), "{error}");
    let again = SaveOptions { overwrite: true, max_shard_bytes: 200_000, ..Default::default() };
    save(&to, &model, &again).unwrap();
    assert!(!to.join("model.safetensors").exists() && to.join("model.safetensors.index.json").exists());
    fs::write(to.join("thesis.tex"), "").unwrap();
    let error = save(&to, &model, &again).unwrap_err().to_string();
    assert!(error.contains("holds thesis.tex, which is no part of a model"), "{error}");
    assert!(to.join("thesis.tex").exists() && Checkpoint::open(&to).is_ok());
    let error = save(&to.join("config.json"), &model, &again).unwrap_err().to_string();
    assert!(error.contains("it is a file"), "{error}");
    assert!(save(Path::new(".."), &model, &again).is_err());
    assert_eq!(names(dir.path()), ["model"]);
}

#[test]
fn a_save_that_fails_leaves_the_old_model() {
    let model = Checkpoint::open(&fixture("tiny-llama2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    save(&to, &model, &SaveOptions::default()).unwrap();
    let options = SaveOptions { overwrite: true, ..Default::default() };
    let failing = |name: &str| match name {
        "model.norm.weight" => Err(Error::Failure("out of memory".into())),
        name => Ok(Cow::Owned(model.read(name)?)),
    };
    assert!(save_model(&to, model.config(), None, failing, &options).is_err());
    let other_shape = |_: &str| Ok(Cow::Owned(Tensor::zeros(&[2, 2])));
    let error = save_model(&to, model.config(), None, other_shape, &options).unwrap_err().to_string();
    assert!(error.contains("has the shape [2, 2], its file needs [500, 60]"), "{error}");
    assert!(Checkpoint::open(&to).is_ok());
    assert_eq!(names(dir.path()), ["model"]);
}

#[test]
fn a_generation_config_is_made_when_there_is_none() {
    let model = Checkpoint::open(&fixture("tiny-llama2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    let mut config = model.config().clone();
    config.eos_token_id = vec![2, 5];
    save_model(&to, &config, None, |name| Ok(Cow::Owned(model.read(name)?)), &SaveOptions::default()).unwrap();
    let read = Checkpoint::open(&to).unwrap();
    assert_eq!(read.generation_config().unwrap()["eos_token_id"], json!([2, 5]));
    assert_eq!(read.config().eos_token_id, [2, 5]);
}

#[test]
fn shards_are_checked_against_their_index() {
    let model = Checkpoint::open(&fixture("tiny-llama3")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    save(&to, &model, &SaveOptions { max_shard_bytes: 300_000, ..Default::default() }).unwrap();
    let index = to.join("model.safetensors.index.json");
    let good: Value = serde_json::from_str(&fs::read_to_string(&index).unwrap()).unwrap();
    assert_eq!(good["metadata"], json!({"total_parameters": 195_008, "total_size": 4 * 195_008}));
    let with = |change: &dyn Fn(&mut Value), wanted: &str| {
        let mut index_now = good.clone();
        change(&mut index_now);
        fs::write(&index, index_now.to_string()).unwrap();
        refused(&to, wanted);
    };
    let first = good["weight_map"]["model.embed_tokens.weight"].clone();
    with(&|i| i["weight_map"]["model.norm.weight"] = first.clone(), "the index places model.norm.weight in");
    with(
        &|i| i["weight_map"]["model.norm.weight"] = json!("../x.safetensors"),
        "which is no name of a .safetensors file",
    );
    with(&|i| i["weight_map"]["model.norm.weight"] = json!(3), "which is no name of a .safetensors file");
    with(
        &|i| i["weight_map"]["model.norm.weight"] = json!("other.safetensors"),
        "shards are missing: other.safetensors",
    );
    with(&|i| i["weight_map"] = json!([]), "there is no object weight_map");
    fs::write(&index, good.to_string()).unwrap();
    fs::copy(to.join(first.as_str().unwrap()), to.join("second.safetensors")).unwrap();
    with(&|i| i["weight_map"]["more"] = json!("second.safetensors"), "is in two shards");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..6)) {
        let (_dir, to) = copy();
        let path = to.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in changes {
            bytes[at] = value;
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(model) = Checkpoint::open(&to) {
            for name in model.tensor_names() {
                let _ = model.read(name);
            }
        }
    }
}
