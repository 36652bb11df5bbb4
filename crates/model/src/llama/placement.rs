//! Moving a model between the CPU and a GPU.

use super::{Llama, initial_rows};
use crate::{Config, Error, Parameter, Result};
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

    /// Leaves the embedding in host memory when the model is moved: rows of it are sent to the GPU instead. Says whether it can be
    /// left: not where it is the head too, or where it trains.
    pub fn leave_embedding(&mut self) -> bool {
        self.embedding_stays = self.embed != self.head && !self.parameters[self.embed].trained;
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

    /// Moves a model from the CPU to `device`. Dense weights take `dtype`; what trains keeps all of its f32 beside a bf16 weight; what
    /// is there already stays as it is. Quantised weights stay as they are and are dequantised to `dtype` where a product needs them.
    ///
    /// # Panics
    /// When the model is on another GPU, or rounded for 8-bit products of the CPU.
    pub fn move_to(&mut self, device: &Device, dtype: Dtype) {
        assert!(self.int8_head.is_none(), "int8 products are the CPU's");
        let stays = self.embedding_stays.then_some(self.embed);
        let moving = self.parameters.iter_mut().enumerate().filter(|(i, _)| Some(*i) != stays);
        moving.for_each(|(_, parameter)| parameter.move_to(device, dtype));
    }

    /// [`Llama::random`] on `device`, made tensor by tensor: the model is never whole in host memory. With `nf4` all matrices are
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
            let mut parameter = Parameter::new(name, value, trained);
            if !(leave_embedding && parameter.name == "model.embed_tokens.weight") {
                parameter.move_to(device, dtype);
            }
            parameter
        });
        let parameters = parameters.collect();
        let model = Self::assemble(config, parameters);
        Self { embedding_stays: leave_embedding, ..model }
    }
}

/// As [`super::PASS_TOKENS`], on a GPU.
pub const PASS_TOKENS_GPU: usize = 16_384;
