//! `adapter_config.json`: which layers an adapter changes, and how.

use super::{SCORE, folder::CONFIG_FILE};
use crate::{
    Error, Result,
    config::Fields,
    import::read_text,
    token_rows::{self, TokenIndices},
};
use regex::Regex;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};

/// Which modules are meant, by their path in the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Full paths (`model.layers.0.self_attn.q_proj`) or their last parts (`q_proj`).
    List(Vec<String>),
    /// A regular expression for the whole path, or `all-linear`: every linear layer but the head.
    Pattern(String),
}

impl Modules {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::List(names) => names.iter().any(|name| ends_with_path(module, name)),
            Self::Pattern(all) if all == "all-linear" => module.ends_with("_proj"),
            Self::Pattern(pattern) => whole(pattern).is_ok_and(|regex| regex.is_match(module)),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::List(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
        }
    }
}

/// True when `path` is `name` or ends with `.name`.
fn ends_with_path(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// `pattern` for a whole path.
fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// `pattern` for the last parts of a path, as the keys of rank_pattern and alpha_pattern mean it.
fn last_parts(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
}

/// PEFT's LoRA config: the fields that change what is computed. Names, meanings and defaults are PEFT's.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub target_modules: Modules,
    /// Modules left out although `target_modules` names them.
    pub exclude_modules: Option<Modules>,
    /// Layers that are adapted; all when `None`. Counts for modules that `target_modules` lists by their last parts.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names before the layer number; any when empty.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `r`, by a regular expression for the last parts of the path.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of modules that differ from `lora_alpha`.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scale by alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// Tokens whose rows the adapter has, by matrix (`embed_tokens`, `lm_head`), ascending; PEFT's `trainable_token_indices`.
    pub trainable_token_indices: TokenIndices,
    /// Modules that are saved as a whole: `["score"]` with a classification head, else empty.
    pub modules_to_save: Vec<String>,
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
    pub task_type: Option<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Modules::List(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            trainable_token_indices: TokenIndices::new(),
            modules_to_save: Vec::new(),
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

impl AdapterConfig {
    /// Reads the config of the adapter in the folder `dir`.
    ///
    /// # Errors
    /// As [`AdapterConfig::from_json`]; when there is none.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join(CONFIG_FILE);
        if !file.exists() {
            let why = if dir.exists() { "it holds no adapter_config.json" } else { "no such folder" };
            return Err(Error::Input(format!("{} is no adapter: {why}", dir.display())));
        }
        Self::from_json(&read_text(&file)?, &file.display().to_string())
    }

    /// Reads `text`, the content of an `adapter_config.json` that messages call `file`. Unknown keys are passed over.
    ///
    /// # Errors
    /// [`Error::Input`] for broken JSON, wrong values, and every variant of LoRA that computes something else.
    pub fn from_json(text: &str, file: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::Input(format!("{file}: not valid JSON: {e}")))?;
        let Value::Object(map) = &value else {
            return Err(Error::Input(format!("{file}: an adapter config must be a JSON object")));
        };
        let fields = Fields { map, file };
        check_supported(&fields)?;
        let default = Self::default();
        let whole_numbers = |key: &str| -> Result<Option<Vec<usize>>> {
            let Some(value) = fields.get(key) else { return Ok(None) };
            let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            let numbers: Option<Vec<usize>> = values.iter().map(|v| v.as_u64().map(|n| n as usize)).collect();
            // An empty list counts as none.
            let numbers = numbers.ok_or_else(|| fields.wrong(key, value, "a layer number or a list of them"))?;
            Ok(Some(numbers).filter(|numbers| !numbers.is_empty()))
        };
        let layers_pattern = match modules(&fields, "layers_pattern")? {
            None => Vec::new(),
            Some(Modules::List(names)) => names,
            Some(Modules::Pattern(name)) if name.is_empty() => Vec::new(),
            Some(Modules::Pattern(name)) => vec![name],
        };
        let config = Self {
            r: fields.size("r", default.r, 1..=1 << 16)?,
            lora_alpha: fields.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: fields.number("lora_dropout")?.unwrap_or(default.lora_dropout),
            target_modules: modules(&fields, "target_modules")?.unwrap_or(default.target_modules),
            exclude_modules: modules(&fields, "exclude_modules")?,
            layers_to_transform: whole_numbers("layers_to_transform")?,
            layers_pattern,
            rank_pattern: pattern(&fields, "rank_pattern", "a whole number above 0", |v| {
                v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 16).contains(n))
            })?,
            alpha_pattern: pattern(&fields, "alpha_pattern", "a number", Value::as_f64)?,
            use_rslora: fields.flag("use_rslora")?,
            trainable_token_indices: token_indices(&fields)?,
            modules_to_save: match fields.get("modules_to_save").and_then(Value::as_array) {
                Some(names) if !names.is_empty() => vec![SCORE.into()],
                _ => Vec::new(),
            },
            base_model_name_or_path: fields.text("base_model_name_or_path")?.map(str::to_owned),
            revision: fields.text("revision")?.map(str::to_owned),
            task_type: fields.text("task_type")?.map(str::to_owned),
        };
        config.check(file)?;
        Ok(config)
    }

    /// Checks values and regular expressions; `file` is named in the message.
    ///
    /// # Errors
    /// [`Error::Input`] that names the field and its value.
    pub fn check(&self, file: &str) -> Result<()> {
        let error = |what: String| Err(Error::Input(format!("{file}: {what}")));
        if self.r == 0 || self.rank_pattern.values().any(|r| *r == 0) {
            return error("the rank r is 0, it must be at least 1".into());
        }
        if let Some(alpha) =
            std::iter::once(&self.lora_alpha).chain(self.alpha_pattern.values()).find(|a| !a.is_finite())
        {
            return error(format!("lora_alpha is {alpha}, it must be finite"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return error(format!("lora_dropout is {}, it must be at least 0 and below 1", self.lora_dropout));
        }
        let of_modules = [Some(&self.target_modules), self.exclude_modules.as_ref()].into_iter().flatten();
        let whole_paths = of_modules.filter_map(|modules| match modules {
            Modules::Pattern(pattern) => Some((pattern, whole(pattern))),
            Modules::List(_) => None,
        });
        let keys = self.rank_pattern.keys().chain(self.alpha_pattern.keys()).chain(&self.layers_pattern);
        let keys = keys.map(|pattern| (pattern, last_parts(pattern)));
        for (pattern, compiled) in whole_paths.chain(keys) {
            if let Err(e) = compiled {
                return error(format!("{pattern:?} is not a supported regular expression: {e}"));
            }
        }
        Ok(())
    }

    /// True when the module at `path` (`model.layers.0.self_attn.q_proj`) is adapted.
    pub fn matches(&self, path: &str) -> bool {
        if self.exclude_modules.as_ref().is_some_and(|excluded| excluded.matches(path)) {
            return false;
        }
        if !self.target_modules.matches(path) {
            return false;
        }
        // As in PEFT, a full path or a pattern already says which layer is meant.
        let Modules::List(names) = &self.target_modules else { return true };
        match &self.layers_to_transform {
            Some(layers) if !names.iter().any(|name| name == path) => {
                self.layer_of(path).is_some_and(|layer| layers.contains(&layer))
            }
            _ => true,
        }
    }

    fn layer_of(&self, path: &str) -> Option<usize> {
        let any = [r"[^.]*".to_owned()];
        let names = if self.layers_pattern.is_empty() { &any[..] } else { &self.layers_pattern[..] };
        names.iter().find_map(|name| {
            let regex = Regex::new(&format!(r"(?:^|\.)(?:{name})\.(\d+)\.")).ok()?;
            regex.captures(path)?.get(1)?.as_str().parse().ok()
        })
    }

    /// The rank of the module at `path`.
    pub fn rank_for(&self, path: &str) -> usize {
        named(&self.rank_pattern, path).unwrap_or(self.r)
    }

    /// What B A x is multiplied by for the module at `path`.
    pub fn scaling_for(&self, path: &str) -> f32 {
        let alpha = named(&self.alpha_pattern, path).unwrap_or(self.lora_alpha);
        let rank = self.rank_for(path) as f64;
        (if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank }) as f32
    }

    /// PEFT's two ways to write it: a list where only the embedding has rows, an object otherwise.
    fn token_indices_json(&self) -> Value {
        match self.trainable_token_indices.get("embed_tokens") {
            Some(ids) if self.trainable_token_indices.len() == 1 => json!(ids),
            _ => json!(self.trainable_token_indices),
        }
    }

    /// The `adapter_config.json`: sorted keys, and only those that PEFT has had for long, so that old readers accept it.
    pub fn to_json(&self) -> Value {
        let mut value = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, v)| (k.clone(), whole_if_possible(*v))).collect::<Map<_, _>>(),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": if self.layers_pattern.is_empty() { Value::Null } else { json!(self.layers_pattern) },
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": whole_if_possible(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": self.revision,
            "target_modules": self.target_modules.json(),
            "task_type": self.task_type,
            "trainable_token_indices": self.token_indices_json(),
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        // Old readers refuse what they do not know: it is written where it says something.
        if self.trainable_token_indices.is_empty()
            && let Some(map) = value.as_object_mut()
        {
            map.remove("trainable_token_indices");
        }
        if let Some(excluded) = &self.exclude_modules {
            value["exclude_modules"] = excluded.json();
        }
        value.sort_all_objects();
        value
    }
}

