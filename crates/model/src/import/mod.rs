//! Reading pre-trained models: Hugging Face folders and GGUF files behind one interface.
//!
//! Files are mapped, not read: [`Checkpoint::open`] looks at the headers only and checks that all weights are there with
//! the shapes that the config asks for; [`Checkpoint::read`] decodes one weight to f32.

mod folder;
mod gguf;

pub(crate) use folder::{read_text, safetensors_header};
pub use gguf::GgufMetadata;

use crate::memory::gpu::dense_bytes;
use crate::{Config, Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};
use tunesmith_tensor::{
    Bytes, Dtype, MappedFile, Packed, Tensor, Weight,
    cuda::sizes,
    nf4::Nf4,
    quant::{BlockType, dequantize},
};

/// Where and how one weight is stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    /// Index of the file.
    pub file: usize,
    /// Its bytes in that file.
    pub range: Range<usize>,
    /// Its encoding.
    pub kind: BlockType,
    /// Its shape, outermost extent first.
    pub shape: Vec<usize>,
    /// As in [`LinearSpec`](crate::block::LinearSpec).
    pub interleaved_heads: Option<usize>,
}

impl Stored {
    /// Number of elements.
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a reader of a format finds; [`Checkpoint::open`] checks it against the config.
pub(crate) struct Source {
    pub config: Config,
    pub generation_config: Option<Value>,
    pub weights: Vec<WeightFile>,
    /// Files of the model that hold no weights.
    pub side_files: Vec<PathBuf>,
    pub tensors: BTreeMap<String, Stored>,
    pub metadata: Option<GgufMetadata>,
}

/// A mapped file of weights.
pub(crate) struct WeightFile {
    pub path: PathBuf,
    pub map: Arc<MappedFile>,
}

impl WeightFile {
    /// Maps `path`.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        match MappedFile::open(&path) {
            Ok(map) => Ok(Self { path, map: Arc::new(map) }),
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                Err(Error::Input(format!("cannot read {}: {e}", path.display())))
            }
            Err(e) => Err(Error::io("cannot read", &path, e)),
        }
    }
}

/// A pre-trained model on the disk, opened and checked; its weights are read one by one.
pub struct Checkpoint {
    source: Source,
    names: Vec<String>,
}

impl Checkpoint {
    /// Opens a model: a Hugging Face folder (`config.json` with `model.safetensors` or shards and their index), a
    /// `.gguf` file, or a folder with one `.gguf` file and no `config.json`.
    ///
    /// # Errors
    /// [`Error::Input`] when something is missing, damaged, contradictory or not supported; [`Error::Io`] when the
    /// machine fails.
    pub fn open(path: &Path) -> Result<Self> {
        let what = fs::metadata(path).map_err(|e| Error::io("cannot open model", path, e))?;
        let source = if what.is_dir() {
            if path.join("config.json").exists() { folder::open(path)? } else { gguf::open(&only_gguf(path)?)? }
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            return Err(Error::Input(format!(
                "{} is a file of weights only; give the folder that also holds its config.json",
                path.display()
            )));
        } else {
            gguf::open(path)?
        };
        let names = check_tensors(path, &source)?;
        Ok(Self { source, names })
    }

    /// The model's config.
    pub fn config(&self) -> &Config {
        &self.source.config
    }

    /// The content of `generation_config.json`, if there is one.
    pub fn generation_config(&self) -> Option<&Value> {
        self.source.generation_config.as_ref()
    }

    /// Names of all weights, in the order of [`Config::expected_tensors`].
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// The metadata of a GGUF file, with its tokenizer; `None` for a folder.
    pub fn gguf_metadata(&self) -> Option<&GgufMetadata> {
        self.source.metadata.as_ref()
    }

    /// Every file that the model was read from: weights, then config files.
    pub fn files(&self) -> Vec<PathBuf> {
        let weights = self.source.weights.iter().map(|file| file.path.clone());
        weights.chain(self.source.side_files.iter().cloned()).collect()
    }

    /// True when a matrix is stored in quantised blocks, as GGUF files may be.
    pub fn is_quantised(&self) -> bool {
        self.source.tensors.values().any(|stored| stored.kind.block_len() > 1)
    }

