//! `report.html`: one self-contained page about a run. It loads nothing, runs no script, follows the reader's light or
//! dark theme, and reads on a phone and on paper.

use std::{fmt::Write as _, path::Path};
use tunesmith_files::{atomic, bytes::format_bytes};

use serde::Serialize;

use crate::{
    Result,
    metrics::MetricRecord,
    statistics::{Comparison, Estimate, Verdict},
};

mod chart;
mod format;

use chart::{Chart, Colour, Curve};
use format::escape;

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
    atomic::write(path, render(report))
}

/// The page. All text is escaped; nothing in it is taken from elsewhere when it is opened.
pub fn render(report: &RunReport) -> String {
    let title = escape(if report.title.is_empty() { "Fine-tuning report" } else { &report.title });
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         img-src data:\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{}</style>\n</head>\n\
         <body>\n<main>\n<header><h1>{title}</h1>",
        include_str!("report/style.css")
    );
    if !report.subtitle.is_empty() {
        page.push_str(&format!("<p class=\"soft\">{}</p>", escape(&report.subtitle)));
    }
    page.push_str("</header>\n");
    for part in [
        warnings(&report.warnings),
        summary(report),
        charts(&report.metrics),
        samples(&report.samples),
        data(&report.data),
        model(report.model.as_ref()),
        samples_while_training(&report.metrics),
        notes(&report.metrics),
        config(&report.config),
        provenance(&report.provenance),
    ] {
        page.push_str(&part);
    }
    let version = env!("CARGO_PKG_VERSION");
    page.push_str(&format!("<footer>Written by tunesmith {version}.</footer>\n</main>\n</body>\n</html>\n"));
    page
}

/// Text of the user or of a model: every line end and space is shown, and its direction is its own.
fn verbatim(text: &str) -> String {
    if text.is_empty() {
        return "<div class=\"text soft\">(empty)</div>".into();
    }
    format!("<div class=\"text\" dir=\"auto\">{}</div>", escape(text))
}

fn warnings(warnings: &[String]) -> String {
    if warnings.is_empty() {
        return String::new();
    }
    let items: String = warnings.iter().map(|warning| format!("<li>{}</li>", escape(warning))).collect();
    format!("<ul class=\"warnings\" aria-label=\"Warnings\">{items}</ul>\n")
}

fn verdict_class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::Undecided => "undecided",
        Verdict::TooFewDocuments => "too-few",
    }
}

/// The comparison, if there is one, and the run in a few numbers.
fn summary(report: &RunReport) -> String {
    let mut html = String::new();
    if let Some(comparison) = &report.comparison {
        let class = verdict_class(comparison.verdict());
        let (base, tuned) = (&comparison.base, &comparison.tuned);
        let on = if report.compared_on.is_empty() { String::new() } else { format!("{}: ", report.compared_on) };
        let _ = write!(
            html,
            "<section aria-label=\"Base against tuned\"><div class=\"verdict {class}\"><p>{}</p>\
             <p class=\"soft\">{}{} documents, {} scored tokens. Intervals: {:.0} %, bootstrap over documents{}.</p></div>\
             <div class=\"cards\">",
            escape(&comparison.to_string()),
            escape(&on),
            format::grouped(base.num_documents),
            format::grouped(base.num_tokens),
            100.0 * comparison.confidence,
            comparison.share_better.map_or(String::new(), |share| {
                format!("; the tuned model is better in {} of the resamples", format::percent(share))
            }),
        );
        html.push_str(&card("Loss", "nats per token", class, base.mean_loss, tuned.mean_loss, 3));
        html.push_str(&card("Perplexity", "", class, base.perplexity, tuned.perplexity, 2));
        if let (Some(base), Some(tuned)) = (base.bits_per_byte, tuned.bits_per_byte) {
            html.push_str(&card("Bits per byte", "", class, base, tuned, 3));
        }
        html.push_str("</div></section>\n");
    }
    let facts: String = run_facts(&report.metrics)
        .into_iter()
        .map(|(name, value)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>"))
        .collect();
    match (facts.is_empty(), report.comparison.is_none()) {
        (false, _) => html + &format!("<dl class=\"facts\">{facts}</dl>\n"),
        (true, true) => html + "<p class=\"soft\">Nothing has been measured in this run yet.</p>\n",
        (true, false) => html,
    }
}

/// One measure before and after; lower is better for all of them.
fn card(title: &str, unit: &str, class: &str, base: Estimate, tuned: Estimate, decimals: usize) -> String {
    let value = |label: &str, estimate: Estimate| {
        let interval = estimate
            .interval()
            .map_or(String::new(), |(low, high)| format!("<small>{low:.decimals$} to {high:.decimals$}</small>"));
        format!("<dt>{label}</dt><dd><b>{:.decimals$}</b>{interval}</dd>", estimate.value)
    };
    let unit = if unit.is_empty() { String::new() } else { format!(" <span class=\"soft\">({unit})</span>") };
    format!(
        "<div class=\"card\"><div class=\"top\"><h3>{title}{unit}</h3><span class=\"chip {class}\">{}</span></div>\
         <dl>{}{}</dl></div>",
        format::change(base.value, tuned.value),
        value("Base", base),
        value("Tuned", tuned),
    )
}

fn run_facts(metrics: &[MetricRecord]) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
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
        facts.push(("Steps", format::grouped(step)));
        facts.push(("Epochs", format::significant(epoch, 3)));
        facts.push(("Trained tokens", format::compact(num_tokens as f64)));
        facts.push(("Last training loss", format::significant(loss, 4)));
        if elapsed_s.is_finite() {
            facts.push(("Training time", format::duration(elapsed_s)));
        }
    }
    if let Some((step, loss)) = best {
        let text =
            format!("{} <span class=\"soft\">(step {})</span>", format::significant(loss, 4), format::grouped(step));
        facts.push(("Lowest validation loss", text));
    }
    speeds.sort_by(f64::total_cmp);
    if let Some(median) = speeds.get(speeds.len() / 2) {
        facts.push(("Median tokens/s", format::compact(*median)));
    }
    if peak > 0 {
        facts.push(("Peak memory", format_bytes(peak)));
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
    let html: String = figures.iter().filter_map(Chart::render).collect();
    if html.is_empty() { html } else { format!("<h2>Training</h2>\n<div class=\"charts\">{html}</div>\n") }
}

