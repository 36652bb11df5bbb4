//! A named tensor with its role in training, and gradient buffers.

use crate::{Adapter, Llama};
use std::borrow::Cow;
use tunesmith_tensor::{Device, Dtype, Tensor, Weight, pool};

/// A named tensor of a model or an adapter, under its Hugging Face (or PEFT) name.
#[derive(Debug)]
pub struct Parameter {
    /// Such as `model.layers.0.self_attn.q_proj.weight` or `base_model.model.….lora_A.weight`.
    pub name: String,
    /// The weights: dense where they train, and for norms, biases and adapters.
    pub value: Weight,
    /// Whether training changes it (only then does it get a gradient buffer).
    pub trained: bool,
    /// For a trained weight in bf16 on a GPU: what rounding left of its f32 master weight ([`Tensor::split`]).
    pub residual: Option<Tensor>,
}

impl Parameter {
    /// A parameter on the CPU.
    pub fn new(name: String, value: impl Into<Weight>, trained: bool) -> Self {
        Self { name, value: value.into(), trained, residual: None }
    }

    /// The f32 value on the CPU, all of its bits: borrowed where it is there and dense.
    ///
    /// # Panics
    /// When the value is a quantised weight on a GPU, or rounded for 8-bit products.
    pub fn host(&self) -> Cow<'_, Tensor> {
        match (&self.value, &self.residual) {
            (Weight::Dense(value), Some(residual)) => Cow::Owned(value.join(residual)),
            (Weight::Dense(value), None) if value.device() == Device::Cpu => Cow::Borrowed(value),
            (Weight::Dense(value), None) => Cow::Owned(value.to_host()),
            (other, _) => Cow::Owned(other.to_tensor()),
        }
    }

    /// The dense value; a quantised one is dequantised first.
    pub(crate) fn make_dense(&mut self) -> &mut Tensor {
        if self.value.dense().is_none() {
            self.value = self.value.to_tensor().into();
        }
        self.value.tensor_mut()
    }

    /// Moves a value from the CPU to `device`; one that is there already stays as it is. Dense weights take `dtype`; what trains
    /// keeps all of its f32 beside a bf16 weight.
    pub(crate) fn move_to(&mut self, device: &Device, dtype: Dtype) {
        if self.value.device() == *device {
            return;
        }
        match &self.value {
            Weight::Dense(value) if self.trained && dtype == Dtype::BF16 && device.gpu().is_some() => {
                let (upper, residual) = value.split(device);
                (self.value, self.residual) = (upper.into(), Some(residual));
            }
            value => self.value = value.to_device(device, dtype),
        }
    }

    /// Replaces a dense value by `value`, which is on the CPU; it goes where the old one was, in its type.
    ///
    /// # Panics
    /// When the old value is not dense.
    pub fn assign(&mut self, value: Tensor) {
        let (device, dtype) = (self.value.device(), self.value.tensor().dtype());
        if device == Device::Cpu {
            self.value = value.into();
        } else if self.residual.is_some() {
            let (upper, residual) = value.split(&device);
            (self.value, self.residual) = (upper.into(), Some(residual));
        } else {
            self.value = value.to_device(&device, dtype).into();
        }
    }
}

/// The parameters that train: those of `model`, then those of `adapter`.
pub fn trained<'a>(model: &'a Llama, adapter: Option<&'a Adapter>) -> impl Iterator<Item = &'a Parameter> + Clone {
    let own = adapter.map_or(&[][..], |adapter| &adapter.parameters);
    model.parameters.iter().chain(own).filter(|p| p.trained)
}

/// Number of weights that train.
pub fn num_trained(model: &Llama, adapter: Option<&Adapter>) -> usize {
    trained(model, adapter).map(|p| p.value.len()).sum()
}

/// Gradient buffers in f32: one for each trained parameter of a model and of an adapter, `None` where it is frozen.
#[derive(Debug, Default)]
pub struct Gradients {
    /// In the order of [`Llama::parameters`].
    pub model: Vec<Option<Tensor>>,
    /// In the order of [`Adapter::parameters`]; empty without one.
    pub adapter: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Zeroed buffers for what trains in `model` and `adapter`.
    pub fn new(model: &Llama, adapter: Option<&Adapter>) -> Self {
        let zeros = |p: &Parameter| Tensor::zeros_on(&p.value.device(), Dtype::F32, p.value.shape());
        let buffers = |all: &[Parameter]| all.iter().map(|p| p.trained.then(|| zeros(p))).collect();
        Self { model: buffers(&model.parameters), adapter: adapter.map_or(Vec::new(), |a| buffers(&a.parameters)) }
    }

    /// Sets every gradient to zero.
    pub fn clear(&mut self) {
        pool::enter(|| self.trained_mut().for_each(Tensor::clear));
    }

    /// The gradients, in the order of [`trained`].
    pub fn trained(&self) -> impl Iterator<Item = &Tensor> {
        self.model.iter().chain(&self.adapter).flatten()
    }

    /// As [`Gradients::trained`].
    pub fn trained_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.model.iter_mut().chain(&mut self.adapter).flatten()
    }
}
