//! Checkpoints: a PEFT or Hugging Face folder that other tools load as it is, with the optimizer beside it.
//!
//! A checkpoint is written to a temporary folder, synced and renamed, and carries `complete.json` with the SHA-256 of each
//! of its files, written last: a folder without it, or that contradicts it, is not a checkpoint. There is no state of a random generator to
//! save: data order and dropout are functions of the seed and the step.

use crate::optimizer::{AdamW, StateTensor};
use crate::{Error, Result};
use safetensors::{SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tunesmith_files::{
    atomic, atomic::create_folder, atomic::folder_of, atomic::sync_file, atomic::sync_folder, atomic::temporary_folder,
    bytes::format_bytes, hash::sha256_of,
};
use tunesmith_model::token_rows::token_rows_name;
use tunesmith_model::{AdapterFile, Checkpoint, Llama, SaveOptions, save_adapter_with_rows, save_model};
use tunesmith_tensor::{MappedFile, Tensor};
use tunesmith_text::{BlockStream, Tokenizer};

/// Name of the file that makes a checkpoint complete.
pub const MARKER: &str = "complete.json";
/// Bytes of room for tokenizer, configuration and headers.
pub const SIDE_FILES: u64 = 32 << 20;
const STATE: &str = "tunesmith_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Where a run stands; with the weights and the optimizer's moments, all that a resume needs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: u64,
    /// Trained tokens so far.
    pub num_tokens: u64,
    /// Tokens that went through the model so far.
    pub num_input_tokens: u64,
    /// Blocks seen so far.
    pub num_blocks: u64,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// Sum of the losses of all steps, for the mean over the run.
    pub loss_sum: f64,
    /// Step and validation loss of the best evaluation so far.
    pub best: Option<(u64, f64)>,
    /// Key of the prepared data: another one means that resuming would not continue the same run.
    pub data_key: String,
}

/// Everything that goes into a checkpoint.
pub struct Contents<'a> {
    /// The model; its adapter is saved if it has one, all its weights otherwise.
    pub model: &'a Llama,
    /// The model's tokenizer with its chat template.
    pub tokenizer: &'a Tokenizer,
    /// Passed through to generation_config.json of full models.
    pub generation_config: Option<&'a serde_json::Value>,
    /// The optimizer and the state; `None` for final weights, which are not resumed.
    pub training: Option<(&'a mut AdamW, &'a RunState)>,
    /// Where the training data stands, when it is read as training goes on.
    pub stream: Option<&'a BlockStream<'a>>,
    /// Further text files by name, such as trainer_state.json.
    pub files: BTreeMap<String, String>,
}

impl Contents<'_> {
    /// About how many bytes the checkpoint takes on the disk, rounded up.
    fn num_bytes(&mut self) -> u64 {
        let weights: usize = match self.model.adapter() {
            Some(_) => {
                let rows: usize = self.model.adapter_token_rows().map(|(_, rows)| rows.len()).sum();
                rows + self.model.adapter_tensors().map(|(_, a, b)| a.len() + b.len()).sum::<usize>()
            }
            None => self.model.num_params(),
        };
        let moments: usize = match &mut self.training {
            Some((optimizer, _)) => optimizer.state(self.model).iter().map(|t| t.bytes.len()).sum(),
            None => 0,
        };
        let stream = self.stream.map_or(0, BlockStream::num_bytes);
        (4 * weights + moments + stream) as u64 + SIDE_FILES
    }
}

/// Bytes that this user may still write on the file system of `folder`, where the system tells.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

fn check_space(to: &Path, needed: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < needed => Err(Error::Failure(format!(
            "cannot save {}: it needs {} and {} are free on its disk; make room and go on with --resume",
            to.display(),
            format_bytes(needed),
            format_bytes(free)
        ))),
        _ => Ok(()),
    }
}

