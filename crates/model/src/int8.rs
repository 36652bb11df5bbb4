//! Products of frozen weights in 8-bit integers.

use crate::{Error, Llama, Result};
use tunesmith_tensor::{Int8Weight, Weight};

impl Llama {
    /// Rounds the weights of all linear layers and of the head to 8 bits, one after the other, and drops what they were
    /// made of: their products are then integer products of quantised activations ([`tunesmith_tensor::packed_int`]). Rows
    /// of the embedding, norms, biases and adapters stay as they are. `backward` makes what gradients need, too.
    ///
    /// # Errors
    /// When a weight of the base model trains.
    pub fn compute_int8(&mut self, backward: bool) -> Result<()> {
        if let Some(p) = self.parameters.iter().find(|p| p.trained) {
            let message = "trains, and what trains cannot be rounded to 8 bits; compute in f32, or train an adapter";
            return Err(Error::Input(format!("{} {message}", p.name)));
        }
        let mut weights: Vec<usize> = self.linears().map(|l| l.weight).collect();
        if self.head == self.embed {
            let head = Int8Weight::new(&self.parameters[self.head].value.to_tensor(), backward);
            self.int8_head = Some(Weight::Int8(head));
        } else {
            weights.push(self.head);
        }
        for i in weights {
            let value = &mut self.parameters[i].value;
            if matches!(value, Weight::Int8(_)) {
                continue;
            }
            let int8 = match value.dense() {
                Some(dense) => Int8Weight::new(dense, backward),
                None => Int8Weight::new(&value.to_tensor(), backward),
            };
            *value = Weight::Int8(int8);
        }
        Ok(())
    }

    /// Whether [`Llama::compute_int8`] has been called.
    pub fn computes_int8(&self) -> bool {
        self.int8_head.is_some() || matches!(self.parameters[self.head].value, Weight::Int8(_))
    }
}

/// The error of whoever asks for weights that [`Llama::compute_int8`] has dropped.
pub(crate) fn values_are_gone(what: &str) -> Error {
    Error::Input(format!(
        "the weights of {what} are rounded to 8 bits for computing; load the model again without int8"
    ))
}
