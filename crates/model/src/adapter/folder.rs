//! Adapters as PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.

use super::{AdapterConfig, SCORE};
use crate::{
    Config, Error, Result,
    export::{Dtype, write_json, write_safetensors},
    import::{WeightFile, decode, few, safetensors_header},
    token_rows::{TOKEN_MODULES, token_rows_name},
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};
use tunesmith_tensor::Tensor;

pub(super) const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Stands before every module path in the names of an adapter's tensors.
pub(super) const PREFIX: &str = "base_model.model.";

/// An adapter read from the disk.
#[derive(Debug)]
pub struct AdapterFile {
    /// What was adapted, and how.
    pub config: AdapterConfig,
    /// Module path (`model.layers.0.self_attn.q_proj`) to A \[r, in\] and B \[out, r\].
    pub tensors: BTreeMap<String, (Tensor, Tensor)>,
    /// Rows [n, d] of the tokens of `trainable_token_indices`, by matrix.
    pub token_rows: BTreeMap<String, Tensor>,
    /// The classification head [classes, d], which `modules_to_save` names.
    pub score: Option<Tensor>,
    path: PathBuf,
}

impl AdapterFile {
    /// Reads the adapter in the folder `dir`.
    ///
    /// # Errors
    /// [`Error::Input`] when something is missing, damaged, contradictory or not supported; [`Error::Io`] when the
    /// machine fails.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = AdapterConfig::read(dir)?;
        let path = dir.join(WEIGHTS_FILE);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            return Err(Error::Input(format!(
                "{} holds adapter_model.bin, which is not supported; convert it to {WEIGHTS_FILE}",
                dir.display()
            )));
        }
        let file = WeightFile::open(path.clone())?;
        let shown = path.display();
        let mut halves: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
        let (mut token_rows, mut score) = (BTreeMap::new(), None);
        for (name, stored) in safetensors_header(&file, 0)? {
            if let Some(module) = rows_of(&name) {
                let count = config.trainable_token_indices.get(module).map_or(0, Vec::len);
                if stored.shape.len() != 2 || stored.shape[0] != count || count == 0 {
                    return Err(Error::Input(format!(
                        "{shown}: {name} has the shape {:?}, but {CONFIG_FILE} names {count} tokens of {module}",
                        stored.shape
                    )));
                }
                token_rows.insert(module.to_owned(), decode(&file, &name, &stored)?);
                continue;
            }
            if is_score(&name) {
                if stored.shape.len() != 2 || !config.modules_to_save.iter().any(|module| module == SCORE) {
                    return Err(unknown_tensor(&path, &name));
                }
                score = Some(decode(&file, &name, &stored)?);
                continue;
            }
            let (module, half) = module_of(&name).ok_or_else(|| unknown_tensor(&path, &name))?;
            if stored.shape.len() != 2 {
                return Err(Error::Input(format!("{shown}: {name} has the shape {:?}, not a matrix's", stored.shape)));
            }
            let tensor = decode(&file, &name, &stored)?;
            let place = &mut halves.entry(module.to_owned()).or_default()[half];
            if place.replace(tensor).is_some() {
                return Err(Error::Input(format!("{shown}: {module} has two tensors lora_{}", ["A", "B"][half])));
            }
        }
        let mut tensors = BTreeMap::new();
        for (module, pair) in halves {
            let (a, b) = match pair {
                [Some(a), Some(b)] => (a, b),
                [None, _] => return Err(Error::Input(format!("{shown}: {module} has no lora_A"))),
                [_, None] => return Err(Error::Input(format!("{shown}: {module} has no lora_B"))),
            };
            let rank = config.rank_for(&module);
            if a.shape()[0] != rank || b.shape()[1] != rank {
                return Err(Error::Input(format!(
                    "{shown}: {module} has lora_A {:?} and lora_B {:?}, but {CONFIG_FILE} gives it the rank {rank}",
                    a.shape(),
                    b.shape()
                )));
            }
            tensors.insert(module, (a, b));
        }
        if let Some(module) = config.trainable_token_indices.keys().find(|module| !token_rows.contains_key(*module)) {
            return Err(Error::Input(format!("{shown} has no {}, which {CONFIG_FILE} names", token_rows_name(module))));
        }
        if score.is_none() && !config.modules_to_save.is_empty() {
            return Err(Error::Input(format!("{shown} has no {PREFIX}{SCORE}.weight, which {CONFIG_FILE} names")));
        }
        if tensors.is_empty() {
            return Err(Error::Input(format!("{shown} holds no tensors")));
        }
        Ok(Self { config, tensors, token_rows, score, path })
    }

    /// Its tensors by PEFT's names.
    pub fn into_tensors(self) -> impl Iterator<Item = (String, Tensor)> {
        let pairs = self.tensors.into_iter().flat_map(|(module, (a, b))| {
            [(format!("{PREFIX}{module}.lora_A.weight"), a), (format!("{PREFIX}{module}.lora_B.weight"), b)]
        });
        let rows = self.token_rows.into_iter().map(|(module, rows)| (token_rows_name(&module), rows));
        pairs.chain(rows).chain(self.score.map(|score| (format!("{PREFIX}{SCORE}.weight"), score)))
    }

    /// Checks that the adapter was made for a model like `model`: every adapted module exists and has the right shape,
    /// and none is missing.
    ///
    /// # Errors
    /// [`Error::Input`] that names the module and both shapes.
    pub fn check_against(&self, model: &Config) -> Result<()> {
        let file = self.path.display();
        let mut shapes: HashMap<String, [usize; 2]> = HashMap::new();
        for layer in 0..model.num_hidden_layers {
            for (module, shape) in model.linear_modules() {
                shapes.insert(format!("model.layers.{layer}.{module}"), shape);
            }
        }
        for (module, (a, b)) in &self.tensors {
            let Some([rows, cols]) = shapes.get(module) else {
                return Err(Error::Input(format!(
                    "{file} was made for another model: it adapts {module}, which is no linear layer of this one ({} layers)",
                    model.num_hidden_layers
                )));
            };
            if a.shape()[1] != *cols || b.shape()[0] != *rows {
                return Err(Error::Input(format!(
                    "{file} was made for another model: it adapts {module} as [{}, {}], but here that is [{rows}, {cols}]",
                    b.shape()[0],
                    a.shape()[1]
                )));
            }
        }
        for (module, rows) in &self.token_rows {
            if module == "lm_head" && model.tie_word_embeddings {
                return Err(Error::Input(format!(
                    "{file} was made for another model: it has rows of lm_head, which is the embedding here"
                )));
            }
            if rows.cols() != model.hidden_size {
                return Err(Error::Input(format!(
                    "{file} was made for another model: its rows of {module} have {} elements, but here they have {}",
                    rows.cols(),
                    model.hidden_size
                )));
            }
        }
        if let Some(score) = self.score.as_ref().filter(|score| score.cols() != model.hidden_size) {
            return Err(Error::Input(format!(
                "{file} was made for another model: its classification head has rows of {} elements, but here they have {}",
                score.cols(),
                model.hidden_size
            )));
        }
        let mut absent: Vec<&str> = shapes.keys().map(String::as_str).collect();
        absent.retain(|module| self.config.matches(module) && !self.tensors.contains_key(*module));
        if !absent.is_empty() {
            absent.sort_unstable();
            return Err(Error::Input(format!(
                "{file} was made for another model or is incomplete: {CONFIG_FILE} also names {}",
                few(&absent)
            )));
        }
        Ok(())
    }
}

