//! What a step asks the heap for once its buffers exist. Alone in its binary, since it watches every thread.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use peak_alloc::PeakAlloc;
use std::path::Path;
use std::slice::from_ref;
use std::sync::Arc;
use tunesmith_model::{Adapter, AdapterFile, Batch, Checkpoint, Llama, Recompute, Storage, Workspace};
use tunesmith_tensor::rng::Rng;
use tunesmith_train::objective::Objective;
use tunesmith_train::optimizer::AdamWOptions;
use tunesmith_train::step::Trainer;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn batch(lengths: &[usize]) -> Batch {
    let (mut rng, mut batch) = (Rng::new(8, 0), Batch::default());
    for length in lengths {
        let ids: Vec<u32> = (0..*length).map(|_| rng.below(512)).collect();
        batch.push(&ids, &vec![true; *length]);
    }
    batch
}

/// Bytes above those held before, at the worst moment of a step and after it, when the same step has been made before: the
/// least of several such steps.
fn transient((llama, adapter): (Llama, Option<Adapter>), recompute: Recompute) -> (usize, usize) {
    let trainer = Trainer::new(Arc::new(llama), adapter, AdamWOptions::default(), Workspace::new(recompute));
    let mut trainer = Trainer { dropout_seed: Some(1), ..trainer };
    let batch = batch(&[300, 41, 7, 160, 500, 1000, 48]);
    let mut step = |_| drop(trainer.step(from_ref(&batch), &Objective::default(), 1e-3).unwrap());
    // The buffers of the workspace come with the first steps. Which thread takes a task is chance, so a thread may make its own
    // buffer for a kind of task in any step: that happens once per thread and kind, while a buffer that is not reused shows in
    // every step. The best of several steps tells the two apart.
    (0..10).for_each(&mut step);
    let costs = (10..20).map(|i| {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        step(i);
        (ALLOCATOR.peak_usage() - before, ALLOCATOR.current_usage().saturating_sub(before))
    });
    costs.min().unwrap()
}

#[test]
fn a_step_reuses_its_buffers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny-llama3");
    let load = || Llama::load(&Checkpoint::open(&folder).unwrap(), Storage::F32, |_, _| ()).unwrap();
    let start = |name| {
        let mut llama = load();
        if name == "full" {
            llama.train_all();
            return (llama, None);
        }
        let adapter = Adapter::open(&mut llama, AdapterFile::open(&folder.join("lora_start")).unwrap(), true).unwrap();
        (llama, Some(adapter))
    };
    for name in ["lora", "full"] {
        for recompute in [Recompute::None, Recompute::Norms, Recompute::Block] {
            let (most, left) = transient(start(name), recompute);
            println!("{name}, {recompute:?}: {most} bytes at most, {left} left");
            // A part of 1,024 tokens has hidden states of 262 kB. What may be asked for is lists of tokens and tasks, and what
            // the `gemm` crate packs its operands into, anew at each call.
            assert!(most < 256 << 10, "{name}, {recompute:?}: {most} bytes asked for during a step");
            assert!(left < 4 << 10, "{name}, {recompute:?}: {left} bytes not given back");
        }
    }
}
