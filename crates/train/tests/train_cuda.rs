//! The training loop on the emulated GPU: it follows the processor's, saves, and goes on from a checkpoint to the bit.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tunesmith_model::memory::Offload;
use tunesmith_model::{AdapterFile, Checkpoint, Llama, Storage};
use tunesmith_tensor::Device;
use tunesmith_tensor::cuda::Gpu;
use tunesmith_text::{ChatTemplate, Report, Tokenizer, prepare};
use tunesmith_train::config::Config;
use tunesmith_train::metrics::{MetricRecord, read_metrics};
use tunesmith_train::train::{Job, Outcome, Start, prepare_model, train};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The tiny model of configs/, a few steps of LoRA.
fn config(output: &Path, device: &str, dtype: Option<&str>, steps: u64) -> Config {
    let text = std::fs::read_to_string(root().join("configs/tiny.toml")).unwrap();
    let mut sets = vec![
        format!("output_dir={}", output.display()),
        format!("model.source={}", root().join("configs/tiny/model").display()),
        format!("data.train=[\"{}\"]", root().join("configs/tiny/counting.jsonl").display()),
        "method=lora".into(),
        "lora.lora_dropout=0.1".into(),
        "data.max_length=64".into(),
        "training.per_device_train_batch_size=1".into(),
        "training.gradient_accumulation_steps=2".into(),
        "training.logging_steps=1".into(),
        "training.eval_steps=0".into(),
        "training.save_steps=2".into(),
        "training.lr_scheduler_type=constant".into(),
        "training.warmup_steps=0".into(),
        "data.validation_fraction=0.01".into(),
        "samples.every=0".into(),
        "samples.max_new_tokens=2".into(),
        format!("training.max_steps={steps}"),
        format!("device={device}"),
    ];
    sets.extend(dtype.map(|dtype| format!("dtype={dtype}")));
    Config::parse(&text, "tiny.toml", &sets).unwrap()
}

fn run(config: &Config, device: &Device, resume: bool) -> Outcome {
    let folder = root().join("configs/tiny/model");
    let mut tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let new_tokens = tokenizer.add_tokens(&config.model.add_tokens, false).unwrap();
    let template = ChatTemplate::of(&tokenizer, None).unwrap();
    let data = config.output_dir.join("data");
    let report: Report = prepare(&data, &config.data, &tokenizer, template.as_ref(), &mut |_| ()).unwrap();
    let mut model = Llama::load(&Checkpoint::open(&folder).unwrap(), Storage::F32, |_, _| ()).unwrap();
    let adapter = prepare_model(config, &Start { new_tokens, ..Start::default() }, &mut model).unwrap();
    let job = Job {
        config,
        device,
        tokenizer: &tokenizer,
        template: template.as_ref(),
        generation_config: None,
        end_tokens: &[],
        data: &data,
        data_key: &report.key,
        resume,
        stop: &AtomicBool::new(false),
    };
    train(job, std::sync::Arc::new(model), adapter, &mut |_| ()).unwrap()
}

/// (loss, gradient norm) of each step.
fn curve(config: &Config) -> Vec<(f64, f64)> {
    let records = read_metrics(&config.output_dir.join("metrics.jsonl")).unwrap();
    let steps = records.iter().filter_map(|record| match record {
        MetricRecord::Train { loss, grad_norm, .. } => Some((*loss, *grad_norm)),
        _ => None,
    });
    steps.collect()
}

