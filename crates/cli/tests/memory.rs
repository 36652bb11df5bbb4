//! Planned memory against the memory that a process really took, and runs under a limit.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod tiny;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tiny::{Ran, run};
use tunesmith_model::{Config, Llama, SaveOptions, save_model};

/// Part of the measured peak by which a plan may be off.
const TOLERANCE: f64 = 0.1;

/// A folder with a model whose buffers are much larger than the program itself, and text for it.
struct Setup {
    folder: tempfile::TempDir,
}

impl Setup {
    /// `blocks` blocks of 1024 tokens.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 512,
            "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 5,
            "num_key_value_heads": 5, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": true, "initializer_range": 0.02
        });
        let config = Config::from_json(&json.to_string(), "config.json").unwrap();
        let llama = Llama::random(config, 1);
        let weight = |name: &str| llama.base_tensor(name).map(|w| std::borrow::Cow::Borrowed(w.tensor()));
        save_model(&model, &llama.config, None, weight, &SaveOptions::default()).unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            std::fs::copy(tokenizer.join(file), model.join(file)).unwrap();
        }
        text(&folder.path().join("text.txt"), 30_000);
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Writes a configuration named `name` with these lines in its sections; its run goes to the folder `name`.
    fn config(&self, name: &str, top: &str, training: &str) -> String {
        let file = self.path(&format!("{name}.toml"));
        let text = format!(
            "output_dir = {:?}\n{top}\n[model]\nsource = {:?}\n[data]\ntrain = [{:?}]\nmax_length = 1024\n\
             validation_fraction = 0.0\n[lora]\nr = 8\n[training]\nmax_steps = 2\n{training}\n",
            self.path(name),
            self.path("model"),
            self.path("text.txt")
        );
        std::fs::write(&file, text).unwrap();
        file
    }
}

/// A text of about `words` words without a pattern.
fn text(path: &Path, words: usize) {
    let mut rng = tunesmith_tensor::rng::Rng::new(1, 1);
    let known = ["sea", "ship", "the", "a", "storm", "rises", "under", "dark", "sails", "we", "go", "home", "and"];
    let text: Vec<&str> = (0..words).map(|_| known[rng.below(known.len() as u32) as usize]).collect();
    std::fs::write(path, text.join(" ")).unwrap();
}

