//! Where a model is put to be used, and in which type.

use tunesmith_files::{Error, Result};
use tunesmith_model::Llama;
use tunesmith_tensor::{Device, DeviceSpec, Dtype};

/// A device, and how a model computes on it.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// Type of weights and activations on a GPU.
    pub dtype: Dtype,
    /// Whether products in f32 may round their factors to TF32 on a GPU.
    pub tf32: bool,
}

impl Placement {
    /// Whether what is asked for goes together, before anything is opened.
    ///
    /// # Errors
    /// TF32 where it would change nothing.
    pub fn check(device: DeviceSpec, dtype: Dtype, tf32: bool) -> Result<()> {
        let fix = match (device, dtype) {
            _ if !tf32 => return Ok(()),
            (DeviceSpec::Cpu, _) => {
                "the CPU's products are exact f32; leave it out, or add --device cuda:0 --dtype f32"
            }
            (_, Dtype::BF16) => "products in bf16 are not rounded to TF32; leave it out, or add --dtype f32",
            (_, Dtype::F32) => return Ok(()),
        };
        Err(Error::Input(format!("--tf32: {fix}")))
    }

    /// Moves `llama` there.
    ///
    /// # Errors
    /// When the model's sizes have no kernels, or it does not fit.
    pub fn place(&self, llama: &mut Llama) -> Result<()> {
        if let Some(gpu) = self.device.gpu() {
            gpu.set_tf32(self.tf32);
            llama.check_device(self.dtype)?;
            llama.move_to(&self.device, self.dtype);
            self.device.synchronize()?;
        }
        Ok(())
    }
}
