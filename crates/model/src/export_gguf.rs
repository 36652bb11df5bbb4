//! Writing GGUF files of architecture `llama`, version 3, tensor by tensor and panel by panel: no matrix is ever whole in
//! memory.

use crate::{Config, Error, GgufMetadata, Result, RopeScaling, config::llama3_divisor};
use std::{io::Write, ops::Range, path::Path};
use tunesmith_files::atomic;
use tunesmith_tensor::{quant::BlockType, quant_encode::quantize};

const ALIGNMENT: usize = 32;
/// Elements of a matrix that are in memory at a time.
const PANEL: usize = 1 << 22;

/// How [`save_gguf`] writes.
#[derive(Clone, Copy, Debug)]
pub struct GgufOptions<'a> {
    /// Encoding of the matrices, one of [`tunesmith_tensor::quant_encode::ENCODABLE`]. Vectors are f32 always.
    pub kind: BlockType,
    /// `general.name`.
    pub name: &'a str,
    /// A file whose tokenizer is taken over; without one the file has no tokenizer.
    pub tokenizer: Option<&'a GgufMetadata>,
}

/// One tensor of the file.
struct Entry {
    /// Hugging Face's name.
    name: String,
    gguf_name: String,
    shape: Vec<usize>,
    kind: BlockType,
    /// Heads of q and k, whose rows are stored for interleaved rotation.
    interleaved_heads: Option<usize>,
}

impl Entry {
    fn bytes(&self) -> Option<usize> {
        self.kind.bytes_for(self.shape.iter().product())
    }
}

/// Writes a model to the file `path`. `rows` fills a buffer [rows, columns] with the asked rows of a weight, named and ordered
/// as Hugging Face does; a vector is one row.
///
/// # Errors
/// [`Error::Input`] when a matrix does not fill whole blocks; [`Error::Io`] when writing fails; whatever `rows` returns. What was
/// at `path` before is then still there.
pub fn save_gguf(
    path: &Path,
    config: &Config,
    options: GgufOptions<'_>,
    mut rows: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let entries = entries(config, options.kind)?;
    let io = |e| Error::io("cannot write", path, e);
    let divisors = rope_divisors(config);
    atomic::write_with(path, |out| {
        let mut header = header(config, &options)?;
        let mut offset = 0;
        let mut tensors = Vec::new();
        let mut declare = |name: &str, shape: &[usize], kind: BlockType, bytes: usize| {
            string(&mut tensors, name);
            tensors.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| tensors.extend((*n as u64).to_le_bytes()));
            tensors.extend(kind.ggml().to_le_bytes());
            tensors.extend((offset as u64).to_le_bytes());
            offset += bytes.next_multiple_of(ALIGNMENT);
        };
        for entry in &entries {
            declare(&entry.gguf_name, &entry.shape, entry.kind, entry.bytes().unwrap_or(0));
        }
        if let Some(divisors) = &divisors {
            declare("rope_freqs.weight", &[divisors.len()], BlockType::F32, 4 * divisors.len());
        }
        let count = entries.len() + usize::from(divisors.is_some());
        header[8..16].copy_from_slice(&(count as u64).to_le_bytes());
        header.extend(tensors);
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&header).map_err(io)?;
        for entry in &entries {
            write_entry(out, entry, &mut rows).map_err(|e| e.map_io(io))?;
        }
        if let Some(divisors) = &divisors {
            write_padded(out, &quantize(BlockType::F32, divisors), 0).map_err(io)?;
        }
        Ok(())
    })
}

/// What stops a tensor from being written: the file, or the source of its rows.
enum Stop {
    Io(std::io::Error),
    Source(Error),
}

impl Stop {
    fn map_io(self, io: impl Fn(std::io::Error) -> Error) -> Error {
        match self {
            Self::Io(e) => io(e),
            Self::Source(e) => e,
        }
    }
}

fn write_entry(
    out: &mut dyn Write,
    entry: &Entry,
    rows: &mut impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<()>,
) -> std::result::Result<(), Stop> {
    let cols = entry.shape.last().copied().unwrap_or(1);
    let num_rows = entry.shape.iter().product::<usize>() / cols.max(1);
    let head_dim = entry.interleaved_heads.map_or(1, |heads| num_rows / heads);
    // Whole heads, so that their rows can change places.
    let step = (PANEL / cols.max(1) / head_dim).max(1) * head_dim;
    let mut panel = vec![0.0; step.min(num_rows) * cols];
    let mut ordered = Vec::new();
    let mut written = 0;
    for first in (0..num_rows).step_by(step) {
        let count = step.min(num_rows - first);
        let panel = &mut panel[..count * cols];
        rows(&entry.name, first..first + count, panel).map_err(Stop::Source)?;
        let bytes = if entry.interleaved_heads.is_some() {
            ordered.clear();
            for row in 0..count {
                let (head, at) = (row / head_dim, row % head_dim);
                let from = head * head_dim + at % 2 * (head_dim / 2) + at / 2;
                ordered.extend_from_slice(&panel[from * cols..(from + 1) * cols]);
            }
            quantize(entry.kind, &ordered)
        } else {
            quantize(entry.kind, panel)
        };
        out.write_all(&bytes).map_err(Stop::Io)?;
        written += bytes.len();
    }
    write_padded(out, &[], written).map_err(Stop::Io)
}

