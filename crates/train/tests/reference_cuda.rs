//! The model on the emulated GPU, through the same launchers and kernels as on a real one, against the numbers of
//! transformers and PEFT, and against the processor.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod distance;

use distance::distance;
use std::path::{Path, PathBuf};
use std::slice::from_ref;
use std::sync::Arc;
use tunesmith_model::memory::Offload;
use tunesmith_model::{
    Adapter, AdapterConfig, AdapterFile, Batch, Checkpoint, Config, GgufOptions, KvCache, Llama, Modules, Recompute,
    Sampler, Sampling, Storage, Workspace, generate, generate_together, initial_rows, save_gguf,
};
use tunesmith_tensor::cuda::{Gpu, sizes};
use tunesmith_tensor::quant::BlockType;
use tunesmith_tensor::{Device, Dtype};
use tunesmith_train::objective::Objective;
use tunesmith_train::optimizer::{AdamWOptions, Optim};
use tunesmith_train::step::Trainer;
use tunesmith_train::verify::{self, Check, Reference};

fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(model).join(file)
}

fn load(model: &str, storage: Storage) -> Llama {
    Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), storage, |_, _| ()).unwrap()
}

fn adapted(model: &str, adapter: &str, storage: Storage) -> (Llama, Option<Adapter>) {
    let mut llama = load(model, storage);
    let file = AdapterFile::open(&fixture(model, adapter)).unwrap();
    let adapter = Adapter::open(&mut llama, file, true).unwrap();
    (llama, Some(adapter))
}

fn move_to(model: &mut (Llama, Option<Adapter>), device: &Device, dtype: Dtype) {
    model.0.move_to(device, dtype);
    model.1.iter_mut().for_each(|adapter| adapter.move_to(device, dtype));
}

fn device() -> Device {
    let binary = std::env::current_exe().unwrap();
    Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap())
}

fn assert_passed(what: &str, checks: &[Check]) {
    let worst = checks.iter().max_by(|a, b| (a.difference / a.tolerance).total_cmp(&(b.difference / b.tolerance)));
    println!("{what}: {} checks, worst {worst:?}", checks.len());
    for check in checks {
        assert!(check.passed(), "{what}: {check:?}");
    }
}

#[test]
fn logits_loss_and_every_gradient() {
    for model in ["tiny-llama2", "tiny-llama3"] {
        let device = device();
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let mut llama = load(model, Storage::F32);
        llama.move_to(&device, Dtype::F32);
        let num_parameters = llama.parameters.len();
        let checks = verify::verify_reference(llama, None, &reference).unwrap();
        device.synchronize().unwrap();
        assert_passed(model, &checks);
        assert_eq!(checks.iter().filter(|c| c.what.starts_with("grad.")).count(), num_parameters);
    }
}

#[test]
fn the_first_steps_of_training() {
    let model = "tiny-llama3";
    let batches = Reference::open(&fixture(model, "train_batches.safetensors")).unwrap();
    for (name, adapter, decay, smoothing) in [
        ("full", None, 0.1, 0.0),
        ("full_label_smoothing_0.1", None, 0.0, 0.1),
        ("lora", Some("lora_start"), 0.0, 0.0),
        ("rslora", Some("rslora_start"), 0.0, 0.0),
    ] {
        let start = |adapter| adapted(model, adapter, Storage::F32);
        let mut start = adapter.map_or_else(|| (load(model, Storage::F32), None), start);
        if adapter.is_none() {
            start.0.train_all();
        }
        let device = device();
        move_to(&mut start, &device, Dtype::F32);
        let curve = verify::read_curve(&fixture(model, "curves.json"), name).unwrap();
        let (checks, _) = verify::verify_curve(start.0, start.1, &batches, &curve[..4], decay, smoothing).unwrap();
        device.synchronize().unwrap();
        assert_passed(name, &checks);
    }
}

