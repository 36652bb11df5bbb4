//! What a LLaMA model is: sizes, rope, special tokens, with Hugging Face's names and defaults.

use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::{f64::consts::TAU, ops::RangeInclusive};

/// The config of a LLaMA model. Field names, meanings and defaults are those of Hugging Face's `LlamaConfig`.
///
/// A value that came out of [`Config::from_json`] or an opened model is consistent: every size is at least 1 and so
/// small that no product of sizes overflows.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Every token that ends a generation; empty when the file says null.
    pub eos_token_id: Vec<u32>,
    pub pad_token_id: Option<u32>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
    pub rope: Rope,
    /// Names of the classes of a classifier (`LlamaForSequenceClassification`), by class; empty for a language model.
    pub id2label: Vec<String>,
}

/// Names of tensors with their shapes.
pub(crate) type NamedShapes = Vec<(String, Vec<usize>)>;

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair `i` of a head turns by `theta^(-2i / head_dim)` radians a position.
    pub theta: f64,
    /// What is done to the frequencies.
    pub scaling: RopeScaling,
}

/// Changes to the rope frequencies that stretch the context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain rope.
    None,
    /// Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above original context / this are divided by the factor.
        low_freq_factor: f64,
        /// Wavelengths below original context / this are kept.
        high_freq_factor: f64,
        /// Context length before stretching, in positions.
        original_max_position_embeddings: usize,
    },
    /// A divisor for each frequency \[head_dim / 2\], as GGUF files hold it; only when they are not Llama 3's.
    Factors(Vec<f32>),
}

// Far above any model, far below what could overflow when a few of them are multiplied.
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 26;
const WIDTH: RangeInclusive<usize> = 1..=1 << 22;
const LAYERS: RangeInclusive<usize> = 1..=1 << 12;
const HEADS: RangeInclusive<usize> = 1..=1 << 14;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;
const CLASSES: RangeInclusive<usize> = 2..=1 << 16;

impl Config {
    /// Reads `text`, the content of a `config.json` that messages call `file`, in the spelling of transformers 4
    /// (`rope_theta` and `rope_scaling`) or 5 (`rope_parameters`). Absent keys have the class defaults.
    ///
    /// # Errors
    /// [`Error::Input`] for broken JSON, a model that is no LLaMA, an unsupported option, or sizes that contradict each
    /// other.
    pub fn from_json(text: &str, file: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::Input(format!("{file}: not valid JSON: {e}")))?;
        let Value::Object(map) = &value else {
            return Err(Error::Input(format!("{file}: a model config must be a JSON object")));
        };
        let fields = Fields { map, file };
        fields.check_architecture()?;

