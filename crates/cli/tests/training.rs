//! Whole training runs of the tiny model through the binary: what they write, how they stop, how they go on.
#![allow(clippy::unwrap_used)]

mod tiny;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tiny::{Ran, binary, refused, run};

/// The repository's tiny configuration with its paths made absolute, to run from anywhere.
struct Setup {
    folder: tempfile::TempDir,
    config: String,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let text = std::fs::read_to_string(root.join("tiny.toml")).unwrap();
        let text = text.replace("configs/", &format!("{}/", root.display()));
        let config = folder.path().join("tiny.toml");
        std::fs::write(&config, text).unwrap();
        Self { config: config.to_str().unwrap().to_owned(), folder }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Arguments of a run in folder `name` with these fields set.
    fn args(&self, name: &str, set: &[&str]) -> Vec<String> {
        let mut args: Vec<String> = ["train", &self.config].map(String::from).to_vec();
        let output = format!("output_dir={}", self.dir(name).display());
        // Quick unless a test wants otherwise: few steps, no samples.
        let quick = [
            "training.max_steps=12",
            "training.logging_steps=1",
            "training.save_steps=4",
            "training.eval_steps=4",
            "samples.prompts=[]",
        ];
        for field in [output.as_str()].iter().chain(&quick).chain(set) {
            args.extend(["--set".to_owned(), field.to_string()]);
        }
        args
    }

    fn train(&self, name: &str, set: &[&str]) -> Ran {
        let args = self.args(name, set);
        run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn resume(&self, name: &str, set: &[&str]) -> Ran {
        let mut args = self.args(name, set);
        args.push("--resume".into());
        run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn records(run: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    lines.filter(|r| r["kind"] == kind).collect()
}

/// (step, loss, grad norm) of every step, to the bit.
fn curve(run: &Path) -> Vec<(u64, f64, f64)> {
    let number = |r: &Value, key: &str| r[key].as_f64().unwrap();
    records(run, "train")
        .iter()
        .map(|r| (r["step"].as_u64().unwrap(), number(r, "loss"), number(r, "grad_norm")))
        .collect()
}

fn weights(folder: &Path) -> Vec<u8> {
    let name =
        if folder.join("adapter_config.json").exists() { "adapter_model.safetensors" } else { "model.safetensors" };
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn a_run_writes_what_it_should_and_learns() {
    let setup = Setup::new();
    let ran = setup.train(
        "run",
        &[
            "training.max_steps=150",
            "training.save_steps=50",
            "training.eval_steps=50",
            "samples.prompts=[\"What comes after 3?\"]",
        ],
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    let run = setup.dir("run");
    let losses = curve(&run);
    assert_eq!(losses.len(), 150);
    let mean = |part: &[(u64, f64, f64)]| part.iter().map(|s| s.1).sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[140..]) < 0.5 * mean(&losses[..10]), "{losses:?}");
    assert!(records(&run, "eval").len() == 4 && records(&run, "sample").len() >= 2);
    for file in [
        "run.toml",
        "lock.json",
        "report.html",
        "evaluation.json",
        "data/prepared.json",
        "final/trainer_state.json",
        "final/tokenizer.json",
    ] {
        assert!(run.join(file).exists(), "{file}");
    }
    let state: Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("final/trainer_state.json")).unwrap()).unwrap();
    assert_eq!((state["global_step"].as_u64(), state["max_steps"].as_u64()), (Some(150), Some(150)));
    assert!(state["best_metric"].as_f64().unwrap() < losses[0].1);
    // Two checkpoints are kept, the best one besides.
    let kept = std::fs::read_dir(run.join("checkpoints")).unwrap().count();
    assert!((2..=3).contains(&kept), "{kept}");
    let evaluation: Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("evaluation.json")).unwrap()).unwrap();
    let loss = |which: &str| evaluation["comparison"][which]["mean_loss"]["value"].as_f64().unwrap();
    assert!(loss("tuned") < loss("base"));
    // The same folder again: refused, nothing lost.
    let again = setup.train("run", &[]);
    assert!(again.code == 2 && again.stderr.contains("--resume"), "{again:?}");
    assert_eq!(curve(&run), losses);
}

