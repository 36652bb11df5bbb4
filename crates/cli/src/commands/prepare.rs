//! `tunesmith prepare`, and the preparation that every command with data goes through.

use crate::args::PrepareArgs;
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::{self, Settings};
use crate::terminal;
use indicatif::ProgressBar;
use std::path::Path;
use tunesmith_text::{
    Balance, Balanced, PAGE, Preference, PrepareOptions, PrepareProgress, PreparedSplit, PreviewToken, Report,
    SourceReport, Split, preview,
};
use tunesmith_train::config::Config;

pub(crate) fn run(args: &PrepareArgs, settings: &Settings) -> Result<()> {
    let mut overrides = Vec::new();
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    if let Some(model) = &args.model {
        overrides.push(format!("model.source={}", quote(model)));
    }
    if !args.data.is_empty() {
        let list: Vec<String> = args.data.iter().map(|d| quote(d)).collect();
        overrides.push(format!("data.train=[{}]", list.join(", ")));
    }
    overrides.extend(args.set.iter().cloned());
    let config = match &args.config {
        Some(file) => load_config(file, &overrides)?,
        None => Config::parse("", "the command line", &overrides)?,
    };
    let opened = load::open_configured(&config.model, settings)?;
    let out = args.out.clone().unwrap_or_else(|| config.output_dir.join("data"));
    let report = prepare(&config.data, &opened, &out, settings)?;
    if let Some(n) = args.preview {
        show_preview(&out, &opened, n)?;
    }
    print!("{}", schema(&report));
    print!("{}", describe(&report));
    println!("{} {}", if report.reused { "already prepared:" } else { "written to" }, out.display());
    println!("look at it: {}", out.join(PAGE).display());
    Ok(())
}

/// Reads a configuration file.
pub(crate) fn load_config(file: &Path, overrides: &[String]) -> Result<Config> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?;
    Ok(Config::parse(&text, &file.display().to_string(), overrides)?)
}

/// Fetches what the data options name by `hf:`, `s3://` and the like, and puts the local paths in their place.
pub(crate) fn local(options: &PrepareOptions, settings: &Settings) -> Result<PrepareOptions> {
    let mut options = options.clone();
    for (split, places) in options.places_mut() {
        for place in std::mem::take(places) {
            if source::is_remote(&place) {
                let found = load::data_files(&place, split.name(), settings)?;
                places.extend(found.iter().map(|path| path.display().to_string()));
            } else {
                places.push(place);
            }
        }
    }
    Ok(options)
}

/// Prepares the data of `options` in `out`, with a bar.
pub(crate) fn prepare(options: &PrepareOptions, opened: &Opened, out: &Path, settings: &Settings) -> Result<Report> {
    let context = opened.checkpoint.config().max_position_embeddings;
    if options.max_length > context {
        return Err(Error::Input(format!(
            "data.max_length = {} is more than the context of {}, {context} tokens; set it to at most {context}",
            options.max_length, opened.spec
        )));
    }
    let options = local(options, settings)?;
    let bar = terminal::bytes_bar("reading data");
    let report = tunesmith_text::prepare(out, &options, &opened.tokenizer, opened.template.as_ref(), &mut |progress| {
        show(&bar, progress);
    });
    bar.finish_and_clear();
    let report = report?;
    if !report.reused || !out.join(PAGE).exists() {
        tunesmith_text::write_page(out, &format!("Data for {}", opened.spec), &report, &opened.tokenizer)?;
    }
    Ok(report)
}

