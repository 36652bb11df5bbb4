//! GGUF files of architecture `llama`, versions 2 and 3, little endian.
//!
//! The file is: magic, version, number of tensors, number of metadata pairs; the pairs; name, extents (innermost first),
//! type and offset of each tensor; padding; the tensors' bytes. Every count is compared with the bytes that are left
//! before anything is done with it, and metadata stays in the mapped file until it is asked for, so a lying header
//! cannot make the reader allocate.

use super::{Source, Stored, WeightFile, few};
use crate::{
    Config, Error, Result, Rope, RopeScaling,
    config::{scaling_of_divisors, widen},
};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    sync::Arc,
};
use tunesmith_tensor::{
    MappedFile,
    quant::{BlockType, dequantize},
};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u32 = 32;
/// Arrays in arrays deeper than this are refused; no known key nests at all.
const MAX_NESTING: usize = 4;
/// Extents that a tensor may have.
const MAX_RANK: u32 = 4;
/// Least bytes that a metadata pair (empty key, type, one byte) and a tensor (empty name, rank, one extent, type, offset) take.
const PAIR_BYTES: u64 = 13;
const TENSOR_BYTES: u64 = 32;

/// Type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Self> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// Bytes of a value; the least, where it varies.
    fn bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// One metadata value: where its first element begins, and how many there are.
#[derive(Clone, Debug)]
struct Entry {
    kind: Kind,
    array: bool,
    count: usize,
    start: usize,
    /// The bytes of key, type and value.
    pair: Range<usize>,
}

/// The metadata of a GGUF file. Values are decoded when asked for.
#[derive(Clone, Debug)]
pub struct GgufMetadata {
    map: Arc<MappedFile>,
    file: String,
    entries: HashMap<String, Entry>,
}

impl GgufMetadata {
    /// True when there is a value named `key`.
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The string `key`; `None` when there is none. This and the other getters fail when the value has another type.
    pub fn string(&self, key: &str) -> Result<Option<String>> {
        Ok(self.strings_of(key, false, "a string")?.and_then(|mut values| values.pop()))
    }

    /// The array of strings `key`.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.strings_of(key, true, "an array of strings")
    }

    /// The whole number `key` (of any integer type, not negative).
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.one(key, "a whole number of 32 bits", integer_u32)
    }

    /// The array of whole numbers `key`.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.numbers(key, true, "an array of whole numbers of 32 bits", integer_u32)
    }

    /// The array of signed whole numbers `key`.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let decode = |kind, b: &[u8]| integer(kind, b).and_then(|n| i32::try_from(n).ok());
        self.numbers(key, true, "an array of signed whole numbers of 32 bits", decode)
    }

    /// The number `key`.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.one(key, "a number", float)
    }

    /// The array of numbers `key`.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.numbers(key, true, "an array of numbers", float)
    }

    /// The truth value `key`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.one(key, "true or false", |kind, b| (kind == Kind::Bool && b[0] < 2).then_some(b[0] == 1))
    }

    /// The pairs whose keys begin with `prefix`, as they stand in the file and in its order.
    pub(crate) fn raw_pairs(&self, prefix: &str) -> Vec<Vec<u8>> {
        let mut ranges: Vec<&Range<usize>> =
            self.entries.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, entry)| &entry.pair).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.into_iter().map(|range| self.map[range.clone()].to_vec()).collect()
    }

    fn one<T>(&self, key: &str, wanted: &str, decode: impl Fn(Kind, &[u8]) -> Option<T>) -> Result<Option<T>> {
        Ok(self.numbers(key, false, wanted, decode)?.and_then(|mut values| values.pop()))
    }

    fn wrong(&self, key: &str, wanted: &str) -> Error {
        Error::Input(format!("{}: the metadata {key} is not {wanted}", self.file))
    }

    fn numbers<T>(
        &self,
        key: &str,
        array: bool,
        wanted: &str,
        decode: impl Fn(Kind, &[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        if entry.array != array || matches!(entry.kind, Kind::String | Kind::Array) {
            return Err(self.wrong(key, wanted));
        }
        let size = entry.kind.bytes() as usize;
        let bytes = &self.map[entry.start..entry.start + entry.count * size];
        let values: Option<Vec<T>> = bytes.chunks_exact(size).map(|b| decode(entry.kind, b)).collect();
        values.map(Some).ok_or_else(|| self.wrong(key, wanted))
    }

    fn strings_of(&self, key: &str, array: bool, wanted: &str) -> Result<Option<Vec<String>>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        if entry.array != array || entry.kind != Kind::String {
            return Err(self.wrong(key, wanted));
        }
        let mut cursor = Cursor { bytes: &self.map, at: entry.start, file: &self.file };
        let mut values = Vec::new();
        for _ in 0..entry.count {
            values.push(cursor.string(key)?);
        }
        Ok(Some(values))
    }
}

