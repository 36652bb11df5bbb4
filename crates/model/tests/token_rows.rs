//! Added tokens: what their rows begin as, their gradients, and their way through an adapter.
#![allow(clippy::unwrap_used)]

mod pass;

use std::path::{Path, PathBuf};
use tunesmith_model::token_rows::{mean_row, token_indices};
use tunesmith_model::{
    Adapter, AdapterConfig, AdapterFile, Batch, Checkpoint, Config, Gradients, Llama, LossOptions, Modules, Storage,
    Workspace,
};
use tunesmith_tensor::rng::Rng;

const MODELS: [&str; 2] = ["tiny-llama2", "tiny-llama3"];

fn load(model: &str, storage: Storage) -> Llama {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(model);
    Llama::load(&Checkpoint::open(&path).unwrap(), storage, |_, _| ()).unwrap()
}

/// The last id of the model (as if its embedding had a spare row) and two behind it.
fn new_ids(config: &Config) -> [u32; 3] {
    let size = config.vocab_size as u32;
    [size - 1, size, size + 1]
}

fn adapter() -> AdapterConfig {
    AdapterConfig { r: 4, target_modules: Modules::Pattern("all-linear".into()), ..AdapterConfig::default() }
}

/// Documents with the new tokens in them; every third position carries no loss.
fn batch(ids: &[u32]) -> Batch {
    let mut rng = Rng::new(3, 0);
    let mut batch = Batch::default();
    for n in [50usize, 31, 400] {
        let ids: Vec<u32> = (0..n).map(|i| if i % 5 == 0 { ids[i / 5 % 3] } else { rng.below(200) }).collect();
        let trained: Vec<bool> = (0..n).map(|i| i % 3 != 0).collect();
        batch.push(&ids, &trained);
    }
    batch
}

fn gradients(llama: &Llama, adapter: Option<&Adapter>, batch: &Batch) -> (f64, Gradients) {
    let (mut ws, mut gradients) = (Workspace::default(), Gradients::new(llama, adapter));
    let options = LossOptions { scale: 0.01, label_smoothing: 0.1, ..pass::PLAIN };
    let (loss, _) = pass::loss_and_gradients((llama, adapter), batch, options, None, &mut ws, &mut gradients);
    (loss, gradients)
}

fn logits(llama: &Llama, adapter: Option<&Adapter>, batch: &Batch) -> Vec<f32> {
    llama.logits(batch, adapter, &mut Workspace::default()).data().to_vec()
}

#[test]
fn new_rows_begin_at_the_mean_and_old_logits_stay() {
    for model in MODELS {
        let base = load(model, Storage::F32);
        let size = base.config.vocab_size;
        let mut grown = load(model, Storage::F32);
        grown.add_tokens(&[size as u32, size as u32 + 2]).unwrap();
        assert_eq!(grown.config.vocab_size, size + 3);
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let find = |llama: &Llama| llama.parameters.iter().find(|p| p.name == name).map(|p| p.value.to_tensor());
            let (Some(old), Some(new)) = (find(&base), find(&grown)) else {
                assert!(base.config.tie_word_embeddings && name == "lm_head.weight");
                continue;
            };
            let mean = mean_row(&old);
            let (first, all) = (old.data()[0], old.data().iter().step_by(old.cols()));
            assert!((mean[0] - all.sum::<f32>() / size as f32).abs() < 1e-5 && mean[0] != first);
            assert_eq!(&new.data()[..old.len()], old.data());
            (size..size + 3).for_each(|row| assert_eq!(new.row(row), mean));
        }
        let mut batch = Batch::default();
        batch.push(&[5, 7, 9, 5], &[true; 4]);
        let (old, new) = (logits(&base, None, &batch), logits(&grown, None, &batch));
        for (old, new) in old.chunks(size).zip(new.chunks(size + 3)) {
            old.iter().zip(new).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{a} {b}"));
        }
        // A row that is there and unused begins at the mean too.
        let mut spare = load(model, Storage::F32);
        spare.add_tokens(&[size as u32 - 1]).unwrap();
        assert_eq!(spare.config.vocab_size, size);
        let value = |llama: &Llama| llama.parameters[0].value.to_tensor();
        assert_eq!(value(&spare).row(size - 1), mean_row(&value(&base)));
    }
}