/// A list means the embedding, and a head that is tied to it.
fn token_indices(fields: &Fields) -> Result<TokenIndices> {
    const KEY: &str = "trainable_token_indices";
    let wrong = |value: &Value| fields.wrong(KEY, value, "a list of token ids, or an object of such lists");
    let ids = |value: &Value| {
        let ids = value.as_array().and_then(|list| {
            list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect::<Option<Vec<u32>>>()
        });
        ids.ok_or_else(|| wrong(value))
    };
    let mut indices = TokenIndices::new();
    match fields.get(KEY) {
        None => {}
        Some(Value::Object(map)) => {
            for (module, list) in map {
                // PEFT takes full paths too.
                let module = module.strip_prefix("model.").unwrap_or(module);
                indices.insert(module.to_owned(), ids(list)?);
            }
        }
        Some(list) => drop(indices.insert("embed_tokens".into(), ids(list)?)),
    }
    indices.retain(|_, ids| !ids.is_empty());
    token_rows::check(&indices).map_err(|what| fields.error(&what))?;
    Ok(indices)
}

/// PEFT declares alpha as an integer, and some readers insist.
fn whole_if_possible(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// The value of the first key that matches the last parts of `path`.
fn named<T: Copy>(pattern: &BTreeMap<String, T>, path: &str) -> Option<T> {
    let matches = |key: &str| ends_with_path(path, key) || last_parts(key).is_ok_and(|regex| regex.is_match(path));
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
}

fn modules(fields: &Fields, key: &str) -> Result<Option<Modules>> {
    let Some(value) = fields.get(key) else { return Ok(None) };
    let wrong = || fields.wrong(key, value, "a string or a list of strings");
    match value {
        Value::String(pattern) => Ok(Some(Modules::Pattern(pattern.clone()))),
        Value::Array(names) => {
            let names: Option<Vec<String>> = names.iter().map(|name| name.as_str().map(str::to_owned)).collect();
            Ok(Some(Modules::List(names.ok_or_else(wrong)?)))
        }
        _ => Err(wrong()),
    }
}

fn pattern<T>(
    fields: &Fields,
    key: &str,
    wanted: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<BTreeMap<String, T>> {
    let mut pattern = BTreeMap::new();
    match fields.get(key) {
        None => {}
        Some(Value::Object(map)) => {
            for (name, value) in map {
                let read = read(value).ok_or_else(|| fields.wrong(&format!("{key}.{name}"), value, wanted))?;
                pattern.insert(name.clone(), read);
            }
        }
        Some(value) => return Err(fields.wrong(key, value, "an object")),
    }
    Ok(pattern)
}

/// Refuses variants of LoRA that compute something else than `W x + s B A x` on the original base.
fn check_supported(fields: &Fields) -> Result<()> {
    const SUPPORTED: &str = "supported is plain LoRA on linear layers";
    match fields.text("peft_type")? {
        Some("LORA") => {}
        Some(other) => return Err(fields.error(&format!("peft_type is {other:?}; {SUPPORTED}"))),
        None => return Err(fields.error(&format!("peft_type is missing; {SUPPORTED} (\"LORA\")"))),
    }
    if let Some(bias) = fields.text("bias")?.filter(|bias| *bias != "none") {
        return Err(fields.error(&format!("bias is {bias:?}; {SUPPORTED} with bias \"none\"")));
    }
    // Any value other than these defaults turns the variant on.
    let variants = [
        "use_dora",
        "lora_bias",
        "fan_in_fan_out",
        "use_qalora",
        "use_bdlora",
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "megatron_config",
    ];
    for key in variants {
        let Some(value) = fields.get(key) else { continue };
        let off = *value == Value::Bool(false) || value.as_array().is_some_and(|list| list.is_empty());
        if !off {
            return Err(fields.error(&format!("{key} is {value}; {SUPPORTED} without it")));
        }
    }
    if let Some(value) = fields.get("modules_to_save") {
        let names = value.as_array().map_or(&[][..], Vec::as_slice);
        // PEFT names both for every classifier, whichever of the two it has.
        let heads = value.is_array() && names.iter().all(|name| name == SCORE || name == "classifier");
        if !heads || (!names.is_empty() && !names.iter().any(|name| name == SCORE)) {
            return Err(
                fields.error(&format!("modules_to_save is {value}; supported is a classification head, [\"score\"]"))
            );
        }
    }
    // These change the base weights when training begins, so their A and B do not belong to the original base.
    if let Some(init) = fields.get("init_lora_weights").and_then(Value::as_str) {
        let changes_base = ["pissa", "olora", "corda", "loftq", "lora_ga"];
        if changes_base.iter().any(|name| init.to_ascii_lowercase().starts_with(name)) {
            return Err(fields.error(&format!(
                "init_lora_weights is {init:?}, which changes the base weights; convert the adapter to plain LoRA first"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: Value) -> Result<AdapterConfig> {
        let mut config = json!({"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]});
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        AdapterConfig::from_json(&config.to_string(), "a/adapter_config.json")
    }

    fn refused(changes: Value, wanted: &str) {
        let error = read(changes).unwrap_err();
        assert!(
            matches!(&error, Error::Input(m) if m.starts_with("a/adapter_config.json: ") && m.contains(wanted)),
            "{error}"
        );
    }

    const Q: &str = "model.layers.0.self_attn.q_proj";
    const UP: &str = "model.layers.1.mlp.up_proj";

    #[test]
    fn absent_keys_have_the_defaults_of_peft() {
        let config = AdapterConfig::from_json(r#"{"peft_type": "LORA"}"#, "f").unwrap();
        assert_eq!(config, AdapterConfig { task_type: None, ..Default::default() });
        let unknown = read(json!({"a_key_of_the_future": {"x": 1}, "lora_alpha": 16, "lora_dropout": 0.05})).unwrap();
        assert_eq!((unknown.lora_alpha, unknown.lora_dropout), (16.0, 0.05));
    }

    #[test]
    fn modules_are_matched_by_last_parts_full_path_or_pattern() {
        let matches = |target: Value, path: &str| read(json!({"target_modules": target})).unwrap().matches(path);
        assert!(matches(json!(["q_proj"]), Q) && matches(json!(["self_attn.q_proj"]), Q) && matches(json!([Q]), Q));
        assert!(!matches(json!(["proj"]), Q) && !matches(json!(["k_proj"]), Q) && !matches(json!([]), Q));
        assert!(matches(json!("all-linear"), Q) && matches(json!("all-linear"), UP));
        assert!(!matches(json!("all-linear"), "lm_head") && !matches(json!("all-linear"), "model.embed_tokens"));
        assert!(matches(json!(r".*\.(q|k)_proj"), Q) && !matches(json!(r".*\.(q|k)_proj"), UP));
        assert!(!matches(json!("q_proj"), Q), "a pattern is for the whole path");
        let excluded = read(json!({"exclude_modules": ["layers.0.self_attn.q_proj"]})).unwrap();
        assert!(!excluded.matches(Q) && excluded.matches("model.layers.1.self_attn.q_proj"));
        assert_eq!(excluded.to_json()["exclude_modules"], json!(["layers.0.self_attn.q_proj"]));
    }

    #[test]
    fn layers_can_be_chosen() {
        let second = "model.layers.1.self_attn.q_proj";
        for layers in [json!(1), json!([1, 7])] {
            let config = read(json!({"layers_to_transform": layers})).unwrap();
            assert!(config.matches(second) && !config.matches(Q));
        }
        let named = |pattern: Value| read(json!({"layers_to_transform": [1], "layers_pattern": pattern})).unwrap();
        assert!(named(json!("layers")).matches(second) && named(json!(["h", "layers"])).matches(second));
        assert!(!named(json!("h")).matches(second) && named(json!("")).matches(second));
        assert!(read(json!({"layers_to_transform": []})).unwrap().matches(Q));
        let full = read(json!({"layers_to_transform": [1], "target_modules": [Q]})).unwrap();
        assert!(full.matches(Q), "a full path says which layer is meant");
        refused(json!({"layers_to_transform": "first"}), "layers_to_transform is \"first\"");
    }

    #[test]
    fn ranks_and_alphas_may_differ_by_module() {
        let changes = json!({"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 16, r"layers\.0\..*q_proj": 2}, "alpha_pattern": {"up_proj": 4}});
        let mut config = read(changes).unwrap();
        assert_eq!(
            (config.rank_for(Q), config.rank_for(UP), config.rank_for("model.layers.1.self_attn.q_proj")),
            (2, 16, 4)
        );
        assert_eq!((config.scaling_for(Q), config.scaling_for(UP)), (4.0, 0.25));
        config.use_rslora = true;
        assert_eq!(config.scaling_for(UP), 1.0);
        let again = AdapterConfig::from_json(&config.to_json().to_string(), "f").unwrap();
        assert_eq!(again, AdapterConfig { task_type: None, ..config });
        refused(json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern.q_proj is 0");
        refused(json!({"rank_pattern": {"(": 1}}), "\"(\" is not a supported regular expression");
        refused(json!({"alpha_pattern": {"q_proj": "x"}}), "alpha_pattern.q_proj is \"x\"");
    }

    #[test]
    fn variants_that_compute_something_else_are_refused() {
        refused(json!({"peft_type": "IA3"}), "peft_type is \"IA3\"; supported is plain LoRA");
        refused(json!({"peft_type": null}), "peft_type is missing");
        refused(json!({"bias": "all"}), "bias is \"all\"");
        for key in ["use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"] {
            refused(json!({key: true}), &format!("{key} is true"));
            assert!(read(json!({key: false})).is_ok());
        }
        refused(json!({"modules_to_save": ["lm_head"]}), "modules_to_save is [\"lm_head\"]");
        refused(json!({"layer_replication": [[0, 2], [1, 3]]}), "layer_replication is");
        refused(json!({"init_lora_weights": "pissa_niter_16"}), "changes the base weights");
        assert!(read(json!({"init_lora_weights": "gaussian", "modules_to_save": []})).is_ok());
        let classifier = read(json!({"modules_to_save": ["classifier", "score"]})).unwrap();
        assert_eq!(classifier.to_json()["modules_to_save"], json!(["score"]));
        refused(json!({"modules_to_save": ["classifier"]}), "modules_to_save is");
        refused(json!({"r": 0}), "r is 0");
        refused(json!({"r": 1.5}), "r is 1.5");
        refused(json!({"lora_dropout": 1.0}), "lora_dropout is 1");
        refused(json!({"target_modules": 3}), "target_modules is 3");
        refused(json!({"target_modules": [3]}), "target_modules is [3]");
        refused(json!({"target_modules": "(?=x)"}), "not a supported regular expression");
        assert!(AdapterConfig::from_json("{", "f").unwrap_err().to_string().contains("line 1 column"));
    }
}
