//! Speed of generation: reading a prompt, writing token by token, and a cold start.

use serde::Serialize;
use std::time::Instant;
use tunesmith_files::{Error, Result};
use tunesmith_model::{Llama, Workspace};
use tunesmith_tensor::ops::sample;
use tunesmith_tensor::rng::Rng;
use tunesmith_train::memory::peak_resident;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct GenerateResult {
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

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of the prompt that is read.
    pub prompt: usize,
    /// Tokens that are written one by one.
    pub new: usize,
    /// Tokens that are in the cache before the first of them is written.
    pub context: usize,
    /// Measurements of each kind, after one that warms up.
    pub repeat: usize,
}

/// Measures `llama`; `first_token` gives the seconds from the start of a process to its first piece of text.
///
/// # Errors
/// Options that are 0 or do not fit into the context; that of `first_token`.
pub fn measure(
    options: &Options,
    llama: &Llama,
    mut first_token: impl FnMut() -> Result<f64>,
) -> Result<GenerateResult> {
    let &Options { prompt, new, context, repeat } = options;
    let (longest, most) = (prompt.max(context + new), llama.config.max_position_embeddings);
    if longest > most {
        return Err(Error::Input(format!("{longest} tokens are more than the model's context of {most}")));
    }
    let mut prefill = repeated(repeat, |ws| prompt_seconds(llama, prompt, ws));
    let mut decode = repeated(repeat, |ws| decode_seconds(llama, context, new, ws));
    let peak = peak_resident();
    let mut first_token_s = f64::INFINITY;
    for _ in 0..repeat {
        first_token_s = first_token_s.min(first_token()?);
    }
    let speeds = |seconds: &mut [f64], tokens: usize| {
        seconds.sort_by(f64::total_cmp);
        (tokens as f64 / seconds[seconds.len() / 2], tokens as f64 / seconds[0])
    };
    let (prefill_tokens_per_s, prefill_best) = speeds(&mut prefill, prompt);
    let (decode_tokens_per_s, decode_best) = speeds(&mut decode, new);
    Ok(GenerateResult {
        weights_gb: llama.parameters.iter().map(|p| p.value.num_bytes()).sum::<usize>() as f64 / 1e9,
        prompt,
        new,
        context,
        threads: rayon::current_num_threads(),
        prefill_tokens_per_s,
        prefill_best,
        decode_tokens_per_s,
        decode_best,
        first_token_s,
        peak_rss_gb: peak.map(|b| b as f64 / 1e9),
    })
}

/// The result as text.
pub fn describe(r: &GenerateResult) -> String {
    let mut text = format!(
        "prompt of {}: {:.1} tokens/s (best {:.1}), {} threads\n\
         {} new tokens after {}: {:.1} tokens/s (best {:.1})\n\
         first token {:.2} s after the start of the process\n",
        r.prompt,
        r.prefill_tokens_per_s,
        r.prefill_best,
        r.threads,
        r.new,
        r.context,
        r.decode_tokens_per_s,
        r.decode_best,
        r.first_token_s
    );
    if let Some(gb) = r.peak_rss_gb {
        text.push_str(&format!("peak resident memory {gb:.2} GB\n"));
    }
    text
}

/// `repeat` measurements after one that is thrown away.
fn repeated(repeat: usize, once: impl Fn(&mut Workspace) -> f64) -> Vec<f64> {
    let mut ws = Workspace::default();
    once(&mut ws);
    (0..repeat).map(|_| once(&mut ws)).collect()
}

fn random_ids(llama: &Llama, num: usize) -> Vec<u32> {
    let mut rng = Rng::new(0, 0);
    (0..num).map(|_| rng.below(llama.config.vocab_size as u32)).collect()
}

fn prompt_seconds(llama: &Llama, num: usize, ws: &mut Workspace) -> f64 {
    let mut cache = llama.new_cache(num);
    let ids = random_ids(llama, num);
    let start = Instant::now();
    llama.decode(&ids, &mut cache, ws);
    start.elapsed().as_secs_f64()
}

fn decode_seconds(llama: &Llama, context: usize, new: usize, ws: &mut Workspace) -> f64 {
    let mut cache = llama.new_cache(context + new);
    if context > 0 {
        llama.decode(&random_ids(llama, context), &mut cache, ws);
    }
    let mut next = 1;
    let start = Instant::now();
    for _ in 0..new {
        next = sample::largest(llama.decode(&[next], &mut cache, ws));
    }
    start.elapsed().as_secs_f64()
}
