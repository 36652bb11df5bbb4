//! GGUF files, built here by a small writer: what they hold comes back, and damage is an error.
#![allow(clippy::unwrap_used)] // Helpers outside #[test] functions are tests too.

use proptest::prelude::*;
use std::{collections::BTreeMap, fs, path::Path};
use tunesmith_model::{Checkpoint, Config, Error, GgufOptions, RopeScaling, save_gguf};
use tunesmith_tensor::{Tensor, quant::BlockType};

/// Number of the tensor type.
const F32: u32 = 0;
const F16: u32 = 1;
const Q8_0: u32 = 8;
const BF16: u32 = 30;

/// A metadata value as bytes with its type in front.
#[derive(Clone)]
struct Value(Vec<u8>);

fn typed(kind: u32, bytes: &[u8]) -> Value {
    Value([&kind.to_le_bytes()[..], bytes].concat())
}

fn u32_value(n: u32) -> Value {
    typed(4, &n.to_le_bytes())
}

fn f32_value(n: f32) -> Value {
    typed(6, &n.to_le_bytes())
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn text_value(s: &str) -> Value {
    typed(8, &text(s))
}

fn array_value(kind: u32, items: &[Vec<u8>]) -> Value {
    typed(9, &[&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat())
}

/// Name, shape (outermost first), type, bytes, and an offset to write instead of the right one.
type TensorEntry = (String, Vec<usize>, u32, Vec<u8>, Option<u64>);

/// Everything that goes into a file; tests change what they are about.
#[derive(Clone)]
struct Gguf {
    version: u32,
    pairs: Vec<(String, Value)>,
    tensors: Vec<TensorEntry>,
    num_pairs: Option<u64>,
    num_tensors: Option<u64>,
}

impl Gguf {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_pairs.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            out.extend(text(key));
            out.extend(&value.0);
        }
        let mut offset = 0u64;
        for (name, shape, kind, bytes, other) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|extent| out.extend((*extent as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(other.unwrap_or(offset).to_le_bytes());
            offset += bytes.len().next_multiple_of(32) as u64;
        }
        for (_, _, _, bytes, _) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }

    fn set(&mut self, key: &str, value: Value) {
        self.pairs.retain(|(k, _)| k != key);
        self.pairs.push((key.into(), value));
    }

    fn open(&self) -> Result<Checkpoint, Error> {
        open(&self.bytes())
    }

    fn refused(&self, wanted: &str) {
        let Err(error) = self.open() else { panic!("accepted, although: {wanted}") };
        assert!(matches!(&error, Error::Input(m) if m.contains(wanted) && m.contains("model.gguf")), "{error}");
    }
}

fn open(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    // The mapping outlives the name of the file.
    Checkpoint::open(&path)
}

fn encode(values: &[f32], kind: u32) -> Vec<u8> {
    match kind {
        F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Q8_0 => values
            .chunks(32)
            .flat_map(|block| {
                let d = half::f16::from_f32(block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
                let q = block.iter().map(|v| (v / d.to_f32()).round() as i8 as u8);
                d.to_le_bytes().into_iter().chain(q.collect::<Vec<_>>()).collect::<Vec<_>>()
            })
            .collect(),
        other => panic!("the writer has no type {other}"),
    }
}

/// Rows as GGUF stores q and k: [heads, 2, head_dim / 2, in] with the middle axes swapped.
fn swapped(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let cols = values.len() / heads / head_dim;
    let mut out = Vec::new();
    for head in 0..heads {
        for j in 0..head_dim / 2 {
            for side in 0..2 {
                let row = head * head_dim + side * head_dim / 2 + j;
                out.extend_from_slice(&values[row * cols..(row + 1) * cols]);
            }
        }
    }
    out
}

fn gguf_name(name: &str) -> String {
    let mut name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
    for (theirs, ours) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ] {
        name = name.replace(theirs, ours);
    }
    name
}

/// A file of `config` with the given weights, matrices encoded as `kind`.
fn gguf(config: &Config, weights: &BTreeMap<String, Tensor>, kind: u32) -> Gguf {
    let family = config.model_type.name();
    let mut pairs = vec![
        ("general.architecture".to_owned(), text_value(family)),
        ("general.type".to_owned(), text_value("model")),
        (format!("{family}.attention.layer_norm_rms_epsilon"), f32_value(config.rms_norm_eps)),
        (format!("{family}.rope.freq_base"), f32_value(config.rope.theta as f32)),
    ];
    for (key, n) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ] {
        pairs.push((format!("{family}.{key}"), u32_value(n as u32)));
    }
    if config.hidden_size != config.num_attention_heads * config.head_dim {
        pairs.push((format!("{family}.attention.key_length"), u32_value(config.head_dim as u32)));
    }
    for (key, id) in [("bos", 1), ("eos", 2), ("padding", 0)] {
        pairs.push((format!("tokenizer.ggml.{key}_token_id"), u32_value(id)));
    }
    let mut tensors = Vec::new();
    for (name, shape) in config.expected_tensors() {
        let values = weights[&name].data();
        let heads = match () {
            () if family != "llama" => 0,
            () if name.contains("q_proj") => config.num_attention_heads,
            () if name.contains("k_proj") => config.num_key_value_heads,
            () => 0,
        };
        let values = if heads > 0 { swapped(values, heads, config.head_dim) } else { values.to_vec() };
        let kind = if shape.len() == 1 { F32 } else { kind };
        tensors.push((gguf_name(&name), shape, kind, encode(&values, kind), None));
    }
    if let RopeScaling::Llama3 { .. } = config.rope.scaling {
        let mut plain = config.clone();
        plain.rope.scaling = RopeScaling::None;
        let (plain, scaled) = (plain.inverse_frequencies(), config.inverse_frequencies());
        let divisors: Vec<f32> = plain.iter().zip(scaled).map(|(p, s)| p / s).collect();
        tensors.push(("rope_freqs.weight".into(), vec![divisors.len()], F32, encode(&divisors, F32), None));
    }
    Gguf { version: 3, pairs, tensors, num_pairs: None, num_tensors: None }
}

