//! `tunesmith tokenizer`: new tokenizers.

use super::prepare::{self, load_config};
use crate::args::{TokenizerTrainArgs, WordRuleName};
use crate::terminal;
use std::fs;
use tunesmith_files::bytes::format_bytes;
use tunesmith_files::table::grouped;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_text::{SpecialTokens, TokenizerOptions, WordRule};
use tunesmith_train::config::Config;

pub(crate) fn train(args: &TokenizerTrainArgs, settings: &Settings) -> Result<()> {
    let config = config(args)?;
    let chat_template = match &args.chat_template {
        Some(file) => Some(fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?),
        None => None,
    };
    let out = &args.out;
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return Err(Error::Input(format!("{} exists already; name a new or empty folder", out.display())));
    }
    let options = TokenizerOptions {
        vocab_size: args.vocab_size,
        min_frequency: args.min_frequency,
        words: match args.words {
            WordRuleName::Gpt2 => WordRule::Gpt2,
            WordRuleName::Smollm => WordRule::SmolLm,
            WordRuleName::Llama3 => WordRule::Llama3,
            WordRuleName::Qwen2 => WordRule::Qwen2,
        },
        special: SpecialTokens { bos: args.bos.clone(), eos: Some(args.eos.clone()), pad: args.pad.clone(), unk: None },
        more_special: args.special.clone(),
        add_bos: args.bos.is_some(),
        chat_template,
    };
    let data = prepare::local(&config.data, settings)?;
    let bar = terminal::bytes_bar("reading data");
    let trained = tunesmith_text::train_tokenizer(&data, &options, &mut |progress| prepare::show(&bar, progress));
    bar.finish_and_clear();
    let trained = trained?;
    fs::create_dir_all(out).map_err(|e| Error::io("cannot create", out, e))?;
    trained.tokenizer.save(out)?;
    let size = trained.tokenizer.vocab_size();
    println!(
        "{}: {} tokens, learned from {} rows ({})",
        out.display(),
        grouped(size),
        grouped(trained.rows),
        format_bytes(trained.bytes)
    );
    if size < args.vocab_size {
        println!(
            "note: --vocab-size {} was not reached: no other pair of tokens is seen {} times or more in this data",
            args.vocab_size, args.min_frequency
        );
    }
    Ok(())
}

/// The configuration; nothing but its data matters, so that it need not name a model.
fn config(args: &TokenizerTrainArgs) -> Result<Config> {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let mut overrides = Vec::new();
    if !args.data.is_empty() {
        let list: Vec<String> = args.data.iter().map(|d| quote(d)).collect();
        overrides.push(format!("data.train=[{}]", list.join(", ")));
    }
    overrides.extend(args.set.iter().cloned());
    match &args.config {
        Some(file) => load_config(file, &overrides),
        None => {
            overrides.push("model.source=none".into());
            Config::parse("", "the command line", &overrides)
        }
    }
}
