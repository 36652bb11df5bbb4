//! `data.html`: what was prepared, on one page that loads nothing, runs no script and follows the reader's light or dark
//! theme.
mod html;

use crate::{
    PreparedSplit, PreviewDocument, Reason, Report, Result, Split, SplitReport, Tokenizer, prepare::Lengths, preview,
};
pub use html::escape;
use html::{bar, bars, percent, table};
use std::{fmt::Write as _, path::Path};
use tunesmith_files::atomic;
use tunesmith_files::table::grouped;

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
            samples.push((split, preview(&PreparedSplit::open(folder, split)?, SHOWN_ROWS, tokenizer)?));
        }
    }
    let page = render(title, report, &samples);
    atomic::write(&folder.join(PAGE), page)
}

/// The page. All text is escaped.
fn render(title: &str, report: &Report, samples: &[(Split, Vec<PreviewDocument>)]) -> String {
    let title = escape(title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         img-src data:\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{}</style>\n</head>\n\
         <body>\n<main>\n<h1>{title}</h1>\n",
        include_str!("data_page/style.css")
    );
    for part in [
        facts(report),
        remarks(report),
        splits(report),
        lengths(report),
        truncation(report),
        balance(report),
        cleaning(report),
        files(report),
        masks(samples),
    ] {
        page.push_str(&part);
    }
    let version = env!("CARGO_PKG_VERSION");
    page.push_str(&format!("<footer>Written by tunesmith {version}.</footer>\n</main>\n</body>\n</html>\n"));
    page
}

/// The splits that hold something.
fn held(report: &Report) -> impl Iterator<Item = (Split, &SplitReport)> {
    Split::ALL.into_iter().map(|split| (split, report.split(split))).filter(|(_, part)| part.counts.rows > 0)
}

