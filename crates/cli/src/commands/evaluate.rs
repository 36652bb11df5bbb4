//! `tunesmith evaluate`, and the comparison of base and tuned that `train` ends with.

use crate::args::{ComputeName, EvaluateArgs, SplitName};
use crate::device;
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::Settings;
use crate::terminal;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tunesmith_model::{Llama, Workspace};
use tunesmith_text::{PreparedSplit, Report, Split, Tokenizer};
use tunesmith_train::config::Config;
use tunesmith_train::evaluate::{continuations, document_losses};
use tunesmith_train::report::{self, ModelFacts, RunReport, SamplePair};
use tunesmith_train::statistics::{
    Bootstrap, Comparison, DocumentLoss, Estimate, LossStatistics, compare, loss_statistics,
};

/// What one model made of a split.
pub(crate) struct Scored {
    documents: Vec<DocumentLoss>,
    texts: Vec<String>,
}

/// The beginning of a document, to be continued by the models.
pub(crate) struct Prompt {
    ids: Vec<u32>,
    text: String,
}

/// Result of an evaluation: of one model, or of two on the same rows.
#[derive(Serialize)]
pub(crate) struct Evaluation {
    pub(crate) model: String,
    pub(crate) adapter: Option<String>,
    pub(crate) base: Option<String>,
    pub(crate) data: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) statistics: Option<LossStatistics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) comparison: Option<Comparison>,
    pub(crate) samples: Vec<SamplePair>,
}

pub(crate) fn run(args: &EvaluateArgs, settings: &Settings) -> Result<()> {
    device::check(&args.device)?;
    let opened = load::open_with_adapter(&args.model, settings)?;
    let folder = tempfile::tempdir().map_err(|e| Error::io("cannot create a folder in", &std::env::temp_dir(), e))?;
    let split = data(args, &opened, folder.path(), settings)?;
    let prompts = prompts(&split, &opened.tokenizer, args.samples)?;
    let score = |model: &Llama, what: &str| score(model, &opened, &split, &prompts, args.max_new_tokens, what);

    let ready = |opened: &Opened, adapter: Option<&str>| -> Result<Llama> {
        let on_gpu = args.device.device != "cpu";
        let storage = args.storage.into();
        // With `auto` it may be the processor after all, whose products want f32.
        let certain = on_gpu && args.device.device != "auto";
        let storage = if certain { opened.storage_before_gpu(storage, false) } else { storage };
        let mut model = opened.llama_with(adapter, storage, settings)?;
        if args.compute == ComputeName::Int8 && on_gpu {
            return Err(Error::Input("--compute int8 is the processor's; leave it out, or use --device cpu".into()));
        }
        if args.compute == ComputeName::Int8 {
            model.compute_int8(false)?;
        }
        device::place(&mut model, &args.device, settings)?;
        Ok(model)
    };
    let mut model = ready(&opened, args.model.adapter.as_deref())?;
    let tuned = score(&model, "scoring")?;
    let base = if args.model.adapter.is_some() {
        model.enable_adapter(false);
        Some(score(&model, "scoring the base")?)
    } else if let Some(base) = &args.base {
        drop(model);
        let other = load::open(base, None, settings)?;
        if other.tokenizer.fingerprint()? != opened.tokenizer.fingerprint()? {
            return Err(Error::Input(format!(
                "{base} and {} have different tokenizers, so their losses a token cannot be compared; evaluate each alone \
                 and compare bits per byte",
                args.model.model
            )));
        }
        Some(score(&ready(&other, None)?, "scoring the base")?)
    } else {
        None
    };
    let bootstrap = Bootstrap { num_resamples: args.resamples, ..Bootstrap::default() };
    let mut evaluation = Evaluation {
        model: args.model.model.clone(),
        adapter: args.model.adapter.clone(),
        base: args.base.clone(),
        data: args.data.clone(),
        statistics: None,
        comparison: None,
        samples: pairs(&prompts, base.as_ref(), &tuned),
    };
    match &base {
        Some(base) => evaluation.comparison = Some(compare(&base.documents, &tuned.documents, &bootstrap)?),
        None => evaluation.statistics = Some(loss_statistics(&tuned.documents, &bootstrap)?),
    }
    print!("{}", describe(&evaluation));
    if let Some(file) = &args.json {
        write_json(file, &evaluation)?;
        println!("written to {}", file.display());
    }
    if let Some(file) = &args.report {
        report::write(file, &html(evaluation, &opened))?;
        println!("report: {}", file.display());
    }
    Ok(())
}

