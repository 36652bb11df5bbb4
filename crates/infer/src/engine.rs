//! The generation engine: requests come and go, and every step takes those that are there a token further.
//!
//! A step has a pass with one token of each sequence that is being continued, which reads the weights once for all, and goes on with
//! prompts by up to [`Llama::prefill_chunk`] tokens, so that a long prompt holds up the others by one part of it only. On the CPU
//! each prompt is a pass of its own: it has rows enough to be worth one, and what becomes of a prompt does not depend on the others.
//! A request begins as soon as there are pages for all that it may become; until then it waits.

use crate::pages::{Before, Pages};
use crate::sampling::Sampler;
use serde::Serialize;
use std::collections::VecDeque;
use std::ops::{ControlFlow, Deref};
use tunesmith_model::{Error, InferWorkspace, Llama, Result, Tokens};
use tunesmith_tensor::ops::sample::{self, Choice, Scratch};
use tunesmith_tensor::{Device, PAGE, PagedCache};

/// A text to be continued.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is there.
    pub prompt: Vec<u32>,
    /// How tokens are chosen. Each request has a random stream of its own, so that what it becomes does not depend on the others, up to
    /// the rounding of products of other sizes.
    pub sampler: Sampler,
    /// Tokens that end the text.
    pub end_tokens: Vec<u32>,
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// The version of the adapter that the text goes through, 0 for none: keys and values are shared within a version only.
    pub adapter_version: u64,
}

impl Request {
    /// A request without an adapter.
    pub fn new(prompt: &[u32], sampler: Sampler, end_tokens: &[u32], max_new_tokens: usize) -> Self {
        let (prompt, end_tokens) = (prompt.to_vec(), end_tokens.to_vec());
        Self { prompt, sampler, end_tokens, max_new_tokens, adapter_version: 0 }
    }

    /// Tokens of the text when it is at its longest. The last of them is never fed.
    fn longest(&self, model: &Llama) -> usize {
        let context = model.config.max_position_embeddings;
        self.prompt.len().saturating_add(self.max_new_tokens).min(context + 1)
    }

    /// Pages that it may need.
    fn num_pages(&self, model: &Llama) -> usize {
        self.longest(model).saturating_sub(1).div_ceil(PAGE)
    }

    /// Whether `model` can continue the prompt.
    fn check(&self, model: &Llama) -> Result<()> {
        let (vocab, context) = (model.config.vocab_size, model.config.max_position_embeddings);
        if let Some(id) = self.prompt.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Input(format!("token {id} of the prompt is outside the model's vocabulary of {vocab}")));
        }
        if self.prompt.is_empty() {
            return Err(Error::Input("there is nothing to continue: the prompt is empty".into()));
        }
        if self.prompt.len() >= context {
            return Err(Error::Input(format!(
                "the prompt has {} tokens, and only {} fit into the context with at least one new token; shorten it",
                self.prompt.len(),
                context - 1
            )));
        }
        Ok(())
    }
}

/// Names a request of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(u64);

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token.
    Stop,
    /// As many tokens as were asked for, or the context is full.
    Length,
    /// The caller said so (a stop string, an interruption).
    Caller,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The new tokens, an end token that stopped it included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// What a step did for a request.
#[derive(Debug)]
pub enum Event {
    /// The next token, unless it is an end token.
    Token(u32),
    /// The request is done.
    Finished(Completion),
    /// The request cannot be continued: its device failed.
    Failed(Error),
}

/// What a caller of [`complete`] ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The request of the token that it was shown.
    This,
    /// Everything.
    All,
}

/// A request that has begun.
struct Sequence {
    id: RequestId,
    request: Request,
    /// Prompt and what was generated.
    text: Vec<u32>,
    /// Tokens of the text whose keys and values are cached.
    cached: usize,
    pages: Vec<u32>,
    /// Full pages that others can find, and what comes before the next one.
    shared: usize,
    before: Before,
    ended: bool,
}

impl Sequence {
    fn is_prefilling(&self) -> bool {
        self.cached < self.request.prompt.len()
    }

    fn generated(&self) -> Vec<u32> {
        self.text[self.request.prompt.len()..].to_vec()
    }
}

/// Requests over one model, which is borrowed or shared (`M` = `&Llama` or `Arc<Llama>`).
pub struct Engine<M> {
    model: M,
    cache: PagedCache,
    pages: Pages,
    max_sequences: usize,
    waiting: VecDeque<(RequestId, Request)>,
    running: Vec<Sequence>,
    events: Vec<(RequestId, Event)>,
    next_id: u64,
    ws: InferWorkspace,
    scratch: Scratch,
}

