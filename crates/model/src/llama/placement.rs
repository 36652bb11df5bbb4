//! Moving a model between the processor and a GPU.

use super::{Llama, PASS_TOKENS, Parameter, initial_rows};
use crate::{Config, Error, Result};
use std::borrow::Cow;
use tunesmith_tensor::{Device, Dtype, Packed, Tensor, Weight, cuda};

impl Llama {
    /// Where the model's weights are and its operations run.
    pub fn device(&self) -> Device {
        self.value(self.norm).device()
    }

    /// Type of the model's activations.
    pub fn dtype(&self) -> Dtype {
        self.tensor(self.norm).dtype()
    }

    /// Leaves the embedding on the processor when the model is moved: rows of it are sent to the GPU instead. Says whether it can be
    /// left: not where it is the head too, where it trains, or where an adapter has rows of it.
    pub fn leave_embedding(&mut self) -> bool {
        let own_rows = self.token_rows.iter().any(|rows| rows.matrix == self.embed);
        self.embedding_stays = self.embed != self.head && !self.parameters[self.embed].trained && !own_rows;
        self.embedding_stays
    }

    /// Whether a model of this configuration can run on a GPU in `dtype`.
    ///
    /// # Errors
    /// When its sizes are none that the kernels take.
    pub fn check_device(&self, dtype: Dtype) -> Result<()> {
        let Config { hidden_size, intermediate_size, head_dim, .. } = self.config;
        match cuda::unsupported(dtype, hidden_size, intermediate_size, head_dim) {
            Some(reason) => Err(Error::Input(format!("{reason}, or device = \"cpu\""))),
            None => Ok(()),
        }
    }

    /// Moves a model from the processor to `device`. Dense weights take `dtype`; what trains keeps all of its f32 beside a
    /// bf16 weight; what is there already stays as it is. Quantised weights stay as they are and are decoded to `dtype` where a product needs them.
    ///
    /// # Panics
    /// When the model is on another GPU, or rounded for 8-bit products of the processor.
    pub fn move_to(&mut self, device: &Device, dtype: Dtype) {
        assert!(self.int8_head.is_none(), "int8 products are the processor's");
        let stays = self.embedding_stays.then_some(self.embed);
        let moving = self.parameters.iter_mut().enumerate().filter(|(i, _)| Some(*i) != stays);
        moving.for_each(|(_, parameter)| parameter.move_to(device, dtype));
        // Rounded as they will be after an update, so that a run goes on to the bit.
        self.place_token_rows(self.adapter_enabled);
    }

    /// [`Llama::random`] on `device`, made tensor by tensor: the model is never whole on the processor. With `nf4` all matrices are
    /// rounded to it; with `trained` every weight trains; with `leave_embedding` that is not moved.
    pub fn random_on(
        config: Config,
        seed: u64,
        nf4: bool,
        trained: bool,
        leave_embedding: bool,
        device: &Device,
        dtype: Dtype,
    ) -> Self {
        let parameters = config.expected_tensors().into_iter().map(|(name, shape)| {
            let mut value = Tensor::zeros(&shape);
            initial_rows(&config, seed, &name, 0..value.rows(), value.data_mut());
            let rounds = nf4 && shape.len() == 2;
            let value = if rounds { Weight::Packed(Packed::nf4(&value, true)) } else { value.into() };
            let mut parameter = Parameter { name, value, trained, low: None };
            if !(leave_embedding && parameter.name == "model.embed_tokens.weight") {
                parameter.move_to(device, dtype);
            }
            parameter
        });
        let parameters = parameters.collect();
        let model = Self::assemble(config, parameters);
        Self { embedding_stays: leave_embedding, ..model }
    }

    /// Tokens that go through the model at once while training: a GPU needs more of them for its products, and its memory
    /// is not shared with a cache.
    pub(super) fn pass_tokens(&self) -> usize {
        if self.device() == Device::Cpu { PASS_TOKENS } else { PASS_TOKENS_GPU }
    }
}

/// As [`PASS_TOKENS`], on a GPU.
pub const PASS_TOKENS_GPU: usize = 16_384;

impl Parameter {
    /// The f32 value on the processor, all of its bits: borrowed where it is there and dense.
    ///
    /// # Panics
    /// When the value is a quantised weight on a GPU, or rounded for 8-bit products.
    pub fn host(&self) -> Cow<'_, Tensor> {
        match (&self.value, &self.low) {
            (Weight::Dense(value), Some(low)) => Cow::Owned(value.join_master(low)),
            (Weight::Dense(value), None) if value.device() == Device::Cpu => Cow::Borrowed(value),
            (Weight::Dense(value), None) => Cow::Owned(value.to_host()),
            (other, _) => Cow::Owned(other.to_tensor()),
        }
    }

    fn move_to(&mut self, device: &Device, dtype: Dtype) {
        if self.value.device() == *device {
            return;
        }
        match &self.value {
            Weight::Dense(value) if self.trained && dtype == Dtype::BF16 && device.gpu().is_some() => {
                let (upper, low) = value.split_master(device);
                (self.value, self.low) = (upper.into(), Some(low));
            }
            value => self.value = value.to_device(device, dtype),
        }
    }

    /// Replaces a dense value by `value`, which is on the processor; it goes where the old one was, in its type.
    ///
    /// # Panics
    /// When the old value is not dense.
    pub fn assign(&mut self, value: Tensor) {
        let (device, dtype) = (self.value.device(), self.value.tensor().dtype());
        if device == Device::Cpu {
            self.value = value.into();
        } else if self.low.is_some() {
            let (upper, low) = value.split_master(&device);
            (self.value, self.low) = (upper.into(), Some(low));
        } else {
            self.value = value.to_device(&device, dtype).into();
        }
    }
}
