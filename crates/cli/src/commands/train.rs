//! `tunesmith train`: load, prepare, train, compare, report.

use super::evaluate::{self, Evaluation};
use super::plan::{Facts, Settled};
use crate::args::TrainArgs;
use crate::device;
use crate::load;
use crate::{stop, terminal};
use indicatif::ProgressBar;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tunesmith_files::Observer;
use tunesmith_files::table::grouped;
use tunesmith_files::{Error, Result};
use tunesmith_files::{
    atomic,
    bytes::format_bytes,
    hash::{sha256_hex, sha256_of},
};
use tunesmith_hub::Settings;
use tunesmith_infer::Opened;
use tunesmith_model::{AdapterFile, Llama, Storage};
use tunesmith_tensor::Device;
use tunesmith_text::{PreparedSplit, Report, Split};
use tunesmith_train::config::{Compute, Config, Method};
use tunesmith_train::memory::peak_resident;
use tunesmith_train::metrics::{MetricRecord, read_metrics};
use tunesmith_train::report::{self, ModelFacts, RunReport, SplitCounts};
use tunesmith_train::train::{Event, Job, Outcome, Start, prepare_model, train};
use tunesmith_train::upload::{Upload, UploadEvent, Uploader};

/// Tokens of a side-by-side sample in the report.
const SAMPLE_TOKENS: usize = 80;
/// Side-by-side samples in the report.
const NUM_SAMPLES: usize = 3;

pub(crate) fn run(args: &TrainArgs, settings: &Settings) -> Result<()> {
    let config = super::prepare::load_config(&args.config, &args.set)?;
    let opened = load::open_configured(&config.model, settings)?;
    let done = train_and_report(&config, &opened, args.resume, settings)?;
    let model = &config.model.source;
    match config.method {
        Method::Lora => println!("try it: tunesmith chat --model {model} --adapter {}", done.weights.display()),
        Method::Full => println!("try it: tunesmith chat --model {}", done.weights.display()),
    }
    Ok(())
}

/// What a finished run leaves for the command line to talk about.
pub(crate) struct Done {
    pub(crate) weights: PathBuf,
}

/// Prepares, trains, compares with the base model on held-out data, and writes the report.
pub(crate) fn train_and_report(config: &Config, opened: &Opened, resume: bool, settings: &Settings) -> Result<Done> {
    config.check_trainable()?;
    let dir = &config.output_dir;
    if !resume && dir.join("metrics.jsonl").exists() {
        return Err(Error::Input(format!(
            "{} holds a run already; go on with it by --resume, or choose another output_dir",
            dir.display()
        )));
    }
    if config.samples.chat && !config.samples.prompts.is_empty() {
        opened.template()?;
    }
    // Before the data, which may take long.
    let device = device::open(config.device, settings)?;
    let upload =
        terminal::with_bar(|bar| Upload::open(config, resume, settings, &mut |event| show_upload(event, bar)))?;
    let data_folder = dir.join("data");
    let data = super::prepare::prepare(&config.data, opened, &data_folder, settings)?;
    print!("{}", super::prepare::describe(&data));
    let facts = Facts::gather(config, opened, &data, &data_folder, device.gpu().is_some())?;
    let settled = facts.settle(config, resume)?;
    match &settled.chosen {
        Some(chosen) => println!("{chosen}"),
        None => {
            let of = device.gpu().map_or(String::new(), |gpu| format!(" of {}", gpu.name()));
            println!("memory{of}: {} at the peak", format_bytes(settled.plan.total));
        }
    }
    if let Some(gpu) = device.gpu() {
        facts.check_room(&settled, gpu)?;
    }
    write_run_files(&settled.config, opened, &data, resume)?;
    let uploads = upload.map(Upload::start).transpose()?;
    let done = train_and_compare(&settled, opened, &device, &data, &data_folder, resume, uploads.as_ref());
    match uploads {
        Some(uploads) => uploads.finish(done, &mut |event| show_upload(event, &mut |_| ())),
        None => done,
    }
}

