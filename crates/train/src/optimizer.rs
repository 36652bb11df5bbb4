//! AdamW over the trained parameters of a model, and the global gradient norm.

use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tunesmith_model::{Gradients, Llama};
use tunesmith_tensor::cuda::sizes;
use tunesmith_tensor::ops::{adamw, adamw_8bit, adamw_offloaded, grad_norm};
use tunesmith_tensor::{Device, Tensor, pool};

/// How the optimizer keeps its two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optim {
    /// AdamW with moments in f32: 8 bytes a trained weight.
    #[default]
    #[serde(rename = "adamw", alias = "adamw_torch", alias = "adamw_torch_fused")]
    AdamW,
    /// AdamW with moments of 8 bits in blocks of 256: 2 bytes a trained weight, nearly the same steps.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    AdamW8bit,
}

impl Optim {
    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw_8bit",
        }
    }

    /// Whether the moments of a tensor of `len` elements have 8 bits: small ones (norms, biases) do not, since they save
    /// nothing and every weight depends on them.
    fn compresses(self, len: usize) -> bool {
        self == Self::AdamW8bit && len >= SMALLEST_8BIT
    }

    /// Bytes of both moments of a tensor of `len` elements.
    pub fn state_bytes(self, len: usize) -> usize {
        if self.compresses(len) { 2 * adamw_8bit::Moment::bytes(len) } else { 8 * len }
    }

    /// As [`Optim::state_bytes`], as a GPU's allocator counts them.
    pub fn gpu_state_bytes(self, len: usize) -> usize {
        2 * if self.compresses(len) { sizes::moment_8bit(len) } else { sizes::allocated(4 * len) }
    }

    /// As [`Optim::state_bytes`], in page-locked memory beside a GPU.
    pub fn offloaded_state_bytes(self, len: usize) -> usize {
        adamw_offloaded::OffloadedMoments::bytes(len, self.compresses(len))
    }

    /// Bytes that a GPU's allocator gives out to bring offloaded moments of tensors of `lens` elements up to date.
    pub fn gpu_piece_bytes(self, lens: &[usize]) -> usize {
        let bytes = |len: &usize| adamw_offloaded::Pieces::bytes(*len, self.compresses(*len));
        lens.iter().map(bytes).max().unwrap_or(0)
    }
}

/// Elements from which a tensor gets 8-bit moments (the bound of the paper's own implementation).
const SMALLEST_8BIT: usize = 4096;

/// The constants of AdamW, under Hugging Face's names.
#[derive(Clone, Copy, Debug)]
pub struct AdamWOptions {
    /// How the moments are kept.
    pub optim: Optim,
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, a step, times the learning rate.
    pub weight_decay: f64,
    /// Whether norms and biases (tensors of one dimension) decay too.
    pub decay_vectors: bool,
    /// Whether the moments of a model on a GPU wait in the processor's memory.
    pub offload: bool,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            optim: Optim::AdamW,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            decay_vectors: false,
            offload: false,
        }
    }
}

/// First and second moment of one parameter; with 8 bits the root of the second.
#[derive(Debug)]
enum Moments {
    F32(Tensor, Tensor),
    Bits8(adamw_8bit::Moment, adamw_8bit::Moment),
    /// On a GPU.
    Device8(adamw_8bit::DeviceMoment, adamw_8bit::DeviceMoment),
    /// Beside a GPU.
    Offloaded(adamw_offloaded::OffloadedMoments),
}

impl Moments {
    /// Where the moments of weights on `device` are: there, or beside it with `offload`.
    fn to_device(&self, device: &Device, offload: bool) -> Self {
        let f32s = tunesmith_tensor::Dtype::F32;
        if let Some(gpu) = device.gpu().filter(|_| offload) {
            return Self::Offloaded(match self {
                Self::F32(m, v) => adamw_offloaded::OffloadedMoments::from_f32(gpu, m, v),
                Self::Bits8(m, r) => adamw_offloaded::OffloadedMoments::from_8bit(gpu, m, r),
                Self::Device8(..) | Self::Offloaded(_) => panic!("the moments are on a GPU already"),
            });
        }
        match (self, device.gpu()) {
            (Self::Bits8(m, r), Some(gpu)) => {
                let [m, r] = [m, r].map(|moment| adamw_8bit::DeviceMoment::new(gpu, moment));
                Self::Device8(m, r)
            }
            (Self::Bits8(m, r), None) => Self::Bits8(m.clone(), r.clone()),
            (Self::F32(m, v), _) => Self::F32(m.to_device(device, f32s), v.to_device(device, f32s)),
            (Self::Device8(..) | Self::Offloaded(_), _) => panic!("the moments are on a GPU already"),
        }
    }

