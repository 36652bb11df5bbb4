//! A text that a model writes: token by token, shown as it becomes certain, ended by tokens, texts or the user.

use crate::StopStrings;
use serde::Serialize;
use std::{
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tunesmith_files::Result;
use tunesmith_model::{FinishReason, KvCache, Llama, Sampler, Sampling, Workspace, generate};
use tunesmith_text::{StreamDecoder, Tokenizer};

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// An end token.
    Stop,
    /// As many tokens as were asked for, or the context is full.
    Length,
    /// A stop string.
    StopString,
    /// The user stopped it.
    Interrupted,
}

/// A generated text.
#[derive(Clone, Debug, PartialEq)]
pub struct Continuation {
    /// Without the stop string and without special tokens.
    pub text: String,
    /// The new tokens, an end token included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Speed after the first new token, or, of a single one, with the reading of the prompt.
    pub tokens_per_s: f64,
}

/// Where a text ends at the latest.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Texts to stop at; they do not belong to the text.
    pub stop_strings: Vec<String>,
}

/// A model that writes: its sampler goes on drawing from text to text, and its cache keeps what two prompts share.
#[derive(Debug)]
pub struct Writer<'a> {
    llama: &'a Llama,
    tokenizer: &'a Tokenizer,
    end_tokens: Vec<u32>,
    limits: Limits,
    sampler: Sampler,
    cache: KvCache,
    /// The tokens whose keys and values `cache` holds.
    cached: Vec<u32>,
    ws: Workspace,
    stop: &'a AtomicBool,
}

impl<'a> Writer<'a> {
    /// A writer that stops when `stop` is set.
    ///
    /// # Errors
    /// Parameters of the draw that are out of range.
    pub fn new(
        llama: &'a Llama,
        tokenizer: &'a Tokenizer,
        end_tokens: Vec<u32>,
        limits: Limits,
        sampling: Sampling,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        Ok(Self {
            llama,
            tokenizer,
            end_tokens,
            limits,
            sampler: Sampler::new(sampling)?,
            cache: llama.new_cache(0),
            cached: Vec::new(),
            ws: Workspace::default(),
            stop,
        })
    }

    /// Continues `prompt`; `show` gets the text piece by piece as it becomes certain.
    ///
    /// # Errors
    /// When the prompt is empty or does not fit into the context; that of `show`.
    pub fn write(&mut self, prompt: &[u32], mut show: impl FnMut(&str) -> Result<()>) -> Result<Continuation> {
        self.prepare_cache(prompt);
        let mut text = GrowingText::after(self.tokenizer, prompt, &self.limits.stop_strings);
        let mut emit = |piece: String| if piece.is_empty() { Ok(()) } else { show(&piece) };
        let mut failed = None;
        let (start, mut first) = (Instant::now(), None);
        let on_token = |id: u32| {
            first.get_or_insert_with(Instant::now);
            if let Err(error) = text.push(id).and_then(&mut emit) {
                failed = Some(error);
            }
            if failed.is_some() || text.stopped || self.stop.load(Ordering::Relaxed) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let ended = generate(
            self.llama,
            prompt,
            &mut self.cache,
            &mut self.sampler,
            &self.end_tokens,
            self.limits.max_new_tokens,
            &mut self.ws,
            on_token,
        );
        let (ids, reason) = ended?;
        let end = Instant::now();
        self.cached = prompt.iter().chain(&ids).copied().take(self.cache.len()).collect();
        if let Some(error) = failed {
            return Err(error);
        }
        emit(text.finish()?)?;
        let (counted, from) = match first {
            Some(first) if ids.len() > 1 => (ids.len() - 1, first),
            _ => (ids.len(), start),
        };
        let seconds = end.duration_since(from).as_secs_f64().max(1e-9);
        let finish = text.why(reason);
        Ok(Continuation { text: text.text, ids, finish, tokens_per_s: counted as f64 / seconds })
    }

    /// Makes space in the cache for `prompt` and what follows it, and keeps the part of the cache that begins `prompt`.
    fn prepare_cache(&mut self, prompt: &[u32]) {
        let context = self.llama.config.max_position_embeddings;
        let needed = prompt.len().saturating_add(self.limits.max_new_tokens).min(context);
        let common = self.cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token is always read again: its logits are what the first new token is drawn from.
        self.cache.truncate(common.min(prompt.len().saturating_sub(1)));
        self.cached.truncate(self.cache.len());
        self.cache.set_capacity(needed);
    }
}

/// A text that grows token by token until it ends or a stop string is in it.
#[derive(Debug)]
pub struct GrowingText<'a> {
    tokenizer: &'a Tokenizer,
    decoder: StreamDecoder,
    stops: StopStrings<'a>,
    /// What is certain of it, without the stop string.
    pub text: String,
    /// Whether a stop string was found.
    pub stopped: bool,
}

