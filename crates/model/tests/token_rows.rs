//! Added tokens: what their rows begin as, their gradients, and their way through an adapter.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use tunesmith_model::token_rows::{mean_row, token_indices};
use tunesmith_model::{
    AdapterConfig, AdapterFile, Batch, Checkpoint, Config, Gradients, Llama, LossOptions, Modules, Storage, Workspace,
    save_adapter_with_rows,
};
use tunesmith_tensor::{Tensor, rng::Rng};

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

fn gradients(llama: &Llama, batch: &Batch) -> (f64, Gradients) {
    let (mut ws, mut gradients) = (Workspace::default(), Gradients::new(llama));
    let options = LossOptions { scale: 0.01, label_smoothing: 0.1, dropout_seed: None, step: 0, first_token: 0 };
    let loss = llama.loss_and_gradients(batch, options, &mut ws, &mut gradients);
    (loss, gradients)
}

fn logits(llama: &Llama, batch: &Batch) -> Vec<f32> {
    llama.logits(batch, &mut Workspace::default()).data().to_vec()
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
        let (old, new) = (logits(&base, &batch), logits(&grown, &batch));
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
        lora.add_adapter(&adapter(), 1).unwrap();
        lora.train_tokens(&ids).unwrap();
        let batch = batch(&ids);
        let ((loss, want), (same, got)) = (gradients(&full, &batch), gradients(&lora, &batch));
        assert!((loss - same).abs() < 1e-6 * loss, "{loss} {same}");
        let modules = if full.config.tie_word_embeddings { 1 } else { 2 };
        let mut seen = 0;
        for (matrix, name) in [
            ("model.embed_tokens.weight", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
            ("lm_head.weight", "base_model.model.lm_head.token_adapter.trainable_tokens_delta"),
        ] {
            let at = |llama: &Llama, name: &str| llama.parameters.iter().position(|p| p.name == name);
            let (Some(whole), Some(rows)) = (at(&full, matrix), at(&lora, name)) else { continue };
            let (whole, rows) = (want.tensors[whole].as_ref().unwrap(), got.tensors[rows].as_ref().unwrap());
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
        assert!(
            got.tensors.iter().zip(&lora.parameters).all(|(g, p)| g.is_some() == p.name.starts_with("base_model."))
        );
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
            llama.add_adapter(&adapter(), 1).unwrap();
            llama.train_tokens(&ids).unwrap();
            let mut rng = Rng::new(9, 0);
            for parameter in llama.parameters.iter_mut().filter(|p| p.trained) {
                parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += 0.05 * rng.normal());
            }
            llama.place_token_rows(true);
            let tuned = logits(&llama, &batch);
            llama.enable_adapter(false);
            assert_eq!(logits(&llama, &batch), logits(&base, &batch), "without it the model is the base model");
            llama.enable_adapter(true);
            assert_eq!(logits(&llama, &batch), tuned);

            let folder = tempfile::tempdir().unwrap();
            let config = llama.adapter().unwrap().clone();
            assert_eq!(config.trainable_token_indices, token_indices(&llama.config, &ids));
            let rows: Vec<_> = llama.adapter_token_rows().collect();
            let rows = || rows.iter().map(|(module, rows)| (*module, &**rows));
            save_adapter_with_rows(folder.path(), &config, llama.adapter_tensors(), rows()).unwrap();
            assert!(save_adapter_with_rows(folder.path(), &config, llama.adapter_tensors(), []).is_err());
            // Rows that the configuration does not name, not even one.
            let none = tempfile::tempdir().unwrap();
            let nameless = AdapterConfig { trainable_token_indices: Default::default(), ..config.clone() };
            let empty = [("embed_tokens", &Tensor::zeros(&[0, llama.config.hidden_size]))];
            save_adapter_with_rows(none.path(), &nameless, llama.adapter_tensors(), empty).unwrap();
            let error = AdapterFile::open(none.path()).unwrap_err().to_string();
            assert!(error.contains("names 0 tokens of embed_tokens"), "{error}");
            let file = AdapterFile::open(folder.path()).unwrap();
            assert_eq!(file.config, config);
            let mut read = load(model, storage);
            read.attach_adapter(file, false).unwrap();
            assert_eq!(logits(&read, &batch), tuned);
            assert!(read.compute_int8(false).unwrap_err().to_string().contains("merge the adapter"));
            if storage == Storage::F32 {
                read.enable_adapter(false);
                read.merge_adapter().unwrap();
                assert_eq!(read.config.vocab_size, base.config.vocab_size);
                for (a, b) in logits(&read, &batch).iter().zip(&tuned) {
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
