//! Continuing a prompt token by token: what `generate` and `chat` share.

use crate::args::SamplingArgs;
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tunesmith_infer::{Completion, End, Engine, FinishReason, Request, Sampler, Sampling};
use tunesmith_model::Llama;
use tunesmith_text::{StreamDecoder, Tokenizer};

/// Ctrl-C: stops the text that is being generated; where none is, or when pressed again, leaves the program at once.
#[derive(Clone)]
pub(crate) struct Interrupt {
    wanted: Arc<AtomicBool>,
    generating: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C for the rest of the program.
    pub(crate) fn install() -> Result<Self> {
        let interrupt = Self { wanted: Arc::default(), generating: Arc::default() };
        let seen = interrupt.clone();
        ctrlc::set_handler(move || {
            let again = seen.wanted.swap(true, Ordering::Relaxed);
            if again || !seen.generating.load(Ordering::Relaxed) {
                std::process::exit(i32::from(Error::Interrupted.exit_code()));
            }
        })
        .map_err(|e| Error::Failure(format!("cannot listen to Ctrl-C: {e}")))?;
        Ok(interrupt)
    }

    pub(crate) fn begin(&self) {
        self.wanted.store(false, Ordering::Relaxed);
        self.generating.store(true, Ordering::Relaxed);
    }

    pub(crate) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    pub(crate) fn end(&self) {
        self.generating.store(false, Ordering::Relaxed);
    }
}

/// How tokens are chosen: the model's generation_config.json, overridden by what the user gave.
pub(crate) fn sampling(args: &SamplingArgs, generation_config: Option<&Value>) -> Result<Sampling> {
    if args.max_new_tokens == 0 {
        return Err(Error::Input("--max-new-tokens 0 generates nothing; give at least 1".into()));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::Input("--stop is empty, which is found everywhere; give the text to stop at".into()));
    }
    let mut sampling = Sampling::from_generation_config(generation_config)?;
    // Whoever names a parameter of the draw wants a draw, also where the model's default is greedy.
    let draws = args.temperature.is_some() || args.top_k.is_some() || args.top_p.is_some() || args.min_p.is_some();
    sampling.do_sample = !args.greedy && (sampling.do_sample || draws);
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
    sampling.min_p = args.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = args.repetition_penalty.unwrap_or(sampling.repetition_penalty);
    // The fraction of the second is what differs from run to run.
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() << 30 ^ u64::from(d.subsec_nanos()));
    sampling.seed = args.seed.unwrap_or_else(clock);
    sampling.check()?;
    Ok(sampling)
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finish {
    /// An end token.
    Stop,
    /// As many tokens as were asked for, or the context is full.
    Length,
    /// A stop string.
    StopString,
    /// Ctrl-C.
    Interrupted,
}

/// A generated text.
pub(crate) struct Continuation {
    /// Without the stop string and without special tokens.
    pub(crate) text: String,
    /// The new tokens, an end token included.
    pub(crate) ids: Vec<u32>,
    pub(crate) finish: Finish,
    /// Speed after the first new token, or, of a single one, with the reading of the prompt.
    pub(crate) tokens_per_s: f64,
}

/// A model that writes: its sampler goes on drawing from text to text, and its engine keeps what two prompts share.
pub(crate) struct Writer<'a> {
    engine: Engine<&'a Llama>,
    tokenizer: &'a Tokenizer,
    end_tokens: Vec<u32>,
    max_new_tokens: usize,
    stop: Vec<String>,
    sampler: Sampler,
    interrupt: Interrupt,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(
        llama: &'a Llama,
        tokenizer: &'a Tokenizer,
        end_tokens: Vec<u32>,
        args: &SamplingArgs,
        sampling: Sampling,
        interrupt: Interrupt,
    ) -> Result<Self> {
        Ok(Self {
            engine: Engine::new(llama, 1, 0),
            tokenizer,
            end_tokens,
            max_new_tokens: args.max_new_tokens,
            stop: args.stop.clone(),
            sampler: Sampler::new(sampling)?,
            interrupt,
        })
    }

    /// Continues `prompt`; `show` gets the text piece by piece as it becomes certain.
    pub(crate) fn write(&mut self, prompt: &[u32], mut show: impl FnMut(&str) -> Result<()>) -> Result<Continuation> {
        let request = Request::new(prompt, self.sampler.clone(), &self.end_tokens, self.max_new_tokens);
        self.engine.reserve(&request);
        let mut text = GrowingText::after(self.tokenizer, prompt, &self.stop);
        let mut emit = |piece: String| if piece.is_empty() { Ok(()) } else { show(&piece) };
        let mut failed = None;
        let (start, mut first) = (Instant::now(), None);
        self.interrupt.begin();
        let on_token = |_, id: u32| {
            first.get_or_insert_with(Instant::now);
            if let Err(error) = text.push(id).and_then(&mut emit) {
                failed = Some(error);
            }
            if failed.is_some() || text.stopped || self.interrupt.wanted() {
                return ControlFlow::Break(End::This);
            }
            ControlFlow::Continue(())
        };
        let ended = self.engine.complete(vec![request], on_token);
        self.interrupt.end();
        let Some(Completion { ids, reason }) = ended?.pop() else {
            return Err(Error::Failure("nothing became of the prompt".into()));
        };
        let end = Instant::now();
        self.sampler.skip(ids.len());
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
}