        let hidden_size = fields.size("hidden_size", 4096, WIDTH)?;
        let num_attention_heads = fields.size("num_attention_heads", 32, HEADS)?;
        let head_dim = match fields.get("head_dim") {
            Some(_) => fields.size("head_dim", 0, HEADS)?,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(fields.error(&format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, and head_dim is not given"
                )));
            }
        };
        let max_position_embeddings = fields.size("max_position_embeddings", 2048, POSITIONS)?;
        let config = Self {
            vocab_size: fields.size("vocab_size", 32000, VOCABULARY)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 11008, WIDTH)?,
            num_hidden_layers: fields.size("num_hidden_layers", 32, LAYERS)?,
            num_attention_heads,
            num_key_value_heads: fields.size("num_key_value_heads", num_attention_heads, HEADS)?,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            bos_token_id: fields.token_ids("bos_token_id", Some(1))?.first().copied(),
            eos_token_id: fields.token_ids("eos_token_id", Some(2))?,
            pad_token_id: fields.token_ids("pad_token_id", None)?.first().copied(),
            initializer_range: fields.number("initializer_range")?.unwrap_or(0.02) as f32,
            rope: fields.rope()?,
            id2label: fields.id2label()?,
        };
        config.check(file)?;
        Ok(config)
    }

    /// Checks that the sizes fit each other; `file` is named in the message.
    pub(crate) fn check(&self, file: &str) -> Result<()> {
        let error = |what: String| Err(Error::Input(format!("{file}: {what}")));
        let sizes = [
            ("vocab_size", self.vocab_size, VOCABULARY),
            ("hidden_size", self.hidden_size, WIDTH),
            ("intermediate_size", self.intermediate_size, WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS),
            ("num_attention_heads", self.num_attention_heads, HEADS),
            ("num_key_value_heads", self.num_key_value_heads, HEADS),
            ("head_dim", self.head_dim, HEADS),
            ("max_position_embeddings", self.max_position_embeddings, POSITIONS),
        ];
        for (name, size, range) in sizes {
            if !range.contains(&size) {
                return error(format!("{name} is {size}, it must be from {} to {}", range.start(), range.end()));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return error(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return error(format!("head_dim is {}, rope needs an even number", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return error(format!("rms_norm_eps is {}, it must be above 0 and below 1", self.rms_norm_eps));
        }
        if !(self.initializer_range >= 0.0 && self.initializer_range <= 1.0) {
            return error(format!("initializer_range is {}, it must be from 0 to 1", self.initializer_range));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 0.0) {
            return error(format!("rope_theta is {}, it must be a positive number", self.rope.theta));
        }
        match &self.rope.scaling {
            RopeScaling::None => {}
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let fine = factor.is_finite() && *factor >= 1.0 && *low_freq_factor > 0.0;
                if !(fine && high_freq_factor.is_finite() && high_freq_factor > low_freq_factor) {
                    return error(format!(
                        "llama3 rope with factor {factor}, low_freq_factor {low_freq_factor} and high_freq_factor {high_freq_factor}: \
                         it must hold that factor >= 1 and 0 < low_freq_factor < high_freq_factor"
                    ));
                }
                if !POSITIONS.contains(original_max_position_embeddings) {
                    return error(format!(
                        "original_max_position_embeddings is {original_max_position_embeddings}, it must be from {} to {}",
                        POSITIONS.start(),
                        POSITIONS.end()
                    ));
                }
            }
            RopeScaling::Factors(divisors) => {
                let half = self.head_dim / 2;
                if divisors.len() != half || !divisors.iter().all(|d| d.is_finite() && *d > 0.0) {
                    return error(format!("{} rope divisors, there must be {half} positive ones", divisors.len()));
                }
            }
        }
        let ids = self.bos_token_id.iter().map(|id| ("bos_token_id", id));
        for (name, id) in ids.chain(self.eos_token_id.iter().map(|id| ("eos_token_id", id))) {
            if *id as usize >= self.vocab_size {
                return error(format!("{name} {id} is outside the vocabulary of {} tokens", self.vocab_size));
            }
        }
        Ok(())
    }

    /// The `config.json` that transformers 4 and 5 both read, with sorted keys; `dtype` is `float32`, `bfloat16` or
    /// `float16`.
    ///
    /// # Errors
    /// [`Error::Input`] when the rope divisors of a GGUF file have no equivalent in this format.
    pub fn to_json(&self, dtype: &str) -> Result<Value> {
        let rope_scaling = match &self.rope.scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                json!({
                    "factor": factor,
                    "high_freq_factor": high_freq_factor,
                    "low_freq_factor": low_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                    "rope_type": "llama3",
                })
            }
            RopeScaling::Factors(_) => {
                return Err(Error::Input(
                    "this model's rope divisors (rope_freqs.weight of its GGUF file) match no llama3 scaling, so a config.json cannot \
                     express them; start from the model's Hugging Face folder instead"
                        .into(),
                ));
            }
        };
        let eos_token_id = match self.eos_token_id[..] {
            [] => Value::Null,
            [id] => json!(id),
            _ => json!(self.eos_token_id),
        };
        let mut value = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": widen(self.initializer_range),
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "pretraining_tp": 1,
            "rms_norm_eps": widen(self.rms_norm_eps),
            "rope_scaling": rope_scaling,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if self.is_classifier() {
            let ids: Vec<String> = (0..self.id2label.len()).map(|id| id.to_string()).collect();
            value["architectures"] = json!(["LlamaForSequenceClassification"]);
            value["id2label"] = ids.iter().cloned().zip(self.id2label.iter().map(|label| json!(label))).collect();
            value["label2id"] = self.id2label.iter().cloned().zip((0..).map(|id: u32| json!(id))).collect();
            value["problem_type"] = json!("single_label_classification");
            value.sort_all_objects();
        }
        Ok(value)
    }

    /// Radians a position that each pair of a head turns by, [head_dim / 2], after scaling. Every step is rounded to f32
    /// where transformers rounds (`modeling_rope_utils.py`), since positions multiply the difference.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let plain = |i: usize| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / self.rope.theta.powf(f64::from(exponent)) as f32
        };
        let half = 0..self.head_dim / 2;
        match &self.rope.scaling {
            RopeScaling::None => half.map(plain).collect(),
            RopeScaling::Factors(divisors) => half.zip(divisors).map(|(i, divisor)| plain(i) / divisor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (factor, low, high) = (*factor as f32, *low_freq_factor as f32, *high_freq_factor as f32);
                let original = *original_max_position_embeddings as f32;
                let scaled = |frequency: f32| {
                    let wavelength = TAU as f32 / frequency;
                    if wavelength > original / low {
                        frequency / factor
                    } else if wavelength < original / high {
                        frequency
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                half.map(plain).map(scaled).collect()
            }
        }
    }

    /// Names and shapes of all weights, in the order of the model: embedding, layers, norm, head. Linear weights are
    /// [out, in]. A tied head is not listed.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            for (module, [rows, cols]) in self.linear_modules() {
                let name = format!("model.layers.{layer}.{module}");
                tensors.push((format!("{name}.weight"), vec![rows, cols]));
                let biased = if module.starts_with("mlp") { self.mlp_bias } else { self.attention_bias };
                if biased {
                    tensors.push((format!("{name}.bias"), vec![rows]));
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![hidden]));
            }
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        if self.is_classifier() {
            tensors.push(("score.weight".to_owned(), vec![self.id2label.len(), hidden]));
        } else if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Whether its head scores classes at the last token of a sequence instead of tokens.
    pub fn is_classifier(&self) -> bool {
        !self.id2label.is_empty()
    }

    /// The seven linear modules of a layer, such as `self_attn.q_proj`, with the shape [out, in] of their weights.
    pub fn linear_modules(&self) -> [(&'static str, [usize; 2]); 7] {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let query = self.num_attention_heads * self.head_dim;
        let key = self.num_key_value_heads * self.head_dim;
        [
            ("self_attn.q_proj", [query, hidden]),
            ("self_attn.k_proj", [key, hidden]),
            ("self_attn.v_proj", [key, hidden]),
            ("self_attn.o_proj", [hidden, query]),
            ("mlp.gate_proj", [intermediate, hidden]),
            ("mlp.up_proj", [intermediate, hidden]),
            ("mlp.down_proj", [hidden, intermediate]),
        ]
    }

    /// Number of weights, a tied head counted once.
    pub fn num_params(&self) -> usize {
        self.expected_tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// The f64 whose shortest decimal is that of `value`: 1e-5 stays 1e-5 when it is written as f64.
pub(crate) fn widen(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The scaling that the divisors of a GGUF file (`rope_freqs.weight`, [head_dim / 2]) stand for.
///
/// Such files hold the divisors only. Llama 3's parameters are found again where there are some that give the same
/// divisors. Scaling all of low, high and original by one number changes nothing, so low is taken as 1; parameters in
/// use (high 4, original a power of two) are tried before a fit.
pub(crate) fn scaling_of_divisors(theta: f64, head_dim: usize, divisors: &[f32]) -> RopeScaling {
    let factor = divisors.iter().copied().fold(1.0f32, f32::max);
    if divisors.iter().all(|d| (d - 1.0).abs() < 1e-6) {
        return RopeScaling::None;
    }
    let factor = widen(factor);
    let frequency = |i: usize| theta.powf(-((2 * i) as f64) / head_dim as f64);
    let candidate = |high: f64, original: f64| {
        let matches = divisors.iter().enumerate().all(|(i, divisor)| {
            let wanted = llama3_divisor(frequency(i), factor, 1.0, high, original);
            (f64::from(*divisor) / wanted - 1.0).abs() < 1e-5
        });
        matches.then_some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: high,
            original_max_position_embeddings: original as usize,
        })
    };
    let usual = [8192.0, 4096.0, 2048.0, 16384.0, 32768.0, 65536.0, 131072.0, 1024.0, 512.0, 256.0, 128.0, 64.0];
    if let Some(found) = usual.iter().find_map(|original| candidate(4.0, *original)) {
        return found;
    }
    // Between the two plateaus a divisor is 1 / ((1 - s) / factor + s) with s = (original / wavelength - 1) / (high - 1),
    // a straight line in the frequency; two points of it give both unknowns.
    let line: Vec<(f64, f64)> = divisors
        .iter()
        .enumerate()
        .map(|(i, d)| (frequency(i) / TAU, f64::from(*d)))
        .filter(|(_, d)| *d > 1.0 + 1e-4 && *d < factor * (1.0 - 1e-4))
        .map(|(turns, d)| (turns, (1.0 / d - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    if let ([(x0, s0), .., (x1, s1)], true) = (&line[..], factor > 1.0) {
        let slope = (s0 - s1) / (x0 - x1);
        let high = 1.0 - 1.0 / (s0 - slope * x0);
        let original = slope * (high - 1.0);
        // Files come from round numbers; the exact fit is the last resort.
        for high in [high.round(), (high * 4.0).round() / 4.0, high] {
            let original = (original / high * high).round();
            let sane = high > 1.0 && POSITIONS.contains(&(original as usize));
            if let Some(found) = sane.then(|| candidate(high, original)).flatten() {
                return found;
            }
        }
    }
    RopeScaling::Factors(divisors.to_vec())
}

/// What Llama 3's rope divides `frequency` (radians a position) by.
pub(crate) fn llama3_divisor(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = TAU / frequency;
    if wavelength > original / low {
        factor
    } else if wavelength < original / high {
        1.0
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

/// The architecture of a classifier.
const CLASSIFIER: &str = "LlamaForSequenceClassification";

/// The names that transformers gives classes without a name.
pub(crate) fn default_labels(num_classes: usize) -> Vec<String> {
    (0..num_classes).map(|id| format!("LABEL_{id}")).collect()
}

/// Typed access to the keys of a JSON object; null counts as absent.
pub(crate) struct Fields<'a> {
    pub(crate) map: &'a Map<String, Value>,
    pub(crate) file: &'a str,
}

impl<'a> Fields<'a> {
    pub(crate) fn error(&self, what: &str) -> Error {
        Error::Input(format!("{}: {what}", self.file))
    }

    pub(crate) fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.error(&format!("{key} is {value}, it must be {wanted}"))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn size(&self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        size.ok_or_else(|| self.wrong(key, value, &format!("a whole number from {} to {}", range.start(), range.end())))
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, value, "a number"))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, value, "a string"))
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.error(&format!("the llama3 rope needs {key}")))
    }

    /// A token id or a list of them. Negative ids mean "none" in old files.
    fn token_ids(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>> {
        let values = match self.map.get(key) {
            None => return Ok(default.into_iter().collect()),
            Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(values)) => &values[..],
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids = Vec::new();
        for value in values {
            let id = value.as_i64().filter(|id| *id <= i64::from(u32::MAX));
            let id = id.ok_or_else(|| self.wrong(key, value, "a token id or a list of them"))?;
            if let Ok(id) = u32::try_from(id)
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    fn check_architecture(&self) -> Result<()> {
        const SUPPORTED: &str = "supported is model_type \"llama\" with the architecture LlamaForCausalLM or \
                                 LlamaForSequenceClassification";
        let architectures: Vec<&str> = match self.get("architectures") {
            None => Vec::new(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Some(value) => return Err(self.wrong("architectures", value, "a list of names")),
        };
        let model_type = self.text("model_type")?;
        if model_type.is_none() && architectures.is_empty() {
            return Err(self.error(&format!("neither model_type nor architectures is given; {SUPPORTED}")));
        }
        if let Some(other) = model_type.filter(|name| *name != "llama") {
            return Err(self.error(&format!("model_type is {other:?}; {SUPPORTED}")));
        }
        let supported = |name: &&str| ["LlamaForCausalLM", CLASSIFIER].contains(name);
        if !architectures.is_empty() && !architectures.iter().any(supported) {
            return Err(self.error(&format!("the architecture is {}; {SUPPORTED}", architectures.join(", "))));
        }
        if let Some(act) = self.text("hidden_act")?.filter(|name| *name != "silu") {
            return Err(self.error(&format!("hidden_act is {act:?}; supported is \"silu\"")));
        }
        if let Some(quantization) = self.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("some method");
            return Err(self.error(&format!(
                "the weights are quantised ({method}); supported are plain f32, bf16 and f16 safetensors, and GGUF files for quantised weights"
            )));
        }
        Ok(())
    }

    /// Names of the classes where the architecture is a classifier; transformers' names where the file gives none.
    fn id2label(&self) -> Result<Vec<String>> {
        let architectures = self.get("architectures").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if !architectures.iter().any(|name| name == CLASSIFIER) {
            return Ok(Vec::new());
        }
        if let Some(kind) = self.text("problem_type")?.filter(|kind| *kind != "single_label_classification") {
            return Err(self.error(&format!("problem_type is {kind:?}; supported is \"single_label_classification\"")));
        }
        let labels = match self.get("id2label") {
            None => default_labels(self.size("num_labels", 2, CLASSES)?),
            Some(Value::Object(map)) => {
                let label = |id: usize| map.get(&id.to_string()).and_then(Value::as_str).map(str::to_owned);
                let labels: Option<Vec<String>> = (0..map.len()).map(label).collect();
                labels.ok_or_else(|| self.error("id2label must name the classes 0, 1, 2 and so on"))?
            }
            Some(value) => return Err(self.wrong("id2label", value, "an object")),
        };
        if !CLASSES.contains(&labels.len()) {
            return Err(self.error(&format!("{} classes; supported are 2 to {}", labels.len(), CLASSES.end())));
        }
        Ok(labels)
    }

    /// Both spellings of rope: `rope_parameters`, or `rope_scaling` with `rope_theta` beside it.
    fn rope(&self) -> Result<Rope> {
        let (key, scaling) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", Some(value)),
            (None, value) => ("rope_scaling", value),
        };
        let empty = Map::new();
        let map = match scaling {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(value) => return Err(self.wrong(key, value, "an object")),
        };
        let inner = Fields { map, file: self.file };
        let theta = match inner.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10000.0),
        };
        for fields in [self, &inner] {
            if let Some(part) = fields.number("partial_rotary_factor")?.filter(|part| *part != 1.0) {
                return Err(self.error(&format!("partial_rotary_factor is {part}; supported is 1")));
            }
        }
        let kind = match inner.text("rope_type")? {
            Some(kind) => kind,
            None => inner.text("type")?.unwrap_or("default"),
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "llama3" => {
                let original = "original_max_position_embeddings";
                if inner.get(original).is_none() {
                    return Err(self.error(&format!("the llama3 rope needs {original}")));
                }
                RopeScaling::Llama3 {
                    factor: inner.required("factor")?,
                    low_freq_factor: inner.required("low_freq_factor")?,
                    high_freq_factor: inner.required("high_freq_factor")?,
                    original_max_position_embeddings: inner.size(original, 0, POSITIONS)?,
                }
            }
            other => {
                return Err(self.error(&format!(
                    "the rope type is {other:?} (in {key}); supported are \"default\" and \"llama3\""
                )));
            }
        };
        Ok(Rope { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        Config::from_json(text, "m/config.json")
    }

    fn refused(changes: Value, wanted: &str) {
        let mut config: Value =
            serde_json::from_str(include_str!("../tests/fixtures/tiny-llama3/config.json")).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let error = read(&config.to_string()).unwrap_err();
        assert!(matches!(&error, Error::Input(m) if m.starts_with("m/config.json: ") && m.contains(wanted)), "{error}");
    }

    fn llama3(original: usize, factor: f64) -> RopeScaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        }
    }

    fn plain() -> Config {
        read(r#"{"model_type": "llama", "head_dim": 64}"#).unwrap()
    }

    #[test]
    fn classifiers_name_their_classes() {
        let text = r#"{"architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "head_dim": 64"#;
        let config = read(&format!(r#"{text}, "id2label": {{"0": "bad", "1": "good"}}}}"#)).unwrap();
        assert_eq!(config.id2label, ["bad", "good"]);
        let json = config.to_json("float32").unwrap();
        assert_eq!((&json["architectures"][0], &json["label2id"]["good"]), (&json!(CLASSIFIER), &json!(1)));
        assert_eq!(read(&json.to_string()).unwrap(), config);
        let last = config.expected_tensors().pop().unwrap();
        assert_eq!(last, ("score.weight".into(), vec![2, config.hidden_size]));
        assert_eq!(read(&format!(r#"{text}, "num_labels": 3}}"#)).unwrap().id2label, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        for (more, wanted) in [
            (r#""id2label": {"1": "a", "2": "b"}"#, "id2label must name the classes 0, 1, 2"),
            (r#""id2label": {"0": "a"}"#, "1 classes; supported are 2"),
            (r#""problem_type": "regression""#, "problem_type is \"regression\""),
        ] {
            let error = read(&format!("{text}, {more}}}")).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        assert!(!plain().is_classifier());
    }

    #[test]
    fn absent_keys_have_the_class_defaults() {
        let config = read(r#"{"model_type": "llama"}"#).unwrap();
        assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (32000, 4096, 11008));
        assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (32, 32, 128));
        assert_eq!((config.num_hidden_layers, config.max_position_embeddings), (32, 2048));
        assert_eq!((config.rms_norm_eps, config.initializer_range), (1e-6, 0.02));
        assert_eq!((config.bos_token_id, &config.eos_token_id[..], config.pad_token_id), (Some(1), &[2][..], None));
        assert_eq!(config.rope, Rope { theta: 10000.0, scaling: RopeScaling::None });
        assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
        assert_eq!(config.num_params(), 6_738_415_616, "Llama 2 7B");
    }

    #[test]
    fn both_spellings_of_rope_and_of_token_ids_are_read() {
        let old = r#"{"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5, "torch_dtype": "bfloat16", "eos_token_id": [7, 9],
            "bos_token_id": null, "pad_token_id": -1, "num_key_value_heads": null, "rope_scaling": {"type": "llama3", "factor": 8,
            "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
        let new = r#"{"model_type": "llama", "dtype": "bfloat16", "eos_token_id": [7, 9], "bos_token_id": null, "rope_scaling": null,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
        assert_eq!(read(old).unwrap(), read(new).unwrap());
        let config = read(old).unwrap();
        assert_eq!(config.rope, Rope { theta: 500000.0, scaling: llama3(8192, 8.0) });
        assert_eq!((config.bos_token_id, config.eos_token_id, config.pad_token_id), (None, vec![7, 9], None));
    }

    #[test]
    fn what_is_written_is_read_back() {
        for text in [
            include_str!("../tests/fixtures/tiny-llama2/config.json"),
            include_str!("../tests/fixtures/tiny-llama3/config.json"),
            r#"{"model_type": "llama", "attention_bias": true, "mlp_bias": true, "eos_token_id": null, "rms_norm_eps": 1e-5}"#,
        ] {
            let config = read(text).unwrap();
            let written = config.to_json("float32").unwrap();
            assert_eq!(read(&written.to_string()).unwrap(), config);
            let eps = written["rms_norm_eps"].as_f64().unwrap();
            assert!(eps == 1e-5 || eps == 1e-6, "{eps}: not the f32 value with all its digits");
            let keys: Vec<_> = written.as_object().unwrap().keys().collect();
            assert!(keys.is_sorted());
        }
        let mut config = plain();
        config.rope.scaling = RopeScaling::Factors(vec![1.5; 32]);
        assert!(config.to_json("float32").unwrap_err().to_string().contains("rope_freqs.weight"));
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        refused(json!({"model_type": "mistral"}), "model_type is \"mistral\"; supported is");
        refused(json!({"architectures": ["LlamaForTokenClassification"]}), "LlamaForTokenClassification");
        refused(json!({"hidden_act": "gelu"}), "supported is \"silu\"");
        refused(json!({"quantization_config": {"quant_method": "gptq"}}), "(gptq)");
        for kind in ["yarn", "linear", "dynamic", "longrope"] {
            refused(
                json!({"rope_parameters": {"rope_type": kind, "factor": 2.0}}),
                "supported are \"default\" and \"llama3\"",
            );
            refused(json!({"rope_parameters": null, "rope_scaling": {"type": kind, "factor": 2.0}}), "rope_scaling");
        }
        refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5");
        assert!(read("{}").unwrap_err().to_string().contains("neither model_type nor architectures"));
        assert!(read("[1]").unwrap_err().to_string().contains("must be a JSON object"));
        assert!(read("{\n  \"model_type\": llama}").unwrap_err().to_string().contains("line 2 column"));
    }

    #[test]
    fn contradictions_and_absurd_numbers_are_refused() {
        refused(json!({"num_key_value_heads": 3}), "not a multiple of num_key_value_heads 3");
        refused(json!({"head_dim": 15}), "head_dim is 15");
        refused(
            json!({"head_dim": null, "num_attention_heads": 5, "num_key_value_heads": 5}),
            "hidden_size 64 is not a multiple",
        );
        refused(json!({"hidden_size": 0}), "hidden_size is 0");
        refused(json!({"vocab_size": u64::MAX}), "vocab_size is 18446744073709551615");
        refused(json!({"num_hidden_layers": 4097}), "from 1 to 4096");
        refused(json!({"num_hidden_layers": -1}), "num_hidden_layers is -1");
        refused(json!({"intermediate_size": 160.5}), "intermediate_size is 160.5");
        refused(json!({"hidden_size": "64"}), "hidden_size is \"64\"");
        refused(json!({"rms_norm_eps": 0.0}), "rms_norm_eps is 0");
        refused(json!({"initializer_range": 2}), "initializer_range is 2");
        refused(json!({"tie_word_embeddings": 1}), "true or false");
        refused(json!({"eos_token_id": 512}), "eos_token_id 512 is outside the vocabulary of 512");
        refused(json!({"bos_token_id": "x"}), "bos_token_id is \"x\"");
        refused(json!({"rope_parameters": {"rope_theta": 0}}), "rope_theta is 0");
        refused(json!({"rope_parameters": 4}), "rope_parameters is 4");
        let rope = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        refused(json!({"rope_parameters": rope}), "low_freq_factor < high_freq_factor");
        refused(
            json!({"rope_parameters": {"rope_type": "llama3"}}),
            "the llama3 rope needs original_max_position_embeddings",
        );
        refused(
            json!({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 64}}),
            "the llama3 rope needs factor",
        );
    }

    /// Values of transformers 5.23.0, as bits.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let bits = |text: &str| -> Vec<u32> {
            read(text).unwrap().inverse_frequencies().iter().map(|f| f.to_bits()).collect()
        };
        let tiny2 = [0x3f800000, 0x3e5c9d35, 0x3d3e1e95, 0x3c23d70a, 0x3b0d3169, 0x39f35a5c];
        assert_eq!(bits(include_str!("../tests/fixtures/tiny-llama2/config.json")), tiny2);
        let tiny3 = [0x3f800000, 0x3da29e0c, 0x3b9a08c8, 0x3a6ef74f, 0x39395d21, 0x380fc8f8, 0x36df10c4, 0x35ad07a7];
        assert_eq!(bits(include_str!("../tests/fixtures/tiny-llama3/config.json")), tiny3);
        let mut config = plain();
        config.rope = Rope { theta: 500000.0, scaling: llama3(8192, 32.0) };
        let values = config.inverse_frequencies();
        let wanted =
            [(1, 0x3f29e1c6), (14, 0x3b527720), (15, 0x3aa9279b), (16, 0x39e13620), (17, 0x38cb98f7), (31, 0x33ca41b0)];
        for (i, wanted) in wanted {
            assert_eq!(values[i].to_bits(), wanted, "frequency {i}");
        }
    }

    #[test]
    fn llama3_parameters_are_found_from_divisors() {
        let divisors = |theta: f64, dim: usize, factor, low, high, original| -> Vec<f32> {
            (0..dim / 2)
                .map(|i| llama3_divisor(theta.powf(-((2 * i) as f64) / dim as f64), factor, low, high, original) as f32)
                .collect()
        };
        for (dim, factor, original) in [(128, 8.0, 8192), (64, 32.0, 8192), (16, 8.0, 64), (128, 16.0, 4096)] {
            let found = scaling_of_divisors(500000.0, dim, &divisors(500000.0, dim, factor, 1.0, 4.0, original as f64));
            let mut config = plain();
            config.head_dim = dim;
            config.rope = Rope { theta: 500000.0, scaling: found };
            let close = config.inverse_frequencies();
            config.rope.scaling = llama3(original, factor);
            assert!(matches!(&config.rope.scaling, RopeScaling::Llama3 { .. }));
            for (a, b) in close.iter().zip(config.inverse_frequencies()) {
                assert!((a / b - 1.0).abs() < 2e-6, "{dim} {factor} {original}: {a} {b}");
            }
        }
        assert_eq!(scaling_of_divisors(5e5, 128, &divisors(5e5, 128, 8.0, 1.0, 4.0, 8192.0)), llama3(8192, 8.0));
        // Unusual parameters come back in the form with low = 1.
        let odd = scaling_of_divisors(10000.0, 128, &divisors(10000.0, 128, 4.0, 2.0, 6.0, 3000.0));
        let wanted = RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 3.0,
            original_max_position_embeddings: 1500,
        };
        assert_eq!(odd, wanted);
        assert_eq!(scaling_of_divisors(10000.0, 8, &[1.0; 4]), RopeScaling::None);
        let other = [1.0, 3.0, 2.0, 5.0];
        assert_eq!(scaling_of_divisors(10000.0, 8, &other), RopeScaling::Factors(other.to_vec()));
    }

    #[test]
    fn tensors_are_listed_in_order_with_biases_and_head() {
        let mut config = read(include_str!("../tests/fixtures/tiny-llama3/config.json")).unwrap();
        let tensors = config.expected_tensors();
        assert_eq!(tensors.len(), 3 + 9 * 3);
        assert_eq!(tensors[0], ("model.embed_tokens.weight".into(), vec![512, 64]));
        assert_eq!(tensors[2], ("model.layers.0.self_attn.k_proj.weight".into(), vec![32, 64]));
        assert_eq!(tensors[29], ("lm_head.weight".into(), vec![512, 64]));
        (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) = (true, true, true);
        let tensors = config.expected_tensors();
        assert_eq!(tensors.len(), 2 + 16 * 3);
        assert_eq!(tensors[4], ("model.layers.0.self_attn.k_proj.bias".into(), vec![32]));
        assert_eq!(tensors.last().unwrap().0, "model.norm.weight");
    }
}