#[test]
fn their_gradients_are_those_of_the_whole_matrices() {
    for model in MODELS {
        let mut full = load(model, Storage::F32);
        let ids = new_ids(&full.config);
        full.add_tokens(&ids).unwrap();
        full.train_all();
        // B is zero: the adapter changes nothing yet.
        let mut lora = load(model, Storage::F32);
        let mut own = Adapter::new(&lora, &adapter(), 1).unwrap();
        own.train_tokens(&mut lora, &ids).unwrap();
        let batch = batch(&ids);
        let ((loss, want), (same, got)) = (gradients(&full, None, &batch), gradients(&lora, Some(&own), &batch));
        assert!((loss - same).abs() < 1e-6 * loss, "{loss} {same}");
        let modules = if full.config.tie_word_embeddings { 1 } else { 2 };
        let mut seen = 0;
        for (matrix, name) in [
            ("model.embed_tokens.weight", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
            ("lm_head.weight", "base_model.model.lm_head.token_adapter.trainable_tokens_delta"),
        ] {
            let whole = full.parameters.iter().position(|p| p.name == matrix);
            let rows = own.parameters.iter().position(|p| p.name == name);
            let (Some(whole), Some(rows)) = (whole, rows) else { continue };
            let (whole, rows) = (want.model[whole].as_ref().unwrap(), got.adapter[rows].as_ref().unwrap());
            assert_eq!(rows.shape(), [3, full.config.hidden_size]);
            for (row, id) in ids.iter().enumerate() {
                let norm = whole.row(*id as usize).iter().map(|x| x * x).sum::<f32>().sqrt();
                assert!(norm > 0.0);
                for (a, b) in whole.row(*id as usize).iter().zip(rows.row(row)) {
                    assert!((a - b).abs() < 1e-5 * norm, "{model} {name}: {a} {b}");
                }
            }
            seen += 1;
        }
        assert_eq!(seen, modules);
        assert!(got.model.iter().all(Option::is_none) && got.adapter.iter().all(Option::is_some));
    }
}

#[test]
fn an_adapter_keeps_them() {
    for model in MODELS {
        for storage in [Storage::F32, Storage::Nf4] {
            let mut llama = load(model, storage);
            let ids = new_ids(&llama.config);
            let batch = batch(&ids);
            let mut base = load(model, storage);
            base.grow_vocabulary(llama.config.vocab_size + 2).unwrap();
            let mut own = Adapter::new(&llama, &adapter(), 1).unwrap();
            own.train_tokens(&mut llama, &ids).unwrap();
            let mut rng = Rng::new(9, 0);
            for parameter in &mut own.parameters {
                parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.05 * rng.normal());
            }
            let tuned = logits(&llama, Some(&own), &batch);
            assert_eq!(logits(&llama, None, &batch), logits(&base, None, &batch), "without it: the base model");
            assert_eq!(logits(&llama, Some(&own), &batch), tuned);

            let folder = tempfile::tempdir().unwrap();
            assert_eq!(own.config.trainable_token_indices, token_indices(&llama.config, &ids));
            own.save(folder.path()).unwrap();
            // Rows that the configuration does not name.
            let none = tempfile::tempdir().unwrap();
            own.save(none.path()).unwrap();
            let nameless = AdapterConfig { trainable_token_indices: Default::default(), ..own.config.clone() };
            std::fs::write(none.path().join("adapter_config.json"), nameless.to_json().to_string()).unwrap();
            let error = AdapterFile::open(none.path()).unwrap_err().to_string();
            assert!(error.contains("names 0 tokens of"), "{error}");
            let file = AdapterFile::open(folder.path()).unwrap();
            assert_eq!(file.config, own.config);
            let mut other = load(model, storage);
            let read = Adapter::open(&mut other, file, false).unwrap();
            assert_eq!(logits(&other, Some(&read), &batch), tuned);
            assert!(read.check_int8().unwrap_err().to_string().contains("merge the adapter"));
            if storage == Storage::F32 {
                read.merge_into(&mut other).unwrap();
                assert_eq!(other.config.vocab_size, base.config.vocab_size);
                for (a, b) in logits(&other, None, &batch).iter().zip(&tuned) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let llama = load("tiny-llama3", Storage::F32);
    let config = AdapterConfig { trainable_token_indices: token_indices(&llama.config, &[3, 9]), ..adapter() };
    let json = config.to_json();
    let tied = llama.config.tie_word_embeddings;
    assert_eq!(json["trainable_token_indices"].is_array(), tied);
    for (value, says) in [
        (serde_json::json!("x"), "a list of token ids"),
        (serde_json::json!([1, -2]), "a list of token ids"),
        (serde_json::json!([9, 3]), "must ascend"),
        (serde_json::json!([4_000_000_000u32]), "no token of any model"),
        (serde_json::json!({"q_proj": [1]}), "embed_tokens or lm_head"),
    ] {
        let mut json = json.clone();
        json["trainable_token_indices"] = value;
        let error = AdapterConfig::from_json(&json.to_string(), "f").unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(
        AdapterConfig::from_json(&adapter().to_json().to_string(), "f").unwrap().trainable_token_indices.is_empty()
    );
    assert!(adapter().to_json().get("trainable_token_indices").is_none());
}
