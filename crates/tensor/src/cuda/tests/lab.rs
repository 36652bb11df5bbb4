//! What tests of launchers share: a device in one precision, inputs that it can hold, and comparisons. [`parity`] runs
//! one body on the CPU and on every other device, and compares what it hands over.

use crate::cuda::gpu::Gpu;
use crate::rng::Rng;
use crate::{Device, Dtype, Tensor};

/// A device, the type that its activations have, and what a body has handed over.
pub(crate) struct Lab {
    pub(crate) device: Device,
    pub(crate) dtype: Dtype,
    pub(crate) rng: Rng,
    handed_over: Vec<Output>,
}

/// A result that must be the same on every device.
struct Output {
    what: String,
    value: Tensor,
    /// Type that it has on the device.
    dtype: Dtype,
    /// Largest difference, relative to the largest element; 0: equal after rounding to the type.
    tolerance: f32,
    /// Share of the elements that may differ at all.
    share: f64,
}

/// What bf16 with its 8 bits is allowed to differ by, relative to the largest element.
const BF16_TOLERANCE: f32 = 8e-3;

/// One device for each type.
pub(crate) fn labs(seed: u64) -> [Lab; 2] {
    [Dtype::F32, Dtype::BF16].map(|dtype| {
        // Beside the test binary, so that what was compiled serves the next run.
        let binary = std::env::current_exe().unwrap();
        let gpu = Gpu::emulated(&binary.with_file_name("emulator")).unwrap();
        Lab { device: Device::Cuda(gpu), dtype, rng: Rng::new(seed, 0), handed_over: Vec::new() }
    })
}

/// Runs `body` on the CPU and on each device with the same random numbers, and compares its outputs.
pub(crate) fn parity(body: fn(&mut Lab)) {
    for mut lab in labs(1) {
        let mut cpu = Lab { device: Device::Cpu, dtype: lab.dtype, rng: Rng::new(1, 0), handed_over: Vec::new() };
        body(&mut cpu);
        body(&mut lab);
        lab.device.synchronize().unwrap();
        assert_eq!(cpu.handed_over.len(), lab.handed_over.len());
        for (want, got) in cpu.handed_over.iter().zip(&lab.handed_over) {
            got.compare(&want.value, lab.dtype);
        }
    }
}

impl Output {
    fn compare(&self, want: &Tensor, activations: Dtype) {
        let Self { what, value, dtype, tolerance, share } = self;
        let what = format!("{what} in {}", activations.name());
        assert_eq!(value.shape(), want.shape(), "{what}");
        let largest = want.data().iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let round = *tolerance == 0.0 && *dtype == Dtype::BF16;
        let mut differing = 0;
        for (i, (a, b)) in value.data().iter().zip(want.data()).enumerate() {
            let b = if round { half::bf16::from_f32(*b).to_f32() } else { *b };
            // Written so that a NaN fails.
            let fine = (a - b).abs() <= tolerance * largest + 1e-30;
            assert!(fine, "{what}: element {i} is {a}, must be {b} (largest {largest})");
            differing += usize::from(*a != b);
        }
        assert!(differing as f64 <= share * want.len() as f64, "{what}: {differing} elements differ");
    }
}

impl Lab {
    /// Random numbers in host memory that the device can hold exactly.
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

    /// Random numbers on the device in its type: the same ones on every device.
    pub(crate) fn input(&mut self, shape: &[usize], std: f32) -> Tensor {
        let tensor = self.random(shape, std);
        self.up(&tensor)
    }

    /// As [`Lab::input`], in f32.
    pub(crate) fn input_f32(&mut self, shape: &[usize], std: f32) -> Tensor {
        let tensor = self.random(shape, std);
        self.up_f32(&tensor)
    }

    /// Hands `value` over: `tolerance` is the largest difference allowed in f32; bf16 is allowed 0.8 %, unless it is 0.
    pub(crate) fn output(&mut self, what: &str, value: &Tensor, tolerance: f32) {
        let bf16 = self.dtype == Dtype::BF16 && tolerance > 0.0;
        self.output_in_both(what, value, if bf16 { BF16_TOLERANCE } else { tolerance }, 1.0);
    }

    /// [`Lab::output`] of each of `values`.
    pub(crate) fn outputs<const N: usize>(&mut self, values: [(&str, &Tensor); N], tolerance: f32) {
        values.into_iter().for_each(|(what, value)| self.output(what, value, tolerance));
    }

    /// As [`Lab::output`] with one tolerance for both types, and a share of elements that may differ.
    pub(crate) fn output_in_both(&mut self, what: &str, value: &Tensor, tolerance: f32, share: f64) {
        let (value, dtype) = (value.to_host(), value.dtype());
        self.handed_over.push(Output { what: what.to_owned(), value, dtype, tolerance, share });
    }

    /// Compares what the device has computed with what the CPU has; `tolerance` as in [`Lab::output`].
    pub(crate) fn close(&self, what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
        self.device.synchronize().unwrap();
        let bf16 = self.dtype == Dtype::BF16 && tolerance > 0.0;
        let tolerance = if bf16 { BF16_TOLERANCE } else { tolerance };
        let (what, value, dtype) = (what.to_owned(), got.to_host(), got.dtype());
        Output { what, value, dtype, tolerance, share: 1.0 }.compare(want, self.dtype);
    }
}
