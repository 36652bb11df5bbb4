//! A small model against numbers that transformers wrote (`reference.json`, made by `reference.py`): its weights follow from a
//! seed, so that nothing but the numbers has to be kept.

use super::{Check, Size};
use crate::optimizer::{AdamW, AdamWOptions, clip_coefficient, gradient_norm};
use crate::selftest::{of_largest, worst};
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use tunesmith_infer::{Request, Sampler, Sampling, complete};
use tunesmith_model::{Batch, Config, Gradients, Llama, LossOptions, Recompute, Workspace};
use tunesmith_tensor::{Device, Dtype};

const REFERENCE: &str = include_str!("reference.json");

/// Numbers of transformers in f32 on a processor.
#[derive(Deserialize)]
struct Reference {
    made_with: String,
    config: serde_json::Value,
    seed: u64,
    /// Token ids, all scored but the first of each row.
    rows: Vec<Vec<u32>>,
    loss: f64,
    /// Of each row.
    logits_every_13th_of_the_last: Vec<f32>,
    gradient_norms: BTreeMap<String, f64>,
    greedy: Greedy,
    /// Loss and gradient norm of steps of AdamW at 1e-3 without decay, clipped at 1.
    curve: Vec<(f64, f64)>,
}

#[derive(Deserialize)]
struct Greedy {
    prompt: Vec<u32>,
    new: Vec<u32>,
}

/// Compares logits, loss, gradients, a training curve and, in f32, generated tokens on `device`.
///
/// # Errors
/// When the device fails.
pub(super) fn check(device: &Device, dtype: Dtype, size: Size, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let reference: Reference =
        serde_json::from_str(REFERENCE).map_err(|e| Error::Failure(format!("the embedded reference numbers: {e}")))?;
    let config = Config::from_json(&reference.config.to_string(), "the embedded reference")?;
    let mut model = Llama::random(config, reference.seed);
    model.train_all();
    model.move_to(device, dtype);
    let exact = dtype == Dtype::F32;
    // bf16 rounds every weight and every activation of a small model; f32 differs in the order of sums.
    let bound = |f32, bf16| if exact { f32 } else { bf16 };
    let mut report = |check, compared: String, error, bound| {
        observe(Check { model: dtype.name().into(), check, compared, error, bound });
    };
    let of = |what: &str| format!("{what}, {}", reference.made_with);
    let mut batch = Batch::default();
    reference.rows.iter().for_each(|row| batch.push(row, &vec![true; row.len()]));
    let mut ws = Workspace::new(Recompute::Norms);
    let logits = model.logits(&batch, &mut ws).to_host();
    let ends = reference.rows.iter().scan(0, |end, row| {
        *end += row.len();
        Some(*end - 1)
    });
    let got: Vec<f32> = ends.flat_map(|row| logits.row(row).iter().copied().step_by(13)).collect();
    report("logits", of("a row"), of_largest(&got, &reference.logits_every_13th_of_the_last), bound(1e-4, 4e-2));

    let scale = 1.0 / batch.targets.len() as f32;
    let mut gradients = Gradients::new(&model);
    let mut optimizer = AdamW::new(&model, AdamWOptions::default());
    let steps = if size == Size::Small { 3 } else { reference.curve.len() };
    let (mut errors, mut first) = (Vec::new(), Vec::new());
    for (step, (loss, norm)) in (0..).zip(&reference.curve[..steps]) {
        gradients.clear();
        let options = LossOptions { scale, label_smoothing: 0.0, dropout_seed: None, step, first_token: 0 };
        let got_loss = model.loss_and_gradients(&batch, options, &mut ws, &mut gradients) * f64::from(scale);
        let got_norm = gradient_norm(&gradients);
        errors.extend([got_loss / loss - 1.0, got_norm / norm - 1.0].map(f64::abs));
        if step == 0 {
            report("loss", of("relative"), (got_loss / reference.loss - 1.0).abs(), bound(1e-5, 2e-2));
            for (parameter, gradient) in model.parameters.iter().zip(&gradients.tensors) {
                let (Some(want), Some(gradient)) = (reference.gradient_norms.get(&parameter.name), gradient) else {
                    // A weight that the reference does not know is a difference too.
                    first.push(f64::NAN);
                    continue;
                };
                let squares: f64 = gradient.to_host().data().iter().map(|x| f64::from(*x).powi(2)).sum();
                first.push((squares.sqrt() / want - 1.0).abs());
            }
        }
        optimizer.update(&mut model, &gradients, 1e-3, clip_coefficient(got_norm, 1.0));
    }
    device.synchronize()?;
    let count = first.len();
    report("gradients", of(&format!("norms of {count} weights")), worst(first.into_iter()), bound(1e-3, 4e-2));
    report("training", of(&format!("{steps} steps")), worst(errors.into_iter()), bound(1e-3, 4e-2));
    if exact {
        // Weights that were not trained, alone and beside another prompt.
        let mut model = Llama::random(model.config, reference.seed);
        model.move_to(device, dtype);
        let Greedy { prompt, new } = &reference.greedy;
        let sampler = Sampler::new(Sampling::default())?;
        let requests = [&prompt[..], &prompt[..3]].map(|p| Request::new(p, sampler.clone(), &[], new.len()));
        let texts = complete(&model, requests.to_vec(), 2, |_, _| ControlFlow::Continue(()))?;
        let got = &texts[0].ids;
        let differing = got.iter().zip(new).filter(|(a, b)| a != b).count() + new.len().abs_diff(got.len());
        report("generation", of("greedy tokens that differ"), differing as f64, 0.0);
    }
    Ok(())
}
