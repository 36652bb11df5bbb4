//! `tunesmith bench generate`: speed of reading a prompt and of writing, and the time to the first token of a cold start.

use super::plan::peak_resident;
use super::{threads, write_json_line};
use crate::args::{BenchGenerateArgs, ComputeName};
use crate::error::{Error, Result};
use crate::load;
use crate::source::Settings;
use serde::Serialize;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;
use tunesmith_infer::{Engine, Event, Request, Sampler, Sampling};
use tunesmith_model::Llama;
use tunesmith_tensor::PAGE;
use tunesmith_tensor::rng::Rng;

#[derive(Serialize)]
struct GenerateResult {
    /// Bytes of weights in memory.
    weights_gb: f64,
    prompt: usize,
    new: usize,
    context: usize,
    threads: usize,
    /// Tokens of the prompt a second: the median, and the best run.
    prefill_tokens_per_s: f64,
    prefill_best: f64,
    /// Tokens written a second: the median, and the best run.
    decode_tokens_per_s: f64,
    decode_best: f64,
    /// From the start of a process to the first piece of text, best run.
    first_token_s: f64,
    peak_rss_gb: Option<f64>,
}

pub(super) fn run(args: &BenchGenerateArgs, settings: &Settings) -> Result<()> {
    if args.prompt == 0 || args.new == 0 || args.repeat == 0 {
        return Err(Error::Input("--prompt, --new and --repeat must be at least 1".into()));
    }
    let opened = load::open(&args.model, None, settings)?;
    let longest = (args.prompt + 1).max(args.context + args.new);
    let context = opened.checkpoint.config().max_position_embeddings;
    if longest > context {
        return Err(Error::Input(format!("{longest} tokens are more than the model's context of {context}")));
    }
    let llama = opened.generator(args.compute, None, None, settings)?;
    let mut prefill = measure(args.repeat, || Ok(seconds(&llama, args.prompt, 0)?.0))?;
    let mut decode = measure(args.repeat, || Ok(seconds(&llama, args.context.max(1), args.new)?.1))?;
    let peak = peak_resident();
    let mut first = Vec::with_capacity(args.repeat);
    for _ in 0..args.repeat {
        first.push(first_token_seconds(args, settings)?);
    }
    let speeds = |seconds: &mut [f64], tokens: usize| {
        seconds.sort_by(f64::total_cmp);
        (tokens as f64 / seconds[seconds.len() / 2], tokens as f64 / seconds[0])
    };
    let (prefill_tokens_per_s, prefill_best) = speeds(&mut prefill, args.prompt);
    let (decode_tokens_per_s, decode_best) = speeds(&mut decode, args.new);
    let result = GenerateResult {
        weights_gb: llama.parameters.iter().map(|p| p.value.num_bytes()).sum::<usize>() as f64 / 1e9,
        prompt: args.prompt,
        new: args.new,
        context: args.context,
        threads: threads(),
        prefill_tokens_per_s,
        prefill_best,
        decode_tokens_per_s,
        decode_best,
        first_token_s: first.into_iter().fold(f64::INFINITY, f64::min),
        peak_rss_gb: peak.map(|b| b as f64 / 1e9),
    };
    if let Some(file) = &args.json {
        return write_json_line(file, &result);
    }
    let GenerateResult { prompt, new, threads, first_token_s, .. } = result;
    println!("prompt of {prompt}: {prefill_tokens_per_s:.1} tokens/s (best {prefill_best:.1}), {threads} threads");
    println!("{new} new tokens behind {}: {decode_tokens_per_s:.1} tokens/s (best {decode_best:.1})", result.context);
    println!("first token {first_token_s:.2} s after the start of the process");
    if let Some(gb) = result.peak_rss_gb {
        println!("peak resident memory {gb:.2} GB");
    }
    Ok(())
}

/// `repeat` measurements after one that is thrown away.
fn measure(repeat: usize, once: impl Fn() -> Result<f64>) -> Result<Vec<f64>> {
    once()?;
    (0..repeat).map(|_| once()).collect()
}

/// Seconds until the first token after a random prompt of `prompt` tokens, and for `new` further ones.
fn seconds(llama: &Llama, prompt: usize, new: usize) -> Result<(f64, f64)> {
    let mut rng = Rng::new(0, 0);
    let ids: Vec<u32> = (0..prompt).map(|_| rng.below(llama.config.vocab_size as u32)).collect();
    let request = Request::new(&ids, Sampler::new(Sampling::default())?, &[], new + 1);
    let mut engine = Engine::new(llama, 1, (prompt + new).div_ceil(PAGE));
    let start = Instant::now();
    engine.submit(request)?;
    let mut first = None;
    while !engine.is_idle() {
        for (_, event) in engine.step() {
            match event {
                Event::Token(_) => first = first.or_else(|| Some(start.elapsed().as_secs_f64())),
                Event::Finished(_) => {}
                Event::Failed(error) => return Err(error.into()),
            }
        }
    }
    let first = first.unwrap_or_default();
    Ok((first, start.elapsed().as_secs_f64() - first))
}

/// Starts this program anew to write one token.
fn first_token_seconds(args: &BenchGenerateArgs, settings: &Settings) -> Result<f64> {
    let failed = |e: std::io::Error| Error::Io { what: "cannot start this program a second time".into(), source: e };
    let program = std::env::current_exe().map_err(failed)?;
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(settings.offline.then_some("--offline"))
        .args(["generate", "--greedy", "--max-new-tokens", "1", "--model", &args.model])
        .args(args.compute.map(|compute| if compute == ComputeName::F32 { "--compute=f32" } else { "--compute=int8" }))
        .arg("The capital of France is")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let Some(mut out) = child.stdout.take() else {
        return Err(Error::Failure("the output of a started program cannot be read".into()));
    };
    let read = out.read(&mut [0]).map_err(failed)?;
    let seconds = start.elapsed().as_secs_f64();
    // The rest is read too: a closed pipe would end the program early.
    std::io::copy(&mut out, &mut std::io::sink()).map_err(failed)?;
    let status = child.wait().map_err(failed)?;
    if read == 0 || !status.success() {
        return Err(Error::Failure(format!("`generate` for the time of a cold start ended with {status}")));
    }
    Ok(seconds)
}
