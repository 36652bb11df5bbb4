//! Models whose frozen matrices are packed: the same numbers as with the decoded matrices, for less memory.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

mod pass;

use std::path::Path;
use tunesmith_model::{
    Adapter, AdapterConfig, Batch, Checkpoint, Config, GgufOptions, Gradients, LINEAR_NAMES, Llama, LossOptions,
    Modules, Storage, Workspace, initial_rows, save_gguf,
};
use tunesmith_tensor::quant::BlockType;
use tunesmith_tensor::{Tensor, Weight};

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "initializer_range": 0.3,
    "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#;

fn config() -> Config {
    Config::from_json(CONFIG, "config.json").unwrap()
}

fn write(path: &Path, kind: BlockType) {
    let config = config();
    let options = GgufOptions { kind, name: "test", tokenizer: None };
    save_gguf(path, &config, options, |name, rows, out| {
        initial_rows(&config, 3, name, rows, out);
        Ok(())
    })
    .unwrap();
}

fn load(path: &Path, storage: Storage) -> Llama {
    Llama::load(&Checkpoint::open(path).unwrap(), storage, |_, _| ()).unwrap()
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    for length in [19u32, 7] {
        let ids: Vec<u32> = (0..length).map(|i| (i * 37 + length) % 160).collect();
        batch.push(&ids, &vec![true; ids.len()]);
    }
    batch
}

/// Loss and adapter gradients with an adapter whose B is not zero.
fn adapter_step(model: &Llama) -> (f64, Vec<Tensor>, Adapter) {
    let target_modules = Modules::List(LINEAR_NAMES.map(String::from).to_vec());
    let adapter = AdapterConfig { r: 4, lora_alpha: 8.0, target_modules, ..AdapterConfig::default() };
    let mut adapter = Adapter::new(model, &adapter, 1).unwrap();
    for (i, parameter) in adapter.parameters.iter_mut().filter(|p| p.name.contains("lora_B")).enumerate() {
        for (j, x) in parameter.value.tensor_mut().data_mut().iter_mut().enumerate() {
            *x = ((i * 31 + j * 7) % 13) as f32 / 50.0 - 0.12;
        }
    }
    let mut gradients = Gradients::new(model, Some(&adapter));
    let options = LossOptions { scale: 1.0 / 24.0, ..pass::PLAIN };
    let (of, ws) = ((model, Some(&adapter)), &mut Workspace::default());
    let (loss, _) = pass::loss_and_gradients(of, &batch(), options, None, ws, &mut gradients);
    (loss, gradients.adapter.into_iter().flatten().collect(), adapter)
}

/// Replaces every packed matrix by its decoded form.
fn decoded(mut model: Llama) -> Llama {
    for parameter in &mut model.parameters {
        if let Weight::Packed(packed) = &parameter.value {
            parameter.value = packed.to_tensor().into();
        }
    }
    model
}

fn packed_bytes(model: &Llama) -> usize {
    model.parameters.iter().map(|p| p.value.num_bytes()).sum()
}

#[test]
fn packed_training_equals_dequantised_training() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, storage) in [
        (BlockType::Q8_0, Storage::Stored),
        (BlockType::Q4_0, Storage::Stored),
        (BlockType::BF16, Storage::Stored),
        (BlockType::F32, Storage::Nf4),
    ] {
        let path = folder.path().join(format!("{}.gguf", kind.name()));
        write(&path, kind);
        let packed = load(&path, storage);
        let dense = decoded(load(&path, storage));
        assert!(2 * packed_bytes(&packed) < packed_bytes(&dense) + 4096, "{storage:?} of {}", kind.name());
        let ((loss, gradients, _), (want, wanted, _)) = (adapter_step(&packed), adapter_step(&dense));
        assert!((loss - want).abs() < 1e-6 * want, "{}: {loss} {want}", kind.name());
        assert_eq!(gradients.len(), 2 * 7 * 2);
        for (ours, theirs) in gradients.iter().zip(&wanted) {
            let norm = theirs.data().iter().map(|x| x * x).sum::<f32>().sqrt();
            let error = ours.data().iter().zip(theirs.data()).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            assert!(norm > 0.0 && error < 1e-5 * norm, "{}: {error} of {norm}", kind.name());
        }
    }
}

#[test]
fn stored_blocks_are_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, BlockType::Q8_0);
    let (packed, dense) = (load(&path, Storage::Stored), load(&path, Storage::F32));
    for (a, b) in packed.parameters.iter().zip(&dense.parameters) {
        assert_eq!(a.value.to_tensor().data(), b.value.tensor().data(), "{}", a.name);
        let expected = if b.value.shape().len() == 2 { "Q8_0" } else { "F32" };
        assert_eq!(a.value.encoding(), expected, "{}", a.name);
    }
    let (one, two) = (pass::loss((&packed, None), &batch()), pass::loss((&dense, None), &batch()));
    assert!((one - two).abs() < 1e-6 * two, "{one} {two}");
}

#[test]
fn a_written_file_is_the_model_that_was_meant() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, BlockType::F32);
    let (read, made) = (load(&path, Storage::F32), Llama::random(config(), 3));
    assert_eq!(read.config.rope, made.config.rope);
    for (a, b) in read.parameters.iter().zip(&made.parameters) {
        assert_eq!((a.name.as_str(), a.value.shape()), (b.name.as_str(), b.value.shape()));
        assert_eq!(a.value.tensor().data(), b.value.tensor().data(), "{}", a.name);
    }
}

#[test]
fn merging_and_full_training_decode() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, BlockType::Q4_0);
    let mut model = load(&path, Storage::Stored);
    let (loss, _, adapter) = adapter_step(&model);
    adapter.merge_into(&mut model).unwrap();
    let merged = pass::loss((&model, None), &batch());
    assert!((merged - loss).abs() < 1e-5 * loss, "{merged} {loss}");
    assert!(model.parameters.iter().filter(|p| p.name.contains("_proj")).all(|p| p.value.dense().is_some()));
    model.train_all();
    assert!(model.parameters.iter().all(|p| p.value.dense().is_some()));
}

#[test]
fn rows_that_fill_no_block_are_refused() {
    let config = Config::from_json(&CONFIG.replace("96", "100"), "config.json").unwrap();
    let path = std::env::temp_dir().join("never-written.gguf");
    let options = GgufOptions { kind: BlockType::Q4_0, name: "test", tokenizer: None };
    let error = save_gguf(&path, &config, options, |_, _, _| Ok(())).unwrap_err().to_string();
    assert!(error.contains("down_proj") && error.contains("multiple of 32"), "{error}");
    assert!(!path.exists());
}