/// The integer in `b`, whose length is that of `kind`.
fn integer(kind: Kind, b: &[u8]) -> Option<i64> {
    match (kind, b) {
        (Kind::U8, [a]) => Some(i64::from(*a)),
        (Kind::I8, [a]) => Some(i64::from(*a as i8)),
        (Kind::U16, [a, b]) => Some(i64::from(u16::from_le_bytes([*a, *b]))),
        (Kind::I16, [a, b]) => Some(i64::from(i16::from_le_bytes([*a, *b]))),
        (Kind::U32, b) => b.try_into().ok().map(|b| i64::from(u32::from_le_bytes(b))),
        (Kind::I32, b) => b.try_into().ok().map(|b| i64::from(i32::from_le_bytes(b))),
        (Kind::U64, b) => b.try_into().ok().and_then(|b| i64::try_from(u64::from_le_bytes(b)).ok()),
        (Kind::I64, b) => b.try_into().ok().map(i64::from_le_bytes),
        _ => None,
    }
}

fn integer_u32(kind: Kind, b: &[u8]) -> Option<u32> {
    integer(kind, b).and_then(|n| u32::try_from(n).ok())
}

fn float(kind: Kind, b: &[u8]) -> Option<f32> {
    match kind {
        Kind::F32 => b.try_into().ok().map(f32::from_le_bytes),
        Kind::F64 => b.try_into().ok().map(|b| f64::from_le_bytes(b) as f32),
        _ => None,
    }
}

/// A position in the file's bytes that cannot leave them.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn error(&self, what: &str) -> Error {
        Error::Input(format!("{}: {what} (at byte {}); the file is truncated or damaged", self.file, self.at))
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        if len > self.left() {
            return Err(self.error(&format!("{what} needs {len} bytes, {} are left", self.left())));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let b = self.take(4, what)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let (low, high) = (self.u32(what)?, self.u32(what)?);
        Ok(u64::from(low) | u64::from(high) << 32)
    }

    /// A count of things that take at least `bytes` bytes each.
    fn count(&mut self, bytes: u64, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        if count > self.left() / bytes {
            return Err(self.error(&format!("{count} {what} cannot be in the {} bytes that are left", self.left())));
        }
        Ok(count as usize)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(&format!("{what} is not UTF-8 text"))),
        }
    }

    fn kind(&mut self, key: &str) -> Result<Kind> {
        let id = self.u32(key)?;
        Kind::from_id(id).ok_or_else(|| self.error(&format!("the metadata {key} has the unknown type {id}")))
    }

    /// Passes over a value of `kind`; returns what is needed to find it again.
    fn entry(&mut self, kind: Kind, key: &str, depth: usize) -> Result<Entry> {
        match kind {
            Kind::Array => {
                if depth == MAX_NESTING {
                    return Err(self.error(&format!("the metadata {key} nests arrays too deeply")));
                }
                let kind = self.kind(key)?;
                let count = self.count(kind.bytes(), &format!("elements of {key}"))?;
                let start = self.at;
                match kind {
                    Kind::String | Kind::Array => {
                        for _ in 0..count {
                            self.entry(kind, key, depth + 1)?;
                        }
                    }
                    _ => {
                        self.take(count as u64 * kind.bytes(), key)?;
                    }
                }
                Ok(Entry { kind, array: true, count, start, pair: 0..0 })
            }
            Kind::String => {
                let start = self.at;
                let len = self.u64(key)?;
                self.take(len, key)?;
                Ok(Entry { kind, array: false, count: 1, start, pair: 0..0 })
            }
            _ => {
                let start = self.at;
                self.take(kind.bytes(), key)?;
                Ok(Entry { kind, array: false, count: 1, start, pair: 0..0 })
            }
        }
    }
}

