//! Checks that the engine agrees with itself: things that must be equal by mathematics, computed in two ways on the
//! machine at hand. They need no reference files; [`crate::verify`] compares with another implementation.

mod packed;

use crate::checkpoint::{self, Contents, RunState};
use crate::optimizer::{AdamW, AdamWOptions, Optim, clip_coefficient, gradient_norm};
use crate::{Error, Result};
use serde::Serialize;
use std::borrow::Cow;
use std::path::Path;
use std::slice::from_ref;
use tunesmith_model::{
    AdapterConfig, AdapterFile, Batch, Checkpoint, Config, Gradients, InferWorkspace, Llama, LossOptions, Modules,
    Recompute, SaveOptions, Tokens, Workspace, save_adapter, save_model,
};
use tunesmith_tensor::{PAGE, Tensor, rng::Rng};
use tunesmith_text::{GgufVocabulary, Tokenizer};

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The model that was looked at.
    pub model: String,
    /// What must hold.
    pub check: &'static str,
    /// What was compared, and how the error is measured.
    pub compared: String,
    /// How far both are apart; NaN when one is not a number.
    pub error: f64,
    /// The largest error that passes; 0 where equality to the bit is promised.
    pub bound: f64,
}

impl Check {
    /// Whether the error is within the bound (a NaN never is).
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// Sums of the same products in another order: f32 has 24 bits, and a model adds up some thousand products a number.
const ORDER: f64 = 2e-5;
/// Merging rounds every weight once more.
const MERGED: f64 = 1e-4;
/// A difference quotient of losses in f32, whose own noise is about 1e-7 of the loss.
const QUOTIENT: f64 = 1e-3;

/// All checks: on two small random models, made in memory, and on every way in which weights are kept; `folder` is an empty one for what is saved. Each check is
/// given to `observe` when it is done.
///
/// # Errors
/// When something cannot be computed or saved at all. A check that fails is no error: see [`Check::passed`].
pub fn on_small_models(folder: &Path, observe: &mut dyn FnMut(Check)) -> Result<()> {
    for name in ["plain", "biased"] {
        let model = || small(name);
        resume(name, &model, &folder.join(name), observe)?;
        let mut model = small(name)?;
        full_training(name, &mut model, observe)?;
        model_files(name, &model, &folder.join(name).join("model"), observe)?;
        on_model(name, &mut model, &folder.join(name).join("adapter"), observe)?;
    }
    packed::products(observe);
    packed::integers(observe);
    packed::int8_model(&|| small("plain"), observe)?;
    packed::adapters(&|| small("plain"), observe)
}

/// The checks that a model of any size can take, with a LoRA adapter where something trains; `model` is left with an
/// adapter merged into it. `folder` is where that adapter is saved.
///
/// # Errors
/// As [`on_small_models`]; also when an adapter is attached already.
pub fn on_model(name: &str, model: &mut Llama, folder: &Path, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let mut report = |check, compared: String, error, bound| {
        observe(Check { model: name.to_owned(), check, compared, error, bound });
    };
    let mut ws = Workspace::default();
    let documents = documents(model.config.vocab_size);
    let packed = batch_of(&documents);

    let base = model.logits(&packed, &mut ws).data().to_vec();
    let mut separate = Vec::new();
    for document in &documents {
        separate.extend_from_slice(model.logits(&batch_of(from_ref(document)), &mut ws).data());
    }
    let what = format!("logits of {} documents in one pass and alone, of the largest", documents.len());
    report("packed = separate", what, of_largest(&separate, &base), ORDER);

    let whole: Vec<u32> = documents.iter().flat_map(|(ids, _)| ids).copied().collect();
    let mut batch = Batch::default();
    batch.push(&whole, &vec![true; whole.len()]);
    let mut cached = Vec::new();
    let mut full = Vec::new();
    let steps = cached_logits(model, &whole);
    let logits = model.logits(&batch, &mut ws);
    for (position, row) in &steps {
        cached.extend_from_slice(row);
        full.extend_from_slice(logits.row(*position));
    }
    let what = format!("logits of {} tokens through the cache and in one pass, of the largest", whole.len());
    report("decode with cache = full forward", what, of_largest(&cached, &full), ORDER);

    let config = AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        target_modules: Modules::Pattern("all-linear".into()),
        ..AdapterConfig::default()
    };
    model.add_adapter(&config, 1)?;
    let fresh = model.logits(&packed, &mut ws).data().to_vec();
    report("new adapter = base", "logits, elements that differ".into(), differing(&fresh, &base), 0.0);
    // B begins as zero, and a pair that does nothing would hide every mistake in it.
    randomise(model, "lora_B", 0.05);
    let adapted = model.logits(&packed, &mut ws).data().to_vec();
    model.enable_adapter(false);
    let off = model.logits(&packed, &mut ws).data().to_vec();
    model.enable_adapter(true);
    report("adapter off = base", "logits, elements that differ".into(), differing(&off, &base), 0.0);