fn batch_of(lengths: &[usize]) -> Batch {
    let mut rng = tunesmith_tensor::rng::Rng::new(3, 0);
    let mut batch = Batch::default();
    for length in lengths {
        let ids: Vec<u32> = (0..*length).map(|_| rng.below(512)).collect();
        let trained: Vec<bool> = (0..*length).map(|i| i % 5 != 2).collect();
        batch.push(&ids, &trained);
    }
    batch
}

fn trainer((llama, adapter): (Llama, Option<Adapter>), ws: Workspace) -> Trainer {
    Trainer { dropout_seed: Some(5), ..Trainer::for_gradients(Arc::new(llama), adapter, ws) }
}

/// Loss, and the gradients of all trained tensors one after the other.
fn run(trainer: &mut Trainer, batch: &Batch, recompute: Recompute) -> (f64, Vec<f32>) {
    trainer.workspace = Workspace::new(recompute);
    let loss = trainer.accumulate(from_ref(batch), &Objective::default()).unwrap();
    (loss.mean(), trainer.gradients.trained().flat_map(|t| t.to_host().data().to_vec()).collect())
}

/// The same dropout, the same loss, the same gradients as on the processor; recomputing changes no bit.
#[test]
fn dropout_packing_and_recompute() {
    let targets = ["q_proj", "v_proj", "down_proj"].map(String::from).to_vec();
    let config =
        AdapterConfig { r: 4, lora_dropout: 0.3, target_modules: Modules::List(targets), ..AdapterConfig::default() };
    let start = || {
        let llama = load("tiny-llama3", Storage::F32);
        let mut adapter = Adapter::new(&llama, &config, 1).unwrap();
        let mut rng = tunesmith_tensor::rng::Rng::new(8, 0);
        for parameter in &mut adapter.parameters {
            parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.1 * rng.normal());
        }
        (llama, Some(adapter))
    };
    let batch = batch_of(&[9, 30, 1, 5]);
    let (want_loss, want) = run(&mut trainer(start(), Workspace::default()), &batch, Recompute::None);
    let mut moved = start();
    move_to(&mut moved, &device(), Dtype::F32);
    let mut trainer = trainer(moved, Workspace::default());
    let (loss, gradients) = run(&mut trainer, &batch, Recompute::None);
    assert!((loss / want_loss - 1.0).abs() < 1e-5, "{loss} {want_loss}");
    assert!(distance(&gradients, &want) < 1e-4, "{}", distance(&gradients, &want));
    for recompute in [Recompute::Norms, Recompute::Block] {
        let again = run(&mut trainer, &batch, recompute);
        assert_eq!(again, (loss, gradients.clone()), "{recompute:?}");
    }
}

/// In bf16 the tensor-core kernels run; what they round away stays small.
#[test]
fn bf16_is_near_f32() {
    let batch = batch_of(&[40, 70]);
    for storage in [Storage::F32, Storage::Nf4] {
        let start = || match storage {
            Storage::F32 => {
                let mut llama = load("tiny-llama3", storage);
                llama.train_all();
                (llama, None)
            }
            _ => adapted("tiny-llama3", "lora_start", storage),
        };
        let (want_loss, want) = run(&mut trainer(start(), Workspace::default()), &batch, Recompute::None);
        let mut moved = start();
        move_to(&mut moved, &device(), Dtype::BF16);
        let (loss, gradients) = run(&mut trainer(moved, Workspace::default()), &batch, Recompute::Block);
        let error = distance(&gradients, &want);
        println!("{storage:?}: loss {loss} against {want_loss}, gradients {error} apart");
        assert!((loss / want_loss - 1.0).abs() < 2e-3, "{loss} {want_loss}");
        assert!(error < 0.03, "{storage:?}: {error}");
    }
}