/// One tensor of the file under its own name; `shape` is outermost first.
#[derive(Clone, Debug)]
struct GgufTensor {
    kind: BlockType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Opens the GGUF file at `path`.
pub(super) fn open(path: &Path) -> Result<Source> {
    let file = WeightFile::open(path.to_owned())?;
    let (metadata, mut tensors) = parse(&file)?;
    check_supported(&metadata, &tensors)?;
    let divisors = match tensors.remove("rope_freqs.weight") {
        Some(tensor) => {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            dequantize(tensor.kind, &file.map[tensor.range], &mut values);
            Some(values)
        }
        None => None,
    };
    let config = config(&metadata, &tensors, divisors)?;

    let mut renamed = BTreeMap::new();
    let mut unknown = Vec::new();
    for (name, tensor) in tensors {
        match hugging_face_name(&name) {
            Some(Renamed::Ignored) => {}
            Some(Renamed::To { name, rotated }) => {
                let heads = match rotated {
                    Rotated::No => None,
                    Rotated::Query => Some(config.num_attention_heads),
                    Rotated::Key => Some(config.num_key_value_heads),
                };
                let GgufTensor { kind, shape, range } = tensor;
                renamed.insert(name, Stored { file: 0, range, kind, shape, interleaved_heads: heads });
            }
            None => unknown.push(name),
        }
    }
    if !unknown.is_empty() {
        unknown.sort();
        let names: Vec<&str> = unknown.iter().map(String::as_str).collect();
        return Err(Error::Input(format!(
            "{}: {} tensors are unknown to the architecture llama: {}",
            metadata.file,
            names.len(),
            few(&names)
        )));
    }
    Ok(Source {
        config,
        generation_config: None,
        weights: vec![file],
        side_files: Vec::new(),
        tensors: renamed,
        metadata: Some(metadata),
    })
}

/// Reads the header. Tensors come back under their GGUF names with ranges inside the file.
fn parse(file: &WeightFile) -> Result<(GgufMetadata, HashMap<String, GgufTensor>)> {
    let name = file.path.display().to_string();
    let mut cursor = Cursor { bytes: &file.map, at: 0, file: &name };
    if cursor.take(4, "the magic number").ok() != Some(&MAGIC[..]) {
        return Err(Error::Input(format!(
            "{name} is no GGUF file (it does not begin with the letters GGUF); a model is a .gguf file or a Hugging Face folder"
        )));
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => {
            return Err(Error::Input(format!("{name} is a big-endian GGUF file; supported are little-endian ones")));
        }
        version => {
            return Err(Error::Input(format!("{name} is GGUF version {version}; supported are versions 2 and 3")));
        }
    }
    let num_tensors = cursor.count(TENSOR_BYTES, "tensors")?;
    let num_pairs = cursor.count(PAIR_BYTES, "metadata pairs")?;
    let mut entries = HashMap::new();
    for _ in 0..num_pairs {
        let start = cursor.at;
        let key = cursor.string("a metadata key")?;
        let kind = cursor.kind(&key)?;
        let mut entry = cursor.entry(kind, &key, 0)?;
        entry.pair = start..cursor.at;
        if entries.insert(key.clone(), entry).is_some() {
            return Err(cursor.error(&format!("the metadata {key} is there twice")));
        }
    }
    let mut found = Vec::new();
    for _ in 0..num_tensors {
        found.push(tensor_info(&mut cursor)?);
    }
    let header = cursor.at as u64;
    let metadata = GgufMetadata { map: file.map.clone(), file: name.clone(), entries };

    let alignment = metadata.u32("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 16 {
        return Err(Error::Input(format!("{name}: general.alignment is {alignment}, it must be a small power of two")));
    }
    let data = header.next_multiple_of(u64::from(alignment));
    let mut tensors = HashMap::new();
    let mut ranges = Vec::new();
    for (tensor, kind, shape, offset, bytes) in found {
        let error = |what: &str| Error::Input(format!("{name}: the tensor {tensor} {what}; the file is damaged"));
        if offset % u64::from(alignment) != 0 {
            return Err(error(&format!("begins at {offset}, no multiple of the alignment {alignment}")));
        }
        let range = data.checked_add(offset).and_then(|start| Some(start..start.checked_add(bytes as u64)?));
        let Some(range) = range.filter(|range| range.end <= file.map.len() as u64) else {
            return Err(Error::Input(format!(
                "{name}: the tensor {tensor} ({bytes} bytes at {offset}) reaches beyond the end of the file of {} bytes; the file is truncated",
                file.map.len()
            )));
        };
        let range = range.start as usize..range.end as usize;
        ranges.push((range.start, range.end, tensor.clone()));
        if tensors.insert(tensor.clone(), GgufTensor { kind, shape, range }).is_some() {
            return Err(error("is there twice"));
        }
    }
    ranges.sort();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            let (first, second) = (&pair[0].2, &pair[1].2);
            return Err(Error::Input(format!("{name}: the tensors {first} and {second} overlap; the file is damaged")));
        }
    }
    Ok((metadata, tensors))
}