/// Writes `bytes` behind `written` earlier ones of the same tensor and fills up to the alignment.
fn write_padded(out: &mut dyn Write, bytes: &[u8], written: usize) -> std::io::Result<()> {
    out.write_all(bytes)?;
    let len = written + bytes.len();
    out.write_all(&[0; ALIGNMENT][..len.next_multiple_of(ALIGNMENT) - len])
}

fn entries(config: &Config, kind: BlockType) -> Result<Vec<Entry>> {
    let entry = |(name, shape): (String, Vec<usize>)| {
        let kind = if shape.len() == 1 { BlockType::F32 } else { kind };
        let heads = if name.contains(".q_proj.") {
            Some(config.num_attention_heads)
        } else if name.contains(".k_proj.") {
            Some(config.num_key_value_heads)
        } else {
            None
        };
        let gguf_name = gguf_name(&name);
        let cols = shape.last().copied().unwrap_or(1);
        if kind.bytes_for(cols).is_none() {
            return Err(Error::Input(format!(
                "{name} has rows of {cols} elements, and {} needs a multiple of {}; write it as f32, f16 or bf16",
                kind.name(),
                kind.block_len()
            )));
        }
        Ok(Entry { name, gguf_name, shape, kind, interleaved_heads: heads })
    };
    config.expected_tensors().into_iter().map(entry).collect()
}

/// GGUF's name of a weight that Hugging Face calls `name`.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let mut name = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}

/// What the plain rope frequencies are divided by, where they are scaled.
fn rope_divisors(config: &Config) -> Option<Vec<f32>> {
    match &config.rope.scaling {
        RopeScaling::None => None,
        RopeScaling::Factors(divisors) => Some(divisors.clone()),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = *original_max_position_embeddings as f64;
            let divisor = |i: usize| {
                let frequency = config.rope.theta.powf(-((2 * i) as f64) / config.head_dim as f64);
                llama3_divisor(frequency, *factor, *low_freq_factor, *high_freq_factor, original) as f32
            };
            Some((0..config.head_dim / 2).map(divisor).collect())
        }
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Magic, version, a place for the number of tensors, and the metadata.
fn header(config: &Config, options: &GgufOptions<'_>) -> Result<Vec<u8>> {
    const U32: u32 = 4;
    const F32: u32 = 6;
    const STRING: u32 = 8;
    let mut pairs: Vec<Vec<u8>> = Vec::new();
    let mut pair = |key: &str, kind: u32, value: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        string(&mut bytes, key);
        bytes.extend(kind.to_le_bytes());
        value(&mut bytes);
        pairs.push(bytes);
    };
    let file_type: u32 = match options.kind {
        BlockType::F32 => 0,
        BlockType::F16 => 1,
        BlockType::Q4_0 => 2,
        BlockType::Q8_0 => 7,
        BlockType::BF16 => 32,
        other => return Err(Error::Input(format!("{} is not written", other.name()))),
    };
    for (key, text) in [("general.architecture", "llama"), ("general.type", "model"), ("general.name", options.name)] {
        pair(key, STRING, &|out| string(out, text));
    }
    let narrow = |what: &str, value: usize| {
        u32::try_from(value).map_err(|_| Error::Input(format!("{what} = {value} is too large for a GGUF file")))
    };
    let mut numbers = vec![
        ("general.file_type", file_type),
        ("general.quantization_version", 2),
        ("llama.block_count", narrow("num_hidden_layers", config.num_hidden_layers)?),
        ("llama.context_length", narrow("max_position_embeddings", config.max_position_embeddings)?),
        ("llama.embedding_length", narrow("hidden_size", config.hidden_size)?),
        ("llama.feed_forward_length", narrow("intermediate_size", config.intermediate_size)?),
        ("llama.attention.head_count", narrow("num_attention_heads", config.num_attention_heads)?),
        ("llama.attention.head_count_kv", narrow("num_key_value_heads", config.num_key_value_heads)?),
        ("llama.rope.dimension_count", narrow("head_dim", config.head_dim)?),
        ("llama.vocab_size", narrow("vocab_size", config.vocab_size)?),
    ];
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        let head_dim = narrow("head_dim", config.head_dim)?;
        numbers.extend([("llama.attention.key_length", head_dim), ("llama.attention.value_length", head_dim)]);
    }
    for (key, value) in numbers {
        pair(key, U32, &|out| out.extend(value.to_le_bytes()));
    }
    for (key, value) in [
        ("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        ("llama.rope.freq_base", config.rope.theta as f32),
    ] {
        pair(key, F32, &|out| out.extend(value.to_le_bytes()));
    }
    if let Some(tokenizer) = options.tokenizer {
        pairs.extend(tokenizer.raw_pairs("tokenizer."));
    }
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend(0u64.to_le_bytes());
    header.extend((pairs.len() as u64).to_le_bytes());
    header.extend(pairs.concat());
    Ok(header)
}