    let sum = gradients_of(model, from_ref(&packed), None, &mut ws);
    gradient_checks(model, &documents, &sum, &mut ws, &mut report);
    let seed = Some(1);
    let dropped = gradients_of(model, from_ref(&packed), seed, &mut ws);
    quotient_check(&difference_quotients(model, &packed, seed, &dropped, &mut ws), &mut report);
    let mut apart = 0.0f64;
    for level in [Recompute::None, Recompute::Block] {
        let again = gradients_of(model, from_ref(&packed), seed, &mut Workspace::new(level));
        for (a, b) in again.tensors.iter().flatten().zip(dropped.tensors.iter().flatten()) {
            apart += differing(a.data(), b.data());
        }
    }
    let what = "gradients with none, norms and block, with dropout, elements that differ".into();
    report("recompute = none", what, apart, 0.0);

    save_adapter(folder, &config, model.adapter_tensors())?;
    let mut read = AdapterFile::open(folder)?.tensors;
    let mut wrong = 0.0;
    for (module, a, b) in model.adapter_tensors() {
        wrong += match read.remove(module) {
            Some((read_a, read_b)) => differing(a.data(), read_a.data()) + differing(b.data(), read_b.data()),
            None => (a.len() + b.len()) as f64,
        };
    }
    report("save + load = identity", "adapter, elements that differ".into(), wrong, 0.0);

    model.merge_adapter()?;
    let merged = model.logits(&packed, &mut ws).data().to_vec();
    report("merged = adapter", "logits, of the largest".into(), of_largest(&merged, &adapted), MERGED);
    let moved = of_largest(&adapted, &base);
    if moved < 10.0 * MERGED {
        return Err(Error::Failure(format!("the adapter of the self-test moves the logits by {moved:.1e} only")));
    }
    Ok(())
}

/// Gradients of every weight.
fn full_training(name: &str, model: &mut Llama, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let mut report = |check, compared: String, error, bound| {
        observe(Check { model: name.to_owned(), check, compared, error, bound });
    };
    let mut ws = Workspace::default();
    let documents = documents(model.config.vocab_size);
    let packed = batch_of(&documents);
    model.train_all();
    let sum = gradients_of(model, from_ref(&packed), None, &mut ws);
    gradient_checks(model, &documents, &sum, &mut ws, &mut report);
    quotient_check(&difference_quotients(model, &packed, None, &sum, &mut ws), &mut report);
    model.parameters.iter_mut().for_each(|p| p.trained = false);
    Ok(())
}

