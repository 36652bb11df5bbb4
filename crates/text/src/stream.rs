//! Text from tokens as they come, never a part of a character.
use crate::{Result, Tokenizer};

/// What an unfinished or invalid byte sequence decodes to.
const REPLACEMENT: char = '\u{fffd}';

/// A model that keeps writing broken bytes must not make the decoder hold back text forever.
const MAX_PENDING: usize = 32;

/// Turns a growing list of token ids into text, piece by piece. The pieces joined equal [`Tokenizer::decode`] of all
/// ids.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The tokens already shown that the next ones need as context, then those not shown yet.
    ids: Vec<u32>,
    shown: usize,
}

impl StreamDecoder {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer: tokenizer.clone(), skip_special, ids: Vec::new(), shown: 0 }
    }

    /// A decoder that continues `prompt`: a space that the first new token begins with is kept, where a decoder at the
    /// beginning of a text drops it (SentencePiece).
    pub fn after(tokenizer: &Tokenizer, skip_special: bool, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(4)..].to_vec();
        Self { shown: ids.len(), ..Self { ids, ..Self::new(tokenizer, skip_special) } }
    }

    /// Takes the next token; returns the text that is now certain (often one token's, sometimes none).
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.emit(self.ids.len() - self.shown >= MAX_PENDING)
    }

    /// The text held back so far: the end of an unfinished character becomes U+FFFD.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(&mut self) -> Result<String> {
        self.emit(true)
    }

    fn emit(&mut self, all: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let after = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // A vocabulary whose decoding depends on later tokens could shorten the text: then there is nothing to add yet.
        let Some(new) = after.get(before.len()..) else { return Ok(String::new()) };
        if new.is_empty() || (new.ends_with(REPLACEMENT) && !all) {
            return Ok(String::new());
        }
        let new = new.to_owned();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{llama_tokenizer, tokenizer};
    use proptest::prelude::*;

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut decoder = StreamDecoder::new(tokenizer, skip_special);
        let mut pieces: Vec<_> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        pieces.push(decoder.finish().unwrap());
        pieces
    }

    #[test]
    fn a_character_comes_out_whole() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a🙂b", false).unwrap();
        assert_eq!(streamed(&tokenizer, &ids, false), ["a", "", "", "", "🙂", "b", ""]);
        assert_eq!(streamed(&tokenizer, &ids[..3], false), ["a", "", "", "\u{fffd}"]);
    }

    #[test]
    fn a_prompt_keeps_the_space_of_the_first_new_word() {
        let tokenizer = llama_tokenizer();
        let prompt = tokenizer.encode("hell", true).unwrap();
        let next = tokenizer.token_to_id("▁hell").unwrap();
        assert_eq!(StreamDecoder::after(&tokenizer, true, &prompt).push(next).unwrap(), " hell");
        assert_eq!(StreamDecoder::new(&tokenizer, true).push(next).unwrap(), "hell");
    }

    #[test]
    fn endless_broken_bytes_are_shown_at_last() {
        let tokenizer = tokenizer();
        let broken = tokenizer.encode("é", false).unwrap()[0];
        let pieces = streamed(&tokenizer, &[broken; 100], false);
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() >= 3, "{pieces:?}");
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_whole_text(text in "(\\PC|<\\|im_end\\|>){0,24}", skip_special: bool) {
            for tokenizer in [tokenizer(), llama_tokenizer()] {
                let ids = tokenizer.encode(&text, true).unwrap();
                let whole = tokenizer.decode(&ids, skip_special).unwrap();
                prop_assert_eq!(streamed(&tokenizer, &ids, skip_special).concat(), whole);
            }
        }

        #[test]
        fn any_ids_give_the_whole_decoding(ids in proptest::collection::vec(0_u32..260, 0..40)) {
            let tokenizer = tokenizer();
            let whole = tokenizer.decode(&ids, false).unwrap();
            let joined = streamed(&tokenizer, &ids, false).concat();
            // Broken bytes may be counted differently when they are cut, sound text may not be lost.
            let sound = |text: &str| text.replace(REPLACEMENT, "");
            prop_assert_eq!(sound(&joined), sound(&whole));
        }
    }
}
