//! The engine against numbers that transformers and PEFT wrote, on two tiny models.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use tunesmith_infer::{Request, Sampler, Sampling, complete};
use tunesmith_model::{AdapterFile, Batch, Checkpoint, Gradients, Llama, LossOptions, Storage, Workspace};
use tunesmith_train::verify::{self, Check, Reference};

const MODELS: [&str; 2] = ["tiny-llama2", "tiny-llama3"];
/// With those of other families.
const FAMILIES: [&str; 3] = ["tiny-llama2", "tiny-llama3", "tiny-qwen2"];

fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(model).join(file)
}

fn load(model: &str) -> Llama {
    Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), Storage::F32, |_, _| ()).unwrap()
}

fn adapted(model: &str, adapter: &str) -> Llama {
    let mut llama = load(model);
    llama.attach_adapter(AdapterFile::open(&fixture(model, adapter)).unwrap(), true).unwrap();
    llama
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
    for model in FAMILIES {
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let mut llama = load(model);
        let checks = verify::verify_reference(&mut llama, &reference).unwrap();
        assert_passed(model, &checks);
        let gradients = checks.iter().filter(|c| c.what.starts_with("grad.")).count();
        assert_eq!(gradients, llama.parameters.len(), "every parameter has a gradient in the reference");
        assert!(checks.iter().any(|c| c.what == "loss") && checks.iter().any(|c| c.what == "logits"));
    }
}

#[test]
fn the_loss_is_that_of_the_reference() {
    for model in FAMILIES {
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let (shape, ids) = reference.integers("input_ids").unwrap().unwrap();
        let (_, labels) = reference.integers("labels").unwrap().unwrap();
        let ids: Vec<u32> = ids.iter().map(|i| *i as u32).collect();
        let batch = Batch::from_labels(ids.chunks(shape[1]).zip(labels.chunks(shape[1])));
        let loss = load(model).loss(&batch, 0.0, &mut Workspace::default()) / batch.targets.len() as f64;
        let want = facts(model)["loss"].as_f64().unwrap();
        assert!((loss / want - 1.0).abs() < verify::LOSS_TOLERANCE, "{model}: {loss} {want}");
    }
}

#[test]
fn packed_documents_equal_separate_ones() {
    for model in FAMILIES {
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
        let got = load(model).logits(&batch, &mut ws).data().to_vec();
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
            let mut llama = match adapter {
                Some(adapter) => adapted(model, adapter),
                None => load(model),
            };
            if adapter.is_none() {
                llama.train_all();
            }
            let curve = verify::read_curve(&curves, name).unwrap();
            assert_eq!(curve.len(), 20);
            let checks = verify::verify_curve(&mut llama, &batches, &curve, decay, smoothing).unwrap();
            assert_eq!(checks.len(), 40);
            assert_passed(&format!("{model} {name}"), &checks);
            if adapter.is_some() {
                let last = AdapterFile::open(&fixture(model, &format!("{name}_final"))).unwrap();
                for (module, a, b) in llama.adapter_tensors() {
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
            let mut llama = adapted(model, &format!("{variant}_start"));
            assert_passed("with the adapter", &verify::verify_reference(&mut llama, &start).unwrap());
            llama.merge_adapter().unwrap();
            assert_passed("merged", &verify::verify_reference(&mut llama, &start).unwrap());
            assert!(llama.merge_adapter().is_err());

            let end = Reference::open(&fixture(model, &format!("{variant}_merged_forward.safetensors"))).unwrap();
            let mut llama = adapted(model, &format!("{variant}_final"));
            assert_passed("final", &verify::verify_reference(&mut llama, &end).unwrap());
        }
    }
}

/// Logits, loss and the gradients of every pair.
#[test]
fn adapters_of_other_families() {
    for model in &FAMILIES[MODELS.len()..] {
        let reference = Reference::open(&fixture(model, "lora_forward.safetensors")).unwrap();
        let mut llama = adapted(model, "lora_start");
        let checks = verify::verify_reference(&mut llama, &reference).unwrap();
        assert_passed(model, &checks);
        assert_eq!(checks.iter().filter(|c| c.what.starts_with("grad.")).count(), 2 * 7 * 4);
    }
}

#[test]
fn adapter_off_is_the_base_to_the_bit() {
    let mut llama = adapted("tiny-llama3", "lora_start");
    let mut batch = Batch::default();
    batch.push(&[5, 9, 300, 7], &[true; 4]);
    let mut ws = Workspace::default();
    let on = llama.logits(&batch, &mut ws).data().to_vec();
    llama.enable_adapter(false);
    let off = llama.logits(&batch, &mut ws).data().to_vec();
    let base = load("tiny-llama3").logits(&batch, &mut ws).data().to_vec();
    assert_eq!(off, base);
    assert_ne!(on, base);
}

#[test]
fn greedy_continuation_with_and_without_the_cache() {
    for model in FAMILIES {
        let llama = load(model);
        let want: Vec<u32> =
            facts(model)["greedy"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
        let mut ws = Workspace::default();
        let request = Request::new(&want[..16], Sampler::new(Sampling::default()).unwrap(), &[], 24);
        let go_on = |_, _| std::ops::ControlFlow::Continue(());
        assert_eq!(complete(&llama, vec![request], 1, go_on).unwrap()[0].ids, want[16..]);
        // The same positions in one pass, without a cache.
        let mut batch = Batch::default();
        batch.push(&want, &vec![true; want.len()]);
        let logits = llama.logits(&batch, &mut ws);
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
    let options = LossOptions { scale: 1e-3, label_smoothing: 0.0, dropout_seed: None, step: 0, first_token: 0 };
    let mut ws = Workspace::default();
    let mut together = Gradients::new(&llama);
    llama.loss_and_gradients(&whole, options, &mut ws, &mut together);
    let losses = ws.losses().to_vec();
    let mut apart = Gradients::new(&llama);
    let mut losses_apart = Vec::new();
    for document in &documents {
        llama.loss_and_gradients(&batch_of(std::slice::from_ref(document)), options, &mut ws, &mut apart);
        losses_apart.extend_from_slice(ws.losses());
    }
    assert_eq!(losses.len(), whole.targets.len());
    for (a, b) in losses.iter().zip(&losses_apart) {
        assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} {b}");
    }
    for (a, b) in together.tensors.iter().flatten().zip(apart.tensors.iter().flatten()) {
        let norm = b.data().iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = a.data().iter().zip(b.data()).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().sqrt();
        assert!(error < 1e-5 * norm, "{error} of {norm}");
    }
}
