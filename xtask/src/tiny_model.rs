//! The random model of configs/tiny.toml: small enough to be committed and to be trained in seconds by the checks.

use crate::Result;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::path::Path;
use tunesmith_model::{Config, Dtype, Llama, SaveOptions, save_model};

/// Where it lies.
const FOLDER: &str = "configs/tiny/model";
/// Bytes are tokens 0 to 255; these follow.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                             + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                             }}{% endif %}";

/// Writes the folder anew.
pub(crate) fn write(root: &Path) -> Result<()> {
    save(&root.join(FOLDER))?;
    println!("wrote {FOLDER}");
    Ok(())
}

fn save(folder: &Path) -> Result<()> {
    let sizes = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 256,
        "eos_token_id": 258,
    });
    let config = Config::from_json(&sizes.to_string(), "the tiny model").map_err(|e| e.to_string())?;
    let model = Llama::random(config, 7);
    let tokenizer = format!("{:#}\n", tokenizer());
    let tokenizer_config = json!({
        "bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "model_max_length": 256,
        "clean_up_tokenization_spaces": false, "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let tokenizer_config = format!("{tokenizer_config:#}\n");
    let extra_files = [
        ("tokenizer.json", tokenizer.as_bytes()),
        ("tokenizer_config.json", tokenizer_config.as_bytes()),
        ("chat_template.jinja", CHAT_TEMPLATE.as_bytes()),
    ];
    let options =
        SaveOptions { dtype: Dtype::BF16, overwrite: true, extra_files: &extra_files, ..SaveOptions::default() };
    let weight = |name: &str| model.base_tensor(name).map(|w| Cow::Borrowed(w.tensor()));
    save_model(folder, &model.config, None, weight, &options).map_err(|e| e.to_string())
}

/// A byte-level tokenizer without merges: every byte is a token.
fn tokenizer() -> Value {
    let mut vocabulary: Map<String, Value> =
        byte_characters().into_iter().enumerate().map(|(byte, c)| (c.to_string(), byte.into())).collect();
    let mut added = Vec::new();
    for (index, token) in SPECIAL.into_iter().enumerate() {
        vocabulary.insert(token.to_owned(), (256 + index).into());
        added.push(json!({
            "id": 256 + index, "content": token, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        }));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

/// The printable character that stands for each byte in byte-level BPE (GPT-2, Radford et al. 2019): itself where it is
/// printable in Latin-1, the next free one from U+0100 otherwise.
fn byte_characters() -> Vec<char> {
    let mut free = 0x100..;
    let character = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => free.next().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER),
    };
    (0..=u8::MAX).map(character).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_model::Checkpoint;

    #[test]
    fn the_committed_model_is_the_one_written_here() {
        let folder = tempfile::tempdir().unwrap();
        let written = folder.path().join("model");
        save(&written).unwrap();
        let committed = crate::root().join(FOLDER);
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            let text = |folder: &Path| std::fs::read_to_string(folder.join(file)).unwrap();
            assert_eq!(text(&written), text(&committed), "{file}: run `cargo xtask tiny-model`");
        }
        // Weights come from logarithms and cosines, whose last bits may differ between platforms.
        let (ours, theirs) = (Checkpoint::open(&written).unwrap(), Checkpoint::open(&committed).unwrap());
        assert_eq!(ours.config(), theirs.config());
        for (name, _) in ours.config().expected_tensors() {
            let (a, b) = (ours.read(&name).unwrap(), theirs.read(&name).unwrap());
            let difference = a.data().iter().zip(b.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference < 1e-3, "{name}: {difference}");
        }
    }

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let mut characters = byte_characters();
        assert_eq!((characters[b' ' as usize], characters[b'\n' as usize]), ('Ġ', 'Ċ'));
        characters.sort_unstable();
        characters.dedup();
        assert_eq!(characters.len(), 256);
    }
}
