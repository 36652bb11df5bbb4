//! The engine against numbers that transformers and PEFT wrote, on two tiny models.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tunesmith_model::{
    Adapter, AdapterFile, Batch, Checkpoint, KvCache, Llama, Sampler, Sampling, Storage, Workspace, generate,
};
use tunesmith_train::objective::Objective;
use tunesmith_train::step::Trainer;
use tunesmith_train::verify::{self, Check, Reference};

const MODELS: [&str; 2] = ["tiny-llama2", "tiny-llama3"];

fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(model).join(file)
}

fn load(model: &str) -> Llama {
    Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), Storage::F32, |_, _| ()).unwrap()
}

fn adapted(model: &str, adapter: &str) -> (Llama, Option<Adapter>) {
    let mut llama = load(model);
    let file = AdapterFile::open(&fixture(model, adapter)).unwrap();
    let adapter = Adapter::open(&mut llama, file, true).unwrap();
    (llama, Some(adapter))
}

fn assert_passed(what: &str, checks: &[Check]) {
    let worst = checks.iter().max_by(|a, b| (a.difference / a.tolerance).total_cmp(&(b.difference / b.tolerance)));
    println!("{what}: {} checks, worst {worst:?}", checks.len());
    for check in checks {
        assert!(check.passed(), "{what}: {check:?}");
    }
}

fn facts(model: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(model, "facts.json")).unwrap()).unwrap()
}

#[test]
fn logits_loss_and_every_gradient() {
    for model in MODELS {
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let llama = load(model);
        let num_parameters = llama.parameters.len();
        let checks = verify::verify_reference(llama, None, &reference).unwrap();
        assert_passed(model, &checks);
        let gradients = checks.iter().filter(|c| c.what.starts_with("grad.")).count();
        assert_eq!(gradients, num_parameters, "every parameter has a gradient in the reference");
        assert!(checks.iter().any(|c| c.what == "loss") && checks.iter().any(|c| c.what == "logits"));
    }
}

#[test]
fn the_loss_is_that_of_the_reference() {
    for model in MODELS {
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let (shape, ids) = reference.integers("input_ids").unwrap().unwrap();
        let (_, labels) = reference.integers("labels").unwrap().unwrap();
        let ids: Vec<u32> = ids.iter().map(|i| *i as u32).collect();
        let batch = Batch::from_labels(ids.chunks(shape[1]).zip(labels.chunks(shape[1])));
        let (_, sum) = Objective::default().losses(&load(model), None, &batch, &mut Workspace::default());
        let loss = sum / batch.targets.len() as f64;
        let want = facts(model)["loss"].as_f64().unwrap();
        assert!((loss / want - 1.0).abs() < verify::LOSS_TOLERANCE, "{model}: {loss} {want}");
    }
}