/// Shows on `bar` how far the preparation is.
pub(crate) fn show(bar: &ProgressBar, progress: PrepareProgress) {
    match progress {
        PrepareProgress::Reading { files_done, files } => {
            bar.set_message(format!("reading data: file {files_done} of {files}"));
        }
        PrepareProgress::Scanning { bytes_done, bytes } => {
            bar.set_message("looking at all rows");
            bar.set_length(bytes);
            bar.set_position(bytes_done);
        }
        PrepareProgress::Tokenizing { bytes_done, bytes, tokens } => {
            bar.set_message(format!("tokenising: {} tokens", terminal::count(tokens)));
            bar.set_length(bytes);
            bar.set_position(bytes_done);
        }
        PrepareProgress::Learning { bytes_done, bytes } => {
            let done = bytes_done == bytes;
            bar.set_message(if done { "joining pairs of bytes" } else { "counting words" });
            bar.set_length(bytes);
            bar.set_position(bytes_done);
            if done {
                // No word comes from the library until it is finished.
                bar.enable_steady_tick(std::time::Duration::from_millis(200));
            }
        }
    }
}

fn number(n: usize) -> String {
    terminal::count(n as u64)
}

/// What the files hold: format, rows and keys.
fn schema(report: &Report) -> String {
    let mut text = String::new();
    for file in &report.files {
        let format = file.format.map_or("no usable rows", |format| format.name());
        text.push_str(&format!("{}: {} rows, {format}", file.file, number(file.rows)));
        if file.bad_rows > 0 {
            text.push_str(&format!(", {} cannot be used", number(file.bad_rows)));
        }
        text.push('\n');
        for (key, known) in &file.keys {
            let types = known.types.iter().map(|name| name.trim_start_matches("an ").trim_start_matches("a "));
            let types = types.collect::<Vec<_>>().join(" or ");
            let types = if types.is_empty() { "never set".into() } else { types };
            text.push_str(&format!("  {key}: {types}"));
            let set = known.rows - known.null;
            if set < file.rows {
                text.push_str(&format!(" (in {} rows)", number(set)));
            }
            text.push('\n');
        }
    }
    text
}

/// Counts of each split, and what became of rows that were too long or could not be used.
pub(crate) fn describe(report: &Report) -> String {
    let rows: Vec<Vec<String>> = Split::ALL
        .into_iter()
        .filter(|split| report.split(*split).counts.rows > 0)
        .map(|split| {
            let r = report.split(split);
            [r.counts.rows, r.documents, r.blocks, r.tokens, r.trained_tokens, r.counts.longest_row].into_iter().fold(
                vec![split.name().to_owned()],
                |mut row, n| {
                    row.push(number(n));
                    row
                },
            )
        })
        .collect();
    let header = ["split", "rows", "documents", "blocks", "tokens", "trained", "longest row"];
    let mut text = terminal::table(&header, &rows);
    for split in Split::ALL {
        let c = &report.split(split).counts;
        if c.overlong_rows > 0 {
            text.push_str(&format!(
                "{}: {} rows are longer than {} tokens: {} split, {} truncated, {} dropped; {} tokens are lost, {} trained tokens no longer count\n",
                split.name(),
                number(c.overlong_rows),
                number(report.options.max_length),
                number(c.split_rows),
                number(c.truncated_rows),
                number(c.dropped_rows),
                number(c.tokens_lost),
                number(c.trained_tokens_lost),
            ));
        }
        if c.undesirable_rows > 0 {
            text.push_str(&format!(
                "{}: {} rows are left out, since their answers were not liked\n",
                split.name(),
                number(c.undesirable_rows)
            ));
        }
        let preferences = &report.split(split).preferences;
        if !preferences.is_empty() {
            let counts: Vec<_> = preferences
                .iter()
                .map(|(preference, count)| format!("{} {}", number(*count), preference.name()))
                .collect();
            text.push_str(&format!("{}: answers for training on preferences: {}\n", split.name(), counts.join(", ")));
        }
        let weighted = report.split(split).weighted_tokens;
        if weighted > 0 {
            text.push_str(&format!(
                "{}: {} further tokens count in training with prompt_loss_weight {}\n",
                split.name(),
                number(weighted),
                report.options.prompt_loss_weight
            ));
        }
        if c.turns_without_end > 0 {
            text.push_str(&format!(
                "{}: the chat template ends {} assistant turns without a special token; a model does not learn from these where to stop\n",
                split.name(),
                number(c.turns_without_end)
            ));
        }
    }
    text.push_str(&mixture(report));
    text.push_str(&shares(report));
    for (step, rows) in &report.clean.changed {
        text.push_str(&format!("{} rows {}\n", number(*rows), step.words()));
    }
    for (reason, rows) in &report.clean.removed {
        text.push_str(&format!("{} rows {} were removed\n", number(*rows), reason.words()));
    }
    if report.rejected_rows > 0 {
        let rows = number(report.rejected_rows);
        text.push_str(&format!(
            "{rows} rows could not be used and were left out; rejects.jsonl has each with its place and reason\n"
        ));
    }
    text
}

