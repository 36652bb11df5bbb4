//! The processes that train together.

use crate::tensor::Tensor;

/// The processes of a run, as one of them sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum World {
    /// This process alone.
    #[default]
    One,
}

impl World {
    /// The sum of what each process gives.
    pub fn sum(self, own: f64) -> f64 {
        match self {
            Self::One => own,
        }
    }

    /// Each of `tensors` becomes its sum over all processes, which give them in the same order.
    pub fn sum_tensors<'a>(self, _tensors: impl Iterator<Item = &'a mut Tensor>) {
        match self {
            Self::One => {}
        }
    }
}
