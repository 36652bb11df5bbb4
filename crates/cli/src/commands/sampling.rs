//! What `generate` and `chat` share: how tokens are chosen, and how text is shown.

use crate::args::SamplingArgs;
use serde_json::Value;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};
use tunesmith_files::{Error, Result};
use tunesmith_infer::Limits;
use tunesmith_model::Sampling;

/// Where a text ends at the latest.
pub(crate) fn limits(args: &SamplingArgs) -> Limits {
    Limits { max_new_tokens: args.max_new_tokens, stop_strings: args.stop.clone() }
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

/// Writes a piece of text to standard output at once.
pub(crate) fn show(piece: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    written.map_err(|source| Error::Io { what: "cannot write the text to standard output".into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
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
}