/// `sum`, the gradients of all `documents` in one pass, against the ways in which they must come out the same.
fn gradient_checks(
    model: &Llama,
    documents: &[Document],
    sum: &Gradients,
    ws: &mut Workspace,
    report: &mut dyn FnMut(&'static str, String, f64, f64),
) {
    let again = gradients_of(model, &[batch_of(documents)], None, ws);
    let pairs = sum.tensors.iter().flatten().zip(again.tensors.iter().flatten());
    let wrong = pairs.map(|(a, b)| differing(a.data(), b.data())).sum();
    report("the same twice", "gradients, elements that differ".into(), wrong, 0.0);
    let each: Vec<Batch> = documents.iter().map(|document| batch_of(from_ref(document))).collect();
    let accumulated = gradients_of(model, &each, None, ws);
    let what = format!("gradients of {} documents in one pass and one by one, relative", documents.len());
    report("accumulation 1 x N = N x 1", what, relative(&accumulated, sum), ORDER);
}

/// What [`difference_quotients`] found, as one check that names the worst kind.
fn quotient_check(found: &[(String, f64)], report: &mut dyn FnMut(&'static str, String, f64, f64)) {
    let error = worst(found.iter().map(|(_, error)| *error));
    let kind = found.iter().find(|(_, e)| *e == error || e.is_nan()).map_or("", |(kind, _)| kind.as_str());
    let what = format!("slope of the loss along {} kinds of parameter, worst {kind}, relative", found.len());
    report("gradient = difference quotient", what, error, QUOTIENT);
}

/// Saving and reading a whole model.
fn model_files(name: &str, model: &Llama, folder: &Path, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let weight = |name: &str| model.base_tensor(name).map(|weight| Cow::Borrowed(weight.tensor()));
    save_model(folder, &model.config, None, weight, &SaveOptions::default())?;
    let read = Checkpoint::open(folder)?;
    let mut wrong = if *read.config() == model.config { 0.0 } else { 1.0 };
    for parameter in &model.parameters {
        wrong += differing(parameter.value.tensor().data(), read.read(&parameter.name)?.data());
    }
    let compared = "model and configuration, elements that differ".into();
    observe(Check { model: name.to_owned(), check: "save + load = identity", compared, error: wrong, bound: 0.0 });
    Ok(())
}

/// Four steps in one go against two, a checkpoint, and two more on a model made anew; with every weight, and with an
/// adapter that drops activations out.
fn resume(name: &str, make: &dyn Fn() -> Result<Llama>, folder: &Path, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(GgufVocabulary {
        model: "gpt2".into(),
        tokens: ["a", "b", "ab"].map(String::from).to_vec(),
        merges: vec!["a b".into()],
        ..GgufVocabulary::default()
    })?;
    let config = AdapterConfig { r: 4, lora_dropout: 0.1, ..AdapterConfig::default() };
    for method in ["every weight", "an adapter with dropout"] {
        let start = || -> Result<Llama> {
            let mut model = make()?;
            match method {
                "every weight" => model.train_all(),
                _ => model.add_adapter(&config, 1)?,
            }
            Ok(model)
        };
        let mut straight = start()?;
        let mut optimizer = AdamW::new(&straight, ADAMW);
        train(&mut straight, &mut optimizer, 0..2);
        let to = folder.join("checkpoint");
        let state = RunState { step: 2, ..RunState::default() };
        let training = Some((&mut optimizer, &state));
        let contents = Contents {
            model: &straight,
            tokenizer: &tokenizer,
            generation_config: None,
            stream: None,
            training,
            files: Default::default(),
        };
        checkpoint::save(&to, contents)?;
        train(&mut straight, &mut optimizer, 2..4);

        let mut resumed = start()?;
        let mut optimizer = AdamW::new(&resumed, ADAMW);
        checkpoint::restore_weights(&to, &mut resumed)?;
        let state = checkpoint::restore_training(&to, &resumed, &mut optimizer)?;
        train(&mut resumed, &mut optimizer, state.step..4);
        let pairs = straight.parameters.iter().zip(&resumed.parameters);
        let error = pairs.map(|(a, b)| differing(a.value.tensor().data(), b.value.tensor().data())).sum();
        let compared = format!("weights after training {method}, elements that differ");
        observe(Check { model: name.to_owned(), check: "resume = uninterrupted", compared, error, bound: 0.0 });
    }
    Ok(())
}

const ADAMW: AdamWOptions = AdamWOptions {
    offload: false,
    adam_beta1: 0.9,
    adam_beta2: 0.999,
    adam_epsilon: 1e-8,
    weight_decay: 0.1,
    decay_vectors: false,
    optim: Optim::AdamW,
};

/// Optimizer steps on tokens that the number of the step decides.
fn train(model: &mut Llama, optimizer: &mut AdamW, steps: std::ops::Range<u64>) {
    let mut ws = Workspace::default();
    for step in steps {
        let mut rng = Rng::new(step, 1);
        let ids: Vec<u32> = (0..24).map(|_| rng.below(model.config.vocab_size as u32)).collect();
        let mut batch = Batch::default();
        batch.push(&ids, &vec![true; ids.len()]);
        let options = LossOptions { step, ..options(&batch, Some(1)) };
        let mut gradients = Gradients::new(model);
        model.loss_and_gradients(&batch, options, &mut ws, &mut gradients);
        let clip = clip_coefficient(gradient_norm(&gradients), 1.0);
        optimizer.update(model, &gradients, 1e-2, clip);
    }
}

/// Token ids and which of them carry loss.
type Document = (Vec<u32>, Vec<bool>);

/// Documents of several lengths, one of a single token among them; about two thirds of the tokens carry loss.
fn documents(vocab: usize) -> Vec<Document> {
    let mut rng = Rng::new(2, 0);
    let mut document = |length| {
        let ids = (0..length).map(|_| rng.below(vocab as u32)).collect();
        (ids, (0..length).map(|_| rng.below(3) > 0).collect())
    };
    [17, 1, 9, 30].map(&mut document).into()
}

fn batch_of(documents: &[Document]) -> Batch {
    let mut batch = Batch::default();
    documents.iter().for_each(|(ids, trained)| batch.push(ids, trained));
    batch
}

fn options(batch: &Batch, dropout_seed: Option<u64>) -> LossOptions {
    let scale = 1.0 / batch.targets.len().max(1) as f32;
    LossOptions { scale, label_smoothing: 0.0, dropout_seed, step: 0, first_token: 0 }
}

/// Gradients of the mean loss over the tokens of all `batches` together.
fn gradients_of(model: &Llama, batches: &[Batch], dropout_seed: Option<u64>, ws: &mut Workspace) -> Gradients {
    let tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    let mut gradients = Gradients::new(model);
    for batch in batches {
        let options = LossOptions { scale: 1.0 / tokens as f32, ..options(batch, dropout_seed) };
        model.loss_and_gradients(batch, options, ws, &mut gradients);
    }
    gradients
}

/// Logits after `ids` were fed to a cache up to there, with the positions at which they were taken: half of the tokens at
/// once, then three, two, and the rest one by one.
fn cached_logits(model: &Llama, ids: &[u32]) -> Vec<(usize, Vec<f32>)> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE) as u32).collect();
    let (mut cache, mut ws) = (model.new_cache(pages.len()), InferWorkspace::default());
    let mut chunks = [ids.len() / 2, 3, 2].into_iter();
    let (mut found, mut past) = (Vec::new(), 0);
    while past < ids.len() {
        let end = past + chunks.next().unwrap_or(1);
        let part = Tokens { ids: &ids[past..end], past, pages: &pages, logits: true };
        found.push((end - 1, model.infer(&[part], &mut cache, &mut ws).to_host().data().to_vec()));
        past = end;
    }
    found
}

