//! Runs that an earlier version began must go on: run folders with a checkpoint at step 30 of 60, and what that version logged to the
//! end (`expected.jsonl`). They were made from the root of the repository, at version 0.1.0 (commit 43499e5), by
//!
//! ```text
//! tunesmith --offline train configs/tiny.toml --set method=METHOD --set training.max_steps=60 --set training.save_steps=30
//!     --set training.eval_steps=30 --set samples.every=30 --set lora.r=4 --set training.logging_steps=5
//! ```

mod tiny;

use serde_json::Value;
use std::path::Path;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).unwrap();
        }
    }
}

fn records(file: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|record| record["kind"] == kind).collect()
}

#[test]
fn a_run_of_an_earlier_version_goes_on() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    for method in ["lora", "full"] {
        let folder = tempfile::tempdir().unwrap();
        let fixture = crate_folder.join("tests/fixtures/resume").join(method);
        copy(&fixture, folder.path());
        let method = format!("method={method}");
        let output = format!("output_dir={}", folder.path().display());
        let steps = ["training.max_steps=60", "training.save_steps=30", "training.eval_steps=30"];
        let rest = ["samples.every=30", "lora.r=4", "training.logging_steps=5", &method, &output];
        let mut command = tiny::binary();
        command.current_dir(crate_folder.join("../..")).args(["--offline", "train", "configs/tiny.toml", "--resume"]);
        steps.iter().chain(&rest).for_each(|field| drop(command.args(["--set", field])));
        let ran = command.output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.success(), "{said}");

        let (ours, theirs) = (folder.path().join("metrics.jsonl"), fixture.join("expected.jsonl"));
        for (kind, keys) in [("train", &["loss", "grad_norm", "learning_rate"][..]), ("eval", &["eval_loss"])] {
            let (ours, theirs) = (records(&ours, kind), records(&theirs, kind));
            assert_eq!(ours.len(), theirs.len(), "{kind}: {said}");
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_eq!((&ours["step"], &ours["num_tokens"]), (&theirs["step"], &theirs["num_tokens"]), "{method}");
                for key in keys {
                    // Another processor sums in another order, and thirty steps amplify it.
                    let (a, b) = (ours[key].as_f64().unwrap(), theirs[key].as_f64().unwrap());
                    assert!((a - b).abs() <= 2e-3 * b.abs(), "{method} step {}: {key} {a} {b}", ours["step"]);
                }
            }
        }
        assert!(folder.path().join("final/complete.json").exists());
    }
}