/// What each data set holds and how much of it an epoch draws.
fn mixture(report: &Report) -> String {
    if report.sources.is_empty() {
        return String::new();
    }
    let epoch: usize = report.sources.iter().map(|source| source.blocks_per_epoch).sum();
    let row = |source: &SourceReport| {
        let share = 100.0 * source.blocks_per_epoch as f64 / epoch.max(1) as f64;
        let numbers = [source.rows, source.tokens, source.blocks, source.blocks_per_epoch].map(number);
        std::iter::once(source.name.clone()).chain(numbers).chain([format!("{share:.1} %")]).collect()
    };
    let rows: Vec<Vec<String>> = report.sources.iter().map(row).collect();
    terminal::table(&["source", "rows", "tokens", "blocks", "blocks an epoch", "share"], &rows)
}

/// The values and groups of each split.
fn shares(report: &Report) -> String {
    let mut text = String::new();
    for split in Split::ALL {
        let part = report.split(split);
        if part.groups > 0 {
            let [groups, largest] = [part.groups, part.largest_group].map(number);
            text.push_str(&format!("{split}: {groups} groups, the largest of {largest} rows\n"));
        }
        if !part.values.is_empty() {
            let values: Vec<_> =
                part.values.iter().take(20).map(|(value, rows)| format!("{value} {}", number(*rows))).collect();
            let more = if part.values.len() > 20 { ", ..." } else { "" };
            text.push_str(&format!("{split}: {}{more}\n", values.join(", ")));
        }
    }
    if !report.balance.is_empty() {
        let of = |(value, balanced): (&String, &Balanced)| match report.options.balance {
            Balance::LossWeight => format!("{value} x {:.3}", balanced.weight),
            _ => format!("{value} {} of {}", number(balanced.drawn), number(balanced.rows)),
        };
        let values: Vec<_> = report.balance.iter().take(20).map(of).collect();
        let more = if report.balance.len() > 20 { ", ..." } else { "" };
        let what = match report.options.balance {
            Balance::LossWeight => "weight of the loss",
            _ => "rows drawn",
        };
        text.push_str(&format!("balanced, {what}: {}{more}\n", values.join(", ")));
    }
    for warning in report.warnings() {
        text.push_str(&format!("warning: {warning}\n"));
    }
    text
}

fn show_preview(folder: &Path, opened: &Opened, n: usize) -> Result<()> {
    anstream::println!("{}trained{} {}not trained{}, | between tokens", TRAINED, RESET, UNTRAINED, RESET);
    for which in Split::ALL {
        let split = PreparedSplit::open(folder, which)?;
        for document in preview(&split, n, &opened.tokenizer)? {
            let trained = document.tokens.iter().filter(|token| token.trained).count();
            let (source, tokens) = (&document.source, document.tokens.len());
            let weights = weights_of(&document.tokens);
            let preference = match document.preference {
                Preference::Plain => String::new(),
                preference => format!(", {} (prompt of {} tokens)", preference.name(), document.shared),
            };
            anstream::println!("\n{which}, {source}{preference}: {tokens} tokens, {trained} trained{weights}");
            anstream::println!("{}", coloured(&document.tokens));
        }
    }
    println!();
    Ok(())
}