/// The slope of the loss along a random direction for each kind of parameter that trains, twice: from the gradients and
/// as a difference quotient. Returns the kinds with the relative difference.
///
/// The direction weighs each component of the gradient with a random number in [0, 1): a direction that knows nothing of
/// the gradient would be nearly perpendicular to it, with a slope below the noise of a loss in f32.
fn difference_quotients(
    model: &mut Llama,
    batch: &Batch,
    dropout_seed: Option<u64>,
    gradients: &Gradients,
    ws: &mut Workspace,
) -> Vec<(String, f64)> {
    let mut scratch = Gradients::new(model);
    let mut loss = |model: &Llama| {
        let sum = match dropout_seed {
            None => model.loss(batch, 0.0, ws),
            seed => model.loss_and_gradients(batch, options(batch, seed), ws, &mut scratch),
        };
        sum / batch.targets.len() as f64
    };
    let mut kinds: Vec<String> = model.parameters.iter().filter(|p| p.trained).map(|p| kind(&p.name)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut found = Vec::new();
    for (number, kind_of) in kinds.into_iter().enumerate() {
        let mut rng = Rng::new(3, number as u64);
        let mut directions = Vec::new();
        let mut slope = 0.0;
        for (i, parameter) in model.parameters.iter().enumerate() {
            let Some(gradient) = gradients.tensors[i].as_ref().filter(|_| kind(&parameter.name) == kind_of) else {
                continue;
            };
            let direction: Vec<f32> = gradient.data().iter().map(|g| g * rng.uniform()).collect();
            slope += gradient.data().iter().zip(&direction).map(|(g, u)| *g as f64 * *u as f64).sum::<f64>();
            directions.push((i, direction, parameter.value.tensor().data().to_vec()));
        }
        // Far enough that the loss changes by much more than its noise; the extrapolation takes care of the curvature.
        let h = 5e-3 / slope;
        let mut quotient = |h: f64| {
            let mut at = |h: f64| {
                for (i, direction, start) in &directions {
                    let value = model.parameters[*i].value.tensor_mut().data_mut();
                    for ((x, u), x0) in value.iter_mut().zip(direction).zip(start) {
                        *x = (*x0 as f64 + h * *u as f64) as f32;
                    }
                }
                loss(model)
            };
            (at(h) - at(-h)) / (2.0 * h)
        };
        let extrapolated = (4.0 * quotient(h / 2.0) - quotient(h)) / 3.0;
        for (i, _, start) in &directions {
            model.parameters[*i].value.tensor_mut().data_mut().copy_from_slice(start);
        }
        found.push((kind_of, (extrapolated / slope - 1.0).abs()));
    }
    found
}

/// The name of a parameter without its layer: `q_proj.weight`, `lora_A.weight`.
fn kind(name: &str) -> String {
    let parts: Vec<&str> = name.rsplitn(3, '.').collect();
    format!("{}.{}", parts[1], parts[0])
}

/// Fills the parameters whose names contain `part` with normal numbers of standard deviation `std`.
fn randomise(model: &mut Llama, part: &str, std: f32) {
    for (i, parameter) in model.parameters.iter_mut().enumerate().filter(|(_, p)| p.name.contains(part)) {
        let mut rng = Rng::new(4, i as u64);
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x = rng.normal() * std);
    }
}