/// Shows what the copy in a bucket has to say; `bar` takes how far a download is.
fn show_upload(event: UploadEvent<'_>, bar: &mut Observer<'_>) {
    match event {
        UploadEvent::Progress(progress) => bar(progress),
        UploadEvent::Note(text) => println!("{text}"),
        UploadEvent::Warning(text) => eprintln!("warning: {text}"),
    }
}

/// All that follows the preparations.
fn train_and_compare(
    settled: &Settled,
    opened: &Opened,
    device: &Device,
    data: &Report,
    data_folder: &Path,
    resume: bool,
    uploads: Option<&Uploader>,
) -> Result<Done> {
    let (config, plan) = (&settled.config, settled.plan);
    let dir = &config.output_dir;
    let storage = match device.gpu() {
        Some(_) => opened.storage_before_gpu(config.model.storage, config.method == Method::Full),
        None => config.model.storage,
    };
    let mut model = load::llama(opened, storage)?;
    prepare_model(config, &Start::of(opened), &mut model)?;
    let num_trained = model.num_trained();
    let outcome = run_loop(config, opened, &mut model, device, data, data_folder, resume, uploads)?;
    if !outcome.finished {
        println!(
            "stopped after step {} of {}; saved {}; go on with --resume",
            outcome.step,
            outcome.max_steps,
            outcome.weights.display()
        );
        return Err(Error::Stopped);
    }
    if config.compute == Compute::Int8 {
        // What was trained is compared as it will be used: in f32. One model in memory at a time.
        drop(model);
        model = load::llama(opened, config.model.storage)?;
        model.attach_adapter(AdapterFile::open(&outcome.weights)?, false)?;
    }
    let evaluation = compare(config, opened, model, data, data_folder)?;
    device.synchronize()?;
    if let Some((_, evaluation)) = &evaluation {
        print!("\n{}", evaluate::describe(evaluation));
        evaluate::write_json(&dir.join("evaluation.json"), evaluation)?;
    }
    let file = dir.join("report.html");
    report::write(&file, &html(config, opened, data, num_trained, evaluation)?)?;
    println!("\nweights: {}\nreport:  {}", outcome.weights.display(), file.display());
    if let Some(gpu) = device.gpu() {
        let (peak, planned) = (format_bytes(gpu.memory().1 as u64), format_bytes(plan.buffers()));
        println!("peak memory of {}: {peak} in buffers ({planned} were planned)", gpu.name());
        if let (Some(peak), Some(host)) = (peak_resident(), plan.host) {
            println!("peak memory of the process: {} ({} were planned)", format_bytes(peak), format_bytes(host.total));
        }
    } else if let Some(peak) = peak_resident() {
        println!("peak memory: {} ({} were planned)", format_bytes(peak), format_bytes(plan.total));
    }
    Ok(Done { weights: outcome.weights })
}

/// What the run was made of, as hashes: `lock.json`.
#[derive(Serialize)]
struct Lock {
    tunesmith: &'static str,
    model: String,
    weights: BTreeMap<String, String>,
    tokenizer: String,
    chat_template: Option<String>,
    data: String,
    config: String,
}