    /// Copies on the processor; those of a weight of `shape`.
    fn to_host(&self, shape: &[usize]) -> Self {
        match self {
            Self::Offloaded(moments) if moments.is_8bit() => {
                let (m, r) = moments.to_8bit();
                Self::Bits8(m, r)
            }
            Self::Offloaded(moments) => {
                let (m, v) = moments.to_f32(shape);
                Self::F32(m, v)
            }
            Self::F32(m, v) => Self::F32(m.to_host(), v.to_host()),
            Self::Bits8(m, r) => Self::Bits8(m.clone(), r.clone()),
            Self::Device8(m, r) => Self::Bits8(m.to_host(), r.to_host()),
        }
    }
}

/// Moments of every trained parameter and the number of updates made.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    moments: Vec<Option<Moments>>,
    pieces: adamw_offloaded::Pieces,
    updates: u64,
}

/// A piece of the optimizer's state, as it is saved.
#[derive(Debug)]
pub struct StateTensor<'a> {
    /// `exp_avg.NAME` and `exp_avg_sq.NAME` (PyTorch's names for the moments); with 8 bits `exp_avg.NAME`, `exp_avg_root.NAME`
    /// (the root of the second) and the scales of their blocks, `exp_avg_scale.NAME` and `exp_avg_root_scale.NAME`.
    pub name: String,
    /// F32, or U8 for codes.
    pub dtype: Dtype,
    /// That of the parameter; one dimension for scales.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a mut [u8],
}

impl AdamW {
    /// Zero moments for what trains in `model`.
    pub fn new(model: &Llama, options: AdamWOptions) -> Self {
        let zeros = |value: &Tensor| {
            if options.optim.compresses(value.len()) {
                let zeros = |sign| adamw_8bit::Moment::zeros(value.len(), sign);
                Moments::Bits8(zeros(adamw_8bit::Sign::Signed), zeros(adamw_8bit::Sign::Unsigned))
            } else {
                Moments::F32(Tensor::zeros(value.shape()), Tensor::zeros(value.shape()))
            }
        };
        let device = model.device();
        let on_device = |value: &Tensor| match device.gpu() {
            Some(_) => zeros(value).to_device(&device, options.offload),
            None => zeros(value),
        };
        let moments = model.parameters.iter().map(|p| p.trained.then(|| on_device(p.value.tensor()))).collect();
        Self { options, moments, pieces: adamw_offloaded::Pieces::default(), updates: 0 }
    }

    /// A copy on the processor, whose state can be written; for the same model.
    pub fn to_host(&self, model: &Llama) -> Self {
        let copies = self.moments.iter().zip(&model.parameters);
        let moments = copies.map(|(m, p)| m.as_ref().map(|m| m.to_host(p.value.shape()))).collect();
        self.with(moments)
    }

    fn with(&self, moments: Vec<Option<Moments>>) -> Self {
        let pieces = adamw_offloaded::Pieces::default();
        Self { options: self.options, moments, pieces, updates: self.updates }
    }

    /// A copy of an optimizer on the processor for the same model on `device`, or beside it where moments are offloaded.
    ///
    /// # Panics
    /// When the moments are on a GPU already.
    pub fn to_device(&self, device: &Device) -> Self {
        let to_device = |m: &Moments| m.to_device(device, self.options.offload);
        self.with(self.moments.iter().map(|m| m.as_ref().map(to_device)).collect())
    }

