//! Continuing every prompt of a file, several at once.

use super::super::continuation::{Finish, GrowingText, Interrupt};
use super::{Generated, show_json};
use crate::args::GenerateArgs;
use crate::error::{Error, Result};
use crate::load::Opened;
use crate::terminal;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use tunesmith_infer::{Completion, End, Request, Sampler, Sampling, complete};
use tunesmith_model::Llama;

/// A model that is ready, and how it shall write.
pub(super) struct Job<'a> {
    pub(super) args: &'a GenerateArgs,
    pub(super) llama: &'a Llama,
    pub(super) opened: &'a Opened,
    pub(super) end_tokens: &'a [u32],
    pub(super) interrupt: Interrupt,
}

/// The prompts of `file`, one a line.
///
/// # Errors
/// When it cannot be read, a line is no prompt, or there is none.
pub(super) fn read_prompts(file: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?;
    let is_json = file.extension().is_some_and(|e| e == "jsonl");
    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let wrong = |what: &str| Error::Input(format!("{}:{}: {what}", file.display(), i + 1));
        let prompt = if is_json {
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(&format!("not JSON: {e}")))?;
            let prompt = if value.is_object() { value["prompt"].as_str() } else { value.as_str() };
            prompt.ok_or_else(|| wrong("it must be a string, or an object with a string `prompt`"))?.to_owned()
        } else {
            line.to_owned()
        };
        if prompt.is_empty() {
            return Err(wrong("the prompt is empty; take the line out"));
        }
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        return Err(Error::Input(format!("{}: there is no prompt in it", file.display())));
    }
    Ok(prompts)
}

/// Continues `prompts`, whose tokens are `ids`, and prints a line for each.
pub(super) fn run(job: &Job<'_>, prompts: &[String], ids: &[Vec<u32>], sampling: Sampling) -> Result<()> {
    let Job { args, llama, opened, end_tokens, interrupt } = job;
    let tokenizer = &opened.tokenizer;
    let mut requests = Vec::with_capacity(ids.len());
    for (prompt, line) in ids.iter().zip(0..) {
        let sampler = Sampler::new(Sampling { seed: sampling.seed.wrapping_add(line), ..sampling.clone() })?;
        requests.push(Request::new(prompt, sampler, end_tokens, args.sampling.max_new_tokens));
    }
    let mut texts: Vec<GrowingText<'_>> =
        ids.iter().map(|prompt| GrowingText::after(tokenizer, prompt, &args.sampling.stop)).collect();
    let bar = terminal::count_bar("tokens", 0);
    let mut failed = None;
    let on_token = |number: usize, id: u32| {
        bar.inc(1);
        if let Err(error) = texts[number].push(id) {
            failed = Some(error);
        }
        if failed.is_some() || interrupt.wanted() {
            return ControlFlow::Break(End::All);
        }
        if texts[number].stopped { ControlFlow::Break(End::This) } else { ControlFlow::Continue(()) }
    };
    let start = Instant::now();
    interrupt.begin();
    let ended = complete(llama, requests, args.batch, on_token);
    interrupt.end();
    bar.finish_and_clear();
    let results = ended?;
    if let Some(error) = failed {
        return Err(error);
    }
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    let (mut new_tokens, mut interrupted) = (0, false);
    for (((prompt, prompt_ids), text), result) in prompts.iter().zip(ids).zip(&mut texts).zip(&results) {
        let Completion { ids: new, reason } = result;
        text.finish()?;
        let finish_reason = text.why(*reason);
        new_tokens += new.len();
        interrupted |= finish_reason == Finish::Interrupted;
        show_json(&Generated {
            prompt,
            text: &text.text,
            prompt_tokens: prompt_ids.len(),
            new_tokens: new.len(),
            ids: new,
            finish_reason,
        })?;
    }
    let (speed, count) = (new_tokens as f64 / seconds, prompts.len());
    eprintln!("{count} prompts, {new_tokens} new tokens, {speed:.1} tokens/s with the reading of the prompts");
    if interrupted { Err(Error::Interrupted) } else { Ok(()) }
}
