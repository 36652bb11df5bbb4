//! Rank files of tiktoken, as Llama 3 has them: on each line the bytes of a token in base64 and its rank, which is its
//! id.
use super::Vocabulary;
use crate::gguf::{CONTROL, GgufVocabulary, NORMAL, PieceRules};
use base64::{Engine, engine::general_purpose::STANDARD};
use std::collections::HashMap;

/// The special tokens of Llama 3 follow the ranks; their names are not in the file.
const NUM_SPECIAL: usize = 256;
/// The first of them in Llama 3, apart from reserved ones.
const LLAMA3: [(usize, &str); 5] = [
    (0, "<|begin_of_text|>"),
    (1, "<|end_of_text|>"),
    (6, "<|start_header_id|>"),
    (7, "<|end_header_id|>"),
    (9, "<|eot_id|>"),
];
/// What Llama 3.1 has made of reserved ones.
const LLAMA31: [(usize, &str); 4] =
    [(4, "<|finetune_right_pad_id|>"), (5, "<|step_id|>"), (8, "<|eom_id|>"), (10, "<|python_tag|>")];

/// Whether `bytes` begins as a rank file does.
pub(super) fn is_rank_file(bytes: &[u8]) -> bool {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    // No token has kilobytes.
    line.len() < 1 << 16 && std::str::from_utf8(line).is_ok_and(|line| rank(line).is_ok())
}

/// Bytes and rank of a line.
fn rank(line: &str) -> Result<(Vec<u8>, u32), String> {
    let shown: String = line.chars().take(80).collect();
    let wrong = || format!("{shown:?} is not a token in base64, a space and its rank");
    let (token, rank) = line.trim_end().split_once(' ').ok_or_else(wrong)?;
    let token = STANDARD.decode(token).map_err(|_| wrong())?;
    Ok((token, rank.parse().map_err(|_| wrong())?))
}

/// Reads `bytes`. `named` tokens (id and text) follow the ranks; without any, those of Llama 3, or of Llama 3.1 and
/// later when `is_llama31`. The message of an error does not name the file.
pub(super) fn parse(bytes: &[u8], named: bool, is_llama31: bool) -> Result<Vocabulary, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("not a tiktoken file: {e}"))?;
    let mut tokens: Vec<Vec<u8>> = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (token, rank) = rank(line).map_err(|e| format!("line {}: {e}", number + 1))?;
        if rank as usize != tokens.len() {
            return Err(format!(
                "line {}: rank {rank} follows {} others; ranks must count up from 0 without a gap",
                number + 1,
                tokens.len()
            ));
        }
        tokens.push(token);
    }
    let merges = merges(&tokens)?;
    let alphabet = alphabet();
    let spelled = |token: &[u8]| token.iter().map(|byte| alphabet[*byte as usize]).collect::<String>();
    let merges = merges.into_iter().map(|(left, right)| format!("{} {}", spelled(left), spelled(right))).collect();
    let mut names: Vec<String> = tokens.iter().map(|token| spelled(token)).collect();
    let mut kinds = vec![NORMAL; names.len()];
    let first = names.len() as u32;
    let (mut bos, mut eos) = (None, None);
    if !named {
        names.extend(special(is_llama31));
        kinds.resize(names.len(), CONTROL);
        (bos, eos) = (Some(first), Some(first + 1));
    }
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("llama-bpe".into()),
        tokens: names,
        token_types: kinds,
        merges,
        bos,
        eos,
        add_bos: Some(true),
        ..GgufVocabulary::default()
    };
    Ok(Vocabulary { vocabulary, rules: PieceRules::default() })
}

/// Names of the 256 special tokens.
fn special(is_llama31: bool) -> Vec<String> {
    let later: &[(usize, &str)] = if is_llama31 { &LLAMA31 } else { &[] };
    let mut reserved = 0;
    (0..NUM_SPECIAL)
        .map(|at| match LLAMA3.iter().chain(later).find(|(place, _)| *place == at) {
            Some((_, name)) => (*name).to_owned(),
            None => {
                reserved += 1;
                format!("<|reserved_special_token_{}|>", reserved - 1)
            }
        })
        .collect()
}

/// Two tokens that another one is made of.
type Halves<'a> = (&'a [u8], &'a [u8]);

/// Every way to make a token from two others, the token of the lowest rank first: tiktoken always joins the two
/// neighbours whose union has the lowest rank.
fn merges(tokens: &[Vec<u8>]) -> Result<Vec<Halves<'_>>, String> {
    let mut ranks = HashMap::with_capacity(tokens.len());
    for (rank, token) in tokens.iter().enumerate() {
        if let Some(earlier) = ranks.insert(token.as_slice(), rank) {
            return Err(format!("ranks {earlier} and {rank} are the same token"));
        }
    }
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        return Err(format!("the byte 0x{byte:02X} has no token; all 256 are needed"));
    }
    let mut merges = Vec::new();
    for token in tokens {
        let first = merges.len();
        for cut in 1..token.len() {
            let (left, right) = token.split_at(cut);
            if ranks.contains_key(left) && ranks.contains_key(right) {
                merges.push((left, right));
            }
        }
        merges[first..].sort_by_key(|(left, right)| (ranks[left], ranks[right]));
    }
    Ok(merges)
}

/// The characters that stand for bytes in byte-level vocabularies: printable Latin-1 for itself, the rest moved up past
/// it.
fn alphabet() -> [char; 256] {
    let mut moved = 0;
    std::array::from_fn(|byte| {
        let code = match byte as u32 {
            byte @ (33..=126 | 161..=172 | 174..=255) => byte,
            _ => {
                moved += 1;
                255 + moved
            }
        };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_at_their_places() {
        let (first, later) = (special(false), special(true));
        assert_eq!((first.len(), later.len()), (256, 256));
        assert_eq!((first[9].as_str(), first[8].as_str()), ("<|eot_id|>", "<|reserved_special_token_4|>"));
        assert_eq!(
            (first[10].as_str(), first[255].as_str()),
            ("<|reserved_special_token_5|>", "<|reserved_special_token_250|>")
        );
        assert_eq!((later[10].as_str(), later[11].as_str()), ("<|python_tag|>", "<|reserved_special_token_2|>"));
        assert_eq!(
            (later[3].as_str(), later[255].as_str()),
            ("<|reserved_special_token_1|>", "<|reserved_special_token_246|>")
        );
    }

    #[test]
    fn lines_and_ranks_are_checked() {
        let error = |text: &str| parse(text.as_bytes(), false, false).unwrap_err();
        assert!(error("IQ== 0\nIg==\n").starts_with("line 2: \"Ig==\" is not a token in base64"));
        assert!(error("IQ== 0\nIg== 2\n").contains("line 2: rank 2 follows 1 others"));
        assert!(error("IQ== 0\nIQ== 1\n").contains("ranks 0 and 1 are the same token"));
        assert!(error("IQ== 0\n").contains("the byte 0x00 has no token"));
        assert!(is_rank_file(b"IQ== 0\nIg== 1\n") && !is_rank_file(b"\n\x05ab") && !is_rank_file(b""));
    }
}
