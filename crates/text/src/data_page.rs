//! `data.html`: what was prepared, on one page.
mod histogram;

use crate::{
    PreparedSplit, PreviewDocument, Reason, Report, Result, Split, SplitReport, Tokenizer, atomic,
    page::{self, grouped, percent},
    prepare::Lengths,
    preview,
    report::FileReport,
};
use serde_json::{Value, json};
use std::{io::Write as _, path::Path};

/// Name of the page inside a prepared folder.
pub const PAGE: &str = "data.html";

/// Rows of each split that are shown with their masks.
const SHOWN_ROWS: usize = 4;
/// Tokens of a row that are shown.
const SHOWN_TOKENS: usize = 1500;
/// Values and groups that are shown by name.
const SHOWN_VALUES: usize = 30;

/// Writes the page of the prepared `folder` into it, as a whole or not at all. `title` is its heading.
///
/// # Errors
/// Damaged data, or a folder that cannot be written.
pub fn write_page(folder: &Path, title: &str, report: &Report, tokenizer: &Tokenizer) -> Result<()> {
    let mut samples = Vec::new();
    for split in Split::ALL {
        if report.split(split).blocks > 0 {
            let documents = preview(&PreparedSplit::open(folder, split)?, SHOWN_ROWS, tokenizer)?;
            samples.extend(documents.iter().map(|document| sample(split, document)));
        }
    }
    let page = render(title, report, &samples)?;
    atomic::write_file(&folder.join(PAGE), |w| w.write_all(page.as_bytes()))
}

fn render(title: &str, report: &Report, samples: &[Value]) -> Result<String> {
    let values = json!({
        "title": title,
        "report": report,
        "remarks": remarks(report),
        "splits": held(report).map(|(split, part)| described(split, part, report)).collect::<Vec<_>>(),
        "split_rows": numbers(report, |part| {
            let counts = &part.counts;
            [counts.rows, part.documents, part.blocks, part.tokens, part.trained_tokens, counts.longest_row].to_vec()
        }),
        "limits": limits(report),
        "shortened": numbers(report, |part| {
            let c = &part.counts;
            let all = [c.split_rows, c.truncated_rows, c.dropped_rows, c.tokens_lost, c.trained_tokens_lost];
            if c.overlong_rows > 0 { [&[c.overlong_rows][..], &all].concat() } else { Vec::new() }
        }),
        "shown_values": SHOWN_VALUES,
        "groups": held(report).map(|(split, part)| groups(split, part)).collect::<Vec<_>>(),
        "cleaned": cleaned(report),
        "files": files(report),
        "samples": samples,
    });
    page::render(include_str!("page/data.html"), values)
}

/// The splits that hold something.
fn held(report: &Report) -> impl Iterator<Item = (Split, &SplitReport)> {
    Split::ALL.into_iter().map(|split| (split, report.split(split))).filter(|(_, part)| part.counts.rows > 0)
}

/// A row of a table for each split: its name and numbers; none where there are no numbers.
fn numbers(report: &Report, of: impl Fn(&SplitReport) -> Vec<usize>) -> Vec<Vec<String>> {
    held(report)
        .map(|(split, part)| (split, of(part)))
        .filter(|(_, numbers)| !numbers.is_empty())
        .map(|(split, numbers)| [vec![split.name().to_owned()], numbers.into_iter().map(grouped).collect()].concat())
        .collect()
}

/// A split with what the page says of its lengths and values.
fn described(split: Split, part: &SplitReport, report: &Report) -> Value {
    let longest = part.counts.longest_row;
    let values: Vec<(String, usize)> = shown_values(part)
        .into_iter()
        .map(|(value, rows)| {
            // Blanks are shown as they would be written.
            let shown = if value.trim().is_empty() { format!("{value:?}") } else { value.trim().to_owned() };
            (shown, rows)
        })
        .collect();
    json!({
        "name": split.name(),
        "part": part,
        "half": part.lengths.quantile(0.5).min(longest),
        "nine_tenths": part.lengths.quantile(0.9).min(longest),
        "histogram": histogram::histogram(&part.lengths, report.options.max_length),
        "num_valued": values.iter().map(|(_, rows)| rows).sum::<usize>(),
        "values": values,
    })
}