/// One of two small models that between them have all that a LLaMA model can have: `plain` (tied head, grouped heads)
/// and `biased` (untied head, biases everywhere, Llama 3's rope). Nothing in them is 0 or 1.
pub(crate) fn small(name: &str) -> Result<Llama> {
    let biased = name == "biased";
    let rope = r#"{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}"#;
    let rope = if biased { rope } else { r#"{"rope_type": "default", "rope_theta": 10000.0}"# };
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": {layers}, "num_attention_heads": 4, "num_key_value_heads": {kv}, "head_dim": 16,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": {tied}, "attention_bias": {biased},
        "mlp_bias": {biased}, "initializer_range": 0.1, "rope_parameters": {rope}}}"#,
        layers = if biased { 3 } else { 2 },
        kv = if biased { 4 } else { 2 },
        tied = !biased,
    );
    let mut model = Llama::random(Config::from_json(&text, "the configuration of the self-test")?, 5);
    for (i, parameter) in model.parameters.iter_mut().enumerate().filter(|(_, p)| p.value.shape().len() == 1) {
        let mut rng = Rng::new(6, i as u64);
        parameter.value.tensor_mut().data_mut().iter_mut().for_each(|x| *x += rng.normal() * 0.2);
    }
    Ok(model)
}

/// The largest difference, measured by the largest element of `want`.
pub(crate) fn of_largest(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::NAN;
    }
    let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs() as f64));
    let difference = |(a, b): (&f32, &f32)| (*a as f64 - *b as f64).abs();
    worst(got.iter().zip(want).map(difference)) / largest
}

