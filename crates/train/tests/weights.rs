//! Weighted losses against PyTorch (`fixtures/weighted_loss.py` made the numbers), on the processor and on the emulated GPU, and
//! cut into micro-batches in several ways.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tunesmith_model::{Batch, Checkpoint, Llama, Storage, Workspace};
use tunesmith_tensor::cuda::Gpu;
use tunesmith_tensor::{Device, Dtype};
use tunesmith_text::{ChatTemplate, Tokenizer, prepare};
use tunesmith_train::config::Config;
use tunesmith_train::metrics::{MetricRecord, read_metrics};
use tunesmith_train::objective::Objective;
use tunesmith_train::step::Trainer;
use tunesmith_train::train::{Job, Start, prepare_model, train};

struct Reference(serde_json::Value);

impl Reference {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weighted_loss.json");
        Self(serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
    }

    /// The documents as token ids and weights.
    fn documents(&self) -> Vec<(Vec<u32>, Vec<f32>)> {
        let ids: Vec<Vec<u32>> = serde_json::from_value(self.0["ids"].clone()).unwrap();
        let weights: Vec<Vec<f32>> = serde_json::from_value(self.0["weights"].clone()).unwrap();
        ids.into_iter().zip(weights).collect()
    }

    fn number(&self, name: &str) -> f64 {
        self.0[name].as_f64().unwrap()
    }
}

fn model() -> Llama {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny-llama3");
    let mut llama = Llama::load(&Checkpoint::open(&folder).unwrap(), Storage::F32, |_, _| ()).unwrap();
    llama.train_all();
    llama
}

fn batch(documents: &[(Vec<u32>, Vec<f32>)]) -> Batch {
    let mut batch = Batch::default();
    documents.iter().for_each(|(ids, weights)| batch.push_weighted(ids, weights));
    batch
}

/// Weighted mean loss and the gradients of a step whose micro-batches are `batches`.
fn step(trainer: &mut Trainer, batches: &[Batch]) -> (f64, Vec<Vec<f32>>) {
    let loss = trainer.accumulate(batches, &Objective::default()).unwrap();
    (loss.mean(), trainer.gradients.trained().map(|t| t.to_host().data().to_vec()).collect())
}

fn trainer(llama: Llama) -> Trainer {
    Trainer::for_gradients(Arc::new(llama), None, Workspace::default())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

#[test]
fn weighted_loss_and_gradients_are_those_of_pytorch() {
    let reference = Reference::open();
    let documents = reference.documents();
    let binary = std::env::current_exe().unwrap();
    for device in [Device::Cpu, Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap())] {
        let mut llama = model();
        if device.gpu().is_some() {
            llama.move_to(&device, Dtype::F32);
        }
        let batch = batch(&documents);
        assert_eq!(batch.total_weight(), reference.number("sum_of_weights"));
        let mut trainer = trainer(llama);
        let (loss, gradients) = step(&mut trainer, std::slice::from_ref(&batch));
        assert!((loss / reference.number("loss") - 1.0).abs() < 1e-5, "{loss}");
        assert_eq!(trainer.model.parameters.len(), gradients.len());
        for (parameter, gradient) in trainer.model.parameters.iter().zip(&gradients) {
            let want = reference.0["gradient_norms"][&parameter.name].as_f64().unwrap();
            assert!((norm(gradient) / want - 1.0).abs() < 1e-4, "{}: {} {want}", parameter.name, norm(gradient));
            let Some(values) = reference.0["gradients"].get(&parameter.name) else { continue };
            let values: Vec<f32> = serde_json::from_value(values.clone()).unwrap();
            let difference: Vec<f32> = gradient.iter().zip(&values).map(|(a, b)| a - b).collect();
            assert_eq!(difference.len(), values.len());
            assert!(norm(&difference) < 1e-4 * norm(&values), "{}", parameter.name);
        }
        // The losses themselves are unweighted, at the rows that have a weight.
        let (got, _) = Objective::default().losses(&trainer.model, None, &batch, &mut trainer.workspace);
        let losses: Vec<Vec<f32>> = serde_json::from_value(reference.0["losses"].clone()).unwrap();
        let weights = documents.iter().flat_map(|(_, weights)| &weights[1..]);
        let kept: Vec<f32> =
            losses.concat().into_iter().zip(weights).filter(|(_, weight)| **weight > 0.0).map(|(l, _)| l).collect();
        assert_eq!(got.len(), kept.len());
        for (got, want) in got.iter().zip(&kept) {
            assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        }
    }
}

