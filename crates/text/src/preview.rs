//! What a model is trained on, token by token, for inspection.
use crate::{Preference, PreparedSplit, Result, Source, StreamDecoder, Tokenizer};

/// One token as text.
#[derive(Clone, Debug, PartialEq)]
pub struct PreviewToken {
    /// The text that the token completes. A character made of several tokens appears at the last of them.
    pub text: String,
    /// The token id.
    pub id: u32,
    /// Whether it is a label.
    pub trained: bool,
    /// How much its loss counts in training.
    pub weight: f32,
}

/// One document as it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct PreviewDocument {
    /// The row it came from.
    pub source: Source,
    /// What it is to training on preferences.
    pub preference: Preference,
    /// Tokens of its prompt, which both answers of a pair share.
    pub shared: usize,
    /// Its tokens.
    pub tokens: Vec<PreviewToken>,
}

/// The first `n` documents of a prepared split, in the order of their rows inside each block; one more where that
/// completes a pair of answers.
///
/// # Errors
/// Damaged data, or an id outside the vocabulary.
pub fn preview(split: &PreparedSplit, n: usize, tokenizer: &Tokenizer) -> Result<Vec<PreviewDocument>> {
    let mut documents = Vec::new();
    for index in 0..split.len() {
        let block = split.block(index)?;
        let mut start = 0;
        for (document, (&length, source)) in block.lengths.iter().zip(&block.sources).enumerate() {
            let (preference, shared) = (block.preferences[document], block.shared[document]);
            // Both answers of a pair are shown.
            if documents.len() >= n && preference != Preference::Rejected {
                return Ok(documents);
            }
            let range = start..start + length;
            let weights = block.weights.get(range.clone()).unwrap_or_default();
            let tokens = tokens(&block.ids[range.clone()], &block.trained[range], weights, tokenizer)?;
            documents.push(PreviewDocument { source: source.clone(), preference, shared, tokens });
            start += length;
        }
    }
    Ok(documents)
}

fn tokens(ids: &[u32], trained: &[bool], weights: &[f32], tokenizer: &Tokenizer) -> Result<Vec<PreviewToken>> {
    let mut decoder = StreamDecoder::new(tokenizer, false);
    let mut tokens = Vec::with_capacity(ids.len());
    for (index, (&id, &trained)) in ids.iter().zip(trained).enumerate() {
        let weight = weights.get(index).copied().unwrap_or(if trained { 1.0 } else { 0.0 });
        tokens.push(PreviewToken { text: decoder.push(id)?, id, trained, weight });
    }
    if let Some(last) = tokens.last_mut() {
        last.text.push_str(&decoder.finish()?);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PrepareOptions, Split, fixture::tokenizer, prepare};

    #[test]
    fn tokens_show_their_text_and_whether_they_are_trained() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("d.jsonl");
        std::fs::write(
            &data,
            "{\"prompt\": \"a\", \"completion\": \"🙂b\"}\n{\"prompt\": \"c\", \"completion\": \"d\"}\n",
        )
        .unwrap();
        let options = PrepareOptions {
            train: vec![data.display().to_string()],
            validation_fraction: 0.0,
            ..PrepareOptions::default()
        };
        prepare(folder.path(), &options, &tokenizer(), None, &mut |_| ()).unwrap();
        let split = PreparedSplit::open(folder.path(), Split::Train).unwrap();
        let shown = preview(&split, 5, &tokenizer()).unwrap();
        assert_eq!((shown.len(), shown[0].source.line, shown[1].source.line), (2, 1, 2));
        let shown: Vec<_> = shown[0].tokens.iter().map(|t| (t.text.as_str(), t.trained)).collect();
        assert_eq!(
            shown,
            [("a", false), ("", true), ("", true), ("", true), ("🙂", true), ("b", true), ("<|im_end|>", true)]
        );
        assert_eq!(preview(&split, 1, &tokenizer()).unwrap().len(), 1);
        assert!(preview(&split, 0, &tokenizer()).unwrap().is_empty());
    }
}