fn samples(samples: &[SamplePair]) -> String {
    if samples.is_empty() {
        return String::new();
    }
    let mut html = String::from("<h2>Samples</h2>\n");
    for sample in samples {
        let prompt = format!("<div class=\"prompt\"><p class=\"label\">Prompt</p>{}</div>", verbatim(&sample.prompt));
        let tuned = format!("<div><p class=\"label tuned\">Tuned</p>{}</div>", verbatim(&sample.tuned));
        let answers = match &sample.base {
            Some(base) => {
                format!("<div class=\"pair\"><div><p class=\"label\">Base</p>{}</div>{tuned}</div>", verbatim(base))
            }
            None => format!("<div class=\"pair alone\">{tuned}</div>"),
        };
        let _ = write!(html, "<article class=\"sample\">{prompt}{answers}</article>");
    }
    html.push('\n');
    html
}

fn data(splits: &[SplitCounts]) -> String {
    if splits.is_empty() {
        return String::new();
    }
    let cell = |number: u64| format!("<td class=\"number\">{}</td>", format::grouped(number));
    let rows: String = splits
        .iter()
        .map(|split| {
            let share = if split.num_tokens == 0 {
                "\u{2013}".to_owned()
            } else {
                format::percent(split.num_trained_tokens as f64 / split.num_tokens as f64)
            };
            format!(
                "<tr><th scope=\"row\">{}</th>{}{}{}<td class=\"number\">{share}</td>{}{}</tr>",
                escape(&split.split),
                cell(split.num_rows),
                cell(split.num_tokens),
                cell(split.num_trained_tokens),
                cell(split.num_blocks),
                cell(split.num_too_long),
            )
        })
        .collect();
    let heads: String = ["Rows", "Tokens", "With loss", "Share", "Blocks", "Too long"]
        .map(|head| format!("<th scope=\"col\" class=\"number\">{head}</th>"))
        .concat();
    format!(
        "<h2>Data</h2>\n<div class=\"scroll\"><table><thead><tr><th scope=\"col\">Split</th>{heads}</tr></thead>\
         <tbody>{rows}</tbody></table></div>\n"
    )
}

/// A table of names and values; values are escaped here.
fn pairs<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: String = rows
        .into_iter()
        .map(|(name, value)| format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(&value)))
        .collect();
    format!("<div class=\"scroll\"><table class=\"pairs\"><tbody>{rows}</tbody></table></div>\n")
}

fn model(model: Option<&ModelFacts>) -> String {
    let Some(model) = model else { return String::new() };
    let number = |count: u64| format!("{} ({})", format::grouped(count), format::compact(count as f64));
    let mut rows = vec![
        ("Model", model.name.clone()),
        ("Origin", model.origin.clone()),
        ("Method", model.method.clone()),
        ("Parameters", number(model.num_parameters)),
    ];
    let mut trained = number(model.num_trained_parameters);
    if model.num_parameters > 0 {
        let share = model.num_trained_parameters as f64 / model.num_parameters as f64;
        let _ = write!(trained, ", {} of the model", format::percent(share));
    }
    rows.push(("Trained parameters", trained));
    rows.retain(|(_, value)| !value.is_empty());
    format!("<h2>Model</h2>\n{}", pairs(rows))
}

fn samples_while_training(metrics: &[MetricRecord]) -> String {
    let mut html = String::new();
    for record in metrics {
        if let MetricRecord::Sample { step, prompt, text } = record {
            let _ = write!(
                html,
                "<article class=\"sample\"><div class=\"prompt\"><p class=\"label\">Step {}</p>{}</div>\
                 <div class=\"pair alone\"><div>{}</div></div></article>",
                format::grouped(*step),
                verbatim(prompt),
                verbatim(text)
            );
        }
    }
    folded("Samples while training", &html)
}

fn notes(metrics: &[MetricRecord]) -> String {
    let rows: Vec<(String, String)> = metrics
        .iter()
        .filter_map(|record| match record {
            MetricRecord::Note { step, message } => Some((format!("step {}", format::grouped(*step)), message.clone())),
            _ => None,
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    folded("Events", &pairs(rows.iter().map(|(step, message)| (step.as_str(), message.clone()))))
}

fn config(config: &str) -> String {
    if config.trim().is_empty() {
        return String::new();
    }
    folded("Resolved configuration", &format!("<pre><code>{}</code></pre>", escape(config)))
}

fn provenance(rows: &[(String, String)]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    folded("Versions and hashes", &pairs(rows.iter().map(|(name, value)| (name.as_str(), value.clone()))))
}

/// A part that opens on demand; nothing of no content.
fn folded(title: &str, html: &str) -> String {
    if html.is_empty() { String::new() } else { format!("<details><summary>{title}</summary>{html}</details>\n") }
}

#[cfg(test)]
mod tests;
