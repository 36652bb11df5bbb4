//! AdamW over the trained parameters of a model, and the global gradient norm.

use crate::{Error, Result};
use std::collections::HashMap;
use tunesmith_model::{Gradients, Llama};
use tunesmith_tensor::{Tensor, ops::adamw, ops::grad_norm, pool};

/// The constants of AdamW, under Hugging Face's names.
#[derive(Clone, Copy, Debug)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, a step, times the learning rate.
    pub weight_decay: f64,
    /// Whether norms and biases (tensors of one dimension) decay too.
    pub decay_vectors: bool,
}

/// Moments of every trained parameter and the number of updates made.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    moments: Vec<Option<(Tensor, Tensor)>>,
    updates: u64,
}

impl AdamW {
    /// Zero moments for what trains in `model`.
    pub fn new(model: &Llama, options: AdamWOptions) -> Self {
        let zeros = |t: &Tensor| (Tensor::zeros(t.shape()), Tensor::zeros(t.shape()));
        let moments = model.parameters.iter().map(|p| p.trained.then(|| zeros(p.value.tensor()))).collect();
        Self { options, moments, updates: 0 }
    }

    /// One update with `learning_rate`; every gradient is multiplied by `grad_scale` (the clipping coefficient).
    pub fn update(&mut self, model: &mut Llama, gradients: &Gradients, learning_rate: f64, grad_scale: f64) {
        pool::enter(|| self.pooled_update(model, gradients, learning_rate, grad_scale));
    }

    fn pooled_update(&mut self, model: &mut Llama, gradients: &Gradients, learning_rate: f64, grad_scale: f64) {
        self.updates += 1;
        let options = &self.options;
        for ((parameter, gradient), moments) in
            model.parameters.iter_mut().zip(&gradients.tensors).zip(&mut self.moments)
        {
            let (Some(gradient), Some((m, v))) = (gradient, moments) else { continue };
            let decays = options.decay_vectors || parameter.value.shape().len() > 1;
            let step = adamw::Step {
                number: self.updates,
                learning_rate,
                beta1: options.adam_beta1,
                beta2: options.adam_beta2,
                epsilon: options.adam_epsilon,
                weight_decay: if decays { options.weight_decay } else { 0.0 },
                grad_scale,
            };
            adamw::update(parameter.value.tensor_mut(), gradient, m, v, &step);
        }
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The moments by parameter name, as `exp_avg.NAME` and `exp_avg_sq.NAME` (PyTorch's names for them).
    pub fn state<'a>(&'a self, model: &'a Llama) -> impl Iterator<Item = (String, &'a Tensor)> {
        model.parameters.iter().zip(&self.moments).flat_map(|(p, moments)| {
            moments
                .iter()
                .flat_map(|(m, v)| [(format!("exp_avg.{}", p.name), m), (format!("exp_avg_sq.{}", p.name), v)])
        })
    }

    /// Puts back what [`AdamW::state`] gave.
    ///
    /// # Errors
    /// When a moment of a trained parameter is missing or has another shape.
    pub fn restore(&mut self, model: &Llama, mut state: HashMap<String, Tensor>, updates: u64) -> Result<()> {
        for (parameter, moments) in model.parameters.iter().zip(&mut self.moments) {
            let Some((m, v)) = moments else { continue };
            for (kind, slot) in [("exp_avg", m), ("exp_avg_sq", v)] {
                let name = format!("{kind}.{}", parameter.name);
                match state.remove(&name) {
                    Some(tensor) if tensor.shape() == slot.shape() => *slot = tensor,
                    found => {
                        let found = found.map_or("missing".into(), |t| format!("of shape {:?}", t.shape()));
                        return Err(Error::Input(format!(
                            "optimizer state: {name} is {found}, the model needs {:?}; the checkpoint belongs to another configuration",
                            slot.shape()
                        )));
                    }
                }
            }
        }
        self.updates = updates;
        Ok(())
    }
}

/// Euclidean norm over all gradients together.
pub fn gradient_norm(gradients: &Gradients) -> f64 {
    pool::enter(|| gradients.tensors.iter().flatten().map(grad_norm::sum_of_squares).sum::<f64>().sqrt())
}

/// The factor that brings a gradient of norm `norm` down to `max_norm` (PyTorch's `clip_grad_norm_`); 1 when it is shorter
/// or `max_norm` is 0.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}