    /// The weight `name` kept as `storage` says; norms and biases are f32 always.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn load(&self, name: &str, storage: Storage) -> Result<Weight> {
        if self.config().use_qk_norm {
            let family = self.config().model_type.name();
            return Err(Error::Input(format!(
                "models of the family {family} can be read and written, but not computed yet"
            )));
        }
        let stored = self.stored(name)?;
        let &[rows, cols] = stored.shape.as_slice() else { return Ok(self.read(name)?.into()) };
        match storage {
            Storage::Stored if stored.kind != BlockType::F32 => {
                let file = &self.source.weights[stored.file];
                let bytes = Bytes::Mapped(file.map.clone(), stored.range.clone());
                let packed = Packed::from_blocks([rows, cols], stored.kind, bytes, stored.interleaved_heads);
                // A damaged weight is decoded for the sake of the message, which names the element.
                if packed.is_finite() { Ok(Weight::Packed(packed)) } else { Ok(self.read(name)?.into()) }
            }
            Storage::F32 | Storage::Stored => Ok(self.read(name)?.into()),
            Storage::Nf4 => Ok(Weight::Packed(Packed::nf4(&self.read(name)?, true))),
        }
    }

    /// Bytes of all weights as [`Checkpoint::load`] keeps them.
    pub fn weight_bytes(&self, storage: Storage) -> u64 {
        self.names.iter().map(|name| kept_bytes(&self.source.tensors[name], storage) as u64).sum()
    }

    /// Bytes of all weights on a GPU in `dtype`, kept as `storage` says or, when they train, dense with the rest of their f32; and the
    /// elements of the largest one that is quantised there.
    pub fn gpu_weights(&self, storage: Storage, dtype: Dtype, trained: bool) -> (u64, usize) {
        let (mut bytes, mut largest) = (0, 0);
        for stored in self.names.iter().map(|name| &self.source.tensors[name]) {
            let quantised = quantised_gpu_bytes(stored, storage).filter(|_| !trained);
            largest = largest.max(quantised.map_or(0, |_| stored.len()));
            bytes += quantised.unwrap_or_else(|| dense_bytes(stored.len(), dtype, trained));
        }
        (bytes, largest)
    }

    /// Bytes of the embedding among those of [`Checkpoint::gpu_weights`] while it is frozen.
    pub fn gpu_embedding(&self, storage: Storage, dtype: Dtype) -> u64 {
        let stored = &self.source.tensors["model.embed_tokens.weight"];
        quantised_gpu_bytes(stored, storage).unwrap_or_else(|| dense_bytes(stored.len(), dtype, false))
    }

    /// As [`Checkpoint::token_matrix_bytes`], on a GPU.
    pub fn gpu_token_matrix_bytes(&self, storage: Storage, dtype: Dtype, trained: bool, count: usize) -> u64 {
        let bytes = |stored: &Stored| {
            let quantised = quantised_gpu_bytes(stored, storage).filter(|_| !trained);
            quantised.unwrap_or_else(|| dense_bytes(stored.len(), dtype, trained))
        };
        self.token_matrices(count).map(bytes).sum()
    }

    /// Bytes of the embedding, and with `count` 2 of the head too, as [`Checkpoint::load`] keeps them.
    pub fn token_matrix_bytes(&self, storage: Storage, count: usize) -> u64 {
        self.token_matrices(count).map(|stored| kept_bytes(stored, storage) as u64).sum()
    }

    /// The embedding, and with `count` 2 the head.
    fn token_matrices(&self, count: usize) -> impl Iterator<Item = &Stored> {
        let names = ["model.embed_tokens.weight", "lm_head.weight"].into_iter().take(count);
        names.filter_map(|name| self.source.tensors.get(name))
    }

    /// Bytes of all weights after [`crate::Llama::compute_int8`], and the most that there are while it works.
    pub fn int8_bytes(&self, storage: Storage) -> [u64; 2] {
        let config = self.config();
        let head = int8_bytes(config.vocab_size * config.hidden_size);
        let kept = self.names.iter().map(|name| {
            let stored = &self.source.tensors[name];
            // Every matrix but the embedding.
            if stored.shape.len() == 2 && name != "model.embed_tokens.weight" {
                int8_bytes(stored.len())
            } else {
                kept_bytes(stored, storage) as u64
            }
        });
        let after = kept.sum::<u64>() + if config.tie_word_embeddings { head } else { 0 };
        [after, after.max(self.weight_bytes(storage) + head)]
    }

    /// Most bytes that loading holds besides the weights: a matrix on its way into another encoding.
    pub fn loading_bytes(&self, storage: Storage) -> u64 {
        let largest = self.names.iter().map(|name| {
            let stored = &self.source.tensors[name];
            match storage {
                Storage::Stored => 0,
                Storage::F32 => stored.range.len() as u64,
                Storage::Nf4 => (stored.range.len() + 4 * stored.len()) as u64,
            }
        });
        largest.max().unwrap_or(0)
    }

    /// The weight `name` (Hugging Face's name) as f32, in Hugging Face's row order; its shape is that of
    /// [`Config::expected_tensors`].
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such weight, or when it holds NaN or infinity.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let stored = self.stored(name)?;
        decode(&self.source.weights[stored.file], name, stored)
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        match self.source.tensors.get(name) {
            Some(stored) if self.names.iter().any(|n| n == name) => Ok(stored),
            _ => Err(Error::Failure(format!("the model has no weight named {name}"))),
        }
    }
}

