//! Training with frozen weights in 8-bit integers beside the same in f32, on the tiny models.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tunesmith_model::{Adapter, AdapterFile, Batch, Checkpoint, Llama, Storage, Workspace};
use tunesmith_tensor::rng::Rng;
use tunesmith_train::objective::Objective;
use tunesmith_train::step::Trainer;
use tunesmith_train::verify::{self, Reference};

const MODELS: [&str; 2] = ["tiny-llama2", "tiny-llama3"];

fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(model).join(file)
}

fn adapted(model: &str, storage: Storage, int8: bool) -> (Llama, Adapter) {
    let mut llama = Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), storage, |_, _| ()).unwrap();
    let file = AdapterFile::open(&fixture(model, "lora_final")).unwrap();
    let adapter = Adapter::open(&mut llama, file, true).unwrap();
    if int8 {
        llama.compute_int8(true).unwrap();
    }
    assert_eq!(llama.computes_int8(), int8);
    (llama, adapter)
}

fn batch(vocab: u32) -> Batch {
    let mut rng = Rng::new(8, 0);
    let mut batch = Batch::default();
    for length in [40, 7, 61] {
        let ids: Vec<u32> = (0..length).map(|_| rng.below(vocab)).collect();
        batch.push(&ids, &vec![true; length]);
    }
    batch
}

/// Loss a token, and all gradients one behind the other.
fn pass((llama, adapter): (Llama, Adapter)) -> (f64, Vec<f32>) {
    let batch = batch(llama.config.vocab_size as u32);
    let mut trainer = Trainer::for_gradients(Arc::new(llama), Some(adapter), Workspace::default());
    let loss = trainer.accumulate(&[batch], &Objective::default()).unwrap();
    (loss.mean(), trainer.gradients.trained().flat_map(|g| g.data().to_vec()).collect())
}

#[test]
fn loss_and_adapter_gradients_are_close_to_f32() {
    for model in MODELS {
        let (loss, gradients) = pass(adapted(model, Storage::F32, false));
        let (int8_loss, int8_gradients) = pass(adapted(model, Storage::F32, true));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(&gradients, &int8_gradients)
            / (dot(&gradients, &gradients) * dot(&int8_gradients, &int8_gradients)).sqrt();
        println!("{model}: loss {loss} in f32, {int8_loss} in int8; cosine of gradients {cosine}");
        assert!((int8_loss / loss - 1.0).abs() < 1e-3, "{model}: {loss} {int8_loss}");
        assert!(cosine > 0.999 && cosine < 1.0, "{model}: {cosine}");
    }
}

#[test]
fn the_same_for_any_number_of_threads_and_any_storage() {
    let results: Vec<_> = [1, 2, 3]
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| pass(adapted("tiny-llama3", Storage::F32, true)))
        })
        .into_iter()
        .chain([pass(adapted("tiny-llama3", Storage::Stored, true))])
        .collect();
    for result in &results[1..] {
        assert_eq!(result.0, results[0].0);
        assert_eq!(result.1, results[0].1);
    }
}

#[test]
fn twenty_steps_go_the_way_of_f32() {
    for model in MODELS {
        let batches = Reference::open(&fixture(model, "train_batches.safetensors")).unwrap();
        let curve = verify::read_curve(&fixture(model, "curves.json"), "lora").unwrap();
        let mut llama = Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), Storage::F32, |_, _| ()).unwrap();
        let file = AdapterFile::open(&fixture(model, "lora_start")).unwrap();
        let adapter = Adapter::open(&mut llama, file, true).unwrap();
        llama.compute_int8(true).unwrap();
        let (checks, _) = verify::verify_curve(llama, Some(adapter), &batches, &curve, 0.0, 0.0).unwrap();
        let losses: Vec<_> = checks.iter().filter(|c| c.what.contains("loss")).collect();
        assert_eq!(losses.len(), 20);
        let worst = losses.iter().fold(0.0f64, |m, c| m.max(c.difference));
        println!("{model}: losses differ from those of f32 by up to {worst} of themselves");
        assert!(worst < 2e-3, "{model}: {worst}");
    }
}

#[test]
fn rounded_weights_are_not_passed_off_as_the_models_own() {
    let (mut llama, adapter) = adapted("tiny-llama3", Storage::F32, true);
    let message = adapter.merge_into(&mut llama).unwrap_err().to_string();
    assert!(message.contains("rounded to 8 bits") && message.contains("without int8"), "{message}");
    let name = "model.layers.0.self_attn.q_proj.weight";
    let message = llama.base_tensor(name).unwrap_err().to_string();
    assert!(message.contains(name) && message.contains("rounded to 8 bits"), "{message}");
    let (exact, _) = adapted("tiny-llama3", Storage::F32, false);
    let embedding = "model.embed_tokens.weight";
    let rows = |llama: &Llama| llama.base_tensor(embedding).unwrap().to_tensor().data().to_vec();
    assert_eq!(rows(&llama), rows(&exact));

    let mut full =
        Llama::load(&Checkpoint::open(&fixture("tiny-llama3", "")).unwrap(), Storage::F32, |_, _| ()).unwrap();
    full.train_all();
    let message = full.compute_int8(true).unwrap_err().to_string();
    assert!(message.contains("trains") && message.contains("adapter"), "{message}");
}