/// Saves a checkpoint as folder `to`, replacing one of that name.
///
/// # Errors
/// When there is not enough room, or a file cannot be written; an existing `to` is then as it was.
pub fn save(to: &Path, mut contents: Contents<'_>) -> Result<()> {
    let parent = folder_of(to);
    create_folder(parent)?;
    check_space(to, contents.num_bytes(), free_bytes(parent))?;
    let temporary = temporary_folder(parent, ".saving-")?;
    let folder = temporary.path().join("checkpoint");
    match contents.model.adapter() {
        Some(config) => {
            let tensors: Vec<_> = contents.model.host_adapter_tensors().collect();
            let rows: Vec<_> = contents.model.adapter_token_rows().collect();
            let pairs = tensors.iter().map(|(module, a, b)| (*module, &**a, &**b));
            save_adapter_with_rows(&folder, config, pairs, rows.iter().map(|(module, rows)| (*module, &**rows)))?;
        }
        None => {
            let model = contents.model;
            let weight = |name: &str| model.host_tensor(name);
            save_model(&folder, &model.config, contents.generation_config, weight, &SaveOptions::default())?;
        }
    }
    contents.tokenizer.save(&folder)?;
    if let Some((optimizer, state)) = contents.training {
        write_tensors(&folder.join(OPTIMIZER), &optimizer.state(contents.model))?;
        let state = serde_json::to_string_pretty(state).map_err(|e| Error::Failure(format!("{STATE}: {e}")))?;
        atomic::write(&folder.join(STATE), &state)?;
    }
    if let Some(stream) = contents.stream {
        stream.save(&folder)?;
    }
    for (name, text) in &contents.files {
        atomic::write(&folder.join(name), text)?;
    }
    let mut hashes = BTreeMap::new();
    for path in files_of(&folder)? {
        sync_file(&path)?;
        hashes.insert(file_name(&path), sha256_of(&path)?);
    }
    let marker = serde_json::to_string_pretty(&hashes).map_err(|e| Error::Failure(format!("{MARKER}: {e}")))?;
    atomic::write(&folder.join(MARKER), &marker)?;
    // A folder cannot be renamed over one that is not empty: the old one steps aside first, and is deleted last.
    let old = temporary.path().join("old");
    if to.exists() {
        fs::rename(to, &old).map_err(|e| Error::io("cannot replace", to, e))?;
    }
    fs::rename(&folder, to).map_err(|e| Error::io("cannot rename the new checkpoint to", to, e))?;
    sync_folder(parent)
}

fn write_tensors(path: &Path, tensors: &[StateTensor<'_>]) -> Result<()> {
    let fail = |e: safetensors::SafeTensorError| match e {
        safetensors::SafeTensorError::IoError(e) => Error::io("cannot write", path, e),
        e => Error::Failure(format!("cannot write {}: {e}", path.display())),
    };
    let mut views = Vec::new();
    for tensor in tensors {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), tensor.bytes).map_err(fail)?;
        views.push((tensor.name.as_str(), view));
    }
    safetensors::serialize_to_file(views, None, path).map_err(fail)
}

fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("cannot read", folder, e))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("cannot read", folder, e))?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The files that a marker lists, with the SHA-256 of each; `None` when `marker` is none.
pub fn listed(marker: &[u8]) -> Option<BTreeMap<String, String>> {
    let hashes: BTreeMap<String, String> = serde_json::from_slice(marker).ok()?;
    // Markers may come from elsewhere, and what they list is looked for and written below a folder.
    let is_plain = |name: &String| !name.starts_with('.') && !name.contains(['/', '\\', ':']) && name != MARKER;
    (!hashes.is_empty() && hashes.keys().all(is_plain)).then_some(hashes)
}

/// Whether `folder` is a whole checkpoint: every file that its marker lists is there with the hash that it had.
pub fn is_complete(folder: &Path) -> bool {
    let Some(hashes) = fs::read(folder.join(MARKER)).ok().and_then(|marker| listed(&marker)) else { return false };
    hashes.iter().all(|(name, hash)| sha256_of(&folder.join(name)).is_ok_and(|h| h == *hash))
}

/// The checkpoints `step-N` of a run as (N, folder), ascending, whole or not.
pub fn list(checkpoints: &Path) -> Vec<(u64, PathBuf)> {
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(checkpoints)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?, e.path())))
        .collect();
    found.sort();
    found
}

/// The whole checkpoint with the most steps.
pub fn newest(checkpoints: &Path) -> Option<PathBuf> {
    list(checkpoints).into_iter().rev().map(|(_, path)| path).find(|path| is_complete(path))
}

/// Of checkpoints of these ascending `steps` the oldest beyond `keep`, but never that of step `best`.
pub fn surplus(steps: &[u64], keep: usize, best: Option<u64>) -> Vec<u64> {
    let mut others: Vec<u64> = steps.iter().copied().filter(|step| Some(*step) != best).collect();
    others.truncate(others.len().saturating_sub(keep));
    others
}

/// Deletes the oldest checkpoints beyond `keep`, but never the one of step `best`.
///
/// # Errors
/// When a folder cannot be deleted.
pub fn prune(checkpoints: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    let found = list(checkpoints);
    let old = surplus(&found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), keep, best);
    for (_, path) in found.iter().filter(|(step, _)| old.contains(step)) {
        fs::remove_dir_all(path).map_err(|e| Error::io("cannot delete the old checkpoint", path, e))?;
    }
    Ok(())
}

/// Where the run stood when the checkpoint in `folder` was made.
///
/// # Errors
/// When it cannot be read.
pub fn read_state(folder: &Path) -> Result<RunState> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(|e| Error::io("cannot read", &path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::Input(format!("{}: {e}", path.display())))
}

