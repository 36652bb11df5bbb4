//! `report.html`: one self-contained page about a run.

use std::{fmt::Write as _, path::Path};

use serde::Serialize;
use serde_json::{Value, json};
use tunesmith_text::page;

use crate::{
    Result,
    metrics::{MetricRecord, write_atomically},
    statistics::{Comparison, Estimate, Verdict},
};

mod chart;
mod format;

use chart::{Chart, Colour, Curve};

/// Everything the page shows. Parts that are empty or `None` are left out of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RunReport {
    /// Heading and page title.
    pub title: String,
    /// A line under the heading: when, where, how the run ended. May be empty.
    pub subtitle: String,
    /// What the reader should know before believing the numbers, one sentence each.
    pub warnings: Vec<String>,
    /// The records of `metrics.jsonl`, in order.
    pub metrics: Vec<MetricRecord>,
    /// What base and tuned were compared on, such as `test split: hamlet, macbeth, tempest`. May be empty.
    pub compared_on: String,
    /// Base against tuned on held-out documents.
    pub comparison: Option<Comparison>,
    /// The answers of both models to the same prompts.
    pub samples: Vec<SamplePair>,
    /// Counts of the data, a row for each split.
    pub data: Vec<SplitCounts>,
    /// The model that was trained.
    pub model: Option<ModelFacts>,
    /// The resolved configuration, as in `run.toml`.
    pub config: String,
    /// Versions, seeds and hashes that pin the run: name and value.
    pub provenance: Vec<(String, String)>,
}

/// The answers to one prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SamplePair {
    /// The prompt, as the user wrote it.
    pub prompt: String,
    /// The answer of the model before fine-tuning; `None` where only the tuned model was asked.
    pub base: Option<String>,
    /// The answer of the model after fine-tuning.
    pub tuned: String,
}

/// What one split of the data holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SplitCounts {
    /// `train`, `validation` or `test`.
    pub split: String,
    /// Rows (documents).
    pub num_rows: u64,
    /// Tokens.
    pub num_tokens: u64,
    /// Tokens that carry loss.
    pub num_trained_tokens: u64,
    /// Packed blocks; 0 where the split is not packed.
    pub num_blocks: u64,
    /// Rows that did not fit the context and were dropped, truncated or split.
    pub num_too_long: u64,
}

/// The model that was trained.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ModelFacts {
    /// Its name.
    pub name: String,
    /// Where it came from: folder, hub name with revision, package.
    pub origin: String,
    /// Parameters of the base model.
    pub num_parameters: u64,
    /// Parameters that were trained.
    pub num_trained_parameters: u64,
    /// `full`, or the adapter with rank, alpha and targets.
    pub method: String,
}

/// Writes the page as a whole or not at all.
///
/// # Errors
/// [`crate::Error::Input`] when the folder is missing; [`crate::Error::Io`].
pub fn write(path: &Path, report: &RunReport) -> Result<()> {
    write_atomically(path, render(report)?.as_bytes())
}

/// The page; nothing in it is taken from elsewhere when it is opened.
fn render(report: &RunReport) -> Result<String> {
    let RunReport { title, subtitle, warnings, metrics, samples, config, provenance, .. } = report;
    let title = if title.is_empty() { "Fine-tuning report" } else { title };
    let sampled = |record: &MetricRecord| match record {
        MetricRecord::Sample { step, prompt, text } => Some(json!([format::grouped(*step), prompt, text])),
        _ => None,
    };
    let note = |record: &MetricRecord| match record {
        MetricRecord::Note { step, message } => Some(json!([format!("step {}", format::grouped(*step)), message])),
        _ => None,
    };
    let values = json!({
        "title": title,
        "subtitle": subtitle,
        "warnings": warnings,
        "comparison": report.comparison.as_ref().map(|comparison| compared(comparison, &report.compared_on)),
        "facts": facts(metrics),
        "charts": charts(metrics),
        "samples": samples,
        "data": report.data.iter().map(counts).collect::<Vec<_>>(),
        "model": report.model.as_ref().map(model),
        "samples_while_training": metrics.iter().filter_map(sampled).collect::<Vec<_>>(),
        "notes": metrics.iter().filter_map(note).collect::<Vec<_>>(),
        "config": config,
        "provenance": provenance,
    });
    Ok(page::render(include_str!("report/report.html"), values)?)
}

fn verdict_class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::Undecided => "undecided",
        Verdict::TooFewDocuments => "too-few",
    }
}

/// Base against tuned: what was found, on what, and each measure before and after.
fn compared(comparison: &Comparison, on: &str) -> Value {
    let (base, tuned) = (&comparison.base, &comparison.tuned);
    let mut basis = if on.is_empty() { String::new() } else { format!("{on}: ") };
    let _ = write!(
        basis,
        "{} documents, {} scored tokens. Intervals: {:.0} %, bootstrap over documents",
        format::grouped(base.num_documents),
        format::grouped(base.num_tokens),
        100.0 * comparison.confidence,
    );
    if let Some(share) = comparison.share_better {
        let _ = write!(basis, "; the tuned model is better in {} of the resamples", format::percent(share));
    }
    let mut cards = vec![
        card("Loss", "nats per token", base.mean_loss, tuned.mean_loss, 3),
        card("Perplexity", "", base.perplexity, tuned.perplexity, 2),
    ];
    if let (Some(base), Some(tuned)) = (base.bits_per_byte, tuned.bits_per_byte) {
        cards.push(card("Bits per byte", "", base, tuned, 3));
    }
    json!({
        "class": verdict_class(comparison.verdict()),
        "verdict": comparison.to_string(),
        "basis": basis + ".",
        "cards": cards,
    })
}