/// Name, type, shape, offset and bytes of the next tensor.
fn tensor_info(cursor: &mut Cursor) -> Result<(String, BlockType, Vec<usize>, u64, usize)> {
    let name = cursor.string("a tensor name")?;
    let rank = cursor.u32(&name)?;
    if !(1..=MAX_RANK).contains(&rank) {
        return Err(cursor.error(&format!("the tensor {name} has {rank} extents, there must be 1 to {MAX_RANK}")));
    }
    let mut shape = Vec::new();
    for _ in 0..rank {
        let extent = cursor.u64(&name)?;
        let fits = usize::try_from(extent).ok().filter(|extent| *extent > 0);
        shape.push(fits.ok_or_else(|| cursor.error(&format!("the tensor {name} has the extent {extent}")))?);
    }
    shape.reverse();
    let id = cursor.u32(&name)?;
    let Some(kind) = BlockType::from_ggml(id) else {
        let supported = BlockType::ALL.map(BlockType::name).join(", ");
        return Err(Error::Input(format!(
            "{}: the tensor {name} has the type number {id}, which is not supported; supported are {supported}",
            cursor.file
        )));
    };
    let offset = cursor.u64(&name)?;
    let row = shape[shape.len() - 1];
    if !row.is_multiple_of(kind.block_len()) {
        return Err(cursor.error(&format!(
            "the tensor {name} has rows of {row} elements, which is no multiple of the {} in a block of {}",
            kind.block_len(),
            kind.name()
        )));
    }
    let elements = shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
    match elements.and_then(|elements| kind.bytes_for(elements)) {
        Some(bytes) => Ok((name, kind, shape, offset, bytes)),
        None => Err(cursor.error(&format!("the tensor {name} has the absurd shape {shape:?}"))),
    }
}

/// Refuses what is a valid GGUF file, but no LLaMA model that the engine can run.
fn check_supported(metadata: &GgufMetadata, tensors: &HashMap<String, GgufTensor>) -> Result<()> {
    let file = &metadata.file;
    let error = |what: String| Err(Error::Input(format!("{file}: {what}")));
    match metadata.string("general.type")?.as_deref() {
        None | Some("model") => {}
        Some("adapter") => return error("this is an adapter, not a model; supported adapters are PEFT folders".into()),
        Some(other) => return error(format!("this is a GGUF file of type {other:?}, not a model")),
    }
    match metadata.string("general.architecture")?.as_deref() {
        Some("llama") => {}
        Some(other) => return error(format!("the architecture is {other:?}; supported is \"llama\"")),
        None => return error("general.architecture is not given; supported is \"llama\"".into()),
    }
    if let Some(parts) = metadata.u32("split.count")?.filter(|parts| *parts > 1) {
        return error(format!("this is one of {parts} parts of a split model; join the parts into one file first"));
    }
    if let Some(experts) = metadata.u32("llama.expert_count")?.filter(|experts| *experts > 0) {
        return error(format!("this is a mixture of {experts} experts; supported are dense LLaMA models"));
    }
    let scaling = metadata.string("llama.rope.scaling.type")?.unwrap_or_else(|| "none".into());
    if scaling != "none" {
        return error(format!(
            "the rope scaling is {scaling:?}; supported are none and llama3 (the tensor rope_freqs.weight)"
        ));
    }
    for key in ["llama.rope.scale_linear", "llama.rope.scaling.factor"] {
        if let Some(factor) = metadata.f32(key)?.filter(|factor| *factor != 1.0 && *factor != 0.0) {
            return error(format!("{key} is {factor}; linear rope scaling is not supported"));
        }
    }
    if tensors.contains_key("rope_factors_long.weight") || tensors.contains_key("rope_factors_short.weight") {
        return error("the rope scaling is \"longrope\"; supported are none and llama3".into());
    }
    Ok(())
}