impl<'a> GrowingText<'a> {
    /// Nothing yet, after `prompt`.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32], stop: &'a [String]) -> Self {
        let decoder = StreamDecoder::after(tokenizer, true, prompt);
        Self { tokenizer, decoder, stops: StopStrings::new(stop), text: String::new(), stopped: false }
    }

    /// Takes the next token; returns the text that is now certain.
    ///
    /// # Errors
    /// When the tokenizer cannot decode it.
    pub fn push(&mut self, id: u32) -> Result<String> {
        // Embeddings are often padded beyond the vocabulary; such an id stands for no text.
        let known = (id as usize) < self.tokenizer.vocab_size();
        let piece = if known { self.decoder.push(id)? } else { String::new() };
        let (certain, complete) = self.stops.push(&piece);
        self.stopped = complete;
        self.text.push_str(&certain);
        Ok(certain)
    }

    /// What was held back, now that nothing follows.
    ///
    /// # Errors
    /// When the tokenizer cannot decode it.
    pub fn finish(&mut self) -> Result<String> {
        if self.stopped {
            return Ok(String::new());
        }
        // An unfinished character at the end may still complete a stop string, and what was held back is due.
        let (mut certain, complete) = self.stops.push(&self.decoder.finish()?);
        self.stopped = complete;
        if !complete {
            certain.push_str(&self.stops.finish());
        }
        self.text.push_str(&certain);
        Ok(certain)
    }

    /// Why it ended, where generation ended for `reason`.
    pub fn why(&self, reason: FinishReason) -> Finish {
        match reason {
            _ if self.stopped => Finish::StopString,
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length => Finish::Length,
            FinishReason::Caller => Finish::Interrupted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_files::Error;

    /// A tiny model and its tokenizer.
    fn tiny() -> (Llama, Tokenizer) {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let model = tunesmith_model::Checkpoint::open(&here.join("../model/tests/fixtures/tiny-llama2")).unwrap();
        let tokenizer = Tokenizer::from_folder(&here.join("../cli/tests/fixtures/tokenizer")).unwrap();
        (Llama::load(&model, tunesmith_model::Storage::F32, |_, _| ()).unwrap(), tokenizer)
    }

    #[test]
    fn the_flag_stops_the_text_and_not_the_next_one() {
        let (llama, tokenizer) = tiny();
        let stop = AtomicBool::new(false);
        let limits = Limits { max_new_tokens: 20, stop_strings: Vec::new() };
        let mut writer = Writer::new(&llama, &tokenizer, vec![], limits.clone(), Sampling::default(), &stop).unwrap();
        let prompt = tokenizer.encode("To be", true).unwrap();
        let pressed = writer.write(&prompt, |_| {
            stop.store(true, Ordering::Relaxed);
            Ok(())
        });
        let pressed = pressed.unwrap();
        assert_eq!(pressed.finish, Finish::Interrupted);
        assert!(pressed.ids.len() < 20 && !pressed.text.is_empty());
        stop.store(false, Ordering::Relaxed);
        let next = writer.write(&prompt, |_| Ok(())).unwrap();
        assert_eq!((next.finish, next.ids.len()), (Finish::Length, 20));
        assert_eq!(next.ids[..pressed.ids.len()], pressed.ids);
        let failed = writer.write(&prompt, |_| Err(Error::Failure("no paper".into())));
        assert_eq!(failed.err().unwrap().to_string(), "no paper");
    }

    #[test]
    fn the_cache_keeps_the_common_beginning_only() {
        let (llama, tokenizer) = tiny();
        let stop = AtomicBool::new(false);
        let limits = Limits { max_new_tokens: 8, stop_strings: Vec::new() };
        let writer = || Writer::new(&llama, &tokenizer, vec![], limits.clone(), Sampling::default(), &stop).unwrap();
        let mut kept = writer();
        for prompt in [
            "To be, or not",
            "To be, or not to be: that is",
            "To be",
            "Nay",
            "To be, or not to be: that is the question",
        ] {
            let prompt = tokenizer.encode(prompt, true).unwrap();
            kept.prepare_cache(&prompt);
            assert!(kept.cached.len() < prompt.len() && prompt.starts_with(&kept.cached));
            let (again, anew) =
                (kept.write(&prompt, |_| Ok(())).unwrap(), writer().write(&prompt, |_| Ok(())).unwrap());
            assert_eq!((again.ids, again.text), (anew.ids, anew.text));
            assert_eq!(kept.cached.len(), kept.cache.len());
            assert!(kept.cache.len() >= prompt.len());
        }
        assert!(kept.write(&[], |_| Ok(())).is_err());
    }
}
