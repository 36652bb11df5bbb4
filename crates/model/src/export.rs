//! Writing models as Hugging Face folders.
//!
//! Nothing half-written is ever seen under a final name, and nothing that existed is lost: files and folders are written
//! beside their place, flushed to the disk, and renamed.

use crate::{Config, Error, Result, config::NamedShapes};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::tensor::{Dtype as StoredDtype, Metadata, TensorInfo};
use serde_json::{Map, Value, json};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};
use tunesmith_files::atomic::{self, create_folder, folder_of, sync_folder, temporary_folder};
use tunesmith_tensor::Tensor;

/// How the elements of written weights are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits, lossless.
    #[default]
    F32,
    /// 16 bits with the range of f32, rounded to nearest even.
    BF16,
    /// 16 bits, at most 65504, rounded to nearest even.
    F16,
}

impl Dtype {
    /// The name in a `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::BF16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    fn stored(self) -> StoredDtype {
        match self {
            Self::F32 => StoredDtype::F32,
            Self::BF16 => StoredDtype::BF16,
            Self::F16 => StoredDtype::F16,
        }
    }
}

/// How [`save_model`] writes.
#[derive(Clone, Debug)]
pub struct SaveOptions<'a> {
    /// Encoding of the weights.
    pub dtype: Dtype,
    /// Weights are divided into files of at most this many bytes (a larger single weight gets its own file).
    pub max_shard_bytes: usize,
    /// Replace a model folder that is already there.
    pub overwrite: bool,
    /// Further files of the folder (tokenizer, chat template), as name and content.
    pub extra_files: &'a [(&'a str, &'a [u8])],
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        Self { dtype: Dtype::F32, max_shard_bytes: 5_000_000_000, overwrite: false, extra_files: &[] }
    }
}

/// Files that belong to a model folder, and may therefore go when it is replaced. Shards match by pattern.
const MODEL_FILES: [&str; 13] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "README.md",
];

/// Writes a Hugging Face folder `dir` that transformers 4 and 5 load: `config.json`, `generation_config.json`,
/// `model.safetensors` or shards with an index, and the extra files.
///
/// `weight` gives each of [`Config::expected_tensors`] when its turn comes, so that a weight can be computed (merged)
/// as it is written and no second copy of the model is held. Without `generation_config` one with the config's special
/// tokens is written.
///
/// # Errors
/// [`Error::Input`] when `dir` is in use and `overwrite` is off, or when it holds other things than a model; when a
/// weight does not fit into f16; when the config cannot be expressed. [`Error::Io`] when writing fails. [`Error::Failure`]
/// when a weight has another shape than the config says or is not finite. `dir` is as it was after any error.
pub fn save_model<'a>(
    dir: &Path,
    config: &Config,
    generation_config: Option<&Value>,
    mut weight: impl FnMut(&str) -> Result<Cow<'a, Tensor>>,
    options: &SaveOptions,
) -> Result<()> {
    check_target(dir, options)?;
    let config_json = config.to_json(options.dtype.name())?;
    let generation_config = generation_config.cloned().unwrap_or_else(|| {
        json!({
            "_from_model_config": true,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config_json["eos_token_id"],
            "pad_token_id": config.pad_token_id,
        })
    });
    let shards = shards(config, options);
    let (parent, name) = parent_and_name(dir)?;
    create_folder(parent)?;
    let stage = temporary_folder(parent, &format!(".{name}."))?;
    let stage_path = stage.path().to_owned();

    let mut weight_map = Map::new();
    let (mut total_size, mut total_parameters) = (0, 0);
    for (file, tensors) in &shards {
        write_safetensors(&stage_path.join(file), tensors, options.dtype, &mut weight)?;
        for (name, shape) in tensors {
            let elements: usize = shape.iter().product();
            total_parameters += elements;
            total_size += elements * options.dtype.bytes();
            weight_map.insert(name.clone(), json!(file));
        }
    }
    if shards.len() > 1 {
        let metadata = json!({"total_parameters": total_parameters, "total_size": total_size});
        let mut index = json!({"metadata": metadata, "weight_map": weight_map});
        index.sort_all_objects();
        write_json(&stage_path.join("model.safetensors.index.json"), &index, "\n")?;
    }
    write_json(&stage_path.join("config.json"), &config_json, "\n")?;
    write_json(&stage_path.join("generation_config.json"), &generation_config, "\n")?;
    for (name, content) in options.extra_files {
        atomic::write(&stage_path.join(name), content)?;
    }
    sync_folder(&stage_path)?;
    swap(stage, dir, parent)
}