impl<M: Deref<Target = Llama>> Engine<M> {
    /// An engine that continues up to `max_sequences` requests at once, with a cache of `num_pages` pages of [`PAGE`] tokens: what the
    /// caller has planned memory for.
    ///
    /// # Panics
    /// When `max_sequences` is 0.
    pub fn new(model: M, max_sequences: usize, num_pages: usize) -> Self {
        assert!(max_sequences > 0, "an engine for no request");
        let mut pages = Pages::default();
        pages.grow(num_pages);
        Self {
            cache: model.new_cache(num_pages),
            model,
            pages,
            max_sequences,
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            next_id: 0,
            ws: InferWorkspace::default(),
            scratch: Scratch::default(),
        }
    }

    /// Makes the cache large enough for `request`, if it is not.
    pub fn reserve(&mut self, request: &Request) {
        let num_pages = request.num_pages(&self.model).max(self.pages.len());
        self.pages.grow(num_pages);
        self.cache.grow(num_pages);
    }

    /// Takes in a request.
    ///
    /// # Errors
    /// When its prompt is empty, has an id outside the vocabulary, or does not fit into the context, or the cache is too small for it.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        request.check(&self.model)?;
        let needed = request.num_pages(&self.model);
        if needed > self.pages.len() {
            return Err(Error::Input(format!(
                "the request needs {needed} pages of {PAGE} tokens, and the cache has {}; ask for fewer new tokens",
                self.pages.len()
            )));
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        if request.max_new_tokens == 0 {
            let nothing = Completion { ids: Vec::new(), reason: FinishReason::Length };
            self.events.push((id, Event::Finished(nothing)));
        } else {
            self.waiting.push_back((id, request));
        }
        Ok(id)
    }

