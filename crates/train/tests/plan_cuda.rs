//! The plan of a GPU's memory against the peak of the emulated one's allocator, which counts as the real one does.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use tunesmith_model::token_rows::token_indices;
use tunesmith_model::{
    AdapterConfig, Batch, Checkpoint, Gradients, LINEAR_NAMES, Llama, LossOptions, Modules, Recompute, Storage,
    Workspace,
};
use tunesmith_tensor::cuda::{Gpu, sizes};
use tunesmith_tensor::{Device, Dtype};
use tunesmith_train::config::Config;
use tunesmith_train::evaluate::continuations;
use tunesmith_train::memory::{DRIVER, DataShape, Inputs, Place};
use tunesmith_train::optimizer::{AdamW, AdamWOptions, gradient_norm};

/// Part of the measured peak by which a plan may be off.
const TOLERANCE: f64 = 0.1;

/// Blocks of a step and tokens of each; prompts of samples, their length, and what follows.
const BLOCKS: (usize, usize) = (2, 90);
const SAMPLES: (usize, usize, usize) = (3, 40, 4);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Peaks of training alone and with samples behind it.
fn measured(config: &Config, checkpoint: &Checkpoint, adapter: Option<&AdapterConfig>, dtype: Dtype) -> [usize; 2] {
    let binary = std::env::current_exe().unwrap();
    let device = Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap());
    let mut model = Llama::load(checkpoint, config.model.storage, |_, _| ()).unwrap();
    match adapter {
        Some(adapter) => {
            model.add_adapter(adapter, 1).unwrap();
            if let Some(ids) = adapter.trainable_token_indices.get("lm_head") {
                model.train_tokens(ids).unwrap();
            }
        }
        None => model.train_all(),
    }
    let offload = config.training.offload;
    if offload.embedding {
        assert!(model.leave_embedding());
    }
    model.move_to(&device, dtype);
    let options = AdamWOptions { optim: config.training.optim, offload: offload.optimizer, ..AdamWOptions::default() };
    let (mut optimizer, mut gradients) = (AdamW::new(&model, options), Gradients::new(&model));
    let recompute = config.recompute();
    let mut ws = if offload.activations { Workspace::parked(recompute) } else { Workspace::new(recompute) };
    let mut batch = Batch::default();
    for block in 0..BLOCKS.0 {
        let ids: Vec<u32> = (0..BLOCKS.1).map(|i| (i * 7 + block * 31) as u32 % 512).collect();
        batch.push(&ids, &vec![true; ids.len()]);
    }
    for step in 0..2 {
        gradients.clear();
        let options = LossOptions { scale: 1e-2, label_smoothing: 0.0, dropout_seed: Some(1), step, first_token: 0 };
        model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        gradient_norm(&gradients);
        optimizer.update(&mut model, &gradients, 1e-3, 1.0);
    }
    let peak = || {
        device.synchronize().unwrap();
        device.gpu().unwrap().memory().1
    };
    let training = peak();
    let prompt: Vec<u32> = (0..SAMPLES.1 as u32).collect();
    continuations(&model, &vec![&prompt[..]; SAMPLES.0], &[], SAMPLES.2).unwrap();
    [training, peak()]
}