fn config(
    metadata: &GgufMetadata,
    tensors: &HashMap<String, GgufTensor>,
    divisors: Option<Vec<f32>>,
) -> Result<Config> {
    let file = &metadata.file;
    let error = |what: String| Error::Input(format!("{file}: {what}"));
    let optional = |key: &str| Ok::<_, Error>(metadata.u32(key)?.map(|n| n as usize));
    let size = |key: &str| optional(key)?.ok_or_else(|| error(format!("the metadata {key} is missing")));

    let hidden_size = size("llama.embedding_length")?;
    let num_attention_heads = size("llama.attention.head_count")?;
    let num_key_value_heads = optional("llama.attention.head_count_kv")?.unwrap_or(num_attention_heads);
    if num_attention_heads == 0 {
        return Err(error("llama.attention.head_count is 0".into()));
    }
    let rope_dim = optional("llama.rope.dimension_count")?;
    let head_dim = match optional("llama.attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => return Err(error("llama.embedding_length is not a multiple of llama.attention.head_count".into())),
    };
    if let Some(other) = rope_dim.filter(|dim| *dim != head_dim) {
        return Err(error(format!(
            "llama.rope.dimension_count is {other}, but a head has {head_dim} dimensions; partial rotation is not supported"
        )));
    }
    if let Some(other) = optional("llama.attention.value_length")?.filter(|dim| *dim != head_dim) {
        return Err(error(format!(
            "llama.attention.value_length is {other}, but keys have {head_dim}; supported are equal lengths"
        )));
    }
    let vocab_size = match tensors.get("token_embd.weight") {
        Some(tensor) => tensor.shape[0],
        None => return Err(error("the tensor token_embd.weight is missing".into())),
    };
    if let Some(other) = optional("llama.vocab_size")?.filter(|n| *n != vocab_size) {
        return Err(error(format!("llama.vocab_size is {other}, but token_embd.weight has {vocab_size} rows")));
    }
    let theta = metadata.f32("llama.rope.freq_base")?.map_or(10000.0, widen);
    let Some(rms_norm_eps) = metadata.f32("llama.attention.layer_norm_rms_epsilon")? else {
        return Err(error("the metadata llama.attention.layer_norm_rms_epsilon is missing".into()));
    };
    let token = |key: &str| metadata.u32(&format!("tokenizer.ggml.{key}_token_id"));
    let mut eos_token_id = Vec::new();
    for key in ["eos", "eot", "eom"] {
        if let Some(id) = token(key)?
            && !eos_token_id.contains(&id)
        {
            eos_token_id.push(id);
        }
    }
    let mut config = Config {
        vocab_size,
        hidden_size,
        intermediate_size: size("llama.feed_forward_length")?,
        num_hidden_layers: size("llama.block_count")?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps,
        max_position_embeddings: size("llama.context_length")?,
        tie_word_embeddings: !tensors.contains_key("output.weight"),
        attention_bias: tensors.contains_key("blk.0.attn_q.bias"),
        mlp_bias: tensors.contains_key("blk.0.ffn_gate.bias"),
        bos_token_id: token("bos")?,
        eos_token_id,
        pad_token_id: token("padding")?,
        initializer_range: 0.02,
        rope: Rope { theta, scaling: RopeScaling::None },
        id2label: Vec::new(),
    };
    // Checked first with plain rope: the divisors are only meaningful for a sane head.
    config.check(file)?;
    if let Some(divisors) = divisors {
        config.rope.scaling = RopeScaling::Factors(divisors);
        config.check(file)?;
        if let RopeScaling::Factors(divisors) = &config.rope.scaling {
            config.rope.scaling = scaling_of_divisors(theta, head_dim, divisors);
        }
        config.check(file)?;
    }
    Ok(config)
}

/// Whose rows are in the order of interleaved rotation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rotated {
    No,
    Query,
    Key,
}

#[derive(Debug, PartialEq)]
enum Renamed {
    To {
        name: String,
        rotated: Rotated,
    },
    /// Derived values that old files carry along.
    Ignored,
}

/// Hugging Face's name of the GGUF tensor `name`.
fn hugging_face_name(name: &str) -> Option<Renamed> {
    let to = |name: String, rotated| Some(Renamed::To { name, rotated });
    match name {
        "token_embd.weight" => return to("model.embed_tokens.weight".into(), Rotated::No),
        "output_norm.weight" => return to("model.norm.weight".into(), Rotated::No),
        "output.weight" => return to("lm_head.weight".into(), Rotated::No),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u16 = layer.parse().ok().filter(|n: &u16| n.to_string() == layer)?;
    let (module, part) = rest.rsplit_once('.')?;
    let (module, rotated, has_bias) = match module {
        "attn_norm" => ("input_layernorm", Rotated::No, false),
        "ffn_norm" => ("post_attention_layernorm", Rotated::No, false),
        "attn_q" => ("self_attn.q_proj", Rotated::Query, true),
        "attn_k" => ("self_attn.k_proj", Rotated::Key, true),
        "attn_v" => ("self_attn.v_proj", Rotated::No, true),
        "attn_output" => ("self_attn.o_proj", Rotated::No, true),
        "ffn_gate" => ("mlp.gate_proj", Rotated::No, true),
        "ffn_up" => ("mlp.up_proj", Rotated::No, true),
        "ffn_down" => ("mlp.down_proj", Rotated::No, true),
        "attn_rot_embd" | "rope_freqs" => return Some(Renamed::Ignored),
        _ => return None,
    };
    let known = part == "weight" || (part == "bias" && has_bias);
    if known { to(format!("model.layers.{layer}.{module}.{part}"), rotated) } else { None }
}