impl Storage {
    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Stored => "stored",
            Self::Nf4 => "nf4",
        }
    }
}

/// How the matrices of a model that do not train are kept in memory. Computing with them is exact in each form: products
/// decode them as they go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Expanded to f32: the fastest products.
    #[default]
    F32,
    /// As the file has them (f16, bf16, blocks of a GGUF file), read where they lie in the mapped file.
    Stored,
    /// Rounded to NF4 with double quantisation when they are loaded, 4.127 bits a weight: the base of QLoRA.
    Nf4,
}

/// Bytes of a matrix of `len` elements in 8-bit integers both ways, with its scales.
fn int8_bytes(len: usize) -> u64 {
    2 * (len + len / 16) as u64
}

/// Bytes of a frozen weight on a GPU where it is quantised there.
fn quantised_gpu_bytes(stored: &Stored, storage: Storage) -> Option<u64> {
    let bytes = match storage {
        _ if stored.shape.len() != 2 => return None,
        Storage::F32 => return None,
        Storage::Stored if stored.kind.block_len() <= 1 => return None,
        Storage::Stored => sizes::allocated(stored.range.len()),
        Storage::Nf4 => sizes::nf4(stored.len()),
    };
    Some(bytes as u64)
}

/// Bytes of a weight as it is kept.
fn kept_bytes(stored: &Stored, storage: Storage) -> usize {
    match storage {
        Storage::Stored if stored.shape.len() == 2 => stored.range.len(),
        Storage::Nf4 if stored.shape.len() == 2 => Nf4::bytes_for(stored.len()),
        _ => 4 * stored.len(),
    }
}

/// Decodes one stored weight and checks that all of it is finite.
pub(crate) fn decode(file: &WeightFile, name: &str, stored: &Stored) -> Result<Tensor> {
    // The range was checked against the file when the header was read.
    let bytes = &file.map[stored.range.clone()];
    let mut tensor = Tensor::zeros(&stored.shape);
    match stored.interleaved_heads {
        None => dequantize(stored.kind, bytes, tensor.data_mut()),
        Some(heads) => dequantize_heads(stored, bytes, heads, &mut tensor),
    }
    // Decoded, it is in memory a second time.
    file.map.release(stored.range.clone());
    const TASK: usize = 1 << 16;
    let bad = tensor.data().par_chunks(TASK).enumerate().find_map_first(|(task, values)| {
        // A sum of exponent tests has no early exit and is vectorised; the position is looked for only when needed.
        if values.iter().fold(true, |fine, v| fine & v.is_finite()) {
            return None;
        }
        values.iter().position(|v| !v.is_finite()).map(|i| (task * TASK + i, values[i]))
    });
    let Some((flat, value)) = bad else { return Ok(tensor) };
    let mut index = vec![0; stored.shape.len()];
    let mut rest = flat;
    for (place, extent) in index.iter_mut().zip(&stored.shape).rev() {
        *place = rest % extent;
        rest /= extent;
    }
    Err(Error::Input(format!(
        "{}: the weight {name} holds {value} at index {index:?}; the file is damaged or its training diverged",
        file.path.display()
    )))
}