/// The model as [`save_gguf`] writes it, without a tokenizer.
fn saved(config: &Config, weights: &BTreeMap<String, Tensor>) -> Checkpoint {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let options = GgufOptions { kind: BlockType::F32, name: "test", tokenizer: None };
    save_gguf(&path, config, options, |name, rows, out| {
        let cols = out.len() / rows.len();
        out.copy_from_slice(&weights[name].data()[rows.start * cols..rows.end * cols]);
        Ok(())
    })
    .unwrap();
    Checkpoint::open(&path).unwrap()
}

fn folder(name: &str) -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

fn weights(model: &Checkpoint) -> BTreeMap<String, Tensor> {
    model.tensor_names().map(|name| (name.to_owned(), model.read(name).unwrap())).collect()
}

/// A model of a few hundred weights, with biases.
fn small() -> Gguf {
    let text = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": true, "mlp_bias": true}"#;
    let config = Config::from_json(text, "small").unwrap();
    let tensor = |shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32 - 3.5).collect();
        Tensor::from_slice(shape, &values)
    };
    let weights = config.expected_tensors().into_iter().map(|(name, shape)| (name, tensor(&shape))).collect();
    gguf(&config, &weights, F32)
}

#[test]
fn a_model_comes_back_with_rows_rope_and_head_as_in_its_folder() {
    for name in ["tiny-llama2", "tiny-llama3", "tiny-qwen2", "tiny-qwen3"] {
        let original = folder(name);
        let wanted = weights(&original);
        let read = gguf(original.config(), &wanted, F32).open().unwrap();
        assert!(read.tensor_names().eq(original.tensor_names()));
        let saved = saved(original.config(), &wanted);
        for (name, tensor) in &wanted {
            let got = read.read(name).unwrap();
            assert_eq!((got.shape(), got.data()), (tensor.shape(), tensor.data()), "{name}");
            assert_eq!(saved.read(name).unwrap().data(), tensor.data(), "{name}");
        }
        let no_tokens =
            Config { bos_token_id: None, eos_token_id: Vec::new(), pad_token_id: None, ..read.config().clone() };
        assert_eq!(saved.config(), &no_tokens, "the two writers agree");
        let mut config = read.config().clone();
        assert!(!matches!(config.rope.scaling, RopeScaling::Factors(_)));
        for (ours, theirs) in config.inverse_frequencies().iter().zip(original.config().inverse_frequencies()) {
            assert!((ours / theirs - 1.0).abs() < 1e-6, "{ours} {theirs}");
        }
        config.rope = original.config().rope.clone();
        config.initializer_range = original.config().initializer_range;
        assert_eq!(&config, original.config());
        assert!(read.generation_config().is_none() && read.files().len() == 1);
    }
}

#[test]
fn encoded_weights_come_back_close() {
    let original = folder("tiny-llama3");
    let wanted = weights(&original);
    for (kind, tolerance) in [(F16, 1e-3), (BF16, 4e-3), (Q8_0, 1e-2)] {
        let read = gguf(original.config(), &wanted, kind).open().unwrap();
        for (name, tensor) in &wanted {
            let got = read.read(name).unwrap();
            let scale = tensor.data().iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let worst = tensor.data().iter().zip(got.data()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst <= tolerance * scale, "{name} as {kind}: {worst} of {scale}");
        }
    }
}

