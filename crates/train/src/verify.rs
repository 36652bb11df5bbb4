//! Comparison with numbers that another implementation wrote: logits, loss, gradients, training curves.

use crate::objective::Objective;
use crate::optimizer::AdamWOptions;
use crate::step::{Step, Trainer};
use crate::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use tunesmith_model::{Adapter, Batch, Llama, Workspace};

/// One comparison: `difference` is relative, in the measure that `what` says.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The tensor or the number that was compared.
    pub what: String,
    /// Relative difference from the reference; NaN when ours is not a number.
    pub difference: f64,
    /// The largest difference that passes.
    pub tolerance: f64,
}

impl Check {
    /// Whether the difference is within the tolerance (a NaN never is).
    pub fn passed(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// Logits may differ by this fraction of the largest logit.
pub const LOGITS_TOLERANCE: f64 = 1e-4;
/// Relative difference allowed in a loss.
pub const LOSS_TOLERANCE: f64 = 1e-5;
/// Relative difference (Frobenius norm) allowed in a gradient.
pub const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Relative difference allowed in loss and gradient norm of each step of a training curve.
pub const CURVE_TOLERANCE: f64 = 1e-3;

/// A safetensors file of reference tensors, read whole.
pub struct Reference {
    bytes: Vec<u8>,
    file: String,
}

impl Reference {
    /// Reads `path`.
    ///
    /// # Errors
    /// When it cannot be read or is no safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("cannot read", path, e))?;
        let reference = Self { bytes, file: path.display().to_string() };
        reference.tensors()?;
        Ok(reference)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes)
            .map_err(|e| Error::Input(format!("{} is not a safetensors file: {e}", self.file)))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self.tensors()?.names().into_iter().map(|n| n.to_string()).collect();
        names.sort();
        Ok(names)
    }

    /// Shape and values of an f32 tensor; `None` when the file does not have it.
    pub fn floats(&self, name: &str) -> Result<Option<(Vec<usize>, Vec<f32>)>> {
        self.get(name, Dtype::F32, |b: [u8; 4]| f32::from_le_bytes(b))
    }

    /// Shape and values of an i64 tensor; `None` when the file does not have it.
    pub fn integers(&self, name: &str) -> Result<Option<(Vec<usize>, Vec<i64>)>> {
        self.get(name, Dtype::I64, |b: [u8; 8]| i64::from_le_bytes(b))
    }

    fn get<T, const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Option<(Vec<usize>, Vec<T>)>> {
        let tensors = self.tensors()?;
        let Ok(view) = tensors.tensor(name) else { return Ok(None) };
        if view.dtype() != dtype {
            let found = view.dtype();
            return Err(Error::Input(format!("{}: {name} is {found:?}; it must be {dtype:?}", self.file)));
        }
        let (values, _) = view.data().as_chunks::<N>();
        Ok(Some((view.shape().to_vec(), values.iter().map(|b| read(*b)).collect())))
    }

    /// `input_ids` as rows of the last dimension, every id checked against the vocabulary.
    fn rows(&self, vocab: usize) -> Result<(Vec<usize>, Vec<Vec<u32>>)> {
        let Some((shape, ids)) = self.integers("input_ids")? else {
            return Err(Error::Input(format!("{} has no tensor input_ids (i64, [rows, tokens])", self.file)));
        };
        let width = shape.last().copied().filter(|w| *w > 0 && !ids.is_empty());
        let Some(width) = width else {
            return Err(Error::Input(format!("{}: input_ids of shape {shape:?} holds no token", self.file)));
        };
        let id = |id: &i64| {
            u32::try_from(*id).ok().filter(|i| (*i as usize) < vocab).ok_or_else(|| {
                Error::Input(format!("{}: input_ids has {id}, outside the vocabulary of {vocab}", self.file))
            })
        };
        let rows = ids.chunks(width).map(|row| row.iter().map(id).collect()).collect::<Result<_>>()?;
        Ok((shape, rows))
    }