/// Training in bf16 with f32 masters follows training in f32, with both kinds of moments.
#[test]
fn bf16_training_follows_f32() {
    let batch = batch_of(&[33, 20]);
    for optim in [Optim::AdamW, Optim::AdamW8bit] {
        let mut curves = Vec::new();
        for dtype in [None, Some(Dtype::BF16)] {
            let mut llama = load("tiny-llama3", Storage::F32);
            llama.train_all();
            if let Some(dtype) = dtype {
                llama.move_to(&device(), dtype);
            }
            let start = |llama| {
                let options = AdamWOptions { optim, ..AdamWOptions::default() };
                let trainer = Trainer::new(Arc::new(llama), None, options, Workspace::default());
                Trainer { dropout_seed: Some(5), max_grad_norm: 0.0, ..trainer }
            };
            let mut trainer = start(llama);
            let mut curve = Vec::new();
            for _ in 0..4 {
                let step = trainer.step(from_ref(&batch), &Objective::default(), 1e-3).unwrap();
                curve.extend([step.loss.mean(), step.grad_norm]);
            }
            // The way back to the CPU: weights and moments can be written from there.
            let mut host = load("tiny-llama3", Storage::F32);
            host.train_all();
            let mut host = start(host);
            host.copy_state(&trainer).unwrap();
            let moments = host.optimizer.as_mut().unwrap();
            assert!(!moments.state(tunesmith_model::trained(&host.model, None)).is_empty());
            assert_eq!(moments.updates(), 4);
            curve.push(host.accumulate(from_ref(&batch), &Objective::default()).unwrap().mean());
            curves.push(curve);
        }
        println!("{optim:?}: {curves:?}");
        for (a, b) in curves[1].iter().zip(&curves[0]) {
            assert!((a / b - 1.0).abs() < 0.02, "{optim:?}: {a} {b}");
        }
    }
}

#[test]
fn sizes_without_kernels_are_refused_by_name() {
    let llama = load("tiny-llama2", Storage::F32);
    assert!(llama.check_device(Dtype::F32).is_ok());
    let error = llama.check_device(Dtype::BF16).unwrap_err().to_string();
    assert!(error.contains("hidden_size is 60") && error.contains("device = \"cpu\""), "{error}");
}

#[test]
fn greedy_continuation_with_the_cache() {
    let model = "tiny-llama3";
    let facts: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(fixture(model, "facts.json")).unwrap()).unwrap();
    let want: Vec<u32> = facts["greedy"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
    let mut llama = load(model, Storage::F32);
    let device = device();
    llama.move_to(&device, Dtype::F32);
    let mut ws = Workspace::default();
    let mut cache = KvCache::new(&llama.config, want.len());
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let go_on = |_| std::ops::ControlFlow::Continue(());
    let (new, _) = generate(&llama, None, &want[..16], &mut cache, &mut sampler, &[], 24, &mut ws, go_on).unwrap();
    device.synchronize().unwrap();
    assert_eq!(new, want[16..]);
    assert!(ws.is_recorded());
}

/// What each of `prompts` becomes on the processor, on its own.
fn alone(
    llama: &Llama,
    adapter: Option<&Adapter>,
    prompts: &[&[u32]],
    options: &Sampling,
    new: usize,
) -> Vec<Vec<u32>> {
    let mut ws = Workspace::default();
    let mut texts = Vec::new();
    for (prompt, mut sampler) in prompts.iter().zip(samplers(prompts.len(), options)) {
        let mut cache = KvCache::new(&llama.config, prompt.len() + new);
        let go_on = |_| std::ops::ControlFlow::Continue(());
        texts.push(generate(llama, adapter, prompt, &mut cache, &mut sampler, &[], new, &mut ws, go_on).unwrap().0);
    }
    texts
}

fn samplers(num: usize, options: &Sampling) -> Vec<Sampler> {
    let seeded = |i| Sampler::new(Sampling { seed: options.seed + i as u64, ..options.clone() }).unwrap();
    (0..num).map(seeded).collect()
}

