//! The inputs of all layers, kept for the backward pass: where the model is, or in the processor's memory beside a GPU.

use super::grow;
use tunesmith_tensor::{OffloadedActivations, Tensor};

#[derive(Debug)]
pub(super) enum Inputs {
    /// One tensor [T, d] a layer.
    Here(Vec<Tensor>),
    Offloaded(Box<OffloadedActivations>),
}

impl Default for Inputs {
    fn default() -> Self {
        Self::Here(Vec::new())
    }
}

impl Inputs {
    /// Keeps `x_td`, the input of layer `l`; layers follow one another.
    pub(super) fn keep(&mut self, l: usize, x_td: &Tensor) {
        match self {
            Self::Here(inputs) => {
                grow(inputs, l + 1);
                inputs[l].assign(x_td);
            }
            Self::Offloaded(parked) => parked.put(l, x_td),
        }
    }

    /// The input of layer `l`, from the last one down.
    pub(super) fn get(&mut self, l: usize) -> &Tensor {
        match self {
            Self::Here(inputs) => &inputs[l],
            Self::Offloaded(parked) => parked.get(l),
        }
    }

    /// Layer `l` has had its backward pass: another input may take the place of its own.
    pub(super) fn done(&mut self, l: usize) {
        if let Self::Offloaded(parked) = self
            && l >= 2
        {
            parked.fetch(l - 2);
        }
    }

    /// Bytes where the model is.
    pub(super) fn num_bytes(&self) -> usize {
        match self {
            Self::Here(inputs) => inputs.iter().map(Tensor::capacity_bytes).sum(),
            Self::Offloaded(parked) => parked.num_bytes(),
        }
    }
}
