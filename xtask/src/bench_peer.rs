//! This program against its peers, in turn on the same machine: training against transformers + PEFT, inference against
//! llama.cpp.

mod llama;
mod short_rows;
mod train;

pub(crate) use short_rows::member;

use crate::{Result, size::target_directory};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};
use tunesmith::args::{BenchMethod, ComputeName, RecomputeName};
use tunesmith::source;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with torch, transformers and peft (and gguf for a .gguf model).
    #[arg(long, default_value = "python3", value_name = "PYTHON")]
    python: PathBuf,
    /// The model; any source that the program reads.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    model: String,
    /// What trains; may be repeated [default: lora, full].
    #[arg(long, value_enum)]
    method: Vec<BenchMethod>,
    /// Rows of a step x tokens of a row; may be repeated [default: 4x512, 1x2048].
    #[arg(long, value_name = "BATCHxSEQ", value_parser = train::shape)]
    shape: Vec<(usize, usize)>,
    /// How our frozen weights multiply (the peer's always in f32); may be repeated [default: f32].
    #[arg(long, value_enum)]
    compute: Vec<ComputeName>,
    /// What both recompute in the backward pass; may be repeated. `block` is gradient checkpointing to the peer, which keeps
    /// everything otherwise [default: norms].
    #[arg(long, value_enum)]
    recompute: Vec<RecomputeName>,
    /// Measured steps of a run, after one that warms up.
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Runs of each program for each line, ours and the peer's in turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// A tunesmith to measure instead of building the release binary.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Train on short rows instead, movie-review snippets of about 30 tokens: ours packed, the peer's padded.
    #[arg(long)]
    short_rows: bool,
    /// How many of the short rows to train on.
    #[arg(long, default_value_t = 512, requires = "short_rows")]
    rows: usize,
    /// Rows of the peer's padded batches; may be repeated [default: 32, 64].
    #[arg(long, requires = "short_rows")]
    peer_batch: Vec<usize>,
    /// llama.cpp's llama-bench: compare inference on --gguf files instead.
    #[arg(long, value_name = "FILE", requires = "gguf")]
    llama_bench: Option<PathBuf>,
    /// GGUF file for --llama-bench; may be repeated.
    #[arg(long, value_name = "FILE", requires = "llama_bench")]
    gguf: Vec<PathBuf>,
}

/// Runs everything and prints the table.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => build(root)?,
    };
    if let Some(llama_bench) = &args.llama_bench {
        return llama::run(&binary, llama_bench, args);
    }
    let settings = source::Settings::from_env().map_err(|e| e.to_string())?;
    let model = source::resolve(&args.model, &settings, &mut |_| {}).map_err(|e| e.to_string())?;
    if args.short_rows {
        return short_rows::run(root, &binary, &model, &settings, args);
    }
    train::run(root, &binary, &model, args)
}

/// What one run measured.
#[derive(Clone, Debug, PartialEq)]
struct Measured {
    tokens_per_s: f64,
    peak_rss_gb: f64,
    threads: u64,
    /// Versions of the libraries, where the program says them.
    versions: Option<String>,
    /// Everything that it said.
    json: Value,
}

/// A command of ours that trains `model`, to be completed.
fn ours(binary: &Path, model: &source::Resolved) -> Command {
    let mut command = Command::new(binary);
    command.args(["bench", "train", "--json", "-", "--model"]).arg(&model.path);
    command
}

/// The peer's.
fn peer(root: &Path, model: &source::Resolved, args: &Args) -> Command {
    let mut command = Command::new(&args.python);
    command.arg(root.join("docs/bench/peer_train.py")).arg("--model").arg(&model.path);
    command
}

fn name(method: BenchMethod) -> &'static str {
    match method {
        BenchMethod::Lora => "lora",
        BenchMethod::Full => "full",
    }
}

/// One line of a table.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Case {
    method: BenchMethod,
    /// How our frozen weights multiply.
    compute: ComputeName,
    recompute: RecomputeName,
}

