//! An adapter's rows of added tokens on the emulated GPU against the processor: losses, gradients and updates.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod distance;

use distance::distance;
use std::path::Path;
use tunesmith_model::token_rows::token_rows_name;
use tunesmith_model::{
    AdapterConfig, Batch, Checkpoint, Config, Gradients, Llama, LossOptions, Modules, Recompute, Storage, Workspace,
};
use tunesmith_tensor::cuda::Gpu;
use tunesmith_tensor::{Device, Dtype, Tensor, rng::Rng};
use tunesmith_train::optimizer::{AdamW, AdamWOptions};

const STEPS: u64 = 2;

/// A model with an adapter that changes something, and rows of three tokens, two of which are new.
fn model(tied: bool, storage: Storage) -> (Llama, [u32; 3]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny-llama3");
    let mut llama = Llama::load(&Checkpoint::open(&path).unwrap(), storage, |_, _| ()).unwrap();
    if tied {
        llama = Llama::random(Config { tie_word_embeddings: true, ..llama.config }, 4);
    }
    let size = llama.config.vocab_size as u32;
    let ids = [3, size, size + 1];
    let targets = Modules::Pattern("all-linear".into());
    llama.add_adapter(&AdapterConfig { r: 4, target_modules: targets, ..AdapterConfig::default() }, 1).unwrap();
    llama.train_tokens(&ids).unwrap();
    let mut rng = Rng::new(9, 0);
    for parameter in llama.parameters.iter_mut().filter(|p| p.trained) {
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.05 * rng.normal());
    }
    llama.place_token_rows(true);
    (llama, ids)
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

/// What two steps leave: the loss of each, the gradients of the first, all that trains, and the rows where they are read.
struct Trained {
    losses: Vec<f64>,
    gradients: Vec<(String, Tensor)>,
    values: Vec<(String, Tensor)>,
    placed: Vec<f32>,
}

fn train(llama: &mut Llama, ids: &[u32]) -> Trained {
    let device = llama.device();
    let mut optimizer = AdamW::new(llama, AdamWOptions::default());
    let (mut gradients, mut ws) = (Gradients::new(llama), Workspace::new(Recompute::Norms));
    let (mut losses, mut first) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        gradients.clear();
        let options = LossOptions { scale: 0.02, label_smoothing: 0.1, dropout_seed: None, step, first_token: 0 };
        losses.push(llama.loss_and_gradients(&batch(ids, step), options, &mut ws, &mut gradients));
        device.synchronize().unwrap();
        if step == 0 {
            let all = llama.parameters.iter().zip(&gradients.tensors);
            first = all.filter_map(|(p, g)| Some((p.name.clone(), g.as_ref()?.to_host()))).collect();
        }
        optimizer.update(llama, &gradients, 1e-3, 1.0);
    }
    let trained = llama.parameters.iter().filter(|p| p.trained);
    let values = trained.map(|p| (p.name.clone(), p.host().into_owned())).collect();
    Trained { losses, gradients: first, values, placed: placed(llama, ids) }
}

/// The rows of `ids` in the embedding and the head, as they are read.
fn placed(llama: &Llama, ids: &[u32]) -> Vec<f32> {
    let matrices = ["model.embed_tokens.weight", "lm_head.weight"];
    let found = matrices.iter().filter_map(|name| llama.host_tensor(name).ok());
    found.flat_map(|m| ids.iter().flat_map(|id| m.row(*id as usize).to_vec()).collect::<Vec<_>>()).collect()
}

#[test]
fn rows_of_tokens_train_as_on_the_processor() {
    for (tied, storage) in [(true, Storage::F32), (false, Storage::F32), (false, Storage::Nf4)] {
        for (dtype, bound) in [(Dtype::F32, 1e-4), (Dtype::BF16, 4e-2)] {
            let (mut on_host, ids) = model(tied, storage);
            let start = placed(&on_host, &ids);
            let want = train(&mut on_host, &ids);

            let binary = std::env::current_exe().unwrap();
            let gpu = Gpu::emulated(&binary.with_file_name("emulator")).unwrap();
            // What an operation does not write is seen.
            gpu.poison(true);
            let device = Device::Cuda(gpu);
            let (mut llama, _) = model(tied, storage);
            llama.move_to(&device, dtype);
            let got = train(&mut llama, &ids);

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
            // The rows have moved, and are read where tokens are looked up and scored.
            assert!(distance(&want.placed, &start) > 1e-3, "{what}");
            assert!(distance(&got.placed, &want.placed) < bound / 4.0, "{what}");
            // Without the adapter the rows are those of the base model.
            llama.enable_adapter(false);
            on_host.enable_adapter(false);
            let (off, base) = (placed(&llama, &ids), placed(&on_host, &ids));
            assert!(distance(&off, &base) < bound / 4.0 && distance(&got.placed, &base) > 1e-2, "{what}");
            llama.enable_adapter(true);
            assert_eq!(placed(&llama, &ids), got.placed, "{what}");
            device.synchronize().unwrap();
        }
    }
}