/// Decodes a q or k weight [heads * head_dim, in] (or bias) whose rows are stored for interleaved rotation: row
/// `2 j + h` of a head belongs at `h * head_dim / 2 + j`.
fn dequantize_heads(stored: &Stored, bytes: &[u8], heads: usize, tensor: &mut Tensor) {
    let rows = stored.shape[0];
    let (cols, row_bytes, half) = (tensor.len() / rows, bytes.len() / rows, rows / heads / 2);
    tensor.data_mut().par_chunks_mut(cols).enumerate().for_each(|(row, out)| {
        let (head, row) = (row / (2 * half), row % (2 * half));
        let from = head * 2 * half + row % half * 2 + row / half;
        dequantize(stored.kind, &bytes[from * row_bytes..(from + 1) * row_bytes], out);
    });
}

/// The one GGUF file of a folder without `config.json`.
fn only_gguf(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("cannot list", folder, e))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("cannot list", folder, e))?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            found.push(path);
        }
    }
    found.sort();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] if folder.join("adapter_config.json").exists() => Err(Error::Input(format!(
            "{} is an adapter, not a model: name its base as the model and this folder as the adapter",
            folder.display()
        ))),
        [] => Err(Error::Input(format!(
            "{} holds no model: there is neither a config.json nor a .gguf file",
            folder.display()
        ))),
        [first, second, ..] => Err(Error::Input(format!(
            "{} holds {} GGUF files ({}, {}, ...): name the one to use",
            folder.display(),
            found.len(),
            first.display(),
            second.display()
        ))),
    }
}

/// Compares what is stored with what the config asks for; returns the names in the order of the model.
fn check_tensors(path: &Path, source: &Source) -> Result<Vec<String>> {
    let file = path.display();
    let expected = source.config.expected_tensors();
    let missing: Vec<&str> =
        expected.iter().map(|(name, _)| name.as_str()).filter(|name| !source.tensors.contains_key(*name)).collect();
    if !missing.is_empty() {
        let hint = match &missing[..] {
            ["lm_head.weight"] => {
                "; if its output head is the embedding, config.json must say \"tie_word_embeddings\": true"
            }
            _ => "; the download may be incomplete",
        };
        return Err(Error::Input(format!("{file}: {} missing: {}{hint}", count(missing.len()), few(&missing))));
    }
    for (name, shape) in &expected {
        let Some(stored) = source.tensors.get(name) else { continue };
        if stored.shape != *shape {
            return Err(Error::Input(format!(
                "{file}: {name} has the shape {:?}, but the config asks for {shape:?}",
                stored.shape
            )));
        }
    }
    // A tied head is sometimes stored a second time; rope frequencies, in old files, are recomputed.
    let known: std::collections::HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let ignored = |name: &str| {
        name.ends_with("rotary_emb.inv_freq") || (name == "lm_head.weight" && source.config.tie_word_embeddings)
    };
    let extra: Vec<&str> =
        source.tensors.keys().map(String::as_str).filter(|name| !known.contains(name) && !ignored(name)).collect();
    if !extra.is_empty() {
        return Err(Error::Input(format!(
            "{file}: {} unknown to a {} model of this config: {}",
            count(extra.len()),
            source.config.model_type.name(),
            few(&extra)
        )));
    }
    Ok(expected.into_iter().map(|(name, _)| name).collect())
}

fn count(n: usize) -> String {
    if n == 1 { "1 weight is".into() } else { format!("{n} weights are") }
}

/// The first of many names.
pub(crate) fn few(names: &[&str]) -> String {
    let shown = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{shown}, ...") } else { shown }
}