fn html(evaluation: Evaluation, opened: &Opened) -> RunReport {
    RunReport {
        title: format!("Evaluation of {}", evaluation.model),
        subtitle: evaluation.adapter.iter().map(|a| format!("with {a}")).collect(),
        compared_on: evaluation.data.join(", "),
        comparison: evaluation.comparison,
        samples: evaluation.samples,
        model: Some(ModelFacts {
            name: evaluation.model,
            origin: opened.origin.clone(),
            num_parameters: opened.checkpoint.config().num_params() as u64,
            num_trained_parameters: 0,
            method: evaluation.adapter.map_or("as it is".into(), |a| format!("adapter {a}")),
        }),
        provenance: vec![("tunesmith".into(), env!("CARGO_PKG_VERSION").into())],
        ..RunReport::default()
    }
}

/// Writes a value as indented JSON.
pub(crate) fn write_json(file: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Failure(format!("{}: {e}", file.display())))?;
    super::write_atomically(file, (text + "\n").as_bytes())
}

/// The rows to score: a split of a prepared folder, or all rows of the files, prepared in `folder`.
fn data(args: &EvaluateArgs, opened: &Opened, folder: &Path, settings: &Settings) -> Result<PreparedSplit> {
    if let [place] = &args.data[..]
        && Path::new(place).join(tunesmith_text::report::REPORT).exists()
    {
        let (folder, report) = (Path::new(place), Report::read(Path::new(place))?);
        let split = match args.split {
            SplitName::Train => Split::Train,
            SplitName::Validation => Split::Validation,
            SplitName::Test => Split::Test,
        };
        if report.split(split).blocks == 0 {
            return Err(Error::Input(format!(
                "{place} has no rows in its {} split; choose another --split",
                split.name()
            )));
        }
        if report.tokenizer != opened.tokenizer.fingerprint()? {
            let model = &args.model.model;
            return Err(Error::Input(format!(
                "{place} was prepared with another tokenizer than {model}'s; give the files themselves"
            )));
        }
        return Ok(PreparedSplit::open(folder, split)?);
    }
    let quoted: Vec<String> = args.data.iter().map(|d| serde_json::Value::from(d.as_str()).to_string()).collect();
    let mut overrides = vec!["model.source=\"-\"".to_owned(), format!("data.train=[{}]", quoted.join(", "))];
    overrides.push("data.validation_fraction=0.0".to_owned());
    overrides.extend(args.set.iter().cloned());
    let config = Config::parse("", "the command line", &overrides)?;
    let report = super::prepare::prepare(&config.data, opened, folder, settings)?;
    print!("{}", super::prepare::describe(&report));
    Ok(PreparedSplit::open(folder, Split::Train)?)
}

/// Beginnings of `n` rows spread over the split: up to the first trained token, or the first 32 tokens of plain text.
pub(crate) fn prompts(split: &PreparedSplit, tokenizer: &Tokenizer, n: usize) -> Result<Vec<Prompt>> {
    // (block, first token, length) of the document that begins each row. Of a row that was split it is the first of the
    // longest: windows of full length have a block to themselves and stay in order, only the rest at the end moves.
    let mut rows: BTreeMap<(Arc<str>, usize), (usize, usize, usize)> = BTreeMap::new();
    for i in 0..split.len() {
        let block = split.block(i)?;
        let mut start = 0;
        for (length, source) in block.lengths.iter().zip(&block.sources) {
            let row = rows.entry((source.file.clone(), source.line)).or_default();
            if *length > row.2 {
                *row = (i, start, *length);
            }
            start += length;
        }
    }
    let rows: Vec<_> = rows.into_values().collect();
    let n = n.min(rows.len());
    let mut prompts = Vec::new();
    for (block, start, length) in (0..n).map(|i| rows[i * rows.len() / n]) {
        let block = split.block(block)?;
        let first = block.trained[start..start + length].iter().position(|t| *t).unwrap_or(0);
        let end = if first > 1 { first } else { (length / 2).min(32) };
        if end > 0 {
            let ids = block.ids[start..start + end].to_vec();
            let text = tokenizer.decode(&ids, true)?;
            prompts.push(Prompt { ids, text });
        }
    }
    Ok(prompts)
}