fn write_run_files(config: &Config, opened: &Opened, data: &Report, resume: bool) -> Result<()> {
    let dir = &config.output_dir;
    let file = dir.join("run.toml");
    let toml = config.to_toml()?;
    if let Some(old) = std::fs::read_to_string(&file).ok().filter(|old| resume && *old != toml) {
        let changed: Vec<&str> = toml.lines().filter(|line| !old.lines().any(|l| l == *line)).collect();
        eprintln!("note: the configuration has changed since the run began: {}", changed.join("; "));
    }
    atomic::write(&file, &toml)?;
    let files = opened.checkpoint.files();
    let bar = terminal::count_bar("hashing the model's files", files.len() as u64);
    let mut weights = BTreeMap::new();
    for path in files {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        weights.insert(name, sha256_of(&path)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let lock = Lock {
        tunesmith: env!("CARGO_PKG_VERSION"),
        model: opened.origin.clone(),
        weights,
        tokenizer: opened.tokenizer.fingerprint()?,
        chat_template: opened.template.as_ref().map(|t| sha256_hex(t.source())),
        data: data.key.clone(),
        config: sha256_hex(&toml),
    };
    evaluate::write_json(&dir.join("lock.json"), &lock)
}

fn run_loop(
    config: &Config,
    opened: &Opened,
    model: &mut Llama,
    device: &Device,
    data: &Report,
    data_folder: &Path,
    resume: bool,
    uploads: Option<&Uploader>,
) -> Result<Outcome> {
    stop::install(Some("\nstopping after this step and saving; press Ctrl-C again to stop at once"))?;
    let end_tokens = opened.end_tokens()?;
    let job = Job {
        config,
        model,
        device,
        tokenizer: &opened.tokenizer,
        template: opened.template.as_ref(),
        generation_config: opened.checkpoint.generation_config(),
        end_tokens: &end_tokens,
        data: data_folder,
        data_key: &data.key,
        resume,
        stop: stop::flag(),
    };
    let mut watcher = Watcher { bar: ProgressBar::hidden(), max_steps: 0, printed: 0, uploads };
    let outcome = stop::listening(|| train(job, &mut |event| watcher.see(event)));
    watcher.bar.finish_and_clear();
    outcome
}

/// Shows a run on the terminal: a bar with the last step, a line for everything else. Without a terminal, a line for
/// about every hundredth of the run.
struct Watcher<'a> {
    bar: ProgressBar,
    max_steps: u64,
    printed: u64,
    uploads: Option<&'a Uploader>,
}

impl Watcher<'_> {
    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            println!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    fn see(&mut self, event: Event<'_>) {
        for news in self.uploads.into_iter().flat_map(Uploader::news) {
            match news.is_warning {
                true => self.bar.suspend(|| eprintln!("warning: {}", news.text)),
                false => self.line(&news.text),
            }
        }
        match event {
            Event::Started { step, max_steps, num_trained_parameters, num_blocks } => {
                self.max_steps = max_steps;
                self.bar = terminal::training_bar(max_steps);
                self.bar.set_position(step);
                // What was done before a resume says nothing about this run's speed.
                self.bar.reset_eta();
                let parameters = grouped(num_trained_parameters);
                let on =
                    num_blocks.map_or("data that is read as it goes on".into(), |n| format!("{} blocks", grouped(n)));
                let from = if step > 0 { format!(" from step {step}") } else { String::new() };
                self.line(&format!("training {parameters} weights on {on} for {max_steps} steps{from}"));
            }
            Event::Evaluating(done, all) => self.bar.set_message(format!("evaluating {done}/{all}")),
            Event::Saving(folder) => self.bar.set_message(format!("saving {}", folder.display())),
            Event::Saved(folder) => {
                self.line(&format!("saved {}", folder.display()));
                if let Some(uploads) = self.uploads {
                    uploads.wake();
                }
            }
            Event::Record(record) => self.record(record),
        }
    }

    fn record(&mut self, record: &MetricRecord) {
        match record {
            MetricRecord::Train { step, loss, learning_rate, grad_norm, tokens_per_s, rss_bytes, .. } => {
                let text = format!(
                    "loss {loss:.4} lr {learning_rate:.2e} |g| {grad_norm:.3} {tokens_per_s:.0} tok/s {}",
                    format_bytes(*rss_bytes)
                );
                self.bar.set_position(*step);
                let due = self.printed + (self.max_steps / 100).max(1);
                if self.bar.is_hidden() && (*step >= due || *step == self.max_steps) {
                    println!("step {step}/{}: {text}", self.max_steps);
                    self.printed = *step;
                }
                self.bar.set_message(text);
            }
            MetricRecord::Eval { step, eval_loss, eval_perplexity, .. } => {
                self.line(&format!("step {step}: validation loss {eval_loss:.4}, perplexity {eval_perplexity:.2}"));
            }
            MetricRecord::Sample { step, prompt, text } => {
                self.line(&format!("step {step}: {prompt} → {}", text.trim().replace('\n', "\n    ")));
            }
            MetricRecord::Note { step, message } => self.line(&format!("step {step}: {message}")),
        }
    }
}