impl Case {
    /// Every combination that was asked for. Full fine-tuning has no frozen weights.
    fn all(args: &Args) -> Vec<Self> {
        let methods = if args.method.is_empty() { &[BenchMethod::Lora, BenchMethod::Full][..] } else { &args.method };
        let computes = if args.compute.is_empty() { &[ComputeName::F32][..] } else { &args.compute };
        let levels = if args.recompute.is_empty() { &[RecomputeName::Norms][..] } else { &args.recompute };
        let mut cases = Vec::new();
        for method in methods.iter().copied() {
            for compute in computes.iter().copied() {
                if method == BenchMethod::Lora || compute == ComputeName::F32 {
                    cases.extend(levels.iter().map(|recompute| Self { method, compute, recompute: *recompute }));
                }
            }
        }
        cases
    }

    /// Adds the arguments that say so. Returns what to call it.
    fn set(self, ours: &mut Command, peer: &mut Command) -> String {
        let mut title = name(self.method).to_owned();
        for command in [&mut *ours, &mut *peer] {
            command.args(["--method", name(self.method)]);
        }
        if self.compute == ComputeName::Int8 {
            ours.args(["--compute", "int8"]);
            title += " int8";
        }
        match self.recompute {
            RecomputeName::Norms => {}
            RecomputeName::None => {
                ours.args(["--recompute", "none"]);
                title += ", nothing recomputed";
            }
            RecomputeName::Block => {
                ours.args(["--recompute", "block"]);
                peer.arg("--ckpt");
                title += ", blocks recomputed";
            }
        }
        title
    }
}

/// The release binary of what is in the tree now: an old one would be measured by mistake sooner or later.
pub(crate) fn build(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(["build", "--release", "--package", "tunesmith"]).current_dir(root).status();
    if !status.map_err(|e| format!("cannot run cargo: {e}"))?.success() {
        return Err("the release build failed".into());
    }
    Ok(target_directory(root)?.join("release").join(format!("tunesmith{}", std::env::consts::EXE_SUFFIX)))
}

/// What `command` prints.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).stderr(Stdio::piped()).output();
    let done = done.map_err(|e| format!("cannot run {program}: {e}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{program} failed ({}):\n{}", done.status, said.trim_end()));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Runs `command` and reads the JSON object on the last line that it prints.
fn measure(command: &mut Command) -> Result<Measured> {
    let program = command.get_program().to_string_lossy().into_owned();
    parse(&output(command)?).map_err(|e| format!("{program}: {e}"))
}

/// The JSON object on the last line that a program printed.
pub(crate) fn json_line(stdout: &str) -> Result<Value> {
    let line = stdout.lines().rfind(|line| line.starts_with('{')).ok_or("it printed no line of JSON")?;
    serde_json::from_str(line).map_err(|e| format!("{e} in {line}"))
}

fn parse(stdout: &str) -> Result<Measured> {
    let json = json_line(stdout)?;
    let number = |key: &str| json[key].as_f64().filter(|x| *x > 0.0).ok_or_else(|| format!("no {key} in {json}"));
    let versions = json["versions"].as_object().map(|versions| {
        let each = versions.iter().map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or("?")));
        each.collect::<Vec<_>>().join(", ")
    });
    Ok(Measured {
        tokens_per_s: number("tokens_per_s")?,
        peak_rss_gb: number("peak_rss_gb")?,
        threads: json["threads"].as_u64().unwrap_or(0),
        versions,
        json,
    })
}

/// Runs of both programs for one line of a table.
#[derive(Default)]
struct Pair {
    ours: Vec<Measured>,
    peer: Vec<Measured>,
}

impl Pair {
    /// Runs `ours` and `peer` in turn, `rounds` times each.
    fn measure(what: &str, ours: &mut Command, peer: &mut Command, rounds: u32) -> Result<Self> {
        let mut pair = Self::default();
        for round in 1..=rounds {
            for (who, command, found) in [("ours", &mut *ours, &mut pair.ours), ("peer", &mut *peer, &mut pair.peer)] {
                let one = measure(command)?;
                let (speed, memory) = (one.tokens_per_s, one.peak_rss_gb);
                eprintln!("{what} {who} {round}/{rounds}: {speed:.1} tokens/s, {memory:.2} GB");
                found.push(one);
            }
        }
        Ok(pair)
    }

    fn versions(&self) -> Option<String> {
        self.peer.iter().find_map(|one| one.versions.clone())
    }