/// What the reader should know, the worst first.
fn remarks(report: &Report) -> Vec<String> {
    let mut remarks = Vec::new();
    for (split, part) in held(report) {
        let counts = &part.counts;
        let all = part.trained_tokens + counts.trained_tokens_lost;
        if counts.trained_tokens_lost * 20 > all {
            remarks.push(format!(
                "{split}: {} of the tokens to train on are lost, because rows are longer than {} tokens.",
                percent(counts.trained_tokens_lost, all),
                grouped(report.options.max_length)
            ));
        }
        if counts.turns_without_end > 0 {
            remarks.push(format!(
                "{split}: the chat template ends {} assistant turns without a special token, so that a model does not learn \
                 where to stop.",
                grouped(counts.turns_without_end)
            ));
        }
    }
    let values = shown_values(&report.train);
    let most = values.iter().max_by_key(|(_, rows)| *rows);
    let least = values.iter().min_by_key(|(_, rows)| *rows);
    if let (Some((most, many)), Some((least, few))) = (most, least)
        && *many > 10 * few
    {
        remarks.push(format!(
            "{} has {} rows to train on and {} only {}; a model learns little of what is rare.",
            most,
            grouped(*many),
            least,
            grouped(*few)
        ));
    }
    let leaks: usize = [Reason::Leak, Reason::NearLeak].iter().filter_map(|r| report.clean.removed.get(r)).sum();
    if leaks > 0 {
        remarks.push(format!("{} rows to train on were held out too, and were removed.", grouped(leaks)));
    }
    if report.clean.kept_duplicates > 0 {
        remarks.push(format!(
            "{} rows say what an earlier row of their split says, and stay: data.clean.duplicates = \"exact\" removes them.",
            grouped(report.clean.kept_duplicates)
        ));
    }
    if report.rejected_rows > 0 {
        let rows = grouped(report.rejected_rows);
        remarks.push(format!("{rows} rows could not be used; rejects.jsonl has each with its place and reason."));
    }
    remarks
}

/// What other values of `max_length` would cost.
fn limits(report: &Report) -> Vec<Vec<String>> {
    let mut lengths = Lengths::default();
    for (_, part) in held(report) {
        lengths.merge(&part.lengths);
    }
    let chosen = report.options.max_length;
    let longest = held(report).map(|(_, part)| part.counts.longest_row).max().unwrap_or(0);
    let mut limits: Vec<usize> = (5..30).map(|power| 1 << power).collect();
    limits
        .retain(|limit| *limit < longest && (lengths.beyond(*limit).0 * 1000 > lengths.rows() || *limit >= chosen / 4));
    let whole = longest.max(1).next_power_of_two();
    limits.extend([chosen, whole]);
    limits.sort_unstable();
    limits.dedup();
    // The last nine: nobody cuts rows to a few words.
    let limits = &limits[limits.len().saturating_sub(9)..];
    limits
        .iter()
        .map(|limit| {
            let (rows, tokens) = lengths.beyond(*limit);
            let mark = if *limit == chosen { " (chosen)" } else { "" };
            let about = if limit.is_power_of_two() { "" } else { "about " };
            vec![
                format!("{}{mark}", grouped(*limit)),
                format!("{about}{}", grouped(rows)),
                format!("{about}{}", percent(rows, lengths.rows())),
                format!("{about}{}", grouped(tokens)),
                format!("{about}{}", percent(tokens, lengths.tokens())),
            ]
        })
        .collect()
}

/// The values of a split, the most common first: those that it is stratified by, or the few different completions.
fn shown_values(part: &SplitReport) -> Vec<(&str, usize)> {
    let values = if part.values.is_empty() { part.completions.as_ref() } else { Some(&part.values) };
    let mut values: Vec<_> = values.into_iter().flatten().map(|(value, rows)| (value.as_str(), *rows)).collect();
    values.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    values
}

fn groups(split: Split, part: &SplitReport) -> Vec<String> {
    let mean = part.counts.rows as f64 / part.groups.max(1) as f64;
    let share = percent(part.largest_group, part.counts.rows);
    vec![split.name().into(), grouped(part.groups), format!("{mean:.1}"), grouped(part.largest_group), share]
}

/// What cleaning found: what, in how many rows, and what became of them.
fn cleaned(report: &Report) -> Vec<Vec<String>> {
    let clean = &report.clean;
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (reason, count) in &clean.removed {
        rows.push(vec![format!("rows {}", reason.words()), grouped(*count), "removed".into()]);
    }
    if clean.kept_duplicates > 0 {
        rows.push(vec!["rows that say what an earlier row says".into(), grouped(clean.kept_duplicates), "kept".into()]);
    }
    for (step, count) in &clean.changed {
        rows.push(vec![format!("rows {}", step.words()), grouped(*count), "changed".into()]);
    }
    rows
}

fn files(report: &Report) -> Vec<Vec<String>> {
    let row = |file: &FileReport| {
        let keys: Vec<_> = file.keys.keys().map(String::as_str).collect();
        vec![
            file.file.clone(),
            file.format.map_or("no usable rows", |format| format.name()).to_owned(),
            file.split.map_or("by row", Split::name).to_owned(),
            grouped(file.rows),
            grouped(file.bad_rows),
            keys.join(", "),
        ]
    };
    report.files.iter().map(row).collect()
}

/// A document with its mask.
fn sample(split: Split, document: &PreviewDocument) -> Value {
    let tokens: Vec<_> =
        document.tokens.iter().take(SHOWN_TOKENS).map(|token| (token.trained, token.text.as_str())).collect();
    json!({
        "split": split.name(),
        "source": document.source.to_string(),
        "num_tokens": document.tokens.len(),
        "num_trained": document.tokens.iter().filter(|token| token.trained).count(),
        "more": document.tokens.len() - tokens.len(),
        "tokens": tokens,
    })
}

#[cfg(test)]
mod tests;