    /// One update with `learning_rate`; every gradient is multiplied by `grad_scale` (the clipping coefficient).
    pub fn update(&mut self, model: &mut Llama, gradients: &Gradients, learning_rate: f64, grad_scale: f64) {
        pool::enter(|| self.pooled_update(model, gradients, learning_rate, grad_scale));
    }

    fn pooled_update(&mut self, model: &mut Llama, gradients: &Gradients, learning_rate: f64, grad_scale: f64) {
        self.updates += 1;
        let options = &self.options;
        let mut offloaded = Vec::new();
        for ((parameter, gradient), moments) in
            model.parameters.iter_mut().zip(&gradients.tensors).zip(&mut self.moments)
        {
            let (Some(gradient), Some(moments)) = (gradient, moments) else { continue };
            let decays = options.decay_vectors || parameter.value.shape().len() > 1;
            let step = adamw::Step {
                number: self.updates,
                learning_rate,
                beta1: options.adam_beta1,
                beta2: options.adam_beta2,
                epsilon: options.adam_epsilon,
                weight_decay: if decays { options.weight_decay } else { 0.0 },
                grad_scale,
            };
            let value = parameter.value.tensor_mut();
            match (moments, &mut parameter.low) {
                (Moments::F32(m, v), None) => adamw::update(value, gradient, m, v, &step),
                (Moments::F32(m, v), Some(low)) => adamw::update_split(value, low, gradient, m, v, &step),
                (Moments::Bits8(m, r), _) => adamw_8bit::update(value, gradient, m, r, &step),
                (Moments::Device8(m, r), low) => {
                    adamw_8bit::update_on_device(value, low.as_mut(), gradient, m, r, &step);
                }
                (Moments::Offloaded(moments), low) => {
                    offloaded.push(adamw_offloaded::Update {
                        value,
                        residual: low.as_mut(),
                        grad: gradient,
                        moments,
                        step,
                    });
                }
            }
        }
        adamw_offloaded::update(&mut offloaded, &mut self.pieces);
        drop(offloaded);
        model.place_token_rows(true);
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Sets the number of updates made, after the state has been read back.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Everything but the number of updates, to be written or to be filled.
    ///
    /// # Panics
    /// When the moments are on a GPU ([`AdamW::to_host`] makes a copy that is not).
    pub fn state(&mut self, model: &Llama) -> Vec<StateTensor<'_>> {
        let mut state = Vec::new();
        for (parameter, moments) in model.parameters.iter().zip(&mut self.moments) {
            let (name, shape) = (&parameter.name, parameter.value.shape());
            match moments {
                None => {}
                Some(Moments::Device8(..) | Moments::Offloaded(_)) => panic!("the moments of {name} are on a GPU"),
                Some(Moments::F32(m, v)) => {
                    for (kind, moment) in [("exp_avg", m), ("exp_avg_sq", v)] {
                        let bytes = bytemuck::cast_slice_mut(moment.data_mut());
                        let name = format!("{kind}.{name}");
                        state.push(StateTensor { name, dtype: Dtype::F32, shape: shape.to_vec(), bytes });
                    }
                }
                Some(Moments::Bits8(m, r)) => {
                    for (kind, moment) in [("exp_avg", m), ("exp_avg_root", r)] {
                        let blocks = vec![moment.scales.len()];
                        let scales = bytemuck::cast_slice_mut(&mut moment.scales);
                        let scale_name = format!("{kind}_scale.{name}");
                        let name = format!("{kind}.{name}");
                        let (dtype, shape) = (Dtype::U8, shape.to_vec());
                        state.push(StateTensor { name, dtype, shape, bytes: &mut moment.codes });
                        state.push(StateTensor { name: scale_name, dtype: Dtype::F32, shape: blocks, bytes: scales });
                    }
                }
            }
        }
        state
    }
}

/// Euclidean norm over all gradients together.
pub fn gradient_norm(gradients: &Gradients) -> f64 {
    let tensors: Vec<&Tensor> = gradients.tensors.iter().flatten().collect();
    pool::enter(|| grad_norm::norm(&tensors))
}

/// The factor that brings a gradient of norm `norm` down to `max_norm` (PyTorch's `clip_grad_norm_`); 1 when it is shorter
/// or `max_norm` is 0.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}