/// Losses of all documents of `split` and continuations of `prompts`, with a bar.
pub(crate) fn score(
    model: &Llama,
    opened: &Opened,
    split: &PreparedSplit,
    prompts: &[Prompt],
    max_new_tokens: usize,
    what: &str,
) -> Result<Scored> {
    let bar = terminal::count_bar(what, split.len() as u64);
    let mut ws = Workspace::default();
    let documents = document_losses(model, split, &mut ws, |done, _| bar.set_position(done as u64))?;
    bar.set_message("generating samples");
    let end_tokens = opened.end_tokens()?;
    let ids: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
    let new = continuations(model, &ids, &end_tokens, max_new_tokens, &mut ws)?;
    let texts = new.iter().map(|new| opened.tokenizer.decode(new, true)).collect::<std::result::Result<_, _>>()?;
    bar.finish_and_clear();
    Ok(Scored { documents, texts })
}

impl Scored {
    /// The paired comparison of two models on the same rows.
    pub(crate) fn against(&self, base: &Self) -> Result<Comparison> {
        Ok(compare(&base.documents, &self.documents, &Bootstrap::default())?)
    }
}

/// Prompts with what each model made of them.
pub(crate) fn pairs(prompts: &[Prompt], base: Option<&Scored>, tuned: &Scored) -> Vec<SamplePair> {
    let pair = |(i, prompt): (usize, &Prompt)| SamplePair {
        prompt: prompt.text.clone(),
        base: base.map(|b| b.texts[i].clone()),
        tuned: tuned.texts[i].clone(),
    };
    prompts.iter().enumerate().map(pair).collect()
}

fn interval(estimate: &Estimate) -> String {
    match estimate.interval() {
        Some((low, high)) => format!("{:.4} [{low:.4}, {high:.4}]", estimate.value),
        None => format!("{:.4}", estimate.value),
    }
}

fn row(name: &str, s: &LossStatistics) -> Vec<String> {
    let bits = s.bits_per_byte.as_ref().map_or("-".into(), interval);
    vec![name.into(), interval(&s.mean_loss), interval(&s.perplexity), bits]
}

/// The result as text.
pub(crate) fn describe(evaluation: &Evaluation) -> String {
    let header = ["", "loss (nats/token)", "perplexity", "bits per byte"];
    let mut text = String::new();
    if let Some(c) = &evaluation.comparison {
        text.push_str(&terminal::table(&header, &[row("base", &c.base), row("tuned", &c.tuned)]));
        text.push_str(&format!("difference (tuned - base, same rows): {}\n{}\n", interval(&c.loss_difference), c));
        text.push_str(&counts(&c.tuned));
    }
    if let Some(s) = &evaluation.statistics {
        text.push_str(&terminal::table(&header, &[row("model", s)]));
        text.push_str(&counts(s));
    }
    for sample in &evaluation.samples {
        text.push_str(&format!("\n> {}\n", sample.prompt.trim().replace('\n', "\n> ")));
        if let Some(base) = &sample.base {
            text.push_str(&format!("base:  {}\n", base.trim().replace('\n', "\n       ")));
        }
        text.push_str(&format!("tuned: {}\n", sample.tuned.trim().replace('\n', "\n       ")));
    }
    text
}

fn counts(s: &LossStatistics) -> String {
    let [documents, tokens, bytes] = [s.num_documents, s.num_tokens, s.num_bytes].map(terminal::count);
    format!("{documents} documents, {tokens} scored tokens, {bytes} bytes; intervals: 95 % bootstrap over documents\n")
}