/// The largest error; NaN when one is NaN, which `max` would pass over.
pub(crate) fn worst(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |worst, error| if worst.is_nan() || error <= worst { worst } else { error })
}

/// How many elements are not the same to the bit.
fn differing(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count() as f64
}

/// The largest relative difference (Euclidean norm) of a tensor's gradient.
fn relative(got: &Gradients, want: &Gradients) -> f64 {
    let pairs = got.tensors.iter().flatten().zip(want.tensors.iter().flatten());
    worst(pairs.map(|(a, b)| distance(a, b)))
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let square = |x: f64| x * x;
    let norm = b.data().iter().map(|x| square(*x as f64)).sum::<f64>().sqrt();
    let difference = a.data().iter().zip(b.data()).map(|(x, y)| square(*x as f64 - *y as f64)).sum::<f64>().sqrt();
    if norm == 0.0 { difference } else { difference / norm }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_agrees_with_itself() {
        let folder = tempfile::tempdir().unwrap();
        let mut checks = Vec::new();
        on_small_models(folder.path(), &mut |check| checks.push(check)).unwrap();
        for check in &checks {
            assert!(check.passed(), "{check:?}");
        }
        let of = |what: &str| checks.iter().filter(|c| c.check == what).count();
        assert!(of("gradient = difference quotient") == 4 && of("save + load = identity") == 4, "{checks:?}");
        assert_eq!((of("resume = uninterrupted"), of("packed weight = decoded one")), (4, 14));
        assert_eq!((of("adapter on packed weights = on decoded ones"), of("integer product = f32 product")), (3, 6));
    }

    #[test]
    fn a_wrong_gradient_is_found() {
        let mut model = small("biased").unwrap();
        model.train_all();
        let batch = batch_of(&documents(model.config.vocab_size));
        let mut ws = Workspace::default();
        let mut gradients = gradients_of(&model, from_ref(&batch), None, &mut ws);
        let wrong = model.parameters.iter().position(|p| p.name.ends_with("1.mlp.up_proj.bias")).unwrap();
        gradients.tensors[wrong].as_mut().unwrap().data_mut()[..16].iter_mut().for_each(|g| *g = -*g);
        let failed: Vec<String> = difference_quotients(&mut model, &batch, None, &gradients, &mut ws)
            .into_iter()
            .filter(|(_, error)| *error > QUOTIENT)
            .map(|(kind, _)| kind)
            .collect();
        assert_eq!(failed, ["up_proj.bias"]);
    }

    #[test]
    fn measures_see_what_is_not_a_number() {
        assert!(of_largest(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
        assert!(of_largest(&[1.0], &[1.0, 1.0]).is_nan() && differing(&[1.0], &[]).is_nan());
        assert_eq!((of_largest(&[1.0, 3.0], &[1.0, 4.0]), differing(&[0.0, 1.0], &[-0.0, 1.0])), (0.25, 1.0));
        let failed = Check { model: "m".into(), check: "c", compared: "x".into(), error: f64::NAN, bound: 1.0 };
        assert!(!failed.passed());
    }
}
