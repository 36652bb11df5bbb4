//! AdamW with 8-bit moments beside AdamW with moments in f32, on a tiny model.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;
use tunesmith_model::{Batch, Checkpoint, Llama, Storage, Workspace, num_trained, trained};
use tunesmith_tensor::rng::Rng;
use tunesmith_train::objective::Objective;
use tunesmith_train::optimizer::{AdamW, AdamWOptions, Optim};
use tunesmith_train::step::Trainer;

const STEPS: u64 = 60;

fn model() -> Llama {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny-llama3");
    let mut llama = Llama::load(&Checkpoint::open(&folder).unwrap(), Storage::F32, |_, _| ()).unwrap();
    llama.train_all();
    llama
}

/// Losses of a training on sequences that can be learnt: each token is followed by one of two.
fn curve(optim: Optim) -> (Vec<f64>, Arc<Llama>) {
    let options = AdamWOptions { optim, weight_decay: 0.01, ..AdamWOptions::default() };
    let mut trainer = Trainer::new(Arc::new(model()), None, options, Workspace::default());
    let mut rng = Rng::new(7, 0);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let mut batch = Batch::default();
        for _ in 0..4 {
            let mut ids = vec![rng.below(512)];
            while ids.len() < 48 {
                ids.push((ids[ids.len() - 1] * 5 + 1 + rng.below(2)) % 512);
            }
            batch.push(&ids, &[true; 48]);
        }
        losses.push(trainer.step(&[batch], &Objective::default(), 2e-3).unwrap().loss.mean());
    }
    (losses, trainer.model)
}

#[test]
fn eight_bits_track_thirty_two() {
    let (exact, _) = curve(Optim::AdamW);
    let (losses, llama) = curve(Optim::AdamW8bit);
    let (again, same) = curve(Optim::AdamW8bit);
    assert_eq!(losses, again, "the same from run to run");
    for (a, b) in llama.parameters.iter().zip(&same.parameters) {
        assert_eq!(a.value.tensor().data(), b.value.tensor().data());
    }
    let (first, last) = (exact[0], exact[exact.len() - 1]);
    assert!(last < 0.8 * first, "it learns: {first} to {last}");
    let worst = exact.iter().zip(&losses).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    println!("largest relative difference of the losses {worst}");
    assert!(worst < 0.005, "{exact:?}\n{losses:?}");
}

#[test]
fn eight_bits_take_two_bytes_a_weight() {
    let llama = model();
    for (optim, bytes) in [(Optim::AdamW, 8.0), (Optim::AdamW8bit, 2.0)] {
        let mut optimizer = AdamW::new(&llama, None, AdamWOptions { optim, ..AdamWOptions::default() });
        let there: usize = optimizer.state(trained(&llama, None)).iter().map(|t| t.bytes.len()).sum();
        let planned: usize = llama.parameters.iter().map(|p| optim.state_bytes(p.value.len())).sum();
        assert_eq!(there, planned);
        // Small tensors keep their f32 moments, and blocks have scales.
        let a_weight = there as f64 / num_trained(&llama, None) as f64;
        assert!(a_weight >= bytes && a_weight < bytes + 0.6, "{a_weight} bytes a weight");
    }
}