#[test]
fn a_run_on_the_device_follows_the_processor_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let binary = std::env::current_exe().unwrap();
    let device = Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap());

    let on_cpu = config(&folder.path().join("cpu"), "cpu", None, 4);
    assert!(run(&on_cpu, &Device::Cpu, false).finished);
    let want = curve(&on_cpu);
    for (dtype, bound) in [("f32", 1e-4), ("bf16", 3e-2)] {
        let straight = config(&folder.path().join(dtype), "cuda:0", Some(dtype), 4);
        let outcome = run(&straight, &device, false);
        let got = curve(&straight);
        assert_eq!((got.len(), outcome.step), (4, 4));
        for ((loss, norm), (want_loss, want_norm)) in got.iter().zip(&want) {
            assert!((loss / want_loss - 1.0).abs() < bound, "{dtype}: {got:?} {want:?}");
            assert!((norm / want_norm - 1.0).abs() < bound, "{dtype}: {got:?} {want:?}");
        }
        // Half of it, and the rest from its checkpoint: the same numbers and the same file, and so with what can wait in the
        // processor's memory there.
        let output = folder.path().join(format!("{dtype}-resumed"));
        let offloading = |steps| {
            let mut config = config(&output, "cuda:0", Some(dtype), steps);
            config.training.offload = Offload { activations: true, optimizer: true, embedding: false };
            config
        };
        run(&offloading(2), &device, false);
        assert_eq!(device.gpu().unwrap().host_memory(), 0, "it is given back");
        let rest = offloading(4);
        let resumed = run(&rest, &device, true);
        assert_eq!(curve(&rest), got, "{dtype}");
        let file = |outcome: &Outcome| std::fs::read(outcome.weights.join("adapter_model.safetensors")).unwrap();
        assert!(file(&resumed) == file(&outcome), "{dtype}: the adapters differ");
    }
    // TF32 only for the run that asks for it.
    let mut rounded = config(&folder.path().join("tf32"), "cuda:0", Some("f32"), 4);
    rounded.training.tf32 = true;
    run(&rounded, &device, false);
    let exact = config(&folder.path().join("exact"), "cuda:0", Some("f32"), 4);
    run(&exact, &device, false);
    let [rounded, exact, before] =
        [&rounded, &exact, &config(&folder.path().join("f32"), "cuda:0", None, 4)].map(curve);
    assert_eq!(exact, before);
    assert!(rounded.iter().zip(&exact).all(|(a, b)| a != b), "{rounded:?} {exact:?}");
    for ((loss, norm), (want_loss, want_norm)) in rounded.iter().zip(&want) {
        assert!((loss / want_loss - 1.0).abs() < 1e-2 && (norm / want_norm - 1.0).abs() < 1e-2, "{rounded:?} {want:?}");
    }
    device.synchronize().unwrap();
}

/// An adapter with rows of added tokens, which occur in prompts and answers: as on the processor, and resumed to the bit.
#[test]
fn added_tokens_train_on_the_device_and_resume() {
    let folder = tempfile::tempdir().unwrap();
    let binary = std::env::current_exe().unwrap();
    let device = Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap());
    let with_tokens = |name: &str, device: &str, dtype: Option<&str>, steps: u64| {
        let mut config = config(&folder.path().join(name), device, dtype, steps);
        config.model.add_tokens = ["comes", "12"].map(String::from).to_vec();
        config
    };
    let rows = |outcome: &Outcome| {
        let adapter = AdapterFile::open(&outcome.weights).unwrap();
        assert_eq!(adapter.config.trainable_token_indices["embed_tokens"].len(), 2);
        adapter.token_rows["embed_tokens"].data().to_vec()
    };
    let on_cpu = with_tokens("cpu", "cpu", None, 4);
    let want_rows = rows(&run(&on_cpu, &Device::Cpu, false));
    let want = curve(&on_cpu);
    for (dtype, bound) in [("f32", 1e-4), ("bf16", 3e-2)] {
        let straight = with_tokens(dtype, "cuda:0", Some(dtype), 4);
        let outcome = run(&straight, &device, false);
        let got = curve(&straight);
        for ((loss, norm), (want_loss, want_norm)) in got.iter().zip(&want) {
            assert!((loss / want_loss - 1.0).abs() < bound, "{dtype}: {got:?} {want:?}");
            assert!((norm / want_norm - 1.0).abs() < bound, "{dtype}: {got:?} {want:?}");
        }
        // The rows lie where the processor's do: in bf16 as far as steps of AdamW are the same whose gradients are hardly any.
        let trained = rows(&outcome);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let apart: f64 = trained.iter().zip(&want_rows).map(|(a, b)| square(a - b)).sum();
        let apart = (apart / want_rows.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
        assert!(apart < 3.0 * bound, "{dtype}: the rows are {apart} apart");
        assert!(trained[..64] != trained[64..], "{dtype}: both began at the mean, and were trained apart");
        let name = format!("{dtype}-resumed");
        run(&with_tokens(&name, "cuda:0", Some(dtype), 2), &device, false);
        let rest = with_tokens(&name, "cuda:0", Some(dtype), 4);
        let resumed = run(&rest, &device, true);
        assert_eq!(curve(&rest), got, "{dtype}");
        assert!(rows(&resumed) == trained, "{dtype}: the rows differ");
    }
    device.synchronize().unwrap();
}
