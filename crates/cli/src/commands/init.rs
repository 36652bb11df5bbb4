//! `tunesmith init`: a new model with random weights.

use super::merge::text_files;
use crate::args::{InitArgs, InitDtype};
use crate::load;
use crate::terminal;
use std::borrow::Cow;
use std::ops::Range;
use tunesmith_files::table::grouped;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_model::{Config, Dtype, GgufOptions, SaveOptions, initial_rows, save_gguf, save_model};
use tunesmith_tensor::{Tensor, quant::BlockType};
use tunesmith_text::Tokenizer;

pub(crate) fn run(args: &InitArgs, settings: &Settings) -> Result<()> {
    let file = &args.config;
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?;
    let mut config = Config::from_json(&text, &file.display().to_string())?;
    if args.out.exists() {
        return Err(Error::Input(format!("{} exists already; name a new file or folder", args.out.display())));
    }
    let given = args.tokenizer.as_deref().map(|spec| load::tokenizer(spec, settings)).transpose()?;
    if let Some((tokenizer, _)) = &given {
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::Input(format!(
                "{}: vocab_size is {}, but the tokenizer of {} has {} tokens",
                file.display(),
                config.vocab_size,
                args.tokenizer.as_deref().unwrap_or_default(),
                tokenizer.vocab_size()
            )));
        }
        follow(&mut config, tokenizer);
    }
    let config = config;
    let bar = terminal::count_bar("making weights", config.num_params() as u64);
    if args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        let metadata = match (&given, &args.tokenizer) {
            (Some((_, None)), Some(spec)) => {
                return Err(Error::Input(format!(
                    "--tokenizer {spec} is a folder; a GGUF file takes its tokenizer from another GGUF file"
                )));
            }
            (given, _) => given.as_ref().and_then(|(_, metadata)| metadata.as_ref()),
        };
        let kind = match args.dtype {
            InitDtype::F32 => BlockType::F32,
            InitDtype::Bf16 => BlockType::BF16,
            InitDtype::F16 => BlockType::F16,
            InitDtype::Q8_0 => BlockType::Q8_0,
            InitDtype::Q4_0 => BlockType::Q4_0,
        };
        let name = args.out.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy());
        let options = GgufOptions { kind, name: &name, tokenizer: metadata };
        save_gguf(&args.out, &config, options, |name: &str, rows: Range<usize>, out: &mut [f32]| {
            initial_rows(&config, args.seed, name, rows, out);
            bar.inc(out.len() as u64);
            Ok(())
        })?;
    } else {
        let dtype = match args.dtype {
            InitDtype::F32 => Dtype::F32,
            InitDtype::Bf16 => Dtype::BF16,
            InitDtype::F16 => Dtype::F16,
            InitDtype::Q8_0 | InitDtype::Q4_0 => {
                return Err(Error::Input(
                    format!(
                        "--dtype {:?} is a format of GGUF files; name one, such as --out {}.gguf",
                        args.dtype,
                        args.out.display()
                    )
                    .to_lowercase(),
                ));
            }
        };
        let files = given.as_ref().map(|(tokenizer, _)| text_files(tokenizer)).transpose()?.unwrap_or_default();
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, text)| (name.as_str(), text.as_slice())).collect();
        let shapes: std::collections::HashMap<String, Vec<usize>> = config.expected_tensors().into_iter().collect();
        let weight = |name: &str| {
            let mut weight = Tensor::zeros(shapes.get(name).map_or(&[0], Vec::as_slice));
            initial_rows(&config, args.seed, name, 0..weight.rows(), weight.data_mut());
            bar.inc(weight.len() as u64);
            Ok(Cow::Owned(weight))
        };
        let options = SaveOptions { dtype, extra_files: &files, ..SaveOptions::default() };
        save_model(&args.out, &config, None, weight, &options)?;
    }
    bar.finish_and_clear();
    let without = if given.is_none() { ", without a tokenizer (--tokenizer SOURCE takes one over)" } else { "" };
    println!("{}: {} random weights{without}", args.out.display(), grouped(config.num_params()));
    Ok(())
}

/// Special tokens of the new model are those of its tokenizer.
fn follow(config: &mut Config, tokenizer: &Tokenizer) {
    config.bos_token_id = tokenizer.bos_id();
    config.pad_token_id = tokenizer.pad_id();
    match tokenizer.eos_id() {
        // One of several that the configuration lists: a model may end its turns in other ways than its texts.
        Some(eos) if config.eos_token_id.contains(&eos) => {}
        eos => config.eos_token_id = eos.into_iter().collect(),
    }
}
