//! `tunesmith merge`: an adapter into its base model, as a Hugging Face folder.

use crate::args::{DtypeName, MergeArgs, ModelArgs};
use crate::error::{Error, Result};
use crate::load::{self, Opened};
use crate::source::{Bucket, Settings};
use crate::terminal;
use std::borrow::Cow;
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;
use tunesmith_model::token_rows::{TOKEN_MODULES, grown, vocabulary_for};
use tunesmith_model::{AdapterFile, Config, Dtype, SaveOptions, save_model};
use tunesmith_tensor::ops::linear;
use tunesmith_text::Tokenizer;

pub(crate) fn run(args: &MergeArgs, settings: &Settings) -> Result<()> {
    let bucket = args.out.to_str().filter(|out| out.contains("://"));
    let bucket = bucket.map(|out| Bucket::open("--out", out, settings)).transpose()?;
    let stage = match &bucket {
        None => None,
        Some(bucket) => {
            bucket.check()?;
            if !bucket.children("")?.is_empty() {
                let address = bucket.address("");
                return Err(Error::Input(format!(
                    "{address} is not empty: name a prefix below which there is nothing"
                )));
            }
            let cache = &settings.cache;
            fs::create_dir_all(cache).map_err(|e| Error::io("cannot create", cache, e))?;
            let stage = tempfile::Builder::new().prefix("merged-").tempdir_in(cache);
            Some(stage.map_err(|e| Error::io("cannot create a folder in", cache, e))?)
        }
    };
    let out = stage.as_ref().map_or(&*args.out, TempDir::path);
    let folder = load::resolve(&args.adapter, settings)?.path;
    let adapter = AdapterFile::open(&folder)?;
    let model = ModelArgs { model: args.model.clone(), adapter: Some(args.adapter.clone()), chat_template: None };
    let opened = load::open_with_adapter(&model, settings)?;
    let checkpoint = &opened.checkpoint;
    let old = checkpoint.config();
    let vocab_size = vocabulary_for(&adapter.config.trainable_token_indices, old.vocab_size);
    let config = Config { vocab_size, ..old.clone() };
    adapter.check_against(checkpoint.config())?;
    let dtype = match args.dtype {
        DtypeName::F32 => Dtype::F32,
        DtypeName::Bf16 => Dtype::BF16,
        DtypeName::F16 => Dtype::F16,
    };

    let files = text_files(&opened.tokenizer)?;
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    let names: Vec<&str> = checkpoint.tensor_names().collect();
    let bar = terminal::count_bar("merging weights", names.len() as u64);
    // One weight at a time: read, merged, written. No second copy of the model is ever held, nor a first.
    let weight = |name: &str| {
        let mut weight = checkpoint.read(name)?;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        if let Some((a, b)) = adapter.tensors.get(module) {
            // W += s · B A, where B [out, r] · A [r, in] has the form of an input gradient.
            let scale = adapter.config.scaling_for(module);
            linear::matmul_input_gradient(b, a, scale, &mut weight, linear::Store::Accumulate);
        }
        if vocab_size > old.vocab_size && weight.shape() == [old.vocab_size, old.hidden_size] && is_token_matrix(name) {
            weight = grown(&weight, vocab_size);
        }
        let rows = adapter.token_rows.iter().find(|(matrix, _)| ends_with_matrix(name, matrix));
        if let Some((matrix, rows)) = rows {
            for (row, id) in adapter.config.trainable_token_indices[matrix].iter().enumerate() {
                weight.row_mut(*id as usize).copy_from_slice(rows.row(row));
            }
        }
        bar.inc(1);
        Ok(Cow::Owned(weight))
    };
    let options = SaveOptions { dtype, extra_files: &files, ..SaveOptions::default() };
    let saved = save_model(out, &config, checkpoint.generation_config(), weight, &options);
    bar.finish_and_clear();
    saved?;
    if let (Some(bucket), Some(stage)) = (&bucket, stage)
        && let Err(error) = upload(bucket, stage.path())
    {
        // Merging may have taken long.
        let kept = stage.keep();
        return Err(Error::Failure(format!("{error}. The merged model is in {}", kept.display())));
    }

    let params = config.num_params();
    println!(
        "{}: {} weights ({}, {}), {} of them changed by {}; {} tensors and the tokenizer",
        args.out.display(),
        terminal::count(params as u64),
        dtype.name(),
        terminal::bytes((params * dtype.bytes()) as u64),
        terminal::count(changed(&adapter) as u64),
        args.adapter,
        names.len(),
    );
    if let Some(precision) = stored_precision(&opened)? {
        println!(
            "note: the base is stored as {precision}. The merged weights are those values plus the adapter, not rounded \
             to {precision} again; merging into the original, unquantised weights gives slightly other numbers. If you have \
             both bases, merge into both and compare them with `tunesmith evaluate`."
        );
    }
    Ok(())
}

/// Whether a weight has a row for each token.
fn is_token_matrix(name: &str) -> bool {
    TOKEN_MODULES.iter().any(|matrix| ends_with_matrix(name, matrix))
}

/// Whether `name` is the weight of the module `matrix`.
fn ends_with_matrix(name: &str, matrix: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|path| path == matrix || path.ends_with(&format!(".{matrix}")))
}

/// Sends the files of `folder`, the configuration last: without it the others are no model.
fn upload(bucket: &Bucket, folder: &Path) -> Result<()> {
    let cannot = |e| Error::io("cannot read", folder, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(cannot)? {
        names.push(entry.map_err(cannot)?.file_name().to_string_lossy().into_owned());
    }
    names.sort_by_key(|name| (name == "config.json", name.clone()));
    let bar = terminal::count_bar("uploading files", names.len() as u64);
    for name in &names {
        let path = folder.join(name);
        let file = File::open(&path).map_err(|e| Error::io("cannot read", &path, e))?;
        let len = file.metadata().map_err(|e| Error::io("cannot read", &path, e))?.len();
        bucket.put(name, &file, len, &path)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Number of weights that the adapter adds to or replaces.
fn changed(adapter: &AdapterFile) -> usize {
    let rows: usize = adapter.token_rows.values().map(|rows| rows.len()).sum();
    rows + adapter.tensors.values().map(|(a, b)| a.cols() * b.rows()).sum::<usize>()
}

/// The tokenizer's files, so that they are in the folder from its first moment on.
pub(super) fn text_files(tokenizer: &Tokenizer) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("cannot create a folder in", &std::env::temp_dir(), e))?;
    tokenizer.save(folder.path())?;
    let cannot = |e| Error::io("cannot read", folder.path(), e);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder.path()).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let content = fs::read(entry.path()).map_err(cannot)?;
        files.push((entry.file_name().to_string_lossy().into_owned(), content));
    }
    Ok(files)
}

/// How a quantised base is stored, by llama.cpp's numbers in `general.file_type`; `None` where nothing is lost.
fn stored_precision(opened: &Opened) -> Result<Option<String>> {
    let Some(metadata) = opened.checkpoint.gguf_metadata() else { return Ok(None) };
    let name = match metadata.u32("general.file_type")? {
        Some(0 | 1 | 32) => return Ok(None),
        Some(2) => "Q4_0",
        Some(3) => "Q4_1",
        Some(7) => "Q8_0",
        Some(8) => "Q5_0",
        Some(9) => "Q5_1",
        Some(10 | 21) => "Q2_K",
        Some(11..=13) => "Q3_K",
        Some(14 | 15) => "Q4_K",
        Some(16 | 17) => "Q5_K",
        Some(18) => "Q6_K",
        _ => "a GGUF file that does not name its precision",
    };
    Ok(Some(name.to_owned()))
}