#[test]
fn packed_documents_equal_separate_ones() {
    for model in MODELS {
        let reference = Reference::open(&fixture(model, "packing.safetensors")).unwrap();
        let (_, ids) = reference.integers("packed_ids").unwrap().unwrap();
        let (_, lengths) = reference.integers("lengths").unwrap().unwrap();
        let (_, want) = reference.floats("logits").unwrap().unwrap();
        let mut batch = Batch::default();
        let mut rest: &[i64] = &ids;
        for length in lengths {
            let (document, others) = rest.split_at(length as usize);
            let document: Vec<u32> = document.iter().map(|i| *i as u32).collect();
            batch.push(&document, &vec![true; document.len()]);
            rest = others;
        }
        let mut ws = Workspace::default();
        let got = load(model).logits(&batch, None, &mut ws).data().to_vec();
        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = got.iter().zip(&want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert_eq!(got.len(), want.len());
        assert!(worst / largest < 1e-4, "{model}: {worst} of {largest}");
    }
}

#[test]
fn training_curves() {
    for model in MODELS {
        let batches = Reference::open(&fixture(model, "train_batches.safetensors")).unwrap();
        let curves = fixture(model, "curves.json");
        for (name, adapter, decay, smoothing) in [
            ("full", None, 0.1, 0.0),
            ("full_label_smoothing_0.1", None, 0.0, 0.1),
            ("lora", Some("lora_start"), 0.0, 0.0),
            ("rslora", Some("rslora_start"), 0.0, 0.0),
        ] {
            let (mut llama, own) = adapter.map_or_else(|| (load(model), None), |adapter| adapted(model, adapter));
            if own.is_none() {
                llama.train_all();
            }
            let curve = verify::read_curve(&curves, name).unwrap();
            assert_eq!(curve.len(), 20);
            let (checks, trainer) = verify::verify_curve(llama, own, &batches, &curve, decay, smoothing).unwrap();
            assert_eq!(checks.len(), 40);
            assert_passed(&format!("{model} {name}"), &checks);
            if let Some(own) = trainer.adapter {
                let last = AdapterFile::open(&fixture(model, &format!("{name}_final"))).unwrap();
                for (module, a, b) in own.tensors() {
                    let (want_a, want_b) = &last.tensors[module];
                    for (got, want) in [(a, want_a), (b, want_b)] {
                        let worst = got.data().iter().zip(want.data()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                        assert!(worst < 2e-3, "{model} {name} {module}: {worst}");
                    }
                }
            }
        }
    }
}

#[test]
fn adapters_merged_and_unmerged() {
    for model in MODELS {
        for variant in ["lora", "rslora"] {
            let start = Reference::open(&fixture(model, &format!("{variant}_forward.safetensors"))).unwrap();
            let start_of = || adapted(model, &format!("{variant}_start"));
            let (llama, adapter) = start_of();
            assert_passed("with the adapter", &verify::verify_reference(llama, adapter, &start).unwrap());
            let (mut llama, adapter) = start_of();
            adapter.unwrap().merge_into(&mut llama).unwrap();
            assert_passed("merged", &verify::verify_reference(llama, None, &start).unwrap());

            let end = Reference::open(&fixture(model, &format!("{variant}_merged_forward.safetensors"))).unwrap();
            let (llama, adapter) = adapted(model, &format!("{variant}_final"));
            assert_passed("final", &verify::verify_reference(llama, adapter, &end).unwrap());
        }
    }
}

#[test]
fn adapter_off_is_the_base_to_the_bit() {
    let (llama, adapter) = adapted("tiny-llama3", "lora_start");
    let mut batch = Batch::default();
    batch.push(&[5, 9, 300, 7], &[true; 4]);
    let mut ws = Workspace::default();
    let on = llama.logits(&batch, adapter.as_ref(), &mut ws).data().to_vec();
    let off = llama.logits(&batch, None, &mut ws).data().to_vec();
    let base = load("tiny-llama3").logits(&batch, None, &mut ws).data().to_vec();
    assert_eq!(off, base);
    assert_ne!(on, base);
}

#[test]
fn greedy_continuation_with_and_without_the_cache() {
    for model in MODELS {
        let llama = load(model);
        let want: Vec<u32> =
            facts(model)["greedy"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
        let mut ws = Workspace::default();
        let mut cache = KvCache::new(&llama.config, want.len());
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        let go_on = |_| std::ops::ControlFlow::Continue(());
        let (new, _) = generate(&llama, None, &want[..16], &mut cache, &mut sampler, &[], 24, &mut ws, go_on).unwrap();
        assert_eq!(new, want[16..]);
        // The same positions in one pass, without a cache.
        let mut batch = Batch::default();
        batch.push(&want, &vec![true; want.len()]);
        let logits = llama.logits(&batch, None, &mut ws);
        for (t, next) in want.iter().enumerate().skip(16) {
            assert_eq!(tunesmith_tensor::ops::sample::largest(logits.row(t - 1)), *next);
        }
    }
}

#[test]
fn a_batch_in_parts_is_the_sum_of_its_documents() {
    let mut llama = load("tiny-llama3");
    llama.train_all();
    let mut rng = tunesmith_tensor::rng::Rng::new(3, 0);
    let mut documents = Vec::new();
    for length in [400u32, 500, 300, 400] {
        documents.push((0..length).map(|_| rng.below(512)).collect::<Vec<u32>>());
    }
    let batch_of = |documents: &[Vec<u32>]| {
        let mut batch = Batch::default();
        documents.iter().for_each(|ids| batch.push(ids, &vec![true; ids.len()]));
        batch
    };
    let whole = batch_of(&documents);
    assert!(whole.len() > tunesmith_model::llama::PASS_TOKENS, "the batch takes several parts");
    let objective = Objective::default();
    let mut trainer = Trainer::for_gradients(Arc::new(llama), None, Workspace::default());
    trainer.accumulate(std::slice::from_ref(&whole), &objective).unwrap();
    let together: Vec<_> = trainer.gradients.trained().cloned().collect();
    let (losses, _) = objective.losses(&trainer.model, None, &whole, &mut trainer.workspace);
    let separate: Vec<Batch> = documents.iter().map(|document| batch_of(std::slice::from_ref(document))).collect();
    trainer.accumulate(&separate, &objective).unwrap();
    let of_one = |batch| objective.losses(&trainer.model, None, batch, &mut trainer.workspace).0;
    let losses_apart: Vec<f32> = separate.iter().flat_map(of_one).collect();
    assert_eq!(losses.len(), whole.targets.len());
    for (a, b) in losses.iter().zip(&losses_apart) {
        assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} {b}");
    }
    for (a, b) in together.iter().zip(trainer.gradients.trained()) {
        let norm = b.data().iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = a.data().iter().zip(b.data()).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().sqrt();
        assert!(error < 1e-5 * norm, "{error} of {norm}");
    }
}