/// A text that grows token by token until it ends or a stop string is in it.
pub(crate) struct GrowingText<'a> {
    tokenizer: &'a Tokenizer,
    decoder: StreamDecoder,
    stops: StopStrings<'a>,
    /// What is certain of it, without the stop string.
    pub(crate) text: String,
    /// Whether a stop string was found.
    pub(crate) stopped: bool,
}

impl<'a> GrowingText<'a> {
    /// Nothing yet, behind `prompt`.
    pub(crate) fn after(tokenizer: &'a Tokenizer, prompt: &[u32], stop: &'a [String]) -> Self {
        let decoder = StreamDecoder::after(tokenizer, true, prompt);
        Self { tokenizer, decoder, stops: StopStrings::new(stop), text: String::new(), stopped: false }
    }

    /// Takes the next token; returns the text that is now certain.
    pub(crate) fn push(&mut self, id: u32) -> Result<String> {
        // Embeddings are often padded beyond the vocabulary; such an id stands for no text.
        let known = (id as usize) < self.tokenizer.vocab_size();
        let piece = if known { self.decoder.push(id)? } else { String::new() };
        let (certain, complete) = self.stops.push(&piece);
        self.stopped = complete;
        self.text.push_str(&certain);
        Ok(certain)
    }

    /// What was held back, now that nothing follows.
    pub(crate) fn finish(&mut self) -> Result<String> {
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
    pub(crate) fn why(&self, reason: FinishReason) -> Finish {
        match reason {
            _ if self.stopped => Finish::StopString,
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length => Finish::Length,
            FinishReason::Caller => Finish::Interrupted,
        }
    }
}

/// Writes a piece of text to standard output at once.
pub(crate) fn show(piece: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    written.map_err(|source| Error::Io { what: "cannot write the text to standard output".into(), source })
}

/// Finds stop strings in a text that arrives in pieces, and holds back what might be the beginning of one.
pub(crate) struct StopStrings<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopStrings<'a> {
    /// Looks for any of `stops`, none of them empty.
    pub(crate) fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece; returns the text that is certain not to belong to a stop string, and whether one is
    /// complete: then the text ends here. Of several, the one that is complete first counts.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |i: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*i..]));
        let certain = self.held.char_indices().map(|(i, _)| i).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text held back, now that nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn args(line: &[&str]) -> SamplingArgs {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            sampling: SamplingArgs,
        }
        Line::try_parse_from([&["x"], line].concat()).unwrap().sampling
    }

    #[test]
    fn flags_override_the_models_defaults() {
        let config = json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9});
        let of = |line: &[&str]| sampling(&args(line), Some(&config)).unwrap();
        let plain = of(&["--seed", "7"]);
        assert_eq!((plain.do_sample, plain.temperature, plain.top_p, plain.seed), (true, 0.6, 0.9, 7));
        assert!(!of(&["--greedy"]).do_sample);
        assert_eq!(of(&["--temperature", "1.5", "--top-k", "3"]).temperature, 1.5);
        let none = |line: &[&str]| sampling(&args(line), None).unwrap();
        assert!(!none(&[]).do_sample && !none(&["--repetition-penalty", "1.1"]).do_sample);
        for flag in [["--temperature", "0.5"], ["--top-k", "3"], ["--top-p", "0.5"], ["--min-p", "0.1"]] {
            assert!(none(&flag).do_sample, "{flag:?}");
        }
    }

    #[test]
    fn useless_options_are_refused() {
        for (line, said) in [
            (["--max-new-tokens", "0"], "at least 1"),
            (["--stop", ""], "--stop is empty"),
            (["--temperature", "0"], "temperature = 0 is not allowed"),
        ] {
            let error = sampling(&args(&line), None).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(said), "{error}");
        }
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut search = StopStrings::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (certain, complete) = search.push(piece);
            shown.push(certain);
            if complete {
                return (shown, true);
            }
        }
        shown.push(search.finish());
        (shown, false)
    }

    #[test]
    fn beginnings_of_stop_strings_are_held_back() {
        assert_eq!(run(&["###"], &["a#", "#b", "##", "#c"]).0, ["a", "##b", "", ""]);
        assert!(run(&["###"], &["a##", "#"]).1);
        assert_eq!(run(&["\nUser:"], &["hi\n", "Use"]).0, ["hi", "", "\nUse"]);
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
    }

    #[test]
    fn the_string_that_is_complete_first_counts() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".into()], true));
        assert_eq!(run(&["abcd", "bc"], &["xab", "cd"]).0.concat(), "xa");
        assert_eq!(run(&["é"], &["caf", "é!"]).0.concat(), "caf");
    }

    /// A tiny model, its tokenizer, and Ctrl-C that no signal presses.
    fn tiny() -> (Llama, Tokenizer, Interrupt) {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let model = tunesmith_model::Checkpoint::open(&here.join("../model/tests/fixtures/tiny-llama2")).unwrap();
        let tokenizer = Tokenizer::from_folder(&here.join("tests/fixtures/tokenizer")).unwrap();
        let interrupt = Interrupt { wanted: Arc::default(), generating: Arc::default() };
        (Llama::load(&model, tunesmith_model::Storage::F32, |_, _| ()).unwrap(), tokenizer, interrupt)
    }

    #[test]
    fn ctrl_c_stops_the_text_and_not_the_next_one() {
        let (llama, tokenizer, interrupt) = tiny();
        let args = args(&["--max-new-tokens", "20"]);
        let mut writer =
            Writer::new(&llama, &tokenizer, vec![], &args, Sampling::default(), interrupt.clone()).unwrap();
        let prompt = tokenizer.encode("To be", true).unwrap();
        let pressed = writer.write(&prompt, |_| {
            assert!(interrupt.generating.load(Ordering::Relaxed));
            interrupt.wanted.store(true, Ordering::Relaxed);
            Ok(())
        });
        let pressed = pressed.unwrap();
        assert_eq!(pressed.finish, Finish::Interrupted);
        assert!(pressed.ids.len() < 20 && !pressed.text.is_empty());
        assert!(!interrupt.generating.load(Ordering::Relaxed), "Ctrl-C now leaves the program");
        let next = writer.write(&prompt, |_| Ok(())).unwrap();
        assert_eq!((next.finish, next.ids.len()), (Finish::Length, 20));
        assert_eq!(next.ids[..pressed.ids.len()], pressed.ids);
        let failed = writer.write(&prompt, |_| Err(Error::Failure("no paper".into())));
        assert_eq!(failed.err().unwrap().to_string(), "no paper");
    }

    #[test]
    fn what_prompts_have_in_common_changes_no_text() {
        let (llama, tokenizer, interrupt) = tiny();
        let args = args(&["--max-new-tokens", "8"]);
        let writer = || Writer::new(&llama, &tokenizer, vec![], &args, Sampling::default(), interrupt.clone()).unwrap();
        let mut kept = writer();
        for prompt in [
            "To be, or not",
            "To be, or not to be: that is",
            "To be",
            "Nay",
            "To be, or not to be: that is the question",
        ] {
            let prompt = tokenizer.encode(prompt, true).unwrap();
            let (again, anew) =
                (kept.write(&prompt, |_| Ok(())).unwrap(), writer().write(&prompt, |_| Ok(())).unwrap());
            assert_eq!((again.ids, again.text), (anew.ids, anew.text));
        }
        assert!(kept.write(&[], |_| Ok(())).is_err());
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,30}", stops in proptest::collection::vec("[abé]{1,4}", 0..3), size in 1..5usize) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            // The plain way: add characters until some stop string is there.
            let mut want = (text.clone(), false);
            let mut read = String::new();
            for character in text.chars() {
                read.push(character);
                if let Some(start) = stops.iter().filter_map(|s| read.find(s)).min() {
                    want = (read[..start].to_owned(), true);
                    break;
                }
            }
            let characters: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = characters.chunks(size).map(|c| c.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (shown, complete) = run(&stops, &pieces);
            prop_assert_eq!((shown.concat(), complete), want);
        }
    }
}