/// The folder that `dir` is in, and its name.
fn parent_and_name(dir: &Path) -> Result<(&Path, &str)> {
    match (dir.parent(), dir.file_name().and_then(|name| name.to_str())) {
        (Some(_), Some(name)) => Ok((folder_of(dir), name)),
        _ => Err(Error::Input(format!("cannot write a model to {}: name a new folder", dir.display()))),
    }
}

fn check_target(dir: &Path, options: &SaveOptions) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(Error::Input(format!(
                "cannot write a model to {}: it is a file; name a new folder",
                dir.display()
            )));
        }
        Err(e) => return Err(Error::io("cannot list", dir, e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| Error::io("cannot list", dir, e))?.file_name();
        if !options.overwrite {
            return Err(Error::Input(format!(
                "{} is not empty: name a new folder, or ask for it to be overwritten",
                dir.display()
            )));
        }
        let name = name.to_string_lossy();
        let shard = name.starts_with("model-") && name.ends_with(".safetensors");
        let ours =
            shard || MODEL_FILES.contains(&&*name) || options.extra_files.iter().any(|(extra, _)| *extra == name);
        if !ours {
            return Err(Error::Input(format!(
                "{} holds {name}, which is no part of a model, so it is not overwritten: name a new folder",
                dir.display()
            )));
        }
    }
    Ok(())
}

/// Puts the complete folder `stage` in the place of `dir`.
fn swap(stage: tempfile::TempDir, dir: &Path, parent: &Path) -> Result<()> {
    let failed = |e| Error::io("cannot put the finished model in place of", dir, e);
    // The old folder goes into a temporary one, whose end removes it.
    let aside = tempfile::Builder::new().prefix(".replaced.").tempdir_in(parent).map_err(failed)?;
    let old = aside.path().join("old");
    let had_old = dir.exists();
    if had_old {
        fs::rename(dir, &old).map_err(failed)?;
    }
    if let Err(e) = fs::rename(stage.path(), dir) {
        if had_old && fs::rename(&old, dir).is_err() {
            // Not even the way back works: the old model must then outlive its temporary folder.
            let kept = aside.keep().join("old");
            let what = format!("cannot write {}; the model that was there is now {}", dir.display(), kept.display());
            return Err(Error::Io { what, source: e });
        }
        return Err(failed(e));
    }
    // Nothing is left under the temporary name.
    let _: PathBuf = stage.keep();
    sync_folder(parent)
}