#[test]
fn the_allocator_holds_what_was_planned() {
    let checkpoint = Checkpoint::open(&root().join("crates/model/tests/fixtures/tiny-llama3")).unwrap();
    let text = std::fs::read_to_string(root().join("configs/tiny.toml")).unwrap();
    let lora = AdapterConfig {
        r: 8,
        lora_dropout: 0.1,
        target_modules: Modules::List(LINEAR_NAMES.map(String::from).to_vec()),
        ..AdapterConfig::default()
    };
    let ids: Vec<u32> = (0..100).map(|i| 5 * i).collect();
    let tokens = AdapterConfig { trainable_token_indices: token_indices(checkpoint.config(), &ids), ..lora.clone() };
    for (method, storage, recompute, optim, dtype, offload) in [
        ("lora", Storage::F32, Recompute::None, "adamw", Dtype::F32, "[]"),
        ("tokens", Storage::F32, Recompute::Norms, "adamw", Dtype::F32, "[]"),
        ("tokens", Storage::F32, Recompute::Block, "adamw_8bit", Dtype::BF16, r#"["activations", "optimizer"]"#),
        ("lora", Storage::F32, Recompute::Norms, "adamw", Dtype::BF16, r#"["embedding"]"#),
        ("lora", Storage::Nf4, Recompute::Block, "adamw", Dtype::BF16, "[]"),
        ("lora", Storage::Nf4, Recompute::Block, "adamw", Dtype::BF16, r#"["embedding", "activations"]"#),
        ("full", Storage::F32, Recompute::Norms, "adamw", Dtype::F32, r#"["optimizer"]"#),
        ("full", Storage::F32, Recompute::Block, "adamw_8bit", Dtype::BF16, r#"["activations", "optimizer"]"#),
        ("full", Storage::F32, Recompute::Block, "adamw_8bit", Dtype::BF16, "[]"),
    ] {
        let sets = [
            format!("method={}", if method == "full" { "full" } else { "lora" }),
            format!("model.storage={}", storage.name()),
            format!("training.recompute={recompute}"),
            format!("training.optim={optim}"),
            format!("training.offload={offload}"),
            format!("training.per_device_train_batch_size={}", BLOCKS.0),
            "training.gradient_accumulation_steps=1".into(),
            "device=cuda:0".into(),
            format!("dtype={}", dtype.name()),
        ];
        let config = Config::parse(&text, "tiny.toml", &sets).unwrap();
        let adapter = match method {
            "full" => None,
            "tokens" => Some(&tokens),
            _ => Some(&lora),
        };
        let (weights, largest_quantised) = checkpoint.gpu_weights(storage, dtype, adapter.is_none());
        let inputs = Inputs {
            config: &config,
            model: checkpoint.config(),
            adapter,
            place: Place::Gpu { dtype, largest_quantised },
            weights,
            // Rows that train are where they are placed.
            embedding: (method != "tokens").then(|| checkpoint.gpu_embedding(storage, dtype)),
            other_weights: &[],
            loading: 0,
            baseline: 0,
            driver: DRIVER,
            host: None,
            data: &DataShape::uniform(BLOCKS.0, BLOCKS.1),
            sample: Some(SAMPLES),
            threads: 1,
        };
        let plan = inputs.plan();
        let name = format!("{method}, {}, {recompute}, {optim}, {}, {offload}", storage.name(), dtype.name());
        let peaks = measured(&config, &checkpoint, adapter, dtype);
        // The emulator's products need no memory of their own.
        for (what, planned, measured) in
            [("training", plan.training_peak, peaks[0]), ("with samples", plan.evaluation_peak, peaks[1])]
        {
            let planned = (planned - sizes::PRODUCTS as u64) as f64;
            println!("{name}, {what}: planned {planned}, measured {measured}");
            assert!((planned / measured as f64 - 1.0).abs() < TOLERANCE, "{name}, {what}: {plan:?}");
        }
        assert_eq!((plan.buffers(), plan.baseline), (plan.total - DRIVER, 0), "{plan:?}");
        assert!(plan.buffers() >= plan.training_peak.max(plan.evaluation_peak), "{plan:?}");
        // A limit chooses a level that needs less, and one that is too small is refused with the least.
        let mut tight = config.clone();
        tight.training.recompute = None;
        let least = Inputs { config: &tight, ..inputs.clone() }.fit(1).unwrap_err().to_string();
        assert!(least.contains("the run needs at least"), "{least}");
        let fitted = Inputs { config: &tight, ..inputs.clone() }.fit(plan.total).unwrap();
        assert!(fitted.total <= plan.total, "{fitted:?}");
    }
}
