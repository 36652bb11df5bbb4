//! Training on short rows: ours packed into blocks, the peer's in padded batches. The same rows, each once, and the same
//! tokens that carry loss.

use super::{Args, CELLS, Case, Measured, Pair, RULES, load_average, ours, peer, shown, today};
use crate::{Result, size::target_directory, write};
use std::{io::Read, path::Path};
use tunesmith_hub::{self as hub, Resolved, Settings};

/// An archive of the package's training data, and in it movie-review snippets with an id and a score before each,
/// separated by tabs.
const ARCHIVE: &str = "pypi:vaderSentiment==3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz";
const SNIPPETS: &str = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt";
/// Our blocks of a step and their length.
const BLOCKS: (usize, usize) = (4, 512);

pub(super) fn run(root: &Path, binary: &Path, model: &Resolved, settings: &Settings, args: &Args) -> Result<()> {
    let archive = hub::resolve(ARCHIVE, settings, &mut |_| {}).map_err(|e| e.to_string())?;
    let rows = rows(&member(&archive.path, SNIPPETS)?, args.rows)?;
    let file = target_directory(root)?.join("bench-peer").join("snippets.jsonl");
    write(&file, rows.join("\n") + "\n")?;
    let peer_batches = if args.peer_batch.is_empty() { vec![32, 64] } else { args.peer_batch.clone() };
    let load_before = load_average();
    let (mut versions, mut commands, mut lines, mut counts) = (None, Vec::new(), Vec::new(), None);
    for case in Case::all(args) {
        for batch in &peer_batches {
            let (mut ours, mut peer) = (ours(binary, model), peer(root, model, args));
            ours.args(["--batch", &BLOCKS.0.to_string(), "--seq", &BLOCKS.1.to_string()]);
            peer.args(["--batch", &batch.to_string()]);
            let name = case.set(&mut ours, &mut peer);
            for command in [&mut ours, &mut peer] {
                command.arg("--data").arg(&file);
            }
            let what = format!("{name}, peer's batch {batch}");
            let pair = Pair::measure(&what, &mut ours, &mut peer, args.rounds)?;
            let trained = count(&pair.ours[0], "trained_tokens")?;
            if let Some(other) =
                pair.ours.iter().chain(&pair.peer).find(|run| count(run, "trained_tokens") != Ok(trained))
            {
                return Err(format!("not the same tokens were trained: ours {trained}, another run {}", other.json));
            }
            counts = Some((trained, count(&pair.ours[0], "tokens")?));
            if commands.is_empty() {
                commands = vec![shown(&ours), shown(&peer)];
            }
            versions = versions.or_else(|| pair.versions());
            let padded = count(&pair.peer[0], "padded_tokens")?;
            lines.push(format!("| {what} ({padded} tokens with padding) | {} |", pair.cells()));
        }
    }
    let (trained, tokens) = counts.unwrap_or_default();
    println!(
        "{}, {} ({}), the first {} rows of {SNIPPETS} ({ARCHIVE}), {tokens} tokens, {trained} of them trained on both \
         sides, median of {} runs in turn, load before {load_before}, peer: {}\n",
        today(),
        args.model,
        model.origin,
        rows.len(),
        args.rounds,
        versions.unwrap_or_else(|| "versions unknown".to_owned()),
    );
    commands.iter().for_each(|command| println!("    {command}"));
    println!("\n| Method | {} |\n|---|{RULES}|", CELLS.replace("tokens/s", "trained tokens/s"));
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// The text file `name` of a .tar.gz file.
pub(crate) fn member(archive: &Path, name: &str) -> Result<String> {
    let cannot = |e: std::io::Error| format!("cannot read {name} in {}: {e}", archive.display());
    let file = std::fs::File::open(archive).map_err(cannot)?;
    for entry in tar::Archive::new(flate2::read::GzDecoder::new(file)).entries().map_err(cannot)? {
        let mut entry = entry.map_err(cannot)?;
        if entry.path().map_err(cannot)?.as_ref() == Path::new(name) {
            let mut text = String::new();
            return entry.read_to_string(&mut text).map(|_| text).map_err(cannot);
        }
    }
    Err(format!("{} has no file {name}", archive.display()))
}

fn count(run: &Measured, key: &str) -> Result<u64> {
    run.json[key].as_u64().ok_or_else(|| format!("no {key} in {}", run.json))
}

/// The first `num` snippets of `text` as rows of JSON.
fn rows(text: &str, num: usize) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate().take(num) {
        let Some(snippet) = line.split('\t').nth(2).map(str::trim).filter(|snippet| !snippet.is_empty()) else {
            return Err(format!("line {} of the snippets has no third column: {line}", number + 1));
        };
        found.push(serde_json::json!({ "text": snippet }).to_string());
    }
    if found.len() < num {
        return Err(format!("there are only {} snippets; --rows {num} is too many", found.len()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_column_is_the_text() {
        let text = "1_1\t-1.2\tdull, \"at best\" .\r\n2_1\t0.5\tfine\n";
        assert_eq!(rows(text, 2).unwrap(), [r#"{"text":"dull, \"at best\" ."}"#, r#"{"text":"fine"}"#]);
        assert!(rows(text, 3).unwrap_err().contains("only 2 snippets"));
        assert!(rows("1_1\t0.5\n", 1).unwrap_err().contains("line 1"));
    }
}