    /// `labels` in the rows of `input_ids`; the ids themselves when the file has none.
    fn labels(&self, shape: &[usize], rows: &[Vec<u32>]) -> Result<Vec<Vec<i64>>> {
        match self.integers("labels")? {
            Some((labels_shape, _)) if labels_shape != shape => {
                Err(Error::Input(format!("{}: labels have shape {labels_shape:?}, input_ids {shape:?}", self.file)))
            }
            Some((_, labels)) => {
                let labels: Vec<Vec<i64>> = labels.chunks(rows[0].len()).map(|row| row.to_vec()).collect();
                for (row, labels) in rows.iter().zip(&labels) {
                    if let Some((id, l)) = row.iter().zip(labels).find(|(id, l)| **l != -100 && **l != **id as i64) {
                        return Err(Error::Input(format!(
                            "{}: a label is {l} where the token is {id}; labels must equal input_ids or be -100",
                            self.file
                        )));
                    }
                }
                Ok(labels)
            }
            None => Ok(rows.iter().map(|r| r.iter().map(|id| *id as i64).collect()).collect()),
        }
    }
}

fn relative(ours: f64, reference: f64) -> f64 {
    (ours - reference).abs() / reference.abs().max(1e-12)
}

/// Compares `model`, seen through `adapter`, with whatever `reference` has of: `logits` for `input_ids`, the mean loss of `labels`
/// (a scalar `loss`, or computed from the reference logits), and `grad.<weight>` of it, an adapter's weights by PEFT's names.
///
/// # Errors
/// When the file lacks `input_ids`, has none of the tensors above, or names a weight that the model does not have.
pub fn verify_reference(mut model: Llama, mut adapter: Option<Adapter>, reference: &Reference) -> Result<Vec<Check>> {
    let (shape, rows) = reference.rows(model.config.vocab_size)?;
    let labels = reference.labels(&shape, &rows)?;
    let batch = Batch::from_labels(rows.iter().map(|r| r.as_slice()).zip(labels.iter().map(|l| l.as_slice())));
    let mut ws = Workspace::default();
    let mut checks = Vec::new();
    if let Some((_, want)) = reference.floats("logits")? {
        let logits = model.logits(&batch, adapter.as_ref(), &mut ws).to_host();
        let got = logits.data();
        if got.len() != want.len() {
            let (file, vocab) = (&reference.file, model.config.vocab_size);
            return Err(Error::Input(format!(
                "{file}: logits have {} values; {} tokens and a vocabulary of {vocab} make {}",
                want.len(),
                batch.len(),
                got.len()
            )));
        }
        let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs() as f64));
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs() as f64).fold(0.0, f64_max);
        checks.push(Check { what: "logits".into(), difference: worst / largest, tolerance: LOGITS_TOLERANCE });
    }
    let names = reference.names()?;
    let wanted: Vec<&str> = names.iter().filter_map(|n| n.strip_prefix("grad.")).collect();
    let loss = match reference.floats("loss")? {
        Some((_, values)) => values.first().map(|l| *l as f64),
        None if reference.integers("labels")?.is_some() => {
            reference.floats("logits")?.map(|(_, logits)| mean_loss(&logits, &batch, model.config.vocab_size))
        }
        None => None,
    };
    if !wanted.is_empty() || loss.is_some() {
        let own = adapter.as_mut().map_or(&mut [][..], |adapter| &mut adapter.parameters);
        let mut missing = wanted.clone();
        for parameter in model.parameters.iter_mut().chain(own) {
            parameter.trained = wanted.contains(&parameter.name.as_str());
            missing.retain(|name| *name != parameter.name);
        }
        if let Some(name) = missing.first() {
            return Err(Error::Input(format!("{} has grad.{name}; the model has no such weight", reference.file)));
        }
        let mut trainer = Trainer::for_gradients(Arc::new(model), adapter, ws);
        let ours = trainer.accumulate(&[batch], &Objective::default())?.mean();
        if let Some(want) = loss {
            checks.push(Check { what: "loss".into(), difference: relative(ours, want), tolerance: LOSS_TOLERANCE });
        }
        for (parameter, got) in trainer.trained().zip(trainer.gradients.trained()) {
            let name = &parameter.name;
            let Some((_, want)) = reference.floats(&format!("grad.{name}"))? else { continue };
            if want.len() != got.len() {
                let shape = got.shape();
                return Err(Error::Input(format!("{}: grad.{name} does not have the shape {shape:?}", reference.file)));
            }
            let norm = want.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
            let error = got
                .to_host()
                .data()
                .iter()
                .zip(&want)
                .map(|(a, b)| (*a as f64 - *b as f64).powi(2))
                .sum::<f64>()
                .sqrt();
            let difference = error / norm.max(1e-30);
            checks.push(Check { what: format!("grad.{name}"), difference, tolerance: GRADIENT_TOLERANCE });
        }
    }
    if checks.is_empty() {
        return Err(Error::Input(format!(
            "{} has nothing to compare: it needs logits, loss or grad.<weight name>",
            reference.file
        )));
    }
    Ok(checks)
}