/// What is to be said of tokens that count otherwise than their marks say: how many have which weight.
fn weights_of(tokens: &[PreviewToken]) -> String {
    let mut runs: Vec<(f32, usize)> = Vec::new();
    for token in tokens.iter().filter(|token| token.weight != if token.trained { 1.0 } else { 0.0 }) {
        match runs.iter_mut().find(|(weight, _)| *weight == token.weight) {
            Some((_, count)) => *count += 1,
            None => runs.push((token.weight, 1)),
        }
    }
    runs.into_iter().map(|(weight, count)| format!(", {count} of weight {weight}")).collect()
}

const TRAINED: anstyle::Style = anstyle::AnsiColor::Green.on_default().bold();
const UNTRAINED: anstyle::Style = anstyle::Style::new().dimmed();
const RESET: anstyle::Reset = anstyle::Reset;

/// Tokens with a bar between them: trained ones green, others dim; without colours, trained runs stand in ⟦ ⟧.
fn coloured(tokens: &[PreviewToken]) -> String {
    let mut text = String::new();
    for (i, token) in tokens.iter().enumerate() {
        let before = i > 0 && tokens[i - 1].trained;
        let after = tokens.get(i + 1).is_some_and(|t| t.trained);
        let style = if token.trained { TRAINED } else { UNTRAINED };
        text.push_str(&format!("{style}"));
        if token.trained && !before {
            text.push('⟦');
        } else if i > 0 {
            text.push('|');
        }
        // A line end stays visible as such, and then ends the line.
        text.push_str(&token.text.replace('\n', "↵\n"));
        if token.trained && !after {
            text.push('⟧');
        }
        text.push_str(&format!("{RESET}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_names_files_formats_and_keys() {
        let report = serde_json::json!({
            "format_version": 3, "key": "", "tokenizer": "", "options": {}, "rejected_rows": 0,
            "clean": {"changed": {}, "removed": {"leak": 3}, "compared": true, "kept_duplicates": 0},
            "balance": {}, "sources": [],
            "train": split(), "validation": split(), "test": split(),
            "files": [{"file": "d.jsonl", "split": null, "format": "messages", "rows": 1200, "bad_rows": 1, "keys": {
                "messages": {"rows": 1200, "null": 0, "types": ["a list"]},
                "tools": {"rows": 1200, "null": 1190, "types": ["a list", "a string"]},
                "id": {"rows": 5, "null": 5, "types": []}
            }}]
        });
        let report: Report = serde_json::from_value(report).unwrap();
        let mut shared = report.clone();
        shared.train.values = [("good".into(), 1100), ("bad".into(), 3)].into();
        let shown = shares(&shared);
        assert!(shown.starts_with("train: bad 3, good 1,100\nwarning: good has 1100 rows"), "{shown}");
        assert!(describe(&report).contains("3 rows to train on that are held out too were removed"));
        let text = schema(&report);
        assert!(text.starts_with("d.jsonl: 1,200 rows, messages, 1 cannot be used\n"), "{text}");
        assert!(
            text.contains("\n  messages: list\n") && text.contains("  tools: list or string (in 10 rows)\n"),
            "{text}"
        );
        assert!(text.contains("  id: never set (in 0 rows)\n"), "{text}");
    }

    fn split() -> serde_json::Value {
        serde_json::to_value(tunesmith_text::SplitReport::default()).unwrap()
    }

    #[test]
    fn trained_runs_are_marked_without_colours_too() {
        let token = |text: &str, trained| {
            let weight = if trained { 1.0 } else { 0.0 };
            PreviewToken { text: text.into(), id: 0, trained, weight }
        };
        let tokens = [token("a", false), token("b", true), token("c\n", true), token("d", false)];
        let plain = anstream::adapter::strip_str(&coloured(&tokens)).to_string();
        assert_eq!(plain, "a⟦b|c↵\n⟧|d");
        assert_eq!(weights_of(&tokens), "");
        let mut weighted = tokens;
        (weighted[0].weight, weighted[1].weight, weighted[3].weight) = (0.25, 2.0, 0.25);
        assert_eq!(weights_of(&weighted), ", 2 of weight 0.25, 1 of weight 2");
    }
}