fn together(
    llama: &Llama,
    adapter: Option<&Adapter>,
    prompts: &[&[u32]],
    options: &Sampling,
    new: usize,
    places: usize,
) -> Vec<Vec<u32>> {
    let (mut samplers, mut ws) = (samplers(prompts.len(), options), Workspace::default());
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let texts = generate_together(llama, adapter, prompts, &mut samplers, &[], new, places, &mut ws, go_on).unwrap();
    assert_eq!(ws.is_recorded(), llama.device() != Device::Cpu, "the last passes are alike");
    texts.into_iter().map(|(ids, _)| ids).collect()
}

/// Prompts of unequal length together on the device: the tokens that each becomes alone on the processor, the most likely ones
/// and drawn ones.
#[test]
fn prompts_together_on_the_device() {
    let ids: Vec<u32> = batch_of(&[400]).ids;
    let prompts = [&ids[..3], &ids[3..60], &ids[60..61], &ids[61..341], &ids[341..346]];
    let mut start = adapted("tiny-llama3", "lora_final", Storage::F32);
    let drawn = Sampling { do_sample: true, top_p: 0.9, repetition_penalty: 1.2, seed: 5, ..Sampling::default() };
    let want =
        [Sampling::default(), drawn.clone()].map(|options| alone(&start.0, start.1.as_ref(), &prompts, &options, 8));
    move_to(&mut start, &device(), Dtype::F32);
    let (llama, adapter) = (&start.0, start.1.as_ref());
    assert_eq!(together(llama, adapter, &prompts, &Sampling::default(), 8, 2), want[0]);
    assert_eq!(together(llama, adapter, &prompts, &drawn, 8, 5), want[1]);
    assert_eq!(together(llama, adapter, &prompts, &drawn, 8, 3), want[1], "the same seed, the same tokens");
}

