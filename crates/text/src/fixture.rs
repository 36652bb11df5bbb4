//! Small vocabularies and a chat template for the tests of this crate.
use crate::{ChatTemplate, GgufVocabulary, Result, Row, RowOptions, Tokenizer, row};
use std::{path::Path, sync::Arc};

/// The template of SmolLM2 in shape: a default system turn, `<|im_start|>role\ncontent<|im_end|>\n`.
pub(crate) const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(crate) fn chatml() -> ChatTemplate {
    ChatTemplate::new(CHATML, tokenizer().special_tokens(), None).unwrap()
}

/// All 256 bytes, a few merges, and three control tokens at ids 0 to 2.
pub(crate) fn byte_level_vocabulary() -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from).into();
    let mut token_types = vec![3; 3];
    let mut shifted = 0;
    for byte in 0..=255_u32 {
        // Printable Latin-1 stands for itself; the rest moves up past it (GPT-2's byte alphabet).
        let code = match byte {
            33..=126 | 161..=172 | 174..=255 => byte,
            _ => {
                shifted += 1;
                255 + shifted
            }
        };
        tokens.push(char::from_u32(code).unwrap().to_string());
    }
    let merges = ["h e", "l l", "Ġ Ġ", "Ġ 1", "1 1", "11 1", "he ll", "Ġ t", "Ġt he"];
    tokens.extend(merges.iter().filter(|m| **m != "Ġt he").map(|m| m.replace(' ', "")));
    tokens.push("Ġthe".into());
    token_types.resize(tokens.len(), 1);
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens,
        token_types,
        merges: merges.map(String::from).into(),
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        padding: Some(2),
        ..GgufVocabulary::default()
    }
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(byte_level_vocabulary()).unwrap()
}

/// A SentencePiece vocabulary: `<unk> <s> </s>`, 256 bytes, a few scored pieces.
pub(crate) fn llama_vocabulary() -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    token_types.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    for (rank, piece) in ["▁h", "he", "ll", "▁hell", "lo", "hell", "▁o", "▁", "h", "e", "l", "o"].iter().enumerate()
    {
        tokens.push((*piece).into());
        token_types.push(1);
        scores.push(-(rank as f32));
    }
    GgufVocabulary {
        model: "llama".into(),
        tokens,
        scores,
        token_types,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        ..GgufVocabulary::default()
    }
}

pub(crate) fn llama_tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(llama_vocabulary()).unwrap()
}

/// The rows of one file as they come, without a look at the rest of it: after an error in a row the next one is read.
pub(crate) fn read_file(path: &Path, options: &RowOptions) -> Result<impl Iterator<Item = Result<Row>>> {
    let file: Arc<str> = path.display().to_string().into();
    let rows = crate::read::open(&path.to_owned().into(), options, &Arc::default())?;
    Ok(rows.map(move |raw| {
        let understood = row::understand(&raw?, &file, options, &mut |_| ());
        understood.map(|understood| understood.row).map_err(|bad| bad.error(&file))
    }))
}
