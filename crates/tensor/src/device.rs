//! Where tensors are, as values: the CPU, or a GPU.

use crate::cuda::error::Error;
use crate::cuda::gpu::Gpu;
use std::sync::Arc;

/// Where a tensor's memory is and where its operations run.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// The CPU: always there, and the reference for every operation.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda(Arc<Gpu>),
}

impl Device {
    /// The GPU, unless this is the CPU.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(gpu),
        }
    }

    /// Waits until everything that was asked of the device is done.
    ///
    /// # Errors
    /// The first failure since the device was opened. Operations do not report errors one by one, as the device works
    /// asynchronously: after a failure they do nothing, and this says what it was.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.gpu().map_or(Ok(()), |gpu| gpu.synchronize())
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Cuda(a), Self::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}
