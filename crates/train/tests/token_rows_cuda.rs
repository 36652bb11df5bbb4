//! An adapter's rows of added tokens on the emulated GPU against the processor: losses, gradients and updates.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod distance;

use distance::distance;
use std::path::Path;
use std::sync::Arc;
use tunesmith_model::token_rows::token_rows_name;
use tunesmith_model::{
    Adapter, AdapterConfig, Batch, Checkpoint, Config, Llama, Modules, Recompute, Storage, Workspace,
};
use tunesmith_tensor::cuda::Gpu;
use tunesmith_tensor::{Device, Dtype, Tensor, rng::Rng};
use tunesmith_train::objective::Objective;
use tunesmith_train::optimizer::AdamWOptions;
use tunesmith_train::step::Trainer;

const STEPS: u64 = 2;

/// A model with an adapter that changes something, and rows of three tokens, two of which are new.
fn model(tied: bool, storage: Storage) -> (Llama, Adapter, [u32; 3]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny-llama3");
    let mut llama = Llama::load(&Checkpoint::open(&path).unwrap(), storage, |_, _| ()).unwrap();
    if tied {
        llama = Llama::random(Config { tie_word_embeddings: true, ..llama.config }, 4);
    }
    let size = llama.config.vocab_size as u32;
    let ids = [3, size, size + 1];
    let targets = Modules::Pattern("all-linear".into());
    let config = AdapterConfig { r: 4, target_modules: targets, ..AdapterConfig::default() };
    let mut adapter = Adapter::new(&llama, &config, 1).unwrap();
    adapter.train_tokens(&mut llama, &ids).unwrap();
    let mut rng = Rng::new(9, 0);
    for parameter in &mut adapter.parameters {
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.05 * rng.normal());
    }
    (llama, adapter, ids)
}

/// Documents with these tokens in them; the last one is nowhere in the first.
fn batch(ids: &[u32], step: u64) -> Batch {
    let mut rng = Rng::new(3, step);
    let mut batch = Batch::default();
    for (document, n) in [37usize, 20].into_iter().enumerate() {
        let own = &ids[..2 + document];
        let token = |i: usize| if i.is_multiple_of(5) { own[i / 5 % own.len()] } else { rng.below(200) };
        let ids: Vec<u32> = (0..n).map(token).collect();
        let trained: Vec<bool> = (0..n).map(|i| i % 3 != 0).collect();
        batch.push(&ids, &trained);
    }
    batch
}

/// What two steps leave: the loss of each, the gradients of the first, all that trains, and what is computed then.
struct Trained {
    losses: Vec<f64>,
    gradients: Vec<(String, Tensor)>,
    values: Vec<(String, Tensor)>,
    logits: Vec<f32>,
    base_logits: Vec<f32>,
}

fn train(llama: Llama, adapter: Adapter, ids: &[u32]) -> Trained {
    let ws = Workspace::new(Recompute::Norms);
    let mut trainer = Trainer::new(Arc::new(llama), Some(adapter), AdamWOptions::default(), ws);
    trainer.max_grad_norm = 0.0;
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let objective = Objective::NextToken { label_smoothing: 0.1 };
        losses.push(trainer.step(&[batch(ids, step)], &objective, 1e-3).unwrap().loss.mean());
        if step == 0 {
            let all = trainer.trained().zip(trainer.gradients.trained());
            gradients = all.map(|(p, g)| (p.name.clone(), g.to_host())).collect();
        }
    }
    let values = trainer.trained().map(|p| (p.name.clone(), p.host().into_owned())).collect();
    let Trainer { model, adapter, workspace, .. } = &mut trainer;
    let mut logits = |adapter| model.logits(&batch(ids, 0), adapter, workspace).to_host().data().to_vec();
    Trained { losses, gradients, values, logits: logits(adapter.as_ref()), base_logits: logits(None) }
}

#[test]
fn rows_of_tokens_train_as_on_the_processor() {
    for (tied, storage) in [(true, Storage::F32), (false, Storage::F32), (false, Storage::Nf4)] {
        for (dtype, bound) in [(Dtype::F32, 1e-4), (Dtype::BF16, 4e-2)] {
            let (on_host, adapter, ids) = model(tied, storage);
            let want = train(on_host, adapter, &ids);

            let binary = std::env::current_exe().unwrap();
            let gpu = Gpu::emulated(&binary.with_file_name("emulator")).unwrap();
            // What an operation does not write is seen.
            gpu.poison(true);
            let device = Device::Cuda(gpu);
            let (mut llama, mut adapter, _) = model(tied, storage);
            llama.move_to(&device, dtype);
            adapter.move_to(&device, dtype);
            let got = train(llama, adapter, &ids);

            let what = format!("tied {tied}, {}, {}", storage.name(), dtype.name());
            for (a, b) in got.losses.iter().zip(&want.losses) {
                assert!((a / b - 1.0).abs() < bound, "{what}: losses {:?}, {:?}", got.losses, want.losses);
            }
            let modules = if tied { &["embed_tokens"][..] } else { &["embed_tokens", "lm_head"] };
            for ((kind, got), want) in
                [("gradient", &got.gradients), ("value", &got.values)].iter().zip([&want.gradients, &want.values])
            {
                let names = |found: &[(String, Tensor)]| found.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
                assert_eq!(names(got), names(want));
                let rows = want.iter().filter(|(name, _)| modules.iter().any(|m| *name == token_rows_name(m)));
                assert_eq!(rows.count(), modules.len(), "{what}");
                let apart = got.iter().zip(want).map(|(a, b)| (distance(a.1.data(), b.1.data()), &a.0));
                let worst = apart.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
                println!("{what}: {kind}: worst {worst:?}");
                assert!(worst.0 < bound, "{what}: the {kind} of {} is {} away", worst.1, worst.0);
            }
            // What the rows have become is what tokens are looked up and scored by; without the adapter it is the base model.
            assert!(distance(&got.logits, &want.logits) < bound, "{what}");
            assert!(distance(&got.base_logits, &want.base_logits) < bound, "{what}");
            assert!(distance(&got.logits, &got.base_logits) > 1e-2, "{what}");
            device.synchronize().unwrap();
        }
    }
}