#[test]
fn micro_batches_do_not_change_a_weighted_step() {
    let documents = Reference::open().documents();
    let mut trainer = trainer(model());
    let (loss, gradients) = step(&mut trainer, &[batch(&documents)]);
    for cut in [1, 2] {
        let batches: Vec<Batch> = documents.chunks(cut).map(batch).collect();
        let (other_loss, others) = step(&mut trainer, &batches);
        assert!((loss / other_loss - 1.0).abs() < 1e-6, "{loss} {other_loss}");
        for (a, b) in gradients.iter().zip(&others) {
            let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
            assert!(norm(&difference) <= 1e-5 * norm(a));
        }
    }
}

/// Loss, gradient norm and trained tokens so far of every step of a run of the tiny configuration with `sets`.
fn curve(folder: &Path, name: &str, sets: &[&str]) -> Vec<(f64, f64, u64)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("configs/tiny.toml")).unwrap();
    let output: PathBuf = folder.join(name);
    let mut all = vec![
        format!("output_dir={}", output.display()),
        format!("model.source={}", root.join("configs/tiny/model").display()),
        format!("data.train=[\"{}\"]", root.join("configs/tiny/counting.jsonl").display()),
        "data.packing=false".into(),
        "training.max_steps=4".into(),
        "training.logging_steps=1".into(),
        "training.save_steps=0".into(),
        "training.eval_steps=0".into(),
        "samples.prompts=[]".into(),
    ];
    all.extend(sets.iter().map(|set| (*set).to_owned()));
    let config = Config::parse(&text, "tiny.toml", &all).unwrap();
    let model = root.join("configs/tiny/model");
    let tokenizer = Tokenizer::from_folder(&model).unwrap();
    let template = ChatTemplate::of(&tokenizer, None).unwrap();
    let data = output.join("data");
    let report = prepare(&data, &config.data, &tokenizer, template.as_ref(), &mut |_| ()).unwrap();
    let mut llama = Llama::load(&Checkpoint::open(&model).unwrap(), Storage::F32, |_, _| ()).unwrap();
    let adapter = prepare_model(&config, &Start::default(), &mut llama).unwrap();
    let job = Job {
        config: &config,
        device: &Device::Cpu,
        tokenizer: &tokenizer,
        template: template.as_ref(),
        generation_config: None,
        end_tokens: &[],
        data: &data,
        data_key: &report.key,
        resume: false,
        stop: &AtomicBool::new(false),
    };
    assert!(train(job, Arc::new(llama), adapter, &mut |_| ()).unwrap().finished);
    let records = read_metrics(&output.join("metrics.jsonl")).unwrap();
    let steps = records.iter().filter_map(|record| match record {
        MetricRecord::Train { loss, grad_norm, num_tokens, .. } => Some((*loss, *grad_norm, *num_tokens)),
        _ => None,
    });
    steps.collect()
}

#[test]
fn a_run_with_a_prompt_weight_is_a_mixture_and_accumulates() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, sets: &[&str]| curve(folder.path(), name, sets);
    let half = "data.prompt_loss_weight=0.5";
    let one = ["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1"];
    let eight = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"];
    let together = run("one", &[&one[..], &[half]].concat());
    let apart = run("eight", &[&eight[..], &[half]].concat());
    assert_eq!(together.len(), 4);
    for (a, b) in together.iter().zip(&apart) {
        assert!((a.0 / b.0 - 1.0).abs() < 1e-4 && (a.1 / b.1 - 1.0).abs() < 1e-3 && a.2 == b.2, "{a:?} {b:?}");
    }
    // The first step, whose weights are those of the start: losses of answers (N of them) and of everything (M) give that of a half.
    let [answers, all] = [("answers", &[][..]), ("all", &["data.train_on=all"][..])]
        .map(|(name, sets)| run(name, &[&one[..], sets].concat())[0]);
    let (n, m) = (answers.2 as f64, all.2 as f64);
    let expected = (0.5 * answers.0 * n + 0.5 * all.0 * m) / (0.5 * n + 0.5 * m);
    assert!((together[0].0 / expected - 1.0).abs() < 1e-5, "{} {expected}", together[0].0);
    assert_eq!(together[0].2, all.2, "tokens that carry loss");
    // With a weight of 1 a prompt is trained like the rest.
    let whole = run("whole", &[&one[..], &["data.prompt_loss_weight=1.0"]].concat());
    assert!((whole[0].0 / all.0 - 1.0).abs() < 1e-6 && (whole[0].1 / all.1 - 1.0).abs() < 1e-5, "{whole:?} {all:?}");
}