/// The matrix whose rows a tensor of this name has.
fn rows_of(name: &str) -> Option<&'static str> {
    let name = name.strip_suffix(".default").unwrap_or(name);
    TOKEN_MODULES.into_iter().find(|module| name == token_rows_name(module))
}

/// Whether this is the name of the classification head.
fn is_score(name: &str) -> bool {
    let name = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix(SCORE));
    matches!(name, Some(".weight" | ".modules_to_save.weight" | ".modules_to_save.default.weight"))
}

/// Module path of a tensor name, and 0 for A or 1 for B.
fn module_of(name: &str) -> Option<(&str, usize)> {
    let rest = name.strip_prefix(PREFIX)?;
    // Some tools leave the adapter's name in.
    let endings =
        [(".lora_A.weight", 0), (".lora_B.weight", 1), (".lora_A.default.weight", 0), (".lora_B.default.weight", 1)];
    endings.iter().find_map(|(ending, half)| rest.strip_suffix(ending).map(|module| (module, *half)))
}

fn unknown_tensor(path: &Path, name: &str) -> Error {
    let why = if name.contains("lora_magnitude_vector") {
        "it belongs to DoRA"
    } else if name.contains("lora_embedding") {
        "it adapts the embedding"
    } else if name.contains("lora_") {
        "its name is not of the form base_model.model.MODULE.lora_A.weight"
    } else {
        "it is a whole weight"
    };
    Error::Input(format!(
        "{}: {name} is not supported: {why}; supported is plain LoRA on linear layers",
        path.display()
    ))
}