#[test]
fn biases_are_read_and_those_of_q_and_k_reordered() {
    let read = small().open().unwrap();
    assert!(read.config().attention_bias && read.config().mlp_bias);
    let plain = |n: usize| (0..n).map(|i| i as f32 - 3.5).collect::<Vec<_>>();
    assert_eq!(read.read("model.layers.0.self_attn.q_proj.bias").unwrap().data(), plain(8));
    assert_eq!(read.read("model.layers.0.self_attn.k_proj.bias").unwrap().data(), plain(4));
    assert_eq!(read.read("model.layers.0.mlp.down_proj.bias").unwrap().data(), plain(8));
    assert!(read.read("model.layers.1.self_attn.q_proj.bias").is_err());
}

#[test]
fn version_2_and_folders_with_one_file_are_read() {
    let mut file = small();
    file.version = 2;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.gguf"), file.bytes()).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().config().vocab_size, 8);
    fs::write(dir.path().join("b.gguf"), file.bytes()).unwrap();
    let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("holds 2 GGUF files") && error.contains("a.gguf"), "{error}");
}

#[test]
fn metadata_is_typed() {
    let mut file = small();
    file.set("tokenizer.ggml.tokens", array_value(8, &[text("a"), text("é"), text("")]));
    file.set("tokenizer.ggml.scores", array_value(6, &[1.5f32.to_le_bytes().to_vec()]));
    file.set(
        "tokenizer.ggml.token_type",
        array_value(5, &[3i32.to_le_bytes().to_vec(), (-1i32).to_le_bytes().to_vec()]),
    );
    file.set("tokenizer.ggml.add_bos_token", typed(7, &[1]));
    file.set("tokenizer.ggml.eot_token_id", u32_value(5));
    file.set("tokenizer.ggml.eom_token_id", typed(10, &6u64.to_le_bytes()));
    file.set("nested", array_value(9, &[[&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat()]));
    file.set("broken", typed(7, &[2]));
    let read = file.open().unwrap();
    let metadata = read.gguf_metadata().unwrap();
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap(), ["a", "é", ""]);
    assert_eq!(metadata.f32s("tokenizer.ggml.scores").unwrap().unwrap(), [1.5]);
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap().unwrap(), [3, -1]);
    assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert_eq!(metadata.string("general.architecture").unwrap().as_deref(), Some("llama"));
    assert_eq!(metadata.f32("llama.rope.freq_base").unwrap(), Some(10000.0));
    assert_eq!(read.config().eos_token_id, [2, 5, 6]);
    assert!(metadata.contains("nested") && !metadata.contains("tokenizer.ggml.merges"));
    assert_eq!(metadata.strings("tokenizer.ggml.merges").unwrap(), None);
    assert!(metadata.u32s("tokenizer.ggml.token_type").is_err(), "one of them is negative");
    for result in [
        metadata.string("tokenizer.ggml.tokens").map(|_| ()),
        metadata.strings("general.architecture").map(|_| ()),
        metadata.u32("general.architecture").map(|_| ()),
        metadata.f32("llama.block_count").map(|_| ()),
        metadata.bool("broken").map(|_| ()),
        metadata.u32s("nested").map(|_| ()),
    ] {
        assert!(matches!(result, Err(Error::Input(m)) if m.contains("is not")));
    }
}

#[test]
fn what_is_not_supported_is_refused() {
    let with = |key: &str, value: Value, wanted: &str| {
        let mut file = small();
        file.set(key, value);
        file.refused(wanted);
    };
    with("general.architecture", text_value("qwen2"), "the metadata qwen2.embedding_length is missing");
    with(
        "general.architecture",
        text_value("gemma2"),
        "the architecture is \"gemma2\", a family that this engine does not",
    );
    with("general.architecture", u32_value(1), "general.architecture is not a string");
    with("general.type", text_value("adapter"), "this is an adapter");
    with("general.type", text_value("mmproj"), "of type \"mmproj\"");
    with("general.alignment", u32_value(24), "general.alignment is 24");
    with("llama.rope.scaling.type", text_value("yarn"), "the rope scaling is \"yarn\"; supported are none and llama3");
    with("llama.rope.scaling.type", text_value("linear"), "the rope scaling is \"linear\"");
    with("llama.rope.scale_linear", f32_value(4.0), "linear rope scaling");
    with("llama.expert_count", u32_value(8), "mixture of 8 experts");
    with("split.count", typed(2, &3u16.to_le_bytes()), "one of 3 parts");
    with("llama.rope.dimension_count", u32_value(2), "partial rotation");
    with("llama.attention.value_length", u32_value(6), "value_length is 6");
    with("llama.attention.head_count_kv", u32_value(0), "num_key_value_heads is 0");
    with("llama.attention.head_count", u32_value(0), "head_count is 0");
    with("llama.block_count", u32_value(u32::MAX), "num_hidden_layers is 4294967295");
    with("llama.block_count", u32_value(2), "16 weights are missing");
    with("llama.vocab_size", u32_value(9), "token_embd.weight has 8 rows");
    with("llama.feed_forward_length", u32_value(5), "but the config asks for");
    with("llama.embedding_length", typed(5, &(-8i32).to_le_bytes()), "not a whole number");
    with("tokenizer.ggml.eos_token_id", u32_value(8), "outside the vocabulary");

    let mut file = small();
    file.version = 1;
    file.refused("GGUF version 1; supported are versions 2 and 3");
    file.version = 3u32.swap_bytes();
    file.refused("big-endian");
    let mut file = small();
    file.pairs.retain(|(key, _)| key != "llama.context_length");
    file.refused("llama.context_length is missing");
    let error = open(b"not a model").err().unwrap().to_string();
    assert!(error.contains("is no GGUF file"), "{error}");
}

