//! Where tensors are, as values: the CPU, or a GPU.

use crate::cuda::Options;
use crate::cuda::error::Error;
use crate::cuda::gpu::Gpu;
use std::{fmt, str::FromStr, sync::Arc};

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
    /// behind the program's back: after a failure they do nothing, and this says what it was.
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

/// Where a model shall run, as configurations and arguments name it: `cpu`, `auto`, `cuda:0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The CPU.
    #[default]
    Cpu,
    /// The first GPU where it can be used, else the CPU.
    Auto,
    /// The GPU of this number.
    Cuda(usize),
}

impl DeviceSpec {
    /// Opens the device. For [`Self::Auto`] that came to the CPU, also why it is not the GPU.
    ///
    /// # Errors
    /// When a GPU that is named cannot be used: no driver, no device of that number, a library that is missing.
    pub fn open(self, options: &Options) -> Result<(Device, Option<Error>), Error> {
        match self {
            Self::Cpu => Ok((Device::Cpu, None)),
            Self::Cuda(ordinal) => Ok((Device::Cuda(Gpu::open(ordinal, options)?), None)),
            Self::Auto => Ok(match Gpu::open(0, options) {
                Ok(gpu) => (Device::Cuda(gpu), None),
                Err(reason) => (Device::Cpu, Some(reason)),
            }),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, number) {
            ("cpu", _) => Ok(Self::Cpu),
            ("auto", _) => Ok(Self::Auto),
            (_, Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("{text:?} is no device: it must be \"cpu\", \"auto\", or a GPU such as \"cuda:0\"")),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Auto => f.write_str("auto"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for spec in [DeviceSpec::Cpu, DeviceSpec::Auto, DeviceSpec::Cuda(0), DeviceSpec::Cuda(12)] {
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            let said = text.parse::<DeviceSpec>().unwrap_err();
            assert!(said.contains(&format!("{text:?} is no device")), "{said}");
        }
    }
}