/// Writes an adapter into the folder `dir`, which is made if need be; other files there are left alone. Items are module
/// path (`model.layers.0.self_attn.q_proj`), A \[r, in\] and B \[out, r\].
///
/// # Errors
/// [`Error::Io`] when writing fails; the files that were there before are then still whole. [`Error::Failure`] for a
/// pair that contradicts the config, or a value that is not finite.
pub fn save_adapter<'a, S: AsRef<str>>(
    dir: &Path,
    config: &AdapterConfig,
    pairs: impl IntoIterator<Item = (S, &'a Tensor, &'a Tensor)>,
) -> Result<()> {
    let mut tensors: BTreeMap<String, &Tensor> = BTreeMap::new();
    for (module, a, b) in pairs {
        let module = module.as_ref();
        let rank = config.rank_for(module);
        if a.shape().len() != 2 || b.shape().len() != 2 || a.shape()[0] != rank || b.shape()[1] != rank {
            let (a, b) = (a.shape(), b.shape());
            return Err(Error::Failure(format!("{module} has lora_A {a:?} and lora_B {b:?}, but the rank {rank}")));
        }
        tensors.insert(format!("{PREFIX}{module}.lora_A.weight"), a);
        tensors.insert(format!("{PREFIX}{module}.lora_B.weight"), b);
    }
    write(dir, config, &tensors)
}

