//! `tunesmith verify` as a user runs it, on the numbers that the engine itself is tested with.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod tiny;

use serde_json::Value;
use tiny::{binary, fixture, refused, run};

const MODELS: [&str; 2] = ["tiny-llama2", "tiny-llama3"];

#[test]
fn logits_loss_and_gradients_pass() {
    for name in MODELS {
        let folder = tempfile::tempdir().unwrap();
        let json = folder.path().join("sub/checks.json");
        let reference = fixture(&format!("{name}/forward_backward.safetensors"));
        let args = ["verify", "--model", &fixture(name), "--reference", &reference, "--show", "3"];
        let ran = run(&[&args[..], &["--json", json.to_str().unwrap()]].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        let result: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
        let checks = result["checks"].as_array().unwrap();
        assert_eq!(result["passed"], true);
        assert!(checks.iter().any(|c| c["what"] == "logits") && checks.iter().any(|c| c["what"] == "loss"));
        assert!(checks.iter().any(|c| c["what"] == "grad.model.embed_tokens.weight"));
        assert!(checks.iter().all(|c| c["passed"] == true && c["difference"].as_f64() <= c["tolerance"].as_f64()));
        let last = ran.stdout.lines().last().unwrap();
        assert_eq!(last, format!("{} comparisons, all within tolerance", checks.len()));
        assert_eq!(ran.stdout.lines().count(), 1 + 3 + 1, "{}", ran.stdout);
    }
}

#[test]
fn adapters_pass() {
    for name in MODELS {
        for variant in ["lora", "rslora"] {
            let reference = fixture(&format!("{name}/{variant}_forward.safetensors"));
            let adapter = fixture(&format!("{name}/{variant}_start"));
            let ran = run(&["verify", "--model", &fixture(name), "--adapter", &adapter, "--reference", &reference]);
            assert_eq!(ran.code, 0, "{ran:?}");
            let ran = run(&["verify", "--model", &fixture(name), "--reference", &reference]);
            assert_eq!(ran.code, 1, "without the adapter: {ran:?}");
            assert!(ran.stdout.ends_with("1 comparisons, 1 beyond tolerance\n"), "{ran:?}");
        }
    }
}

fn curve(name: &str, curves: &str, rest: &[&str]) -> tiny::Ran {
    let batches = fixture(&format!("{name}/train_batches.safetensors"));
    let args = ["verify", "--model", &fixture(name), "--batches", &batches, "--curves", curves];
    run(&[&args[..], rest].concat())
}

#[test]
fn every_curve_passes() {
    for name in MODELS {
        let curves = fixture(&format!("{name}/curves.json"));
        let start = |variant: &str| fixture(&format!("{name}/{variant}_start"));
        for rest in [
            vec!["--method", "full", "--weight-decay", "0.1"],
            vec!["--method", "full", "--curve", "full_label_smoothing_0.1", "--label-smoothing", "0.1"],
            vec!["--method", "lora", "--adapter", &start("lora")],
            vec!["--method", "rslora", "--adapter", &start("rslora")],
        ] {
            let ran = curve(name, &curves, &rest);
            assert_eq!(ran.code, 0, "{rest:?}: {ran:?}");
            assert!(ran.stdout.ends_with("40 comparisons, all within tolerance\n"), "{ran:?}");
        }
        let ran = curve(name, &curves, &["--method", "full"]);
        assert_eq!(ran.code, 1, "without the weight decay it is another curve: {ran:?}");
    }
}

#[test]
fn tampered_references_do_not_pass() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tampered.safetensors");
    let mut bytes = std::fs::read(fixture("tiny-llama2/forward_backward.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let described: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let logits = 8 + header + described["logits"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[logits..logits + 4].copy_from_slice(&50.0f32.to_le_bytes());
    std::fs::write(&file, &bytes).unwrap();
    let json = folder.path().join("checks.json");
    let model = fixture("tiny-llama2");
    let args = ["verify", "--model", &model, "--reference", file.to_str().unwrap()];
    let ran = run(&[&args[..], &["--json", json.to_str().unwrap()]].concat());
    assert_eq!(ran.code, 1, "{ran:?}");
    let first = ran.stdout.lines().nth(1).unwrap();
    assert!(first.starts_with("logits") && first.ends_with("BEYOND"), "{ran:?}");
    let result: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(result["passed"], false);
    assert!(result["checks"].as_array().unwrap().iter().any(|c| c["what"] == "logits" && c["passed"] == false));

    bytes.truncate(bytes.len() - 100);
    std::fs::write(&file, &bytes).unwrap();
    refused(&args, 2, "is not a safetensors file");

    let mut curves: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("tiny-llama2/curves.json")).unwrap()).unwrap();
    let loss = curves["full"][5]["loss"].as_f64().unwrap();
    curves["full"][5]["loss"] = (loss * 1.01).into();
    let file = folder.path().join("curves.json");
    std::fs::write(&file, curves.to_string()).unwrap();
    let ran = curve("tiny-llama2", file.to_str().unwrap(), &["--method", "full", "--weight-decay", "0.1"]);
    assert!(
        ran.code == 1 && ran.stdout.contains("step 5 loss") && ran.stdout.contains("40 comparisons, 1 beyond"),
        "{ran:?}"
    );
}