/// A quantised base stays quantised on the device, and becomes what its decoded form becomes on the processor.
#[test]
fn quantised_bases_generate_as_they_are() {
    let json = std::fs::read_to_string(fixture("tiny-llama3", "config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&json).unwrap();
    config["initializer_range"] = 0.3.into();
    let config = Config::from_json(&config.to_string(), "config.json").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = batch_of(&[90]).ids;
    let prompts = [&ids[..30], &ids[30..41], &ids[41..90]];
    for kind in [BlockType::Q8_0, BlockType::Q4_0] {
        let path = folder.path().join(kind.name());
        let options = GgufOptions { kind, name: "test", tokenizer: None };
        let rows = |name: &str, rows, out: &mut [f32]| {
            initial_rows(&config, 3, name, rows, out);
            Ok(())
        };
        save_gguf(&path, &config, options, rows).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let dense = Llama::load(&checkpoint, Storage::F32, |_, _| ()).unwrap();
        let want = alone(&dense, None, &prompts, &Sampling::default(), 8);
        let device = device();
        let mut llama = Llama::load(&checkpoint, Storage::Stored, |_, _| ()).unwrap();
        llama.move_to(&device, Dtype::F32);
        let held = device.gpu().unwrap().memory().0;
        assert_eq!(held as u64, checkpoint.gpu_weights(Storage::Stored, Dtype::F32, false).0);
        let stored: usize = llama.parameters.iter().map(|p| p.value.num_bytes()).sum();
        assert!(3 * stored < 4 * dense.num_params(), "{stored} bytes");
        assert_eq!(together(&llama, None, &prompts, &Sampling::default(), 8, 3), want, "{}", kind.name());
        // One place: products with a single row, and prompts one after the other.
        assert_eq!(together(&llama, None, &prompts, &Sampling::default(), 8, 1), want, "{}", kind.name());
    }
}

/// What `tunesmith gpu-check` runs on a GPU passes on the emulated one.
#[test]
fn gpu_check_passes() {
    let mut checks = 0;
    tunesmith_train::gpu_check::run(&device(), 77, tunesmith_train::gpu_check::Size::Small, &mut |check| {
        println!("{:<4} {:<24} {:.1e} of {:.1e}", check.model, check.check, check.error, check.bound);
        assert!(check.passed(), "{check:?}");
        checks += 1;
    })
    .unwrap();
    assert!(checks > 80, "{checks}");
}

#[test]
fn gpu_bench_measures_every_method() {
    use tunesmith_train::gpu_bench::{self, Case};
    let device = device();
    let peaks = gpu_bench::peaks(&device, Dtype::BF16, 16).unwrap();
    assert!(peaks.copy > 0.0 && peaks.product > 0.0);
    let config = load("tiny-llama3", Storage::F32).config;
    for (full, nf4, optim) in [
        (true, false, Optim::AdamW),
        (true, false, Optim::AdamW8bit),
        (false, false, Optim::AdamW),
        (false, true, Optim::AdamW),
    ] {
        let recompute = Recompute::Block;
        // What waits elsewhere is planned like everything else.
        let offload = Offload { embedding: nf4, activations: nf4, optimizer: optim == Optim::AdamW8bit };
        let config = config.clone();
        let case = Case { model: "tiny", config, full, nf4, tokens: 24, recompute, optim, offload, limit: None };
        let settled = case.settle(Dtype::BF16, u64::MAX).unwrap();
        let gpu = device.gpu().unwrap();
        gpu.reset_peak();
        let before = gpu.memory().1;
        let measured = gpu_bench::measure(&device, Dtype::BF16, &settled, 1, &peaks).unwrap();
        // The emulator's products need no memory of their own.
        let planned = (measured.planned_bytes - sizes::PRODUCTS as u64) as f64;
        let held = (measured.peak_bytes - before) as f64;
        assert!((planned / held - 1.0).abs() < 0.1, "planned {planned}, held {held}: {measured:?}");
        assert_eq!((measured.optim, measured.recompute), (optim, Recompute::Block));
        assert!((measured.first_loss - f64::ln(512.0)).abs() < 0.5, "{measured:?}");
        assert!(measured.tokens_per_s > 0.0 && measured.share > 0.0 && measured.peak_bytes > 0, "{measured:?}");
        let decode = |sizes| {
            let planned = case.settle_decode(Dtype::BF16, sizes, u64::MAX).unwrap();
            // What was found before is another case's.
            let before = gpu.memory().0;
            gpu.reset_peak();
            let decoded = gpu_bench::measure_decode(&device, Dtype::BF16, &case, sizes, planned, &peaks).unwrap();
            let planned = (decoded.planned_bytes - sizes::PRODUCTS as u64) as f64;
            let held = (decoded.peak_bytes - before) as f64;
            println!("{sizes:?}, nf4 {nf4}: planned {planned}, held {held}");
            // Room for the largest matrix decoded is planned, and in NF4 that is the head, which few rows multiply as it is.
            let most = if nf4 { 1.2 } else { 1.1 };
            assert!((1.0..most).contains(&(planned / held)), "planned {planned}, held {held}: {decoded:?}");
            decoded
        };
        let decoded = decode((3, 20, 3));
        assert!(decoded.tokens_per_s > 0.0 && decoded.share > 0.0 && decoded.sequences == 3, "{decoded:?}");
        // Three sequences read the weights once: the limit is above that of one, below three times that.
        let one = decode((1, 20, 3));
        if full && optim == Optim::AdamW {
            // Prompts of more tokens than go through the model at once.
            decode((20, 450, 3));
        }
        assert!(decoded.limit > one.limit && decoded.limit < 3.0 * one.limit, "{decoded:?} {one:?}");
    }
}

/// What waits in the processor's memory (embedding, inputs of layers, moments) changes no bit of what is computed.
#[test]
fn offloading_changes_nothing() {
    let text = std::fs::read_to_string(fixture("tiny-llama3", "config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["num_hidden_layers"] = 5.into();
    json["tie_word_embeddings"] = false.into();
    let config = Config::from_json(&json.to_string(), "five layers").unwrap();
    // Two parts a step, of different lengths, so that buffers grow and shrink.
    let batches = [batch_of(&[9, 30]), batch_of(&[40]), batch_of(&[7, 3])];
    for (dtype, optim, full) in [
        (Dtype::F32, Optim::AdamW, false),
        (Dtype::BF16, Optim::AdamW8bit, false),
        (Dtype::F32, Optim::AdamW8bit, true),
        (Dtype::BF16, Optim::AdamW, true),
    ] {
        let train = |offload: bool| {
            let device = device();
            let mut llama = Llama::random(config.clone(), 4);
            let mut adapter = None;
            if full {
                llama.train_all();
            } else {
                let config = AdapterConfig { lora_dropout: 0.2, ..AdapterConfig::default() };
                adapter = Some(Adapter::new(&llama, &config, 1).unwrap());
            }
            assert!(!offload || llama.leave_embedding() != full, "a trained embedding cannot be left");
            llama.move_to(&device, dtype);
            adapter.iter_mut().for_each(|adapter| adapter.move_to(&device, dtype));
            let recompute = Recompute::Block;
            let ws = if offload { Workspace::parked(recompute) } else { Workspace::new(recompute) };
            let options = AdamWOptions { optim, offload, ..AdamWOptions::default() };
            let trainer = Trainer::new(Arc::new(llama), adapter, options, ws);
            let mut trainer = Trainer { dropout_seed: Some(5), max_grad_norm: 0.0, ..trainer };
            let (mut seen, objective) = (Vec::new(), Objective::default());
            for batch in &batches {
                let step = trainer.step(from_ref(batch), &objective, 1e-3).unwrap();
                seen.extend([step.loss.sum, step.grad_norm]);
            }
            // By way of host memory, as from a checkpoint.
            let moments = trainer.optimizer.take().unwrap().to_host(trainer.trained());
            trainer.optimizer = Some(moments.to_device(&device));
            seen.push(trainer.step(&batches[..1], &objective, 1e-3).unwrap().loss.sum);
            let Trainer { model, adapter, workspace, .. } = &mut trainer;
            seen.push(objective.losses(model, adapter.as_ref(), &batches[1], workspace).1);
            let ids: Vec<u32> = (3..20).collect();
            let new = together(model, adapter.as_ref(), &[&ids], &Sampling::default(), 4, 1);
            device.synchronize().unwrap();
            let gpu = device.gpu().unwrap();
            (seen, new, gpu.memory().1, gpu.host_memory())
        };
        let (want, want_new, most, on_host) = train(false);
        let (got, new, less, waiting) = train(true);
        assert_eq!((&got, new), (&want, want_new), "{dtype:?} {optim:?} full: {full}");
        assert!(less < most && on_host == 0 && waiting > 0, "{less} of {most}, {waiting} on the host");
    }
}

/// Floats that stay in the mapped file until they are moved become what they become by way of f32.
#[test]
fn floats_go_from_the_file_to_the_device() {
    let config = load("tiny-llama3", Storage::F32).config;
    let folder = tempfile::tempdir().unwrap();
    for kind in [BlockType::BF16, BlockType::F16] {
        let path = folder.path().join(kind.name());
        let rows = |name: &str, rows, out: &mut [f32]| {
            initial_rows(&config, 3, name, rows, out);
            Ok(())
        };
        save_gguf(&path, &config, GgufOptions { kind, name: "test", tokenizer: None }, rows).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert!(!checkpoint.is_quantised());
        let [by_f32, mapped] = [Storage::F32, Storage::Stored].map(|storage| {
            let mut llama = Llama::load(&checkpoint, storage, |_, _| ()).unwrap();
            let mut adapter = Adapter::new(&llama, &AdapterConfig::default(), 1).unwrap();
            let device = device();
            adapter.move_to(&device, Dtype::BF16);
            llama.move_to(&device, Dtype::BF16);
            let mut trainer = trainer((llama, Some(adapter)), Workspace::default());
            run(&mut trainer, &batch_of(&[9, 30]), Recompute::Block)
        });
        assert_eq!(by_f32, mapped, "{}", kind.name());
    }
}