/// Base and tuned on the test split (on the validation split if there is no test split), with the split's name.
fn compare(
    config: &Config,
    opened: &Opened,
    mut model: Llama,
    data: &Report,
    data_folder: &Path,
) -> Result<Option<(Split, Evaluation)>> {
    let Some(which) = [Split::Test, Split::Validation].into_iter().find(|s| data.split(*s).blocks > 0) else {
        return Ok(None);
    };
    let dtype = model.dtype();
    let split = PreparedSplit::open(data_folder, which)?;
    let prompts = evaluate::prompts(&split, &opened.tokenizer, NUM_SAMPLES)?;
    let score = |model: &Llama, what: &str| evaluate::score(model, opened, &split, &prompts, SAMPLE_TOKENS, what);
    let tuned = score(&model, "scoring the tuned model")?;
    let base = match config.method {
        Method::Lora => {
            model.enable_adapter(false);
            score(&model, "scoring the base model")?
        }
        Method::Full => {
            // One of the two in memory at a time.
            let device = model.device();
            drop(model);
            let mut base = load::llama(opened, Storage::F32)?;
            base.add_tokens(&opened.new_tokens)?;
            base.move_to(&device, dtype);
            score(&base, "scoring the base model")?
        }
    };
    let evaluation = Evaluation {
        model: config.model.source.clone(),
        adapter: None,
        base: None,
        data: vec![format!("{} split of {}", which.name(), data_folder.display())],
        statistics: None,
        comparison: Some(tuned.against(&base)?),
        samples: evaluate::pairs(&prompts, Some(&base), &tuned),
    };
    Ok(Some((which, evaluation)))
}

fn html(
    config: &Config,
    opened: &Opened,
    data: &Report,
    num_trained: usize,
    evaluation: Option<(Split, Evaluation)>,
) -> Result<RunReport> {
    let splits = Split::ALL.into_iter().filter(|s| data.split(*s).counts.rows > 0);
    let data_counts = splits.map(|split| {
        let r = data.split(split);
        SplitCounts {
            split: split.name().into(),
            num_rows: r.counts.rows as u64,
            num_tokens: r.tokens as u64,
            num_trained_tokens: r.trained_tokens as u64,
            num_blocks: r.blocks as u64,
            num_too_long: r.counts.overlong_rows as u64,
        }
    });
    let mut warnings = data.warnings();
    let (compared_on, comparison, samples) = match evaluation {
        Some((split, e)) => {
            if split == Split::Validation {
                warnings.push("There is no test split: the comparison is on the validation split, which also chose the best step.".into());
            }
            (format!("{} split", split.name()), e.comparison, e.samples)
        }
        None => {
            warnings.push(
                "There is neither a test nor a validation split: nothing says whether the model got better.".into(),
            );
            (String::new(), None, Vec::new())
        }
    };
    let method = match config.method {
        Method::Full => "full fine-tuning".to_owned(),
        Method::Lora => {
            let l = &config.lora;
            let name = if l.use_rslora { "rsLoRA" } else { "LoRA" };
            format!(
                "{name}, rank {}, alpha {}, dropout {}, {}",
                l.r,
                l.lora_alpha,
                l.lora_dropout,
                l.target_modules.join(", ")
            )
        }
    };
    Ok(RunReport {
        title: format!("{} tuned", config.model.source),
        subtitle: config.output_dir.display().to_string(),
        warnings,
        metrics: read_metrics(&config.output_dir.join("metrics.jsonl"))?,
        compared_on,
        comparison,
        samples,
        data: data_counts.collect(),
        model: Some(ModelFacts {
            name: config.model.source.clone(),
            origin: opened.origin.clone(),
            num_parameters: opened.checkpoint.config().num_params() as u64,
            num_trained_parameters: num_trained as u64,
            method,
        }),
        config: config.to_toml()?,
        provenance: vec![
            ("tunesmith".into(), env!("CARGO_PKG_VERSION").into()),
            ("data key".into(), data.key.clone()),
            ("tokenizer".into(), opened.tokenizer.fingerprint()?),
        ],
    })
}
