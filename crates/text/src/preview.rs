//! What a model is trained on, token by token, for the eye.
use crate::{Result, Sample, StreamDecoder, Tokenizer};

/// One token of a sample as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewToken {
    /// The text that the token completes. A character made of several tokens appears at the last of them.
    pub text: String,
    /// The token id.
    pub id: u32,
    /// Whether it is a label.
    pub trained: bool,
}

/// The tokens of the first `n` samples.
///
/// # Errors
/// An id outside the vocabulary.
pub fn preview(samples: &[Sample], n: usize, tokenizer: &Tokenizer) -> Result<Vec<Vec<PreviewToken>>> {
    samples.iter().take(n).map(|sample| tokens(sample, tokenizer)).collect()
}

fn tokens(sample: &Sample, tokenizer: &Tokenizer) -> Result<Vec<PreviewToken>> {
    let mut decoder = StreamDecoder::new(tokenizer, false);
    let mut tokens = Vec::with_capacity(sample.ids.len());
    for (&id, &trained) in sample.ids.iter().zip(&sample.trained) {
        tokens.push(PreviewToken { text: decoder.push(id)?, id, trained });
    }
    if let Some(last) = tokens.last_mut() {
        last.text.push_str(&decoder.finish()?);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Row, RowKind, fixture::tokenizer, options::PrepareOptions, sample};

    #[test]
    fn tokens_show_their_text_and_whether_they_are_trained() {
        let tokenizer = tokenizer();
        let kind = RowKind::PromptCompletion { prompt: "a".into(), completion: "🙂b".into() };
        let row = Row { kind, file: "d.jsonl".into(), line: 1 };
        let options = (&PrepareOptions::default()).into();
        let (samples, _) = sample::samples(&row, &tokenizer, None, &options).unwrap();
        let shown = preview(&samples, 5, &tokenizer).unwrap();
        let shown: Vec<_> = shown[0].iter().map(|t| (t.text.as_str(), t.trained)).collect();
        assert_eq!(
            shown,
            [("a", false), ("", true), ("", true), ("", true), ("🙂", true), ("b", true), ("<|im_end|>", true)]
        );
        assert!(preview(&samples, 0, &tokenizer).unwrap().is_empty());
    }
}
