//! The training step: the only place where a loss becomes an update.

use crate::objective::Objective;
use crate::optimizer::{AdamW, AdamWOptions, clip_coefficient, gradient_norm};
use crate::{Error, Result};
use std::sync::Arc;
use tunesmith_model::{Adapter, Batch, Gradients, Llama, Masks, Parameter, Pass, Workspace, trained};
use tunesmith_tensor::{Device, Tensor, World};

/// A model in training, with all that a step changes. Runs, benchmarks, plans and checks go through it.
#[derive(Debug)]
pub struct Trainer {
    /// The model: shared where it is frozen, owned alone where it trains.
    pub model: Arc<Llama>,
    /// The adapter that trains, or through which the model is seen.
    pub adapter: Option<Adapter>,
    /// Of the last step.
    pub gradients: Gradients,
    /// `None` for whoever wants gradients alone.
    pub optimizer: Option<AdamW>,
    /// Buffers of the passes.
    pub workspace: Workspace,
    /// Where the model is.
    pub device: Device,
    /// The processes that train together.
    pub world: World,
    /// Gradients longer than this are brought down to it; 0 leaves them.
    pub max_grad_norm: f64,
    /// Seed of dropout masks; `None` turns dropout off.
    pub dropout_seed: Option<u64>,
    /// Steps done.
    pub num_steps: u64,
}

/// Loss and gradients of the micro-batches of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Weighted loss sum in nats.
    pub sum: f64,
    /// Sum of the weights: what the sum is divided by.
    pub weight: f64,
    /// The micro-batch with which the sum ceased to be finite; what follows it was left out.
    pub not_finite: Option<usize>,
}

/// A step that was done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Its loss, before the update.
    pub loss: Loss,
    /// Euclidean norm of all gradients together, before clipping. Where it or the loss is not finite, no weight was changed.
    pub grad_norm: f64,
}

impl Loss {
    /// Mean over the weights, in nats.
    pub fn mean(&self) -> f64 {
        self.sum / self.weight
    }
}

impl Trainer {
    /// For steps from the weights of `model` and `adapter` on, which are on the same device.
    pub fn new(model: Arc<Llama>, adapter: Option<Adapter>, options: AdamWOptions, workspace: Workspace) -> Self {
        let optimizer = AdamW::new(&model, adapter.as_ref(), options);
        Self { optimizer: Some(optimizer), max_grad_norm: 1.0, ..Self::for_gradients(model, adapter, workspace) }
    }

    /// For [`Trainer::accumulate`] alone: without an optimizer.
    pub fn for_gradients(model: Arc<Llama>, adapter: Option<Adapter>, workspace: Workspace) -> Self {
        let (gradients, device) = (Gradients::new(&model, adapter.as_ref()), model.device());
        let (world, max_grad_norm) = (World::default(), 0.0);
        Self {
            model,
            adapter,
            gradients,
            optimizer: None,
            workspace,
            device,
            world,
            max_grad_norm,
            dropout_seed: None,
            num_steps: 0,
        }
    }

    /// Starts anew from the checkpoint of another trainer that does the same: its weights, moments and number of steps.
    ///
    /// # Errors
    /// When the model trains and somebody else holds it too.
    pub fn copy_state(&mut self, of: &Self) -> Result<()> {
        let values: Vec<Tensor> = of.trained().map(|p| p.host().into_owned()).collect();
        self.trained_mut()?.into_iter().zip(values).for_each(|(to, value)| to.assign(value));
        let moments = of.optimizer.as_ref().map(|optimizer| optimizer.to_host(of.trained()));
        self.optimizer = moments.map(|moments| moments.to_device(&self.device));
        self.num_steps = of.num_steps;
        Ok(())
    }

    // ---- The step --------------------------------------------------------------------------------------------------

    /// One optimizer step on the micro-batches `batches` of this process.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step(&mut self, batches: &[Batch], objective: &Objective, learning_rate: f64) -> Result<Step> {
        let loss = self.accumulate(batches, objective)?;
        let grad_norm = if loss.not_finite.is_none() { gradient_norm(&self.gradients) } else { f64::NAN };
        self.device.synchronize()?;
        if grad_norm.is_finite() {
            self.update(learning_rate, clip_coefficient(grad_norm, self.max_grad_norm))?;
        }
        Ok(Step { loss, grad_norm })
    }

    /// The gradients of the mean loss over all micro-batches of all processes: each is scaled by the same sum of weights, so that
    /// cutting a step into micro-batches or ranks does not change its gradient.
    ///
    /// # Errors
    /// When the device fails.
    pub fn accumulate(&mut self, batches: &[Batch], objective: &Objective) -> Result<Loss> {
        let Self { model, adapter, gradients, workspace: ws, .. } = self;
        let weight = self.world.sum(objective.weight(batches));
        let scale = 1.0 / weight as f32;
        let (mut sum, mut first_token) = (0.0, 0);
        gradients.clear();
        for (i, batch) in batches.iter().enumerate() {
            for part in batch.parts(model.pass_tokens()) {
                let masks = self.dropout_seed.map(|seed| Masks { seed, step: self.num_steps, first_token });
                model.forward(&part, adapter.as_ref(), Pass::Train(masks), ws);
                sum += objective.loss(model, adapter.as_ref(), &part, ws, Some((scale, gradients)));
                model.backward(&part, adapter.as_ref(), masks, ws, gradients);
                first_token += part.len() as u64;
            }
            // A device that has failed gives numbers that mean nothing.
            self.device.synchronize()?;
            if !f64::is_finite(sum) {
                return Ok(Loss { sum, weight, not_finite: Some(i) });
            }
        }
        self.world.sum_tensors(gradients.trained_mut());
        Ok(Loss { sum: self.world.sum(sum), weight, not_finite: None })
    }

    /// Changes everything that trains by its gradient times `grad_scale`.
    ///
    /// # Errors
    /// Without an optimizer, or when the model trains and somebody else holds it too.
    pub fn update(&mut self, learning_rate: f64, grad_scale: f64) -> Result<()> {
        let Self { model, adapter, gradients, optimizer, .. } = self;
        let optimizer = optimizer.as_mut().ok_or_else(|| Error::Failure("there is no optimizer".into()))?;
        optimizer.update(trained_mut(model, adapter.as_mut())?, gradients, learning_rate, grad_scale);
        self.num_steps += 1;
        Ok(())
    }

    // ----------------------------------------------------------------------------------------------------------------

    /// The parameters that train, to be changed between steps.
    ///
    /// # Errors
    /// When the model trains and somebody else holds it too.
    pub fn trained_mut(&mut self) -> Result<Vec<&mut Parameter>> {
        trained_mut(&mut self.model, self.adapter.as_mut())
    }

    /// The parameters that train.
    pub fn trained(&self) -> impl Iterator<Item = &Parameter> + Clone {
        trained(&self.model, self.adapter.as_ref())
    }
}

/// The parameters that train, in the order of [`trained`].
///
/// # Errors
/// When the model trains and somebody else holds it too.
pub fn trained_mut<'a>(model: &'a mut Arc<Llama>, adapter: Option<&'a mut Adapter>) -> Result<Vec<&'a mut Parameter>> {
    let own = adapter.map_or(&mut [][..], |adapter| &mut adapter.parameters);
    let of_model = match model.parameters.iter().any(|p| p.trained) {
        false => &mut [][..],
        true => match Arc::get_mut(model) {
            Some(model) => &mut model.parameters,
            None => return Err(Error::Failure("the model is in use elsewhere, so its weights cannot train".into())),
        },
    };
    Ok(of_model.iter_mut().chain(own).filter(|p| p.trained).collect())
}
