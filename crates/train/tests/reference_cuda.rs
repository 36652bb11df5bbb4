//! The model on the emulated GPU, through the same launchers and kernels as on a real one, against the numbers of
//! transformers and PEFT, and against the processor.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod distance;

use distance::distance;
use std::path::{Path, PathBuf};
use tunesmith_infer::{Engine, Request, Sampler, Sampling, complete};
use tunesmith_model::memory::Offload;
use tunesmith_model::{
    AdapterConfig, AdapterFile, Batch, Checkpoint, Config, GgufOptions, Gradients, Llama, LossOptions, Modules,
    Recompute, Storage, Workspace, initial_rows, save_gguf,
};
use tunesmith_tensor::cuda::{Gpu, sizes};
use tunesmith_tensor::quant::BlockType;
use tunesmith_tensor::{Device, Dtype};
use tunesmith_train::optimizer::{AdamW, AdamWOptions, Optim, gradient_norm};
use tunesmith_train::verify::{self, Check, Reference};

fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(model).join(file)
}

fn load(model: &str, storage: Storage) -> Llama {
    Llama::load(&Checkpoint::open(&fixture(model, "")).unwrap(), storage, |_, _| ()).unwrap()
}

fn adapted(model: &str, adapter: &str) -> Llama {
    let mut llama = load(model, Storage::F32);
    llama.attach_adapter(AdapterFile::open(&fixture(model, adapter)).unwrap(), true).unwrap();
    llama
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
    for model in ["tiny-llama2", "tiny-llama3", "tiny-qwen2"] {
        let device = device();
        let reference = Reference::open(&fixture(model, "forward_backward.safetensors")).unwrap();
        let mut llama = load(model, Storage::F32);
        llama.move_to(&device, Dtype::F32);
        let checks = verify::verify_reference(&mut llama, &reference).unwrap();
        device.synchronize().unwrap();
        assert_passed(model, &checks);
        assert_eq!(checks.iter().filter(|c| c.what.starts_with("grad.")).count(), llama.parameters.len());
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
        let mut llama = adapter.map_or_else(|| load(model, Storage::F32), |adapter| adapted(model, adapter));
        if adapter.is_none() {
            llama.train_all();
        }
        let device = device();
        llama.move_to(&device, Dtype::F32);
        let curve = verify::read_curve(&fixture(model, "curves.json"), name).unwrap();
        let checks = verify::verify_curve(&mut llama, &batches, &curve[..4], decay, smoothing).unwrap();
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

const OPTIONS: LossOptions =
    LossOptions { scale: 1e-2, label_smoothing: 0.0, dropout_seed: Some(5), step: 3, first_token: 11 };

/// Loss, and the gradients of all trained tensors one behind the other.
fn run(llama: &Llama, batch: &Batch, recompute: Recompute) -> (f64, Vec<f32>) {
    let mut gradients = Gradients::new(llama);
    let loss = llama.loss_and_gradients(batch, OPTIONS, &mut Workspace::new(recompute), &mut gradients);
    llama.device().synchronize().unwrap();
    (loss, gradients.tensors.iter().flatten().flat_map(|t| t.to_host().data().to_vec()).collect())
}

/// The same dropout, the same loss, the same gradients as on the processor; recomputing changes no bit.
#[test]
fn dropout_packing_and_recompute() {
    let targets = ["q_proj", "v_proj", "down_proj"].map(String::from).to_vec();
    let config =
        AdapterConfig { r: 4, lora_dropout: 0.3, target_modules: Modules::List(targets), ..AdapterConfig::default() };
    let mut llama = load("tiny-llama3", Storage::F32);
    llama.add_adapter(&config, 1).unwrap();
    let mut rng = tunesmith_tensor::rng::Rng::new(8, 0);
    for parameter in llama.parameters.iter_mut().filter(|p| p.trained) {
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.1 * rng.normal());
    }
    let batch = batch_of(&[9, 30, 1, 5]);
    let (want_loss, want) = run(&llama, &batch, Recompute::None);
    llama.move_to(&device(), Dtype::F32);
    let (loss, gradients) = run(&llama, &batch, Recompute::None);
    assert!((loss / want_loss - 1.0).abs() < 1e-5, "{loss} {want_loss}");
    assert!(distance(&gradients, &want) < 1e-4, "{}", distance(&gradients, &want));
    for recompute in [Recompute::Norms, Recompute::Block] {
        let again = run(&llama, &batch, recompute);
        assert_eq!(again, (loss, gradients.clone()), "{recompute:?}");
    }
}

/// In bf16 the tensor-core kernels run; what they round away stays small.
#[test]
fn bf16_is_near_f32() {
    let batch = batch_of(&[40, 70]);
    for storage in [Storage::F32, Storage::Nf4] {
        let mut llama = load("tiny-llama3", storage);
        if storage == Storage::F32 {
            llama.train_all();
        } else {
            llama.attach_adapter(AdapterFile::open(&fixture("tiny-llama3", "lora_start")).unwrap(), true).unwrap();
        }
        let (want_loss, want) = run(&llama, &batch, Recompute::None);
        llama.move_to(&device(), Dtype::BF16);
        let (loss, gradients) = run(&llama, &batch, Recompute::Block);
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
            let mut optimizer = AdamW::new(&llama, AdamWOptions { optim, ..AdamWOptions::default() });
            let (mut gradients, mut ws) = (Gradients::new(&llama), Workspace::default());
            let mut curve = Vec::new();
            for _ in 0..4 {
                gradients.clear();
                curve.push(llama.loss_and_gradients(&batch, OPTIONS, &mut ws, &mut gradients));
                curve.push(gradient_norm(&gradients));
                optimizer.update(&mut llama, &gradients, 1e-3, 1.0);
            }
            llama.device().synchronize().unwrap();
            // The way back to the processor: weights and moments can be written from there.
            let mut host = load("tiny-llama3", Storage::F32);
            host.train_all();
            for (to, from) in host.parameters.iter_mut().zip(&llama.parameters) {
                to.assign(from.host().into_owned());
            }
            let mut moments = optimizer.to_host(&llama);
            assert!(!moments.state(&host).is_empty());
            assert_eq!(moments.updates(), 4);
            curve.push(host.loss(&batch, 0.0, &mut ws));
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
    let mut engine = Engine::new(&llama, 1, 3);
    let request = Request::new(&want[..16], Sampler::new(Sampling::default()).unwrap(), &[], 24);
    let new = engine.complete(vec![request], |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    device.synchronize().unwrap();
    assert_eq!(new[0].ids, want[16..]);
    assert!(engine.is_captured());
}

/// What each of `prompts` becomes on the CPU, on its own.
fn alone(llama: &Llama, prompts: &[&[u32]], options: &Sampling, new: usize) -> Vec<Vec<u32>> {
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let requests = requests(prompts, options, new).into_iter();
    requests.map(|request| complete(llama, vec![request], 1, go_on).unwrap().remove(0).ids).collect()
}

fn requests(prompts: &[&[u32]], options: &Sampling, new: usize) -> Vec<Request> {
    let seeded = |i| Sampler::new(Sampling { seed: options.seed + i, ..options.clone() }).unwrap();
    prompts.iter().zip(0..).map(|(prompt, i)| Request::new(prompt, seeded(i), &[], new)).collect()
}

fn together(llama: &Llama, prompts: &[&[u32]], options: &Sampling, new: usize, at_once: usize) -> Vec<Vec<u32>> {
    let mut engine = Engine::new(llama, at_once, 100);
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let texts = engine.complete(requests(prompts, options, new), go_on).unwrap();
    assert_eq!(engine.is_captured(), llama.device() != Device::Cpu, "the last passes are alike");
    texts.into_iter().map(|completion| completion.ids).collect()
}

/// Prompts of unequal length together on the device: the tokens that each becomes alone on the processor, the most likely ones
/// and drawn ones.
#[test]
fn prompts_together_on_the_device() {
    let ids: Vec<u32> = batch_of(&[400]).ids;
    let prompts = [&ids[..3], &ids[3..60], &ids[60..61], &ids[61..341], &ids[341..346]];
    let mut llama = adapted("tiny-llama3", "lora_final");
    let drawn = Sampling { do_sample: true, top_p: 0.9, repetition_penalty: 1.2, seed: 5, ..Sampling::default() };
    let want = [Sampling::default(), drawn.clone()].map(|options| alone(&llama, &prompts, &options, 8));
    llama.move_to(&device(), Dtype::F32);
    assert_eq!(together(&llama, &prompts, &Sampling::default(), 8, 2), want[0]);
    assert_eq!(together(&llama, &prompts, &drawn, 8, 5), want[1]);
    assert_eq!(together(&llama, &prompts, &drawn, 8, 3), want[1], "the same seed, the same tokens");
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
        let want = alone(&dense, &prompts, &Sampling::default(), 8);
        let device = device();
        let mut llama = Llama::load(&checkpoint, Storage::Stored, |_, _| ()).unwrap();
        llama.move_to(&device, Dtype::F32);
        let held = device.gpu().unwrap().memory().0;
        assert_eq!(held as u64, checkpoint.gpu_weights(Storage::Stored, Dtype::F32, false).0);
        let stored: usize = llama.parameters.iter().map(|p| p.value.num_bytes()).sum();
        assert!(3 * stored < 4 * dense.num_params(), "{stored} bytes");
        assert_eq!(together(&llama, &prompts, &Sampling::default(), 8, 3), want, "{}", kind.name());
        // One place: products with a single row, and prompts one after the other.
        assert_eq!(together(&llama, &prompts, &Sampling::default(), 8, 1), want, "{}", kind.name());
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
            if full {
                llama.train_all();
            } else {
                llama.add_adapter(&AdapterConfig { lora_dropout: 0.2, ..AdapterConfig::default() }, 1).unwrap();
            }
            assert!(!offload || llama.leave_embedding() != full, "a trained embedding cannot be left");
            llama.move_to(&device, dtype);
            let mut optimizer = AdamW::new(&llama, AdamWOptions { optim, offload, ..AdamWOptions::default() });
            let mut gradients = Gradients::new(&llama);
            let recompute = Recompute::Block;
            let mut ws = if offload { Workspace::parked(recompute) } else { Workspace::new(recompute) };
            let mut seen = Vec::new();
            for batch in &batches {
                gradients.clear();
                seen.push(llama.loss_and_gradients(batch, OPTIONS, &mut ws, &mut gradients));
                seen.push(gradient_norm(&gradients));
                optimizer.update(&mut llama, &gradients, 1e-3, 0.7);
            }
            // By way of the processor, as from a checkpoint.
            optimizer = optimizer.to_host(&llama).to_device(&device);
            gradients.clear();
            seen.push(llama.loss_and_gradients(&batches[0], OPTIONS, &mut ws, &mut gradients));
            optimizer.update(&mut llama, &gradients, 1e-3, 0.7);
            seen.push(llama.loss(&batches[1], 0.0, &mut ws));
            let ids: Vec<u32> = (3..20).collect();
            let new = together(&llama, &[&ids], &Sampling::default(), 4, 1);
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
            llama.add_adapter(&AdapterConfig::default(), 1).unwrap();
            llama.move_to(&device(), Dtype::BF16);
            run(&llama, &batch_of(&[9, 30]), Recompute::Block)
        });
        assert_eq!(by_f32, mapped, "{}", kind.name());
    }
}