/// Kills a run with `set` (no chance to tidy up) as soon as its checkpoint of `step` is there, resumes it with `then` and compares it
/// with the run `whole`.
fn killed_and_resumed_is_whole(setup: &Setup, set: &[&str], step: u64, then: &[&str]) {
    let mut child = binary().args(setup.args("killed", set)).spawn().unwrap();
    let start = Instant::now();
    while !setup.dir(&format!("killed/checkpoints/step-{step}/complete.json")).exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = setup.resume("killed", then);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert_eq!(curve(&setup.dir("killed")), curve(&setup.dir("whole")));
    assert_eq!(weights(&setup.dir("killed/final")), weights(&setup.dir("whole/final")));
}

#[test]
fn resuming_goes_on_with_the_same_run_to_the_bit() {
    for (method, optim) in [("full", "adamw"), ("lora", "adamw"), ("full", "adamw_8bit")] {
        let setup = Setup::new();
        let (method, optim) = (format!("method={method}"), format!("training.optim={optim}"));
        let set = [method.as_str(), optim.as_str(), "lora.lora_dropout=0.1", "lora.r=4"];
        assert_eq!(setup.train("whole", &set).code, 0);
        let slow = [&set[..], &["training.max_steps=12"]].concat();
        killed_and_resumed_is_whole(&setup, &slow, 4, &set);
        // A damaged newest checkpoint is passed over for the one before.
        std::fs::write(setup.dir("killed/checkpoints/step-12/optimizer.safetensors"), "torn").unwrap();
        let resumed = setup.resume("killed", &set);
        assert_eq!(resumed.code, 0, "{resumed:?}");
        assert!(resumed.stdout.contains("from step 8"), "{resumed:?}");
        assert_eq!(curve(&setup.dir("killed")), curve(&setup.dir("whole")));
    }
}

#[test]
fn another_optimizer_cannot_go_on() {
    let setup = Setup::new();
    assert_eq!(setup.train("run", &["training.optim=adamw_8bit"]).code, 0);
    let resumed = setup.resume("run", &["training.max_steps=20"]);
    assert!(resumed.code == 2 && resumed.stderr.contains("training.optim"), "{resumed:?}");
    assert_eq!(setup.resume("run", &["training.max_steps=20", "training.optim=adamw_8bit"]).code, 0);
}

#[test]
fn a_run_without_a_checkpoint_is_resumed_from_the_start() {
    let setup = Setup::new();
    std::fs::create_dir_all(setup.dir("run")).unwrap();
    std::fs::write(setup.dir("run/metrics.jsonl"), "{\"kind\":\"note\",\"step\":3,\"message\":\"old\"}\n").unwrap();
    assert_eq!(setup.resume("run", &[]).code, 0);
    assert_eq!((curve(&setup.dir("run")).len(), records(&setup.dir("run"), "note").len()), (12, 0));
}

#[test]
fn accumulation_changes_nothing_but_rounding() {
    let setup = Setup::new();
    let one = ["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1"];
    let four = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"];
    assert_eq!(setup.train("one", &one).code, 0);
    assert_eq!(setup.train("four", &four).code, 0);
    for (a, b) in curve(&setup.dir("one")).iter().zip(curve(&setup.dir("four"))) {
        assert!((a.1 / b.1 - 1.0).abs() < 1e-4 && (a.2 / b.2 - 1.0).abs() < 1e-3, "{a:?} {b:?}");
    }
}