fn plan(config: &str) -> Value {
    let ran = run(&["plan", config, "--json", "-"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Bytes of the largest resident set that `tunesmith train` reports.
fn peak(ran: &Ran) -> f64 {
    assert_eq!(ran.code, 0, "{ran:?}");
    let line = ran.stdout.lines().find_map(|l| l.strip_prefix("peak memory: ")).unwrap();
    let (number, unit) = line.split_once(' ').unwrap();
    let factor = if unit.starts_with("GB") { 1e9 } else { 1e6 };
    number.parse::<f64>().unwrap() * factor
}

fn losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    records.filter(|r| r["kind"] == "train").map(|r| r["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_small_model_takes_what_was_planned() {
    let setup = Setup::new();
    for (method, optim, level) in [
        ("lora", "adamw", "none"),
        ("lora", "adamw", "block"),
        ("full", "adamw", "norms"),
        ("full", "adamw_8bit", "norms"),
    ] {
        let name = format!("{method}-{optim}-{level}");
        let training = format!(
            "optim = {optim:?}\nrecompute = {level:?}\nper_device_train_batch_size = 2\ngradient_accumulation_steps = 1"
        );
        let config = setup.config(&name, &format!("method = {method:?}"), &training);
        let planned = plan(&config)["memory"]["total"].as_f64().unwrap();
        let measured = peak(&run(&["train", &config]));
        println!("{name}: planned {:.1} MB, measured {:.1} MB", planned / 1e6, measured / 1e6);
        assert!((planned / measured - 1.0).abs() < TOLERANCE, "{name}: planned {planned}, measured {measured}");
    }
}

/// A plan for a GPU can be made where there is none.
#[test]
fn a_gpu_is_planned_for_without_one() {
    let setup = Setup::new();
    let config = setup.config("gpu", "method = \"lora\"\ndevice = \"cuda:0\"", "");
    let line = |sets: &[&str]| {
        let ran = run(&[&["plan", &config], sets].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.stdout.contains("cuBLASLt"), "{ran:?}");
        ran.stdout.lines().find(|line| line.starts_with("weights")).unwrap().to_owned()
    };
    // The type of what is not quantised is that of the GPU.
    assert!(line(&[]).ends_with(" bf16"));
    assert!(line(&["--set", "dtype=f32"]).ends_with(" f32"));
    assert!(line(&["--set", "model.storage=nf4"]).ends_with(" nf4"));
    // What the driver takes is counted in the total; the process's own memory is named beside it.
    let planned = plan(&config);
    let of = |name: &str| planned["memory"][name].as_u64().unwrap();
    let peak = ["loading_peak", "training_peak", "evaluation_peak"].map(of).into_iter().max().unwrap();
    assert_eq!(of("total"), peak + of("driver"));
    assert_eq!(of("driver"), 805_306_368);
    let host = &planned["memory"]["host"];
    let of = |name: &str| host[name].as_u64().unwrap();
    // 8 blocks of 320 and 896 in f32.
    assert!(of("loading_peak") > of("program") + 8 * 4 * (4 * 320 * 320 + 3 * 320 * 896), "{host}");
    assert!(of("total") == of("loading_peak") && of("saving_peak") > of("program"), "{host}");
    let shown = run(&["plan", &config]).stdout;
    let starts = |name: &str| shown.lines().any(|line| line.starts_with(name));
    assert!(starts("driver         805.3 MB  ") && starts("host ") && !starts("program"), "{shown}");
    let limited = |limit: &str| run(&["plan", &config, "--set", &format!("memory_limit={limit}")]);
    let refused = limited("805MB");
    assert!(refused.code == 2 && refused.stderr.contains("the run needs at least"), "{refused:?}");
    assert_eq!(limited("2GB").code, 0);
    let products =
        |sets: &[&str]| run(&[&["plan", &config, "--set", "dtype=f32"], sets].concat()).stdout.contains("TF32");
    assert!(!products(&[]) && products(&["--set", "training.tf32=true"]));
}

#[test]
fn a_limit_is_kept_and_changes_no_result() {
    let setup = Setup::new();
    let training = "per_device_train_batch_size = 2\ngradient_accumulation_steps = 1";
    let free = setup.config("free", "method = \"full\"", training);
    let tight = |limit: u64| format!("method = \"full\"\nmemory_limit = \"{}MB\"", limit / 1_000_000);
    // A limit in the middle between the least and what would be taken without one.
    let refused = run(&["plan", &setup.config("least", &tight(1_000_000), training)]);
    assert_eq!(refused.code, 2, "{refused:?}");
    let said = refused.stderr.split("set memory_limit = \"").nth(1).unwrap();
    let least: u64 = said.split("MB").next().unwrap().parse().unwrap();
    assert!(refused.stderr.contains("adamw_8bit"), "{refused:?}");
    let asked = plan(&free)["memory"]["total"].as_u64().unwrap();
    assert!(least * 1_000_000 < asked, "{least} MB of {asked}");
    let limit = (least * 1_000_000 + asked) / 2;
    let limited = setup.config("limited", &tight(limit), training);
    let planned = plan(&limited);
    assert!(planned["chosen"].as_str().unwrap().contains("memory_limit"), "{planned}");
    assert!(planned["memory"]["total"].as_u64().unwrap() <= limit);

    let ran = run(&["train", &limited]);
    assert!(ran.stdout.contains("memory_limit"), "{ran:?}");
    assert!(peak(&ran) <= 1.1 * limit as f64, "{ran:?}");
    assert_eq!(run(&["train", &free]).code, 0);
    let [a, b] = ["limited", "free"].map(|run| losses(&PathBuf::from(setup.path(run))));
    assert_eq!(a.len(), 2);
    for (a, b) in a.iter().zip(&b) {
        assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
    }
    // What was chosen stands in run.toml, and the smallest limit that was named does.
    let text = std::fs::read_to_string(setup.path("limited/run.toml")).unwrap();
    assert!(text.contains("recompute = \""), "{text}");
    let enough = setup.config("enough", &tight(least * 1_000_000), training);
    assert_eq!(run(&["plan", &enough]).code, 0);
}

#[test]
fn smollm2_takes_what_was_planned() {
    if std::env::var_os("TUNESMITH_OFFLINE").is_some() || std::env::var_os("HF_HUB_OFFLINE").is_some() {
        println!("skipped: TUNESMITH_OFFLINE (or HF_HUB_OFFLINE) is set, and this test fetches a model");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    text(&folder.path().join("text.txt"), 8000);
    // Not offline as the other tests, or the model could not be fetched.
    let tunesmith = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_tunesmith")).args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
    };
    let check = |name: &str, text: String| {
        let config = path(&format!("{name}.toml"));
        std::fs::write(&config, text).unwrap();
        let ran = tunesmith(&["plan", &config, "--json", "-"]);
        assert_eq!(ran.code, 0, "{ran:?}");
        let plan: Value = serde_json::from_str(&ran.stdout).unwrap();
        let planned = plan["memory"]["total"].as_f64().unwrap();
        let measured = peak(&tunesmith(&["train", &config]));
        println!("{name}: planned {:.1} MB, measured {:.1} MB", planned / 1e6, measured / 1e6);
        assert!((planned / measured - 1.0).abs() < TOLERANCE, "{name}: planned {planned}, measured {measured}");
    };
    for (method, level, storage, compute) in [
        ("lora", "none", "f32", "f32"),
        ("lora", "norms", "f32", "f32"),
        ("lora", "block", "f32", "f32"),
        ("lora", "norms", "f32", "int8"),
        ("lora", "block", "nf4", "f32"),
        ("lora", "block", "stored", "f32"),
        ("full", "norms", "f32", "f32"),
    ] {
        let name = format!("{method}-{level}-{storage}-{compute}");
        let text = format!(
            "output_dir = {:?}\nmethod = {method:?}\ncompute = {compute:?}\n\
             [model]\nsource = \"smollm2-135m-instruct\"\nstorage = {storage:?}\n[data]\ntrain = [{:?}]\n\
             max_length = 512\nvalidation_fraction = 0.0\n[training]\nmax_steps = 1\nper_device_train_batch_size = 4\n\
             gradient_accumulation_steps = 1\nrecompute = {level:?}\n",
            path(&name),
            path("text.txt")
        );
        check(&name, text);
    }
    // Passes of few tokens, no two of the same length: buffers grow a little again and again.
    let rows = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny/counting.jsonl");
    let text = format!(
        "output_dir = {:?}\nmethod = \"lora\"\n[model]\nsource = \"smollm2-135m-instruct\"\n[data]\ntrain = [{rows:?}]\n\
         max_length = 128\n[training]\nmax_steps = 3\nper_device_train_batch_size = 2\n",
        path("small")
    );
    check("small", text);
}