/// Mean cross-entropy (nats) that `logits` [T, V] give the targets of `batch`, in f64.
fn mean_loss(logits: &[f32], batch: &Batch, vocab: usize) -> f64 {
    let loss = |(row, target): (&u32, &u32)| {
        let row = &logits[*row as usize * vocab..][..vocab];
        let largest = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)) as f64;
        let sum: f64 = row.iter().map(|x| (*x as f64 - largest).exp()).sum();
        largest + sum.ln() - row[*target as usize] as f64
    };
    batch.loss_rows.iter().zip(&batch.targets).map(loss).sum::<f64>() / batch.targets.len().max(1) as f64
}

/// The larger number, and NaN when either is (f64::max would hide it).
fn f64_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// One step of a training curve.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CurveStep {
    /// Number of the step, from 0.
    pub step: u64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Mean loss before the update.
    pub loss: f64,
    /// Norm of the gradient before clipping at 1.
    pub grad_norm: f64,
}

/// Reads one curve of a `curves.json`: an object of named lists of steps.
///
/// # Errors
/// When the file cannot be read or has no curve `name`.
pub fn read_curve(path: &Path, name: &str) -> Result<Vec<CurveStep>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read", path, e))?;
    let mut curves: BTreeMap<String, Vec<CurveStep>> =
        serde_json::from_str(&text).map_err(|e| Error::Input(format!("{}: {e}", path.display())))?;
    curves.remove(name).ok_or_else(|| {
        let known: Vec<&String> = curves.keys().collect();
        Error::Input(format!("{} has no curve {name:?}; it has {known:?}", path.display()))
    })
}

/// Trains whatever trains in `model` and `adapter` on the batches of `batches` (input_ids and labels [steps, rows, tokens]) with the
/// learning rates of `curve`, AdamW (0.9, 0.999, 1e-8), `weight_decay` on every trained parameter and clipping at 1, and compares loss
/// and gradient norm of each step. Returns the trainer, too.
///
/// # Errors
/// When the batches are fewer than the steps of the curve.
pub fn verify_curve(
    model: Llama,
    adapter: Option<Adapter>,
    batches: &Reference,
    curve: &[CurveStep],
    weight_decay: f64,
    label_smoothing: f32,
) -> Result<(Vec<Check>, Trainer)> {
    let (shape, rows) = batches.rows(model.config.vocab_size)?;
    let labels = batches.labels(&shape, &rows)?;
    let [steps, rows_a_step, _] = shape[..] else {
        return Err(Error::Input(format!(
            "{}: input_ids has shape {shape:?}; it must be [steps, rows, tokens]",
            batches.file
        )));
    };
    if steps < curve.len() {
        let (file, wanted) = (&batches.file, curve.len());
        return Err(Error::Input(format!("{file} has {steps} batches; the curve has {wanted} steps")));
    }
    let options = AdamWOptions { weight_decay, decay_vectors: true, ..AdamWOptions::default() };
    let mut trainer = Trainer::new(Arc::new(model), adapter, options, Workspace::default());
    let objective = Objective::NextToken { label_smoothing };
    let mut checks = Vec::new();
    for (i, step) in curve.iter().enumerate() {
        let part = i * rows_a_step..(i + 1) * rows_a_step;
        let pairs = rows[part.clone()].iter().zip(&labels[part]);
        let batch = Batch::from_labels(pairs.map(|(r, l)| (r.as_slice(), l.as_slice())));
        let Step { loss, grad_norm } = trainer.step(&[batch], &objective, step.lr)?;
        for (what, ours, reference) in [("loss", loss.mean(), step.loss), ("grad_norm", grad_norm, step.grad_norm)] {
            let difference = relative(ours, reference);
            checks.push(Check { what: format!("step {} {what}", step.step), difference, tolerance: CURVE_TOLERANCE });
        }
    }
    Ok((checks, trainer))
}