/// Name and tensors of each file of weights.
fn shards(config: &Config, options: &SaveOptions) -> Vec<(String, NamedShapes)> {
    let mut groups: Vec<NamedShapes> = vec![Vec::new()];
    let mut filled = 0;
    for (name, shape) in config.expected_tensors() {
        let bytes = shape.iter().product::<usize>() * options.dtype.bytes();
        if filled > 0 && filled + bytes > options.max_shard_bytes {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(group) = groups.last_mut() {
            group.push((name, shape));
        }
    }
    let of = groups.len();
    let name = |i: usize| match of {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{of:05}.safetensors", i + 1),
    };
    groups.into_iter().enumerate().map(|(i, group)| (name(i), group)).collect()
}

/// Writes a safetensors file of the named tensors, asking `weight` for one at a time.
pub(crate) fn write_safetensors<'a>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    dtype: Dtype,
    weight: &mut dyn FnMut(&str) -> Result<Cow<'a, Tensor>>,
) -> Result<()> {
    let mut infos = Vec::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.bytes();
        let info = TensorInfo { dtype: dtype.stored(), shape: shape.clone(), data_offsets: (offset, end) };
        infos.push((name.clone(), info));
        offset = end;
    }
    let failed = |e: String| Error::Failure(format!("cannot describe the tensors of {}: {e}", path.display()));
    // Readers of the ecosystem refuse files without this mark.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|e| failed(e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| failed(e.to_string()))?;
    // Padded so that the data begins aligned.
    header.resize(header.len().next_multiple_of(8), b' ');

    atomic::write_with(path, |out| {
        let io = |e| Error::io("cannot write", path, e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(&header).map_err(io)?;
        for (name, shape) in tensors {
            let tensor = weight(name)?;
            if tensor.shape() != shape {
                let given = tensor.shape();
                return Err(Error::Failure(format!("{name} has the shape {given:?}, its file needs {shape:?}")));
            }
            write_values(out, name, tensor.data(), dtype, io)?;
        }
        Ok(())
    })
}

/// Converts and writes in pieces that stay in the cache.
fn write_values(
    out: &mut dyn Write,
    name: &str,
    values: &[f32],
    dtype: Dtype,
    io: impl Fn(io::Error) -> Error,
) -> Result<()> {
    const PIECE: usize = 16 * 1024;
    let mut bytes = Vec::with_capacity(PIECE * dtype.bytes());
    let (mut bf16s, mut f16s) = (Vec::new(), Vec::new());
    for values in values.chunks(PIECE) {
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            return Err(Error::Failure(format!("{name} holds {value}, so it is not saved")));
        }
        bytes.clear();
        match dtype {
            Dtype::F32 => values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes())),
            Dtype::BF16 => {
                bf16s.resize(values.len(), bf16::ZERO);
                bf16s.convert_from_f32_slice(values);
                bf16s.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
                check_range(name, dtype, values, bf16s.iter().map(|v| v.is_finite()))?;
            }
            Dtype::F16 => {
                f16s.resize(values.len(), f16::ZERO);
                f16s.convert_from_f32_slice(values);
                f16s.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
                check_range(name, dtype, values, f16s.iter().map(|v| v.is_finite()))?;
            }
        }
        out.write_all(&bytes).map_err(&io)?;
    }
    Ok(())
}

fn check_range(name: &str, dtype: Dtype, values: &[f32], finite: impl Iterator<Item = bool>) -> Result<()> {
    match values.iter().zip(finite).find(|(_, finite)| !finite) {
        None => Ok(()),
        Some((value, _)) => Err(Error::Input(format!(
            "{name} holds {value}, which is too large for {}; save the model as {}",
            dtype.name(),
            if dtype == Dtype::F16 { "bfloat16 or float32" } else { "float32" }
        ))),
    }
}

/// Writes `value` with an indent of 2, then `end`.
pub(crate) fn write_json(path: &Path, value: &Value, end: &str) -> Result<()> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|e| Error::Failure(format!("cannot encode {}: {e}", path.display())))?;
    atomic::write(path, text + end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_do_not_fit_are_refused() {
        let write = |value: f32, dtype| {
            write_values(&mut io::sink(), "w", &[0.5, value], dtype, |e| Error::io("", Path::new(""), e))
        };
        assert!(write(1e5, Dtype::F16).unwrap_err().to_string().contains("too large for float16"));
        assert!(write(f32::MAX, Dtype::BF16).unwrap_err().to_string().contains("too large for bfloat16"));
        assert!(write(f32::NAN, Dtype::F32).unwrap_err().to_string().contains("holds NaN"));
        assert!(write(6e4, Dtype::F16).is_ok() && write(1e38, Dtype::BF16).is_ok());
    }
}