    /// Speeds (medians), memory (the largest) and their ratios, as cells of a Markdown table.
    fn cells(&self) -> String {
        let speed = |runs: &[Measured]| median(runs.iter().map(|run| run.tokens_per_s).collect());
        let memory = |runs: &[Measured]| runs.iter().map(|run| run.peak_rss_gb).fold(0.0, f64::max);
        let (a, b, c, d) = (speed(&self.ours), speed(&self.peer), memory(&self.ours), memory(&self.peer));
        format!("{a:.1} | {b:.1} | {:.2} | {c:.2} | {d:.2} | {:.2}", a / b, c / d)
    }
}

const CELLS: &str = "tokens/s | peer's tokens/s | ratio | peak RSS, GB | peer's peak RSS, GB | ratio";
const RULES: &str = "---|---|---|---|---|---";

/// A command as it would be typed, with file names instead of paths.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let word = |word: &std::ffi::OsStr| {
        let path = Path::new(word);
        let name = if path.is_absolute() { path.file_name().unwrap_or(word) } else { word };
        name.to_string_lossy().into_owned()
    };
    words.map(word).collect::<Vec<_>>().join(" ")
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// The load of the last minute, where the system tells: a benchmark beside other work is worth nothing.
pub(crate) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

pub(crate) fn today() -> String {
    date(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()) / 86_400)
}

/// The Gregorian date, `days` after 1970-01-01.
fn date(days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(11_017), "2000-03-01");
        assert_eq!(date(20_453), "2025-12-31");
    }

    #[test]
    fn the_last_line_of_json_counts() {
        let found = parse("warming up\n{\"tokens_per_s\": 300.5, \"peak_rss_gb\": 2, \"threads\": 2}\n").unwrap();
        assert_eq!((found.tokens_per_s, found.peak_rss_gb, found.threads, found.versions), (300.5, 2.0, 2, None));
        let peer = "{\"tokens_per_s\":1,\"peak_rss_gb\":1,\"versions\":{\"torch\":\"2\",\"peft\":\"0\"}}";
        assert_eq!(parse(peer).unwrap().versions.unwrap(), "torch 2, peft 0");
        assert!(parse("").unwrap_err().contains("no line of JSON"));
        assert!(parse("{\"tokens_per_s\": 0, \"peak_rss_gb\": 1}").unwrap_err().contains("no tokens_per_s"));
    }

    #[test]
    fn a_row_compares_medians_and_peaks() {
        let run = |tokens_per_s, peak_rss_gb| Measured {
            tokens_per_s,
            peak_rss_gb,
            threads: 2,
            versions: None,
            json: Value::Null,
        };
        let ours = vec![run(300.0, 2.0), run(400.0, 3.0), run(310.0, 2.0)];
        let pair = Pair { ours, peer: vec![run(200.0, 8.0), run(300.0, 6.0)] };
        assert_eq!(pair.cells(), "310.0 | 250.0 | 1.24 | 3.00 | 8.00 | 0.38");
    }

    #[test]
    fn cases_are_the_combinations_that_make_sense() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let cases = |line: &str| {
            let line = <Line as clap::Parser>::try_parse_from(format!("x {line}").split_whitespace()).unwrap();
            let set = |case: Case| {
                let (mut ours, mut peer) = (Command::new("a"), Command::new("b"));
                let name = case.set(&mut ours, &mut peer);
                (name, shown(&ours), shown(&peer))
            };
            Case::all(&line.args).into_iter().map(set).collect::<Vec<_>>()
        };
        let own = |texts: [&str; 3]| (texts[0].to_owned(), texts[1].to_owned(), texts[2].to_owned());
        assert_eq!(
            cases("--compute f32 --compute int8"),
            [
                own(["lora", "a --method lora", "b --method lora"]),
                own(["lora int8", "a --method lora --compute int8", "b --method lora"]),
                own(["full", "a --method full", "b --method full"]),
            ]
        );
        assert_eq!(
            cases("--method full --recompute block"),
            [own(["full, blocks recomputed", "a --method full --recompute block", "b --method full --ckpt",])]
        );
    }

    #[test]
    fn commands_are_shown_without_the_machines_paths() {
        let mut command = Command::new("/somewhere/bin/tunesmith");
        command.args(["bench", "train", "--model"]).arg("/cache/model.gguf");
        assert_eq!(shown(&command), "tunesmith bench train --model model.gguf");
    }
}