fn facts(report: &Report) -> String {
    let sum = |of: fn(&SplitReport) -> usize| held(report).map(|(_, part)| of(part)).sum::<usize>();
    let (tokens, trained) = (sum(|p| p.tokens), sum(|p| p.trained_tokens));
    let room = sum(|p| p.blocks) * report.options.max_length;
    let waste = if report.options.packing { percent(room.saturating_sub(tokens), room) } else { "not packed".into() };
    let facts = [
        ("rows", grouped(sum(|p| p.counts.rows))),
        ("tokens", grouped(tokens)),
        ("of them trained", percent(trained, tokens)),
        ("blocks", format!("{} of {}", grouped(sum(|p| p.blocks)), grouped(report.options.max_length))),
        ("room left in blocks", waste),
    ];
    let facts = facts.map(|(name, value)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>"));
    format!("<dl class=\"facts\">{}</dl>\n", facts.concat())
}

/// What the reader should know, the worst first.
fn remarks(report: &Report) -> String {
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
    let values = &shown_values(&report.train).unwrap_or_default();
    let most = values.iter().max_by_key(|(_, rows)| *rows);
    let least = values.iter().min_by_key(|(_, rows)| *rows);
    if let (Some((most, many)), Some((least, few))) = (most, least)
        && *many > 10 * few
    {
        remarks.push(format!(
            "{} has {} rows to train on and {} only {}; a model learns little of what is rare.",
            escape(most),
            grouped(*many),
            escape(least),
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
    if remarks.is_empty() {
        return String::new();
    }
    let items: String = remarks.iter().map(|remark| format!("<li>{remark}</li>")).collect();
    format!("<ul class=\"remarks\">{items}</ul>\n")
}

fn splits(report: &Report) -> String {
    let rows: Vec<Vec<String>> = held(report)
        .map(|(split, part)| {
            let counts = &part.counts;
            [counts.rows, part.documents, part.blocks, part.tokens, part.trained_tokens, counts.longest_row]
                .into_iter()
                .fold(vec![split.name().to_owned()], |mut row, n| {
                    row.push(grouped(n));
                    row
                })
        })
        .collect();
    let header = ["split", "rows", "documents", "blocks", "tokens", "trained", "longest row"];
    let most = held(report).map(|(_, part)| part.tokens).max().unwrap_or(0);
    let mut tokens = String::new();
    for (split, part) in held(report) {
        let label = format!("{} tokens, {} trained", grouped(part.tokens), percent(part.trained_tokens, part.tokens));
        tokens.push_str(&bar(
            split.name(),
            &label,
            &[(part.trained_tokens, "first"), (part.tokens - part.trained_tokens, "rest")],
            most,
        ));
    }
    format!(
        "<h2>Splits</h2>\n{}<div class=\"card\"><p class=\"keys\"><span class=\"key first\">trained tokens</span>\
         <span class=\"key rest\">not trained</span></p>{tokens}</div>\n",
        table(&header, &rows)
    )
}

fn lengths(report: &Report) -> String {
    let mut page = String::from("<h2>Lengths of rows</h2>\n<div class=\"charts\">\n");
    for (split, part) in held(report) {
        let lengths = &part.lengths;
        let words = format!(
            "half of the rows have up to {} tokens, nine of ten up to {}, the longest has {}",
            grouped(lengths.quantile(0.5).min(part.counts.longest_row)),
            grouped(lengths.quantile(0.9).min(part.counts.longest_row)),
            grouped(part.counts.longest_row)
        );
        let _ = writeln!(
            page,
            "<figure class=\"card\"><figcaption><h3>{split}</h3><p class=\"soft\">{words}</p></figcaption>{}</figure>",
            html::histogram(lengths, report.options.max_length)
        );
    }
    page.push_str("</div>\n");
    page
}

/// What other values of `max_length` would cost.
fn truncation(report: &Report) -> String {
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
    let rows: Vec<Vec<String>> = limits
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
        .collect();
    let mut page = format!(
        "<h2>What a shorter max_length costs</h2>\n<p class=\"soft\">Rows longer than a limit, and tokens beyond it, which are lost where \
         rows are truncated (those of plain text begin another document, unless data.overlong says otherwise).</p>\n{}",
        table(&["max_length", "longer rows", "of all", "tokens beyond", "of all"], &rows)
    );
    let cut: Vec<Vec<String>> = held(report)
        .filter(|(_, part)| part.counts.overlong_rows > 0)
        .map(|(split, part)| {
            let c = &part.counts;
            let numbers =
                [c.overlong_rows, c.split_rows, c.truncated_rows, c.dropped_rows, c.tokens_lost, c.trained_tokens_lost];
            std::iter::once(split.name().to_owned()).chain(numbers.map(grouped)).collect()
        })
        .collect();
    if !cut.is_empty() {
        page.push_str("<p class=\"soft after\">What was done here:</p>\n");
        let header = ["split", "too long", "split up", "truncated", "dropped", "tokens lost", "trained tokens lost"];
        page.push_str(&table(&header, &cut));
    }
    page
}

/// The values of a split: those that it is stratified by, or the few different completions.
fn shown_values(part: &SplitReport) -> Option<Vec<(&str, usize)>> {
    let values = if part.values.is_empty() { part.completions.as_ref()? } else { &part.values };
    let mut values: Vec<(&str, usize)> = values.iter().map(|(value, rows)| (value.as_str(), *rows)).collect();
    values.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    (!values.is_empty()).then_some(values)
}

fn balance(report: &Report) -> String {
    let mut page = String::new();
    let by = match &report.options.stratify_by {
        Some(key) => format!("by {}", escape(key)),
        None => "by completion".into(),
    };
    for (split, part) in held(report) {
        let Some(values) = shown_values(part) else { continue };
        let shown = &values[..values.len().min(SHOWN_VALUES)];
        let more = values.len() - shown.len();
        let more = if more > 0 { format!("<p class=\"soft\">and {more} more</p>") } else { String::new() };
        let all: usize = values.iter().map(|(_, rows)| rows).sum();
        let _ = writeln!(
            page,
            "<figure class=\"card\"><figcaption><h3>{split}</h3><p class=\"soft\">rows {by}</p></figcaption>{}{more}</figure>",
            bars(shown, all)
        );
    }
    if !page.is_empty() {
        page = format!("<h2>Labels</h2>\n<div class=\"charts\">\n{page}</div>\n");
    }
    if let Some(key) = &report.options.group_by {
        let rows: Vec<Vec<String>> = held(report)
            .map(|(split, part)| {
                let mean = part.counts.rows as f64 / part.groups.max(1) as f64;
                vec![
                    split.name().to_owned(),
                    grouped(part.groups),
                    format!("{mean:.1}"),
                    grouped(part.largest_group),
                    percent(part.largest_group, part.counts.rows),
                ]
            })
            .collect();
        let header = ["split", "groups", "rows in each", "in the largest", "of the split"];
        let _ = write!(
            page,
            "<h2>Groups</h2>\n<p class=\"soft\">By {}; no group is in two splits.</p>\n{}",
            escape(key),
            table(&header, &rows)
        );
    }
    page
}

fn cleaning(report: &Report) -> String {
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
    let looked = match clean.compared {
        true => "Rows were compared with each other.",
        false => "Rows were not compared with each other: nothing is held out, and data.clean.duplicates is \"keep\".",
    };
    let found = if rows.is_empty() { " Nothing was found, and nothing was changed." } else { "" };
    let mut page = format!("<h2>Duplicates and cleaning</h2>\n<p class=\"soft\">{looked}{found}</p>\n");
    if !rows.is_empty() {
        page.push_str(&table(&["what", "rows", "they were"], &rows));
    }
    page
}

fn files(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .files
        .iter()
        .map(|file| {
            let keys: Vec<_> = file.keys.keys().map(|key| escape(key)).collect();
            vec![
                escape(&file.file),
                file.format.map_or("no usable rows", |format| format.name()).to_owned(),
                file.split.map_or("by row", Split::name).to_owned(),
                grouped(file.rows),
                grouped(file.bad_rows),
                keys.join(", "),
            ]
        })
        .collect();
    format!(
        "<h2>Files</h2>\n{}",
        html::wide_table(&["file", "format", "split", "rows", "unusable", "keys"], &rows, 3..5)
    )
}

fn masks(samples: &[(Split, Vec<PreviewDocument>)]) -> String {
    let mut page = String::from(
        "<h2>Rows as they are trained on</h2>\n<p class=\"keys\"><span class=\"mask\"><b>trained</b></span> \
         <span class=\"mask\"><i>not trained</i></span> <span class=\"soft\">every second token is a shade darker; ↵ is a \
         line end</span></p>\n",
    );
    for (split, documents) in samples {
        for document in documents {
            let trained = document.tokens.iter().filter(|token| token.trained).count();
            let place = escape(&document.source.to_string());
            let _ = write!(
                page,
                "<figure class=\"card\"><figcaption><h3>{split}</h3><p class=\"soft\">{place}: {} tokens, {} trained</p></figcaption>\
                 <div class=\"mask\" dir=\"auto\">",
                grouped(document.tokens.len()),
                grouped(trained)
            );
            for (at, token) in document.tokens.iter().take(SHOWN_TOKENS).enumerate() {
                let tag = if token.trained { 'b' } else { 'i' };
                let odd = if at % 2 == 1 { " class=\"o\"" } else { "" };
                let text = escape(&html::visible(&token.text));
                let _ = write!(page, "<{tag}{odd}>{text}</{tag}>");
            }
            let more = document.tokens.len().saturating_sub(SHOWN_TOKENS);
            if more > 0 {
                let _ = write!(page, "<span class=\"soft\"> … {} more tokens</span>", grouped(more));
            }
            page.push_str("</div></figure>\n");
        }
    }
    page
}

#[cfg(test)]
mod tests;
