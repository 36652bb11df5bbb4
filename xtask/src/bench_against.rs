//! This program against an older one: pairs of runs in turn on the same machine, so that what disturbs one of a pair
//! disturbs the other too. Nothing is concluded from a single run.

use crate::{
    Result,
    bench_peer::{build, json_line, load_average, median, output, shown, today},
    size::target_directory,
    write,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tunesmith::source;
use tunesmith_model::Checkpoint;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The older tunesmith.
    #[arg(value_name = "OLD_BINARY")]
    old: PathBuf,
    /// The newer one, instead of building the release binary.
    #[arg(long, value_name = "FILE")]
    new: Option<PathBuf>,
    /// The model; any source that the program reads. It is trained as it is; GGUF files of its sizes, with random
    /// weights, are generated from.
    #[arg(long, default_value = "smollm2-135m-instruct", value_name = "SOURCE")]
    model: String,
    /// Pairs of runs of each case; every second pair begins with the newer program.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Measured steps, or generations, of a run.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// What to measure; may be repeated [default: everything].
    #[arg(long, value_enum)]
    only: Vec<Case>,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Case {
    /// LoRA, 4 rows of 512 tokens.
    Lora,
    /// Full fine-tuning, 4 rows of 512 tokens.
    Full,
    /// LoRA with 8-bit products, 4 rows of 512 tokens.
    Int8,
    /// LoRA, one row of 2,048 tokens.
    Long,
    /// Prefill and decode from a Q8_0 file.
    Q8_0,
    /// Prefill and decode from an F32 file.
    F32,
}

impl Case {
    const ALL: [Self; 6] = [Self::Lora, Self::Full, Self::Int8, Self::Long, Self::Q8_0, Self::F32];

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Lora => &["train", "--method", "lora", "--batch", "4", "--seq", "512"],
            Self::Full => &["train", "--method", "full", "--batch", "4", "--seq", "512"],
            Self::Int8 => &["train", "--method", "lora", "--compute", "int8", "--batch", "4", "--seq", "512"],
            Self::Long => &["train", "--method", "lora", "--batch", "1", "--seq", "2048"],
            Self::Q8_0 | Self::F32 => &["generate", "--prompt", "512", "--new", "64"],
        }
    }

    /// The encoding of the file that is generated from.
    fn encoding(self) -> Option<&'static str> {
        match self {
            Self::Q8_0 => Some("q8_0"),
            Self::F32 => Some("f32"),
            _ => None,
        }
    }

    /// What a run says of its speed, and what to call it.
    fn speeds(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Lora => &[("tokens_per_s", "LoRA, 4 x 512")],
            Self::Full => &[("tokens_per_s", "full, 4 x 512")],
            Self::Int8 => &[("tokens_per_s", "LoRA int8, 4 x 512")],
            Self::Long => &[("tokens_per_s", "LoRA, 1 x 2048")],
            Self::Q8_0 => &[("prefill_tokens_per_s", "Q8_0, prefill 512"), ("decode_tokens_per_s", "Q8_0, decode 64")],
            Self::F32 => &[("prefill_tokens_per_s", "F32, prefill 512"), ("decode_tokens_per_s", "F32, decode 64")],
        }
    }
}

/// Runs everything and prints the table.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let new = match &args.new {
        Some(binary) => binary.clone(),
        None => build(root)?,
    };
    let settings = source::Settings::from_env().map_err(|e| e.to_string())?;
    let model = source::resolve(&args.model, &settings, &mut |_| {}).map_err(|e| e.to_string())?.path;
    let folder = target_directory(root)?.join("bench-against");
    let load_before = load_average();
    let (mut rows, mut commands) = (Vec::new(), Vec::new());
    for case in if args.only.is_empty() { &Case::ALL[..] } else { &args.only } {
        let model = match case.encoding() {
            Some(encoding) => random_file(&args.old, &model, encoding, &folder)?,
            None => model.clone(),
        };
        let repeats = if case.encoding().is_some() { "--repeat" } else { "--steps" };
        let mut programs = [&args.old, &new].map(|binary| {
            let mut command = Command::new(binary);
            command.arg("bench").args(case.arguments()).args([repeats, &args.steps.to_string()]);
            command.args(["--json", "-", "--model"]).arg(&model);
            command
        });
        commands.push(shown(&programs[1]));
        let mut pairs = Vec::new();
        for number in 0..args.pairs {
            let mut pair = [Value::Null, Value::Null];
            for which in if number % 2 == 0 { [0, 1] } else { [1, 0] } {
                pair[which] = json_line(&output(&mut programs[which])?)?;
            }
            eprintln!("{case:?} {}/{}: {} {}", number + 1, args.pairs, pair[0], pair[1]);
            pairs.push(pair);
        }
        for (key, name) in case.speeds() {
            rows.push(format!("| {name} | {} |", cells(&pairs, key)?));
        }
    }
    println!("{}, {}, {} pairs in turn, load before {load_before}\n", today(), args.model, args.pairs);
    commands.iter().for_each(|command| println!("    {command}"));
    println!(
        "\n| Case | old tokens/s | new tokens/s | ratio | 95 % interval | peak RSS, ratio |\n|---|---|---|---|---|---|"
    );
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