#[test]
fn contradictions_between_tensors_are_refused() {
    let changed = |change: &dyn Fn(&mut Gguf), wanted: &str| {
        let mut file = small();
        change(&mut file);
        file.refused(wanted);
    };
    changed(&|f| f.tensors[3].2 = 4, "type number 4, which is not supported; supported are F32");
    changed(&|f| f.tensors[3].2 = 12, "no multiple of the 256 in a block of Q4_K");
    changed(&|f| f.tensors[3].4 = Some(8), "no multiple of the alignment 32");
    changed(&|f| f.tensors[3].4 = Some(0), "overlap");
    changed(&|f| f.tensors[3].4 = Some(1 << 40), "beyond the end of the file");
    changed(&|f| f.tensors[3].4 = Some(u64::MAX - 31), "beyond the end of the file");
    changed(&|f| f.tensors[3].1 = vec![1 << 40, 1 << 40], "absurd shape");
    changed(&|f| f.tensors[3].1 = vec![8, 0], "has the extent 0");
    changed(&|f| f.tensors[3].1 = vec![1; 5], "has 5 extents");
    changed(&|f| f.tensors[4].0 = f.tensors[3].0.clone(), "is there twice");
    changed(
        &|f| f.tensors[3].0 = "blk.0.attn_sinks.weight".into(),
        "unknown to the architecture llama: blk.0.attn_sinks.weight",
    );
    changed(&|f| f.tensors[3].0 = "blk.00.attn_q.weight".into(), "unknown to the architecture");
    changed(&|f| drop(f.tensors.remove(3)), "weight is missing: model.layers.0");
    changed(&|f| f.tensors[3].0 = "blk.7.attn_norm.weight".into(), "unknown to the architecture llama: blk.7");
    changed(&|f| f.pairs[5].0 = f.pairs[4].0.clone(), "is there twice");
    changed(&|f| f.tensors.push(("rope_freqs.weight".into(), vec![3], F32, vec![0; 12], None)), "3 rope divisors");
    changed(&|f| f.tensors.push(("rope_factors_long.weight".into(), vec![2], F32, vec![0; 8], None)), "longrope");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let mut file = small();
    let (name, _, _, bytes, _) = &mut file.tensors[7];
    assert_eq!(name, "blk.0.attn_output.weight");
    bytes[4 * 13..4 * 14].copy_from_slice(&f32::NAN.to_le_bytes());
    let read = file.open().unwrap();
    let error = read.read("model.layers.0.self_attn.o_proj.weight").unwrap_err().to_string();
    assert!(error.contains("model.layers.0.self_attn.o_proj.weight holds NaN at index [1, 5]"), "{error}");
}

#[test]
fn counts_that_lie_are_refused_without_allocating() {
    for absurd in [u64::MAX, 1 << 60, 1 << 32, 100_000] {
        let mut file = small();
        file.num_pairs = Some(absurd);
        file.refused("metadata pairs cannot be in the");
        let mut file = small();
        file.num_tensors = Some(absurd);
        file.refused("tensors cannot be in the");
        let mut file = small();
        file.set("a", typed(9, &[&4u32.to_le_bytes()[..], &absurd.to_le_bytes()].concat()));
        file.refused("elements of a cannot be in the");
        let mut file = small();
        file.set("a", typed(8, &absurd.to_le_bytes()));
        file.refused("are left");
    }
    let mut file = small();
    let mut deep = [&4u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
    for _ in 0..6 {
        deep = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &deep].concat();
    }
    file.set("a", typed(9, &deep));
    file.refused("nests arrays too deeply");
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = small().bytes();
    // Every byte of the header, some of the data.
    for len in (0..2000.min(bytes.len())).chain((0..bytes.len()).rev().step_by(61)) {
        let Err(error) = open(&bytes[..len]) else { panic!("{len} of {} bytes were accepted", bytes.len()) };
        assert!(matches!(error, Error::Input(_)), "{len}: {error}");
    }
    assert!(open(&bytes).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = small().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(model) = open(&bytes) {
            for name in model.tensor_names() {
                let _ = model.read(name);
            }
        }
    }
}
