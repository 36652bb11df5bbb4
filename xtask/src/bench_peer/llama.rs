//! Inference against llama.cpp's own benchmark, on the same GGUF files.

use super::{Args, json_line, load_average, median, output, shown, today};
use crate::Result;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Tokens of the prompt, tokens generated, and tokens that are in the context before both.
const CASES: [(usize, usize, usize); 2] = [(512, 64, 0), (0, 32, 4000)];

/// Measurements of a run.
const REPEAT: &str = "3";

/// Prefill and decoding in tokens per second; `None` where a case has none of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Speeds {
    prefill: Option<f64>,
    decode: Option<f64>,
    /// Seconds from the start of a process to its first token.
    first_token: Option<f64>,
}

pub(super) fn run(binary: &Path, llama_bench: &Path, args: &Args) -> Result<()> {
    let load_before = load_average();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut rows, mut cold, mut commands, mut version) = (Vec::new(), Vec::new(), Vec::new(), String::new());
    for file in &args.gguf {
        for (prompt, new, depth) in CASES {
            let mut ours = Command::new(binary);
            ours.args(["bench", "generate", "--json", "-", "--repeat", REPEAT, "--model"]).arg(file);
            let mut peer = Command::new(llama_bench);
            // Its flash attention is its faster one on long contexts.
            peer.args(["-o", "json", "-fa", "1", "-r", REPEAT, "-t", &threads.to_string(), "-m"]).arg(file);
            // Ours always reads a prompt, so that a case without one reads a token.
            for (our_flag, peer_flag, value) in
                [("--prompt", "-p", prompt), ("--new", "-n", new), ("--context", "-d", depth)]
            {
                let ours_value = if our_flag == "--prompt" { value.max(1) } else { value };
                ours.args([our_flag, &ours_value.to_string()]);
                peer.args([peer_flag, &value.to_string()]);
            }
            let (mut our_runs, mut peer_runs) = (Vec::new(), Vec::new());
            for round in 1..=args.rounds {
                our_runs.push(of_ours(&output(&mut ours)?)?);
                let (speeds, build) = of_peer(&output(&mut peer)?)?;
                peer_runs.push(speeds);
                version = build;
                eprintln!(
                    "{} {round}/{}: {:?}, peer {:?}",
                    file.display(),
                    args.rounds,
                    our_runs.last(),
                    peer_runs.last()
                );
            }
            if commands.len() < 2 * CASES.len() {
                commands.extend([shown(&ours), shown(&peer)]);
            }
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let first = our_runs.iter().filter_map(|run| run.first_token).fold(f64::INFINITY, f64::min);
            if depth == 0 && first.is_finite() {
                cold.push(format!("{name} {first:.2} s"));
            }
            for (what, tokens) in [("prefill", prompt), ("decode", new)] {
                let speed = |run: &Speeds| if what == "prefill" { run.prefill } else { run.decode };
                let middle = |runs: &[Speeds]| -> Option<f64> {
                    let found: Vec<f64> = runs.iter().filter_map(speed).collect();
                    (!found.is_empty()).then(|| median(found))
                };
                if let (Some(a), Some(b)) = (middle(&our_runs), middle(&peer_runs)) {
                    let behind = if depth > 0 { format!(" behind {depth}") } else { String::new() };
                    rows.push(format!("| {name} | {what} {tokens}{behind} | {a:.1} | {b:.1} | {:.2} |", a / b));
                }
            }
        }
    }
    println!(
        "{}, {threads} threads, median of {} runs in turn, load before {load_before}, peer: llama.cpp {version}\n",
        today(),
        args.rounds
    );
    commands.iter().for_each(|command| println!("    {command}"));
    println!("\n| File | tokens | tokens/s | llama.cpp's tokens/s | ratio |\n|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{row}"));
    if !cold.is_empty() {
        println!("\nFirst token of `generate` from a cold start, best run: {}", cold.join(", "));
    }
    Ok(())
}

fn of_ours(stdout: &str) -> Result<Speeds> {
    let json = json_line(stdout)?;
    let speed = |key: &str| json[key].as_f64().filter(|x| *x > 0.0);
    Ok(Speeds {
        prefill: speed("prefill_tokens_per_s"),
        decode: speed("decode_tokens_per_s"),
        first_token: speed("first_token_s"),
    })
}

/// llama-bench prints a list with an object for each test: prompt tokens or generated tokens, and their speed.
fn of_peer(stdout: &str) -> Result<(Speeds, String)> {
    let json: Value = serde_json::from_str(stdout).map_err(|e| format!("llama-bench: {e}"))?;
    let tests = json.as_array().filter(|tests| !tests.is_empty()).ok_or("llama-bench printed no list of tests")?;
    let speed = |key: &str| {
        let test = tests.iter().find(|test| test[key].as_u64().is_some_and(|n| n > 0))?;
        test["avg_ts"].as_f64()
    };
    let build = format!("build {} ({})", tests[0]["build_number"], tests[0]["build_commit"].as_str().unwrap_or("?"));
    Ok((Speeds { prefill: speed("n_prompt"), decode: speed("n_gen"), first_token: None }, build))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_programs_are_understood() {
        let ours = "{\"prefill_tokens_per_s\": 500.5, \"decode_tokens_per_s\": 60, \"first_token_s\": 0.5}";
        assert_eq!(of_ours(ours).unwrap(), Speeds { prefill: Some(500.5), decode: Some(60.0), first_token: Some(0.5) });
        assert!(of_ours("").is_err());
        let peer = r#"[{"build_commit": "abc", "build_number": 7, "n_prompt": 512, "n_gen": 0, "avg_ts": 400.0},
            {"build_commit": "abc", "build_number": 7, "n_prompt": 0, "n_gen": 64, "avg_ts": 50.0}]"#;
        let speeds = Speeds { prefill: Some(400.0), decode: Some(50.0), first_token: None };
        assert_eq!(of_peer(peer).unwrap(), (speeds, "build 7 (abc)".to_owned()));
        assert!(of_peer("[]").unwrap_err().contains("no list"));
    }
}