#[test]
fn wrong_arguments_are_refused() {
    let model = fixture("tiny-llama2");
    let reference = fixture("tiny-llama2/forward_backward.safetensors");
    let batches = fixture("tiny-llama2/train_batches.safetensors");
    let curves = fixture("tiny-llama2/curves.json");
    let (lora, rslora) = (fixture("tiny-llama2/lora_start"), fixture("tiny-llama2/rslora_start"));
    let head = ["verify", "--model", &model];
    let with_curves = ["--batches", &batches, "--curves", &curves, "--method"];
    let of = |rest: &[&str], said: &str| refused(&[&head[..], rest].concat(), 2, said);
    let of_curve = |rest: &[&str], said: &str| refused(&[&head[..], &with_curves, rest].concat(), 2, said);
    of(&[], "--reference");
    of(&["--batches", &batches], "--curves");
    of(&["--batches", &batches, "--curves", &curves], "--method");
    of(&["--reference", &reference, "--weight-decay", "0.1"], "belong to --curves");
    of(&["--reference", &reference, "--method", "full"], "belong to --curves");
    of(&["--reference", &reference, "--chat-template", "x"], "--chat-template has no use here");
    of(&["--reference", "missing.safetensors"], "missing.safetensors");
    of(&["--reference", &batches], "nothing to compare");
    of_curve(&["lora"], "needs the adapter that the curve started from");
    of_curve(&["rslora", "--adapter", &lora], "contradicts the adapter, whose use_rslora is false");
    of_curve(&["lora", "--adapter", &rslora], "contradicts the adapter, whose use_rslora is true");
    of_curve(&["full", "--adapter", &lora], "leave --adapter out");
    of_curve(&["full", "--curve", "none"], "has no curve \"none\"");
    of_curve(&["full", "--weight-decay=-1"], "--weight-decay -1 is not allowed");
    of_curve(&["full", "--label-smoothing", "1"], "--label-smoothing 1 is not allowed");
    of_curve(&["dora"], "possible values: full, lora, rslora");
    let other = fixture("tiny-llama3/lora_start");
    of(&["--reference", &reference, "--adapter", &other], "made for another model: it adapts model.layers.");
    let other = fixture("tiny-llama3/forward_backward.safetensors");
    of(&["--reference", &other], "outside the vocabulary of 500");
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let (model, reference) = (fixture("tiny-llama3"), fixture("tiny-llama3/forward_backward.safetensors"));
    let mut child = binary().args(["verify", "--model", &model, "--reference", &reference]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked") && !output.status.success(), "{stderr}");
}