/// A GGUF file with random weights in `model`'s sizes and with its tokenizer, by the old program; made once and kept.
fn random_file(old: &Path, model: &Path, encoding: &str, folder: &Path) -> Result<PathBuf> {
    let file = folder.join(format!("{encoding}.gguf"));
    if !file.is_file() {
        let checkpoint = Checkpoint::open(model).map_err(|e| e.to_string())?;
        let sizes = folder.join("config.json");
        write(&sizes, checkpoint.config().to_json("float32").map_err(|e| e.to_string())?.to_string())?;
        let mut init = Command::new(old);
        init.args(["init", "--dtype", encoding, "--config"]).arg(&sizes).arg("--out").arg(&file);
        output(init.arg("--tokenizer").arg(model))?;
    }
    Ok(file)
}

/// Medians of the speeds under `key`, median and interval of the ratio new to old, and the ratio of the largest peaks.
fn cells(pairs: &[[Value; 2]], key: &str) -> Result<String> {
    let number = |run: &Value, key: &str| {
        run[key].as_f64().filter(|x| *x > 0.0).ok_or_else(|| format!("a run says no {key}: {run}"))
    };
    let (mut speeds, mut ratios, mut peaks) = ([Vec::new(), Vec::new()], Vec::new(), [0.0f64; 2]);
    for pair in pairs {
        for which in 0..2 {
            speeds[which].push(number(&pair[which], key)?);
            peaks[which] = peaks[which].max(number(&pair[which], "peak_rss_gb")?);
        }
        ratios.push(speeds[1][speeds[1].len() - 1] / speeds[0][speeds[0].len() - 1]);
    }
    ratios.sort_by(f64::total_cmp);
    let interval = match interval_ranks(ratios.len()) {
        Some((low, high)) => format!("{:.3} to {:.3}", ratios[low], ratios[high]),
        None => "too few pairs".to_owned(),
    };
    let [old, new] = speeds.map(median);
    Ok(format!("{old:.1} | {new:.1} | {:.3} | {interval} | {:.3}", median(ratios), peaks[1] / peaks[0]))
}

/// Positions in `num` sorted values between which their distribution's median lies with a probability of at least 95 %,
/// whatever the distribution: the median is below the k-th smallest value as often as fewer than k of `num` tosses of a
/// coin show heads.
fn interval_ranks(num: usize) -> Option<(usize, usize)> {
    let (mut chance, mut tail, mut found) = (0.5f64.powi(i32::try_from(num).ok()?), 0.0, None);
    for below in 0..num / 2 {
        tail += chance;
        if 2.0 * tail > 0.05 {
            break;
        }
        found = Some((below, num - 1 - below));
        chance *= (num - below) as f64 / (below + 1) as f64;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The ranks of the usual tables, counted from 0.
    #[test]
    fn intervals_are_those_of_the_tables() {
        assert_eq!(interval_ranks(5), None);
        assert_eq!(interval_ranks(6), Some((0, 5)));
        assert_eq!(interval_ranks(9), Some((1, 7)));
        assert_eq!(interval_ranks(20), Some((5, 14)));
        assert_eq!(interval_ranks(0), None);
    }

    #[test]
    fn a_row_compares_pair_by_pair() {
        let run = |speed: f64, peak: f64| json!({"tokens_per_s": speed, "peak_rss_gb": peak});
        // The machine becomes slower; the newer program is always a tenth faster.
        let pairs: Vec<[Value; 2]> =
            (0..9).map(|i| 200.0 - 10.0 * f64::from(i)).map(|old| [run(old, 2.0), run(1.1 * old, 1.0)]).collect();
        assert_eq!(cells(&pairs, "tokens_per_s").unwrap(), "160.0 | 176.0 | 1.100 | 1.100 to 1.100 | 0.500");
        assert!(cells(&pairs, "decode_tokens_per_s").unwrap_err().contains("decode_tokens_per_s"));
        assert!(cells(&pairs[..1], "tokens_per_s").unwrap().contains("too few pairs"));
    }
}