    /// Ends a request; returns what was generated, or `None` where it is not there or has ended. No event of it follows.
    pub fn cancel(&mut self, id: RequestId) -> Option<Vec<u32>> {
        if let Some(i) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
            self.waiting.remove(i);
            return Some(Vec::new());
        }
        let i = self.running.iter().position(|sequence| sequence.id == id)?;
        let sequence = self.running.remove(i);
        self.pages.release(&sequence.pages);
        Some(sequence.generated())
    }

    /// Whether nothing is to be done.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    /// Pages that no request uses.
    pub fn available_pages(&self) -> usize {
        self.pages.available()
    }

    /// Whether the last pass on a GPU was replayed.
    pub fn is_captured(&self) -> bool {
        self.ws.is_captured()
    }

    /// A token for each sequence that is being continued, and the next part of prompts. A device that fails ends the requests, not the
    /// engine.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        if let Err(error) = self.passes() {
            let text = error.to_string();
            for sequence in self.running.drain(..).filter(|sequence| !sequence.ended) {
                self.pages.release(&sequence.pages);
                self.events.push((sequence.id, Event::Failed(Error::Failure(text.clone()))));
            }
            for (id, _) in self.waiting.drain(..) {
                self.events.push((id, Event::Failed(Error::Failure(text.clone()))));
            }
            // What the cache holds means nothing.
            self.pages.clear();
        }
        self.running.retain(|sequence| !sequence.ended);
        std::mem::take(&mut self.events)
    }

    fn passes(&mut self) -> Result<()> {
        let continued = self.running.iter().enumerate().filter(|(_, sequence)| !sequence.is_prefilling());
        let continued: Vec<(usize, usize)> = continued.map(|(i, _)| (i, 1)).collect();
        if !continued.is_empty() {
            self.pass(&continued)?;
        }
        let chunk = self.model.prefill_chunk();
        let at_once = if self.model.device() == Device::Cpu { 1 } else { usize::MAX };
        let mut left = chunk;
        loop {
            let mut prompts = Vec::new();
            while prompts.len() < at_once
                && let Some(i) = self.next_prompt(&prompts)
            {
                let Sequence { request, cached, .. } = &self.running[i];
                let count = (request.prompt.len() - cached).min(chunk);
                if count > left {
                    // A prompt is cut only where it would be cut alone.
                    left = 0;
                    break;
                }
                left -= count;
                prompts.push((i, count));
            }
            if prompts.is_empty() {
                return Ok(());
            }
            self.pass(&prompts)?;
        }
    }

    /// A sequence whose prompt is not read, and that is not among `taken`, which come before it; one that waits, if there is none.
    fn next_prompt(&mut self, taken: &[(usize, usize)]) -> Option<usize> {
        let first = taken.last().map_or(0, |(i, _)| i + 1);
        if let Some(i) = (first..self.running.len()).find(|i| self.running[*i].is_prefilling()) {
            return Some(i);
        }
        let (_, request) = self.waiting.front().filter(|_| self.running.len() < self.max_sequences)?;
        let num_pages = request.num_pages(&self.model);
        let (pages, shared, before) = self.pages.take(request.adapter_version, &request.prompt, num_pages)?;
        let (id, request) = self.waiting.pop_front()?;
        let (text, cached) = (request.prompt.clone(), shared * PAGE);
        self.running.push(Sequence { id, request, text, cached, pages, shared, before, ended: false });
        Some(self.running.len() - 1)
    }

    /// Takes `parts` (sequence, how many of its tokens), in rising order, through the model.
    fn pass(&mut self, parts: &[(usize, usize)]) -> Result<()> {
        let Self { model, cache, pages, running, events, ws, scratch, .. } = self;
        let tokens = |(i, count): &(usize, usize)| {
            let Sequence { text, cached, pages, .. } = &running[*i];
            let end = cached + count;
            Tokens { ids: &text[*cached..end], past: *cached, pages, logits: end == text.len() }
        };
        let tokens: Vec<Tokens<'_>> = parts.iter().map(tokens).collect();
        let wants: Vec<usize> = parts.iter().zip(&tokens).filter(|(_, t)| t.logits).map(|((i, _), _)| *i).collect();
        let logits = model.infer(&tokens, cache, ws);
        let wanting = running.iter_mut().enumerate().filter(|(i, _)| wants.contains(i));
        let choices: Vec<Choice<'_>> =
            wanting.map(|(_, Sequence { request, text, .. })| request.sampler.choice(text)).collect();
        let chosen = if choices.is_empty() { Vec::new() } else { sample::rows(logits, &choices, scratch) };
        // A device that has failed gives logits that mean nothing.
        model.device().synchronize().map_err(|e| Error::Failure(e.to_string()))?;
        for (i, count) in parts {
            let Sequence { text, cached, pages: own, shared, before, .. } = &mut running[*i];
            *cached += count;
            for tokens in &text[..*cached].as_chunks::<PAGE>().0[*shared..] {
                *before = pages.fill(own[*shared], *before, tokens);
                *shared += 1;
            }
        }
        for (i, id) in wants.into_iter().zip(chosen) {
            let sequence = &mut running[i];
            sequence.text.push(id);
            let reason = if sequence.request.end_tokens.contains(&id) {
                FinishReason::Stop
            } else {
                events.push((sequence.id, Event::Token(id)));
                if sequence.text.len() < sequence.request.longest(model) {
                    continue;
                }
                FinishReason::Length
            };
            sequence.ended = true;
            pages.release(&sequence.pages);
            events.push((sequence.id, Event::Finished(Completion { ids: sequence.generated(), reason })));
        }
        Ok(())
    }

    /// Continues `requests` to their ends. `on_token` sees the number of the request and each new token but the end token that stops.
    ///
    /// # Errors
    /// As [`Engine::submit`], or when the device fails; no request is left in the engine.
    pub fn complete(
        &mut self,
        requests: Vec<Request>,
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<End>,
    ) -> Result<Vec<Completion>> {
        let (count, mut ids) = (requests.len(), Vec::with_capacity(requests.len()));
        for request in requests {
            match self.submit(request) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    ids.iter().for_each(|id| drop(self.cancel(*id)));
                    return Err(match error {
                        Error::Input(what) if count > 1 => Error::Input(format!("prompt {}: {what}", ids.len() + 1)),
                        error => error,
                    });
                }
            }
        }
        let mut completions = vec![None; count];
        let mut failure = None;
        while completions.contains(&None) && failure.is_none() {
            let mut all_end = false;
            let mut stopped = Vec::new();
            for (id, event) in self.step() {
                let Some(number) = ids.iter().position(|own| *own == id) else { continue };
                match event {
                    Event::Token(token) => {
                        if let ControlFlow::Break(end) = on_token(number, token) {
                            stopped.push(number);
                            all_end |= end == End::All;
                        }
                    }
                    Event::Finished(completion) => completions[number] = Some(completion),
                    Event::Failed(error) => failure = Some(error),
                }
            }
            for number in if all_end { (0..count).collect() } else { stopped.clone() } {
                match self.cancel(ids[number]) {
                    Some(ids) => completions[number] = Some(Completion { ids, reason: FinishReason::Caller }),
                    // It has ended, perhaps with the very token that the caller stopped at.
                    None if stopped.contains(&number) => {
                        completions[number].iter_mut().for_each(|c| c.reason = FinishReason::Caller);
                    }
                    None => {}
                }
            }
        }
        failure.map_or_else(|| Ok(completions.into_iter().flatten().collect()), Err)
    }
}

/// Continues `requests` with `model`, up to `max_sequences` of them at once, in a cache that is just large enough for the longest that
/// can be there together; as [`Engine::complete`].
///
/// # Errors
/// As [`Engine::complete`].
///
/// # Panics
/// When `max_sequences` is 0.
pub fn complete(
    model: &Llama,
    requests: Vec<Request>,
    max_sequences: usize,
    on_token: impl FnMut(usize, u32) -> ControlFlow<End>,
) -> Result<Vec<Completion>> {
    let mut needed: Vec<usize> = requests.iter().map(|request| request.num_pages(model)).collect();
    needed.sort_unstable_by(|a, b| b.cmp(a));
    let num_pages = needed.iter().take(max_sequences).sum();
    Engine::new(model, max_sequences, num_pages).complete(requests, on_token)
}
