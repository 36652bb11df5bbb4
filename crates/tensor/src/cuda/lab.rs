//! What tests of launchers share: an emulated device in one precision, inputs that it can hold, and comparisons.

use super::gpu::Gpu;
use crate::rng::Rng;
use crate::{Device, Dtype, Tensor};

/// An emulated device and the type that its activations have.
pub(crate) struct Lab {
    pub(crate) device: Device,
    pub(crate) dtype: Dtype,
    pub(crate) rng: Rng,
}

/// One device for each type.
pub(crate) fn labs(seed: u64) -> [Lab; 2] {
    [Dtype::F32, Dtype::BF16].map(|dtype| {
        // Beside the test binary, so that what was compiled serves the next run.
        let binary = std::env::current_exe().unwrap();
        let gpu = Gpu::emulated(&binary.with_file_name("emulator")).unwrap();
        Lab { device: Device::Cuda(gpu), dtype, rng: Rng::new(seed, 0) }
    })
}

impl Lab {
    /// Random numbers on the processor that the device can hold exactly.
    pub(crate) fn random(&mut self, shape: &[usize], std: f32) -> Tensor {
        let values = self.rng.normals(shape.iter().product(), std);
        let round = |x: f32| if self.dtype == Dtype::BF16 { half::bf16::from_f32(x).to_f32() } else { x };
        Tensor::from_slice(shape, &values.into_iter().map(round).collect::<Vec<_>>())
    }

    /// A copy on the device in its type.
    pub(crate) fn up(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(&self.device, self.dtype)
    }

    /// A copy on the device in f32.
    pub(crate) fn up_f32(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(&self.device, Dtype::F32)
    }

    /// Compares what the device has computed with what the processor has: `f32` is the largest difference allowed in f32,
    /// relative to the largest element; in bf16, whose numbers have 8 bits, it is 0.8 %.
    pub(crate) fn close(&self, what: &str, got: &Tensor, want: &Tensor, f32: f32) {
        self.device.synchronize().unwrap();
        assert_eq!(got.shape(), want.shape(), "{what}");
        let got = got.to_host();
        let largest = want.data().iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let tolerance = if self.dtype == Dtype::F32 { f32 } else { 8e-3 };
        for (i, (a, b)) in got.data().iter().zip(want.data()).enumerate() {
            // Written so that a NaN fails.
            let fine = (a - b).abs() <= tolerance * largest + 1e-30;
            assert!(fine, "{what} in {}: element {i} is {a}, must be {b} (largest {largest})", self.dtype.name());
        }
    }
}