#[cfg(unix)]
#[test]
fn control_c_saves_and_exits_130() {
    let setup = Setup::new();
    let long = ["training.max_steps=100000", "training.save_steps=0", "training.eval_steps=0"];
    let child = binary().args(setup.args("run", &long)).spawn().unwrap();
    let metrics = setup.dir("run/metrics.jsonl");
    let start = Instant::now();
    while !std::fs::read_to_string(&metrics).is_ok_and(|m| m.lines().count() > 3) {
        assert!(start.elapsed() < Duration::from_secs(120), "no step was made");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stdout}");
    assert!(stdout.contains("go on with --resume"), "{stdout}");
    let steps = curve(&setup.dir("run")).len() as u64;
    let saved = setup.dir(&format!("run/checkpoints/step-{steps}"));
    assert!(saved.join("complete.json").exists());
    let more = format!("training.max_steps={}", steps + 2);
    let resumed = setup.resume("run", &[&more]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert_eq!(curve(&setup.dir("run")).len() as u64, steps + 2);
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_loses_nothing() {
    let setup = Setup::new();
    assert_eq!(setup.train("run", &[]).code, 0);
    let before = weights(&setup.dir("run/checkpoints/step-12"));
    // No file may grow beyond 100 KiB (as on a full disk, writing fails); the signal that comes with it is ignored.
    let more = ["training.max_steps=20"];
    let mut args = setup.args("run", &more);
    args.push("--resume".into());
    let script = "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\"";
    let output =
        Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_tunesmith")]).args(&args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write") && stderr.contains(".safetensors"), "{stderr}");
    assert_eq!(weights(&setup.dir("run/checkpoints/step-12")), before);
    let names: Vec<String> = std::fs::read_dir(setup.dir("run/checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.iter().all(|n| n.starts_with("step-")), "temporary folders are gone: {names:?}");
    // With room again it goes on.
    let resumed = setup.resume("run", &more);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert_eq!(curve(&setup.dir("run")).len(), 20);
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_rows() {
    let setup = Setup::new();
    let wild = [
        "training.learning_rate=1e30",
        "training.max_grad_norm=0.0",
        "training.save_steps=1",
        "training.warmup_steps=0",
        "training.eval_steps=0",
    ];
    let ran = setup.train("run", &wild);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("step 2:") && ran.stderr.contains("counting.jsonl:"), "{ran:?}");
    assert!(ran.stderr.contains("last good checkpoint is") && ran.stderr.contains("learning_rate"), "{ran:?}");
    assert!(setup.dir("run/checkpoints/step-1/complete.json").exists());
}

#[test]
fn mistakes_in_the_configuration_exit_2() {
    let setup = Setup::new();
    refused(&["train", "missing.toml"], 2, "no such file");
    let config = setup.config.as_str();
    refused(&["train", config, "--set", "training.learning_rat=1"], 2, "did you mean `learning_rate`?");
    refused(&["train", config, "--set", "lora.target_modules=[\"foo\"]"], 2, "lora.target_modules");
    refused(&["train", config, "--set", "model.source=smollm2-135m-instuct"], 2, "smollm2-135m-instruct");
    refused(&["train", config, "--set", "data.train=[\"nowhere.jsonl\"]"], 2, "nowhere.jsonl");
    let folder = setup.folder.path();
    let bad = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        format!("data.train=[\"{}\"]", path.display())
    };
    let out = format!("output_dir={}", setup.dir("none").display());
    for (data, said) in [
        (bad("broken.jsonl", "{\"text\": \"a\"}\n{\"text\": \n"), "broken.jsonl"),
        (bad("keys.jsonl", "{\"txet\": \"a\"}\n"), "text"),
        (bad("empty.jsonl", ""), "empty.jsonl"),
        (bad("untrained.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n"), "untrained.jsonl"),
    ] {
        refused(&["train", config, "--set", &out, "--set", &data], 2, said);
    }
    assert!(!setup.dir("none/metrics.jsonl").exists());
}

#[test]
fn a_gpu_that_cannot_be_used_is_refused_before_the_data() {
    let setup = Setup::new();
    // No machine has so many; without a driver it is the driver that is missing.
    let ran = setup.train("run", &["device=cuda:999"]);
    assert!(ran.code == 2 && ran.stdout.is_empty(), "{ran:?}");
    assert!(!setup.dir("run").exists(), "nothing was prepared");
}

#[test]
fn data_that_changed_cannot_be_resumed() {
    let setup = Setup::new();
    assert_eq!(setup.train("run", &[]).code, 0);
    let resumed = setup.resume("run", &["data.max_length=64"]);
    assert!(
        resumed.code == 2 && resumed.stderr.contains("the training data is not what this run began with"),
        "{resumed:?}"
    );
}

#[test]
fn an_adapter_is_trained_evaluated_and_trained_further() {
    let setup = Setup::new();
    let lora = ["method=lora", "lora.use_rslora=true", "lora.r=4", "training.load_best_model_at_end=true"];
    assert_eq!(setup.train("first", &lora).code, 0);
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(setup.dir("first/final/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((config["r"].as_u64(), config["use_rslora"].as_bool()), (Some(4), Some(true)));
    let adapter = setup.dir("first/final").display().to_string();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny");
    let (model, data) = (root.join("model").display().to_string(), root.join("counting.jsonl").display().to_string());
    let json = setup.dir("e.json");
    let report = setup.dir("e.html");
    let ran = run(&[
        "evaluate",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--data",
        &data,
        "--json",
        json.to_str().unwrap(),
        "--report",
        report.to_str().unwrap(),
        "--samples",
        "2",
        "--set",
        "data.max_length=128",
    ]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let value: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let comparison = &value["comparison"];
    assert!(comparison["loss_difference"]["high"].as_f64().unwrap() < 0.0, "{comparison}");
    assert_eq!(value["samples"].as_array().unwrap().len(), 2);
    assert!(std::fs::read_to_string(report).unwrap().contains("</html>"));
    // A prepared folder gives the same rows by name.
    let prepared = setup.dir("first/data").display().to_string();
    let ran = run(&["evaluate", "--model", &model, "--data", &prepared, "--split", "validation", "--samples", "0"]);
    assert!(ran.code == 0 && ran.stdout.contains("perplexity"), "{ran:?}");
    refused(&["evaluate", "--model", &model, "--data", &prepared, "--split", "test"], 2, "no rows in its test split");

    let further = format!("model.adapter={adapter}");
    assert_eq!(setup.train("second", &["method=lora", &further]).code, 0);
    let losses = |run: &str| -> Vec<f64> {
        records(&setup.dir(run), "eval").iter().map(|r| r["eval_loss"].as_f64().unwrap()).collect()
    };
    let best = losses("first").into_iter().fold(f64::INFINITY, f64::min);
    assert_eq!(losses("second")[0], best, "it begins where the first one ended");
}

#[test]
fn prepare_shows_counts_and_masks() {
    let setup = Setup::new();
    let out = setup.dir("prepared").display().to_string();
    let ran = run(&["prepare", &setup.config, "--out", &out, "--preview", "1"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.contains("trained") && ran.stdout.contains('⟦'), "{ran:?}");
    assert!(run(&["prepare", &setup.config, "--out", &out]).stdout.contains("already prepared"));
    refused(&["prepare", "--data", "x.jsonl"], 2, "model.source");
    refused(&["prepare", &setup.config, "--set", "data.max_length=1000"], 2, "more than the context");
}

#[test]
fn quickstart_on_ones_own_model_and_data_runs_twice() {
    let setup = Setup::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny");
    let (model, data) = (root.join("model").display().to_string(), root.join("counting.jsonl").display().to_string());
    let dir = setup.dir("quick").display().to_string();
    let args = ["quickstart", "--dir", &dir, "--model", &model, "--data", &data, "--steps", "6"];
    let first = run(&args);
    assert_eq!(first.code, 0, "{first:?}");
    assert!(first.stdout.contains("generate --model") && first.stdout.contains("merge --model"), "{first:?}");
    let losses = curve(&setup.dir("quick/run"));
    assert_eq!(losses.len(), 6);
    assert!(setup.dir("quick/run/report.html").exists());
    let again = run(&args);
    assert_eq!(again.code, 0, "{again:?}");
    assert_eq!(curve(&setup.dir("quick/run")), losses);
    let mut other = args;
    other[8] = "7";
    refused(&other, 2, "holds a quickstart with other options");
    other[8] = "0";
    refused(&other, 2, "--steps 0");
}

/// QLoRA: the base in NF4 learns, and a base kept as it is stored gives the numbers of the expanded one.
#[test]
fn packed_bases_train() {
    let setup = Setup::new();
    let lora = ["method=lora", "training.learning_rate=1e-2", "training.max_steps=40"];
    let with = |storage: &'static str| [&lora[..], &[storage]].concat();
    for (name, storage) in
        [("f32", "model.storage=f32"), ("stored", "model.storage=stored"), ("nf4", "model.storage=nf4")]
    {
        let ran = setup.train(name, &with(storage));
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    let [plain, stored, nf4] = ["f32", "stored", "nf4"].map(|name| curve(&setup.dir(name)));
    // The file holds f32, so there is nothing to keep packed.
    assert_eq!(plain, stored);
    assert!(nf4[0].1 != plain[0].1 && (nf4[0].1 - plain[0].1).abs() < 0.1 * plain[0].1, "{nf4:?}");
    assert!(nf4[39].1 < nf4[0].1 - 0.3, "{nf4:?}");
    let bad = setup.args("bad", &["method=full", "model.storage=nf4"]);
    refused(&bad.iter().map(String::as_str).collect::<Vec<_>>(), 2, "model.storage = nf4 is not allowed");
}

/// Data that is read as training goes on: killed and resumed, the run is the one that was never interrupted, to the bit.
#[test]
fn a_stream_goes_on_at_the_exact_row() {
    let setup = Setup::new();
    let row = |i: usize| {
        let question = format!("What comes after {i}?");
        serde_json::json!({"messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": (i + 1).to_string()}
        ]})
    };
    // More rows than are read before the first step; the one row of the second is held out too.
    let first: String = (0..3000).map(|i| format!("{}\n", row(i))).collect();
    std::fs::write(setup.dir("a.jsonl"), first).unwrap();
    for file in ["b.jsonl", "held-out.jsonl"] {
        std::fs::write(setup.dir(file), format!("{}\n", row(3000))).unwrap();
    }
    let train = format!("data.train=[\"{0}/a.jsonl\", \"{0}/b.jsonl\"]", setup.folder.path().display());
    let validation = format!("data.validation=[\"{}\"]", setup.dir("held-out.jsonl").display());
    let set = [
        &train[..],
        &validation,
        "data.streaming=true",
        "data.shuffle_buffer=100",
        "training.max_steps=60",
        "training.save_steps=5",
        "training.save_total_limit=100",
    ];
    let whole = setup.train("whole", &set);
    assert_eq!(whole.code, 0, "{whole:?}");
    assert!(whole.stdout.contains("on data that is read as it goes on for 60 steps"), "{whole:?}");
    killed_and_resumed_is_whole(&setup, &set, 10, &set);
    let note = records(&setup.dir("whole"), "note").pop().unwrap();
    let text = note["message"].as_str().unwrap();
    // The row of b.jsonl is held out too, and taken out of training each time it comes.
    assert!(text.starts_with("the stream gave ") && text.ends_with(" are held out too"), "{text}");
    // From any of the checkpoints, in whatever epoch it was made.
    for step in [5, 35, 55] {
        let from = setup.dir(&format!("killed/checkpoints/step-{step}"));
        let to = setup.dir(&format!("from-{step}/checkpoints/step-{step}"));
        std::fs::create_dir_all(&to).unwrap();
        for file in std::fs::read_dir(&from).unwrap() {
            let path = file.unwrap().path();
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
        std::fs::copy(setup.dir("killed/metrics.jsonl"), setup.dir(&format!("from-{step}/metrics.jsonl"))).unwrap();
        let resumed = setup.resume(&format!("from-{step}"), &set);
        assert_eq!(resumed.code, 0, "{resumed:?}");
        assert_eq!(curve(&setup.dir(&format!("from-{step}"))), curve(&setup.dir("whole")));
    }
    std::fs::write(setup.dir("a.jsonl"), format!("{}\n", row(1))).unwrap();
    let changed = setup.resume("killed", &set);
    assert!(
        changed.code == 2 && changed.stderr.contains("the training data is not what this run began with"),
        "{changed:?}"
    );
    let args = setup.args("endless", &[&train, &validation, "data.streaming=true", "training.max_steps=-1"]);
    refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), 2, "say how many steps to make");
    let out = format!("output_dir={}", setup.dir("planned").display());
    let sets = [&out, &train, &validation, "data.streaming=true"].into_iter().flat_map(|set| ["--set", set]);
    let plan = run(&["plan", &setup.config].into_iter().chain(sets).collect::<Vec<_>>());
    assert!(plan.code == 0 && plan.stdout.contains("activations"), "{plan:?}");
}