/// Writes `tensors` by PEFT's names and `config` into the folder `dir`, as [`save_adapter`] does.
pub(super) fn write(dir: &Path, config: &AdapterConfig, tensors: &BTreeMap<String, &Tensor>) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io("cannot create", dir, e))?;
    let shapes: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect();
    let mut weight = |name: &str| match tensors.get(name) {
        Some(tensor) => Ok(Cow::Borrowed(*tensor)),
        None => Err(Error::Failure(format!("there is no tensor {name}"))),
    };
    write_safetensors(&dir.join(WEIGHTS_FILE), &shapes, Dtype::F32, &mut weight)?;
    write_json(&dir.join(CONFIG_FILE), &config.to_json(), "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn model(name: &str) -> Config {
        let file = fixture(name).join("config.json");
        Config::from_json(&fs::read_to_string(file).unwrap(), "config.json").unwrap()
    }

    const Q: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn adapters_of_peft_are_read_and_written_back_the_same() {
        for (name, rslora) in [("lora_start", false), ("rslora_final", true)] {
            for (base, modules) in [("tiny-llama2", 14), ("tiny-llama3", 21)] {
                let from = fixture(base).join(name);
                let adapter = AdapterFile::open(&from).unwrap();
                adapter.check_against(&model(base)).unwrap();
                assert_eq!((adapter.tensors.len(), adapter.config.r, adapter.config.use_rslora), (modules, 4, rslora));
                assert_eq!(adapter.config.scaling_for(Q), if rslora { 4.0 } else { 2.0 });

                let dir = tempfile::tempdir().unwrap();
                let to = dir.path().join("a/b");
                save_adapter(&to, &adapter.config, adapter.tensors.iter().map(|(m, (a, b))| (m, a, b))).unwrap();
                assert_eq!(fs::read(to.join(WEIGHTS_FILE)).unwrap(), fs::read(from.join(WEIGHTS_FILE)).unwrap());
                let again = AdapterFile::open(&to).unwrap();
                assert_eq!(again.config, adapter.config);
                let written = fs::read_to_string(to.join(CONFIG_FILE)).unwrap();
                let original: Value =
                    serde_json::from_str(&fs::read_to_string(from.join(CONFIG_FILE)).unwrap()).unwrap();
                let value: Value = serde_json::from_str(&written).unwrap();
                let keys: Vec<_> = value.as_object().unwrap().keys().collect();
                assert!(keys.is_sorted() && written.starts_with("{\n  \"alpha_pattern\"") && written.ends_with('}'));
                for key in keys {
                    assert_eq!(value[key], original[key], "{key}");
                }
            }
        }
    }

    #[test]
    fn an_adapter_of_another_model_is_refused() {
        let adapter = AdapterFile::open(&fixture("tiny-llama3/lora_start")).unwrap();
        let refused = |config: &Config, wanted: &str| {
            let error = adapter.check_against(config).unwrap_err();
            assert!(matches!(&error, Error::Input(m) if m.contains(wanted)), "{error}");
        };
        let mut config = model("tiny-llama3");
        config.intermediate_size = 128;
        refused(&config, "it adapts model.layers.0.mlp.down_proj as [64, 160], but here that is [64, 128]");
        config.intermediate_size = 160;
        config.num_hidden_layers = 2;
        refused(&config, "it adapts model.layers.2.mlp.down_proj, which is no linear layer of this one (2 layers)");
        config.num_hidden_layers = 4;
        refused(&config, "also names model.layers.3.mlp.down_proj");
        refused(&model("tiny-llama2"), "was made for another model");
    }

    #[test]
    fn damaged_adapters_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path();
        let refused = |wanted: &str| {
            let error = AdapterFile::open(to).unwrap_err();
            assert!(matches!(&error, Error::Input(m) if m.contains(wanted)), "{error}");
        };
        refused("holds no adapter_config.json");
        let config = AdapterConfig { r: 2, ..Default::default() };
        let (a, b) = (Tensor::zeros(&[2, 8]), Tensor::zeros(&[4, 2]));
        save_adapter(to, &config, [(Q, &a, &b)]).unwrap();
        assert!(AdapterFile::open(to).is_ok());
        assert!(save_adapter(to, &config, [(Q, &b, &a)]).is_err());
        write_json(&to.join(CONFIG_FILE), &AdapterConfig { r: 3, ..config.clone() }.to_json(), "").unwrap();
        refused("has lora_A [2, 8] and lora_B [4, 2], but adapter_config.json gives it the rank 3");
        write_json(&to.join(CONFIG_FILE), &config.to_json(), "").unwrap();
        let half = |name: &str, tensor: &Tensor| {
            let shapes = [(name.to_owned(), tensor.shape().to_vec())];
            write_safetensors(&to.join(WEIGHTS_FILE), &shapes, Dtype::BF16, &mut |_| Ok(Cow::Borrowed(tensor)))
                .unwrap();
        };
        half(&format!("{PREFIX}{Q}.lora_A.weight"), &a);
        refused("q_proj has no lora_B");
        half(&format!("{PREFIX}{Q}.lora_B.default.weight"), &b);
        refused("q_proj has no lora_A");
        half(&format!("{PREFIX}{Q}.lora_magnitude_vector"), &b);
        refused("it belongs to DoRA");
        half(&format!("{PREFIX}lm_head.weight"), &b);
        refused("it is a whole weight");
        half(&format!("{PREFIX}{Q}.lora_A.weight"), &Tensor::zeros(&[4]));
        refused("not a matrix's");
        fs::write(to.join(WEIGHTS_FILE), [0; 4]).unwrap();
        refused("the file is truncated");
        fs::rename(to.join(WEIGHTS_FILE), to.join("adapter_model.bin")).unwrap();
        refused("adapter_model.bin, which is not supported");
        fs::remove_file(to.join("adapter_model.bin")).unwrap();
        refused("no such file or folder");
        let error = AdapterFile::open(&to.join("none")).unwrap_err().to_string();
        assert!(error.contains("no such folder"), "{error}");
    }
}
