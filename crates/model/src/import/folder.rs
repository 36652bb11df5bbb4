//! Hugging Face model folders: `config.json`, `generation_config.json`, safetensors in one file or in shards.

use super::{Source, Stored, WeightFile, few};
use crate::{Config, Error, Result};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
};
use tunesmith_tensor::quant::BlockType;

/// Longest text file that is read (a JSON config is some kilobytes, an index of shards some hundred).
const MAX_TEXT: u64 = 64 << 20;

/// Reads a small text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).map_err(|e| Error::io("cannot read", path, e))?;
    let mut bytes = Vec::new();
    let read = file.by_ref().take(MAX_TEXT + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io("cannot read", path, e))?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(Error::Input(format!("{} is no config: it has more than {} MiB", path.display(), MAX_TEXT >> 20)));
    }
    String::from_utf8(bytes).map_err(|e| Error::Input(format!("{} is not UTF-8 text: {e}", path.display())))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|e| Error::Input(format!("{}: not valid JSON: {e}", path.display())))
}

/// Opens the folder `dir`, which has a `config.json`.
pub(super) fn open(dir: &Path) -> Result<Source> {
    let config_file = dir.join("config.json");
    let config = Config::from_json(&read_text(&config_file)?, &config_file.display().to_string())?;
    let mut side_files = vec![config_file];

    let generation_file = dir.join("generation_config.json");
    let generation_config = if generation_file.exists() {
        let value = read_json(&generation_file)?;
        if !value.is_object() {
            return Err(Error::Input(format!("{}: must be a JSON object", generation_file.display())));
        }
        side_files.push(generation_file);
        Some(value)
    } else {
        None
    };

    let (paths, placed) = weight_files(dir, &mut side_files)?;
    let mut weights = Vec::new();
    let mut tensors = BTreeMap::new();
    for (i, path) in paths.into_iter().enumerate() {
        let file = WeightFile::open(path)?;
        for (name, stored) in safetensors_header(&file, i)? {
            if tensors.insert(name.clone(), stored).is_some() {
                return Err(Error::Input(format!("{}: {name} is in two shards", file.path.display())));
            }
        }
        weights.push(file);
    }
    for (name, shard) in placed {
        let there = tensors.get(&name).is_some_and(|stored: &Stored| weights[stored.file].path.ends_with(&shard));
        if !there {
            return Err(Error::Input(format!(
                "{}: the index places {name} in {shard}, which does not hold it",
                dir.join("model.safetensors.index.json").display()
            )));
        }
    }
    Ok(Source { config, generation_config, weights, side_files, tensors, metadata: None })
}

/// Names of weights, each with the file that an index places it in.
type WeightMap = Vec<(String, String)>;

/// The safetensors files of `dir`, and which of them each weight is in according to the index of shards.
fn weight_files(dir: &Path, side_files: &mut Vec<PathBuf>) -> Result<(Vec<PathBuf>, WeightMap)> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok((vec![single], Vec::new()));
    }
    let index_file = dir.join("model.safetensors.index.json");
    if !index_file.exists() {
        let hint = if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            "; pytorch_model.bin is not supported, convert it to safetensors"
        } else {
            ""
        };
        return Err(Error::Input(format!(
            "{} holds neither model.safetensors nor model.safetensors.index.json{hint}",
            dir.display()
        )));
    }
    let index = read_json(&index_file)?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::Input(format!("{}: there is no object weight_map", index_file.display())));
    };
    let mut shards = BTreeSet::new();
    let mut placed = Vec::new();
    for (name, shard) in map {
        // Shards lie beside the index; anything else would reach outside the model's folder.
        let plain = shard.as_str().filter(|s| !s.contains(['/', '\\']) && s.ends_with(".safetensors"));
        let Some(shard) = plain else {
            return Err(Error::Input(format!(
                "{}: weight_map places {name} in {shard}, which is no name of a .safetensors file",
                index_file.display()
            )));
        };
        shards.insert(shard.to_owned());
        placed.push((name.clone(), shard.to_owned()));
    }
    let absent: Vec<&str> = shards.iter().map(String::as_str).filter(|s| !dir.join(s).exists()).collect();
    if !absent.is_empty() {
        return Err(Error::Input(format!(
            "{}: {} of {} shards are missing: {}; the download may be incomplete",
            dir.display(),
            absent.len(),
            shards.len(),
            few(&absent)
        )));
    }
    side_files.push(index_file);
    Ok((shards.into_iter().map(|shard| dir.join(shard)).collect(), placed))
}

/// Names and places of all tensors of a safetensors file, which is file number `index`. Sizes and offsets are checked
/// against the file.
pub(crate) fn safetensors_header(file: &WeightFile, index: usize) -> Result<Vec<(String, Stored)>> {
    let path = file.path.display();
    let (header, metadata) = SafeTensors::read_metadata(&file.map).map_err(|e| {
        let why = match &e {
            SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
                format!("its header does not fit into its {} bytes; the file is truncated", file.map.len())
            }
            SafeTensorError::HeaderTooLarge => "the length of its header is absurd; this is no safetensors file".into(),
            SafeTensorError::MetadataIncompleteBuffer => {
                format!(
                    "its {} bytes are not what its header describes; the file is truncated or damaged",
                    file.map.len()
                )
            }
            SafeTensorError::InvalidOffset(name) => format!("{name} overlaps another tensor or leaves a gap"),
            SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow => {
                "its header gives a tensor a size that contradicts its shape".into()
            }
            other => format!("its header is damaged: {other}"),
        };
        Error::Input(format!("{path}: {why}"))
    })?;
    let data = 8 + header;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let kind = match info.dtype {
            Dtype::F32 => BlockType::F32,
            Dtype::BF16 => BlockType::BF16,
            Dtype::F16 => BlockType::F16,
            other => {
                return Err(Error::Input(format!("{path}: {name} is {other:?}; supported are F32, BF16 and F16")));
            }
        };
        let (start, end) = info.data_offsets;
        let stored = Stored {
            file: index,
            range: data + start..data + end,
            kind,
            shape: info.shape.clone(),
            interleaved_heads: None,
        };
        tensors.push((name, stored));
    }
    Ok(tensors)
}