/// Puts the weights saved in `folder` into `model`, which has the same tensors, one after the other.
///
/// # Errors
/// When the folder's tensors are not those of the model.
pub fn restore_weights(folder: &Path, model: &mut Llama) -> Result<()> {
    let mut adapter: HashMap<String, Tensor> = HashMap::new();
    let mut base = None;
    if model.adapter().is_some() {
        let file = AdapterFile::open(folder)?;
        for (module, rows) in file.token_rows {
            adapter.insert(token_rows_name(&module), rows);
        }
        for (module, (a, b)) in file.tensors {
            adapter.insert(format!("base_model.model.{module}.lora_A.weight"), a);
            adapter.insert(format!("base_model.model.{module}.lora_B.weight"), b);
        }
    } else {
        base = Some(Checkpoint::open(folder)?);
    }
    for parameter in model.parameters.iter_mut().filter(|p| p.trained) {
        let saved = match &base {
            Some(checkpoint) => Some(checkpoint.read(&parameter.name)?),
            None => adapter.remove(&parameter.name),
        };
        match saved {
            Some(value) if value.shape() == parameter.value.shape() => parameter.assign(value),
            found => {
                return Err(Error::Input(format!(
                    "{}: {} is {}; the run needs {:?}. The checkpoint was made with another configuration",
                    folder.display(),
                    parameter.name,
                    found.map_or("missing".into(), |t| format!("of shape {:?}", t.shape())),
                    parameter.value.shape()
                )));
            }
        }
    }
    model.place_token_rows(true);
    Ok(())
}

/// Puts the optimizer saved in `folder` back and returns the state of the run.
///
/// # Errors
/// When a file is missing or does not fit the model.
pub fn restore_training(folder: &Path, model: &Llama, optimizer: &mut AdamW) -> Result<RunState> {
    let state = read_state(folder)?;
    let path = folder.join(OPTIMIZER);
    let cannot = |e| Error::io("cannot read", &path, e);
    let map = MappedFile::open(&path).map_err(cannot)?;
    let bad = |e| Error::Input(format!("{}: {e}", path.display()));
    let (header, metadata) = SafeTensors::read_metadata(&map).map_err(bad)?;
    // Only the header is looked at through the mapping: the moments go from the file to where they belong, and are in
    // memory once.
    drop(map);
    let mut file = File::open(&path).map_err(cannot)?;
    for StateTensor { name, dtype, shape, bytes } in optimizer.state(model) {
        match metadata.info(&name) {
            Some(info) if info.dtype == dtype && info.shape == shape => {
                file.seek(SeekFrom::Start((8 + header + info.data_offsets.0) as u64)).map_err(cannot)?;
                file.read_exact(bytes).map_err(cannot)?;
            }
            found => {
                let found = found.map_or("missing".into(), |i| format!("{:?} of shape {:?}", i.dtype, i.shape));
                return Err(Error::Input(format!(
                    "{}: {name} is {found}, this run needs {dtype:?} of shape {shape:?}; the checkpoint was made with \
                     another training.optim or another model",
                    path.display()
                )));
            }
        }
    }
    optimizer.set_updates(state.step);
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_one_is_kept_besides_the_newest() {
        assert_eq!(surplus(&[1, 2, 3, 4], 2, None), [1, 2]);
        assert_eq!(surplus(&[1, 2, 3, 4], 2, Some(1)), [2]);
        assert_eq!(surplus(&[1, 2, 3, 4], 2, Some(4)), [1]);
        assert!(surplus(&[1, 2], 3, None).is_empty() && surplus(&[], 1, Some(7)).is_empty());
    }

    #[test]
    fn a_marker_lists_plain_names_alone() {
        assert_eq!(listed(br#"{"a.safetensors": "00"}"#).unwrap().len(), 1);
        for bad in ["", "{", "[]", "{}", r#"{"../a": "0"}"#, r#"{"a/b": "0"}"#, r#"{"complete.json": "0"}"#] {
            assert!(listed(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_disk_without_room_is_named_with_what_is_missing() {
        let to = Path::new("run/step-5");
        assert!(check_space(to, 10, Some(10)).is_ok() && check_space(to, 10, None).is_ok());
        let message = check_space(to, 2_500_000_000, Some(40_000_000)).unwrap_err().to_string();
        assert!(
            message.contains("run/step-5") && message.contains("2.50 GB") && message.contains("40.0 MB"),
            "{message}"
        );
        let here = free_bytes(Path::new("."));
        assert!(!cfg!(unix) || here.is_some_and(|free| free > 0), "{here:?}");
    }
}
