//! `tunesmith selftest` on its own models and on a given one.
#![allow(clippy::unwrap_used)]

mod tiny;

use serde_json::Value;
use tiny::{fixture, refused, run};

#[test]
fn everything_passes_and_is_listed() {
    let ran = run(&["selftest"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for check in [
        "packed = separate",
        "accumulation 1 x N = N x 1",
        "adapter off = base",
        "merged = adapter",
        "save + load = identity",
        "gradient = difference quotient",
        "decode with cache = full forward",
        "resume = uninterrupted",
    ] {
        assert!(ran.stdout.lines().any(|line| line.starts_with(check) && line.ends_with("ok")), "{check}: {ran:?}");
    }
    assert!(ran.stdout.contains("all passed") && !ran.stdout.contains("FAILED"));
}

#[test]
fn a_model_of_ones_own() {
    let ran = run(&["selftest", "--model", &fixture("tiny-llama3"), "--json", "-"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["passed"], true);
    let checks = result["checks"].as_array().unwrap();
    assert!(checks.len() >= 9 && checks.iter().all(|check| check["passed"] == true), "{result}");
    assert!(checks.iter().all(|check| check["error"].as_f64() <= check["bound"].as_f64()));
    refused(&["selftest", "--model", &fixture("no-such-model")], 2, "no-such-model");
}

#[test]
fn a_gpu_that_is_none_is_named() {
    refused(&["gpu-check", "--device", "tpu:0"], 2, "\"tpu:0\" is no device");
    refused(&["gpu-bench", "--models", "70B"], 2, "it must be among 1B, 3B and 8B");
}