/// One measure before and after; lower is better for all of them.
fn card(title: &str, unit: &str, base: Estimate, tuned: Estimate, decimals: usize) -> Value {
    let row = |label: &str, estimate: Estimate| {
        let interval = estimate.interval().map(|(low, high)| format!("{low:.decimals$} to {high:.decimals$}"));
        json!([label, format!("{:.decimals$}", estimate.value), interval])
    };
    let rows = [row("Base", base), row("Tuned", tuned)];
    json!({"title": title, "unit": unit, "change": format::change(base.value, tuned.value), "rows": rows})
}

/// The run in a few numbers: name, value, and a note where there is one.
fn facts(metrics: &[MetricRecord]) -> Vec<Value> {
    let mut facts = Vec::new();
    let fact = |name: &str, value: String| json!([name, value]);
    let (mut speeds, mut peak) = (Vec::new(), 0);
    let mut last = None;
    let mut best: Option<(u64, f64)> = None;
    for record in metrics {
        match *record {
            MetricRecord::Train { step, epoch, loss, num_tokens, tokens_per_s, elapsed_s, rss_bytes, .. } => {
                last = Some((step, epoch, loss, num_tokens, elapsed_s));
                peak = peak.max(rss_bytes);
                if tokens_per_s.is_finite() {
                    speeds.push(tokens_per_s);
                }
            }
            MetricRecord::Eval { step, eval_loss, .. } => {
                if eval_loss.is_finite() && best.is_none_or(|(_, lowest)| eval_loss < lowest) {
                    best = Some((step, eval_loss));
                }
            }
            MetricRecord::Sample { .. } | MetricRecord::Note { .. } => {}
        }
    }
    if let Some((step, epoch, loss, num_tokens, elapsed_s)) = last {
        facts.push(fact("Steps", format::grouped(step)));
        facts.push(fact("Epochs", format::significant(epoch, 3)));
        facts.push(fact("Trained tokens", format::compact(num_tokens as f64)));
        facts.push(fact("Last training loss", format::significant(loss, 4)));
        if elapsed_s.is_finite() {
            facts.push(fact("Training time", format::duration(elapsed_s)));
        }
    }
    if let Some((step, loss)) = best {
        let note = format!("(step {})", format::grouped(step));
        facts.push(json!(["Lowest validation loss", format::significant(loss, 4), note]));
    }
    speeds.sort_by(f64::total_cmp);
    if let Some(median) = speeds.get(speeds.len() / 2) {
        facts.push(fact("Median tokens/s", format::compact(*median)));
    }
    if peak > 0 {
        facts.push(fact("Peak memory", format::bytes(peak)));
    }
    facts
}

fn charts(metrics: &[MetricRecord]) -> String {
    let train = |value: fn(f64, f64, f64, f64) -> f64| -> Vec<(f64, f64)> {
        metrics
            .iter()
            .filter_map(|record| match *record {
                MetricRecord::Train { step, loss, learning_rate, grad_norm, tokens_per_s, .. } => {
                    Some((step as f64, value(loss, learning_rate, grad_norm, tokens_per_s)))
                }
                _ => None,
            })
            .collect()
    };
    let validation = metrics
        .iter()
        .filter_map(|record| match *record {
            MetricRecord::Eval { step, eval_loss, .. } => Some((step as f64, eval_loss)),
            _ => None,
        })
        .collect();
    let first = |name, noisy, points| Curve { name, colour: Colour::First, noisy, points };
    let figures = [
        Chart {
            title: "Loss",
            y_label: "nats per token",
            from_zero: false,
            curves: vec![
                first("training", true, train(|loss, _, _, _| loss)),
                Curve { name: "validation", colour: Colour::Second, noisy: false, points: validation },
            ],
        },
        Chart {
            title: "Learning rate",
            y_label: "learning rate",
            from_zero: true,
            curves: vec![first("learning rate", false, train(|_, learning_rate, _, _| learning_rate))],
        },
        Chart {
            title: "Gradient norm",
            y_label: "norm before clipping",
            from_zero: false,
            curves: vec![first("gradient norm", true, train(|_, _, grad_norm, _| grad_norm))],
        },
        Chart {
            title: "Speed",
            y_label: "tokens per second",
            from_zero: true,
            curves: vec![first("tokens per second", true, train(|_, _, _, tokens_per_s| tokens_per_s))],
        },
    ];
    figures.iter().filter_map(Chart::render).collect()
}

fn counts(split: &SplitCounts) -> Vec<String> {
    let share = match split.num_tokens {
        0 => "\u{2013}".to_owned(),
        all => format::percent(split.num_trained_tokens as f64 / all as f64),
    };
    vec![
        split.split.clone(),
        format::grouped(split.num_rows),
        format::grouped(split.num_tokens),
        format::grouped(split.num_trained_tokens),
        share,
        format::grouped(split.num_blocks),
        format::grouped(split.num_too_long),
    ]
}

fn model(model: &ModelFacts) -> Vec<(&'static str, String)> {
    let number = |count: u64| format!("{} ({})", format::grouped(count), format::compact(count as f64));
    let mut trained = number(model.num_trained_parameters);
    if model.num_parameters > 0 {
        let share = model.num_trained_parameters as f64 / model.num_parameters as f64;
        let _ = write!(trained, ", {} of the model", format::percent(share));
    }
    let mut rows = vec![
        ("Model", model.name.clone()),
        ("Origin", model.origin.clone()),
        ("Method", model.method.clone()),
        ("Parameters", number(model.num_parameters)),
        ("Trained parameters", trained),
    ];
    rows.retain(|(_, value)| !value.is_empty());
    rows
}

#[cfg(test)]
mod tests;
