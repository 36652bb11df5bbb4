//! Recompute levels change memory, not gradients; and the memory is what was planned.
#![allow(clippy::unwrap_used)]

mod pass;

use std::path::{Path, PathBuf};
use tunesmith_model::memory::{PassShape, training_bytes};
use tunesmith_model::{
    Adapter, AdapterConfig, Batch, Checkpoint, Gradients, Llama, LossOptions, Masks, Modules, Recompute, Storage,
    Workspace,
};
use tunesmith_tensor::{num_threads, rng::Rng};

fn load(model: &str) -> Llama {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(model);
    Llama::load(&Checkpoint::open(&path).unwrap(), Storage::F32, |_, _| ()).unwrap()
}

/// An adapter with dropout whose B is not zero, so that every gradient is something.
fn adapted(model: &str) -> (Llama, Adapter) {
    let llama = load(model);
    let modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"].map(String::from).to_vec();
    let config =
        AdapterConfig { r: 4, lora_dropout: 0.3, target_modules: Modules::List(modules), ..AdapterConfig::default() };
    let mut adapter = Adapter::new(&llama, &config, 1).unwrap();
    let mut rng = Rng::new(2, 0);
    for parameter in adapter.parameters.iter_mut().filter(|p| p.name.contains("lora_B")) {
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x = 0.1 * rng.normal());
    }
    (llama, adapter)
}

/// Documents of these lengths, one behind the other; every third token carries no loss.
fn packed(lengths: &[usize], vocab: u32) -> Batch {
    let mut rng = Rng::new(3, 0);
    let mut batch = Batch::default();
    for n in lengths {
        let ids: Vec<u32> = (0..*n).map(|_| rng.below(vocab)).collect();
        let trained: Vec<bool> = (0..*n).map(|i| i % 3 != 0).collect();
        batch.push(&ids, &trained);
    }
    batch
}

const MASKS: Option<Masks> = Some(Masks { seed: 5, step: 3, first_token: 1000 });

fn gradients(
    model: (&Llama, Option<&Adapter>),
    batch: &Batch,
    recompute: Recompute,
) -> (Vec<f32>, Gradients, Workspace) {
    let mut ws = Workspace::new(recompute);
    let mut gradients = Gradients::new(model.0, model.1);
    let options = LossOptions { scale: 0.01, label_smoothing: 0.1, ..pass::PLAIN };
    // Twice with the same buffers, the first time on something smaller: what they hold from before must not matter.
    pass::loss_and_gradients(model, &packed(&[7, 5], 256), options, MASKS, &mut ws, &mut gradients);
    gradients.clear();
    let (_, losses) = pass::loss_and_gradients(model, batch, options, MASKS, &mut ws, &mut gradients);
    (losses, gradients, ws)
}

#[test]
fn gradients_are_the_same_to_the_bit() {
    for model in ["tiny-llama2", "tiny-llama3"] {
        let mut full = load(model);
        full.train_all();
        let (lora, adapter) = adapted(model);
        for model in [(&full, None), (&lora, Some(&adapter))] {
            // Two parts, the first of several documents.
            let batch = packed(&[300, 1, 220, 60, 700], 256);
            let (losses, want, _) = gradients(model, &batch, Recompute::None);
            for level in [Recompute::Norms, Recompute::Block] {
                let (others, got, _) = gradients(model, &batch, level);
                assert_eq!(losses, others);
                let trained = tunesmith_model::trained(model.0, model.1);
                for ((a, b), p) in want.trained().zip(got.trained()).zip(trained) {
                    assert!(a.data().iter().any(|x| *x != 0.0), "{}", p.name);
                    assert!(a.data() == b.data(), "{level} {}", p.name);
                }
            }
        }
    }
}

#[test]
fn dropout_does_not_depend_on_how_a_step_is_cut() {
    let (llama, adapter) = adapted("tiny-llama3");
    let model = (&llama, Some(&adapter));
    let documents: Vec<Batch> = [40usize, 30, 50].iter().map(|n| packed(&[*n], 256)).collect();
    let mut together = Batch::default();
    for batch in &documents {
        let trained: Vec<bool> = (0..batch.len()).map(|i| i % 3 != 0).collect();
        together.push(&batch.ids, &trained);
    }
    let options = LossOptions { scale: 0.01, ..pass::PLAIN };
    let masks = |first_token| Some(Masks { seed: 5, step: 3, first_token });
    let mut ws = Workspace::default();
    let mut whole = Gradients::new(&llama, Some(&adapter));
    pass::loss_and_gradients(model, &together, options, masks(0), &mut ws, &mut whole);
    let mut cut = Gradients::new(&llama, Some(&adapter));
    let mut first = 0;
    for batch in &documents {
        pass::loss_and_gradients(model, batch, options, masks(first), &mut ws, &mut cut);
        first += batch.len() as u64;
    }
    for (a, b) in whole.trained().zip(cut.trained()) {
        let norm = a.data().iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = a.data().iter().zip(b.data()).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().sqrt();
        assert!(norm > 0.0 && error < 1e-5 * norm, "{error} of {norm}");
    }
}

#[test]
fn buffers_are_as_large_as_planned() {
    for model in ["tiny-llama2", "tiny-llama3"] {
        let mut full = load(model);
        full.train_all();
        let (lora, adapter) = adapted(model);
        for model in [(&full, None), (&lora, Some(&adapter))] {
            let batch = packed(&[300, 1, 220, 60, 700], 256);
            let shape = PassShape { tokens: 700, loss_rows: 466, threads: num_threads(), int8: false };
            for level in Recompute::ALL {
                let (_, _, ws) = gradients(model, &batch, level);
                let planned = training_bytes(&model.0.config, model.1.map(|adapter| &adapter.config), shape, level);
                let (planned, there) = ((planned.activations + planned.workspace) as f64, ws.num_bytes() as f64);
                let error = (planned / there - 1.0).abs();
                assert!(error < 0.02, "{level}: planned {planned}, there are {there}");
            }
        }
    }
}
