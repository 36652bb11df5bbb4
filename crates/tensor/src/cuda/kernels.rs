//! The kernels: one module per source file, built for each type of element that is used.

use crate::dtype::Dtype;

/// Put in front of every source.
const DEVICE: &str = include_str!("device.cuh");
/// Wrappers of matrix instructions.
const TENSOR_CORES: &str = include_str!("tensor_cores.cuh");
/// What both optimizers share.
const ADAMW: &str = include_str!("adamw.cuh");

/// A source and what is defined for it: one compiled module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// Name of its source.
    pub source: Source,
    /// Type of activations and weights.
    pub element: Dtype,
    /// Size of a head, where the source needs it at compile time; else 0.
    pub head_dim: usize,
}

macro_rules! sources {
    ($($name:ident $file:literal [$($kernel:ident),* $(,)?];)*) => {
        /// A source file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Source { $($name,)* }

        impl Source {
            /// Every source.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its file name without the ending.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $file,)* }
            }

            /// Names of its kernels.
            pub fn kernels(self) -> &'static [&'static str] {
                match self { $(Self::$name => &[$(stringify!($kernel),)*],)* }
            }

            fn text(self) -> &'static str {
                match self { $(Self::$name => include_str!(concat!($file, ".cu")),)* }
            }
        }
    };
}

sources! {
    Adamw "adamw" [adamw];
    Adamw8bit "adamw_8bit" [adamw_8bit];
    Attention "attention" [attention_forward, attention_delta, attention_backward_keys, attention_backward_queries];
    AttentionDecode "attention_decode" [attention_decode, attention_join];
    AttentionF32 "attention_f32" [attention_forward, attention_delta, attention_backward_keys, attention_backward_queries];
    Dequantize "dequantize" [dequantize_blocks, dequantize_nf4, multiply_blocks, multiply_nf4];
    Dropout "dropout" [dropout];
    Embedding "embedding" [embedding_gradient];
    GradNorm "grad_norm" [sum_of_squares];
    Linear "linear" [add_bias, column_sums];
    LinearCrossEntropy "linear_cross_entropy" [cross_entropy, head_columns];
    Rmsnorm "rmsnorm" [rmsnorm_forward, rmsnorm_apply, rmsnorm_backward, rmsnorm_weight_gradient];
    Rope "rope" [rope_angles, rope_rotate];
    Rows "rows" [rows_gather];
    Sample "sample" [penalise, argmax, sample];
    Swiglu "swiglu" [swiglu_forward, swiglu_backward];
}

impl Source {
    /// Sizes of heads that this source is built for; `[0]` where they do not matter.
    pub fn head_dims(self) -> &'static [usize] {
        match self {
            Self::Attention => &[16, 32, 64, 80, 96, 128],
            _ => &[0],
        }
    }

    /// Types of elements that this source is built for.
    pub fn elements(self) -> &'static [Dtype] {
        match self {
            Self::Attention => &[Dtype::BF16],
            Self::AttentionF32 | Self::GradNorm | Self::Sample => &[Dtype::F32],
            _ => &[Dtype::F32, Dtype::BF16],
        }
    }

    /// Whether its kernels multiply with matrix instructions.
    pub fn uses_tensor_cores(self) -> bool {
        self == Self::Attention
    }
}

impl Module {
    /// A module that does not depend on the size of heads.
    pub(crate) fn new(source: Source, element: Dtype) -> Self {
        Self { source, element, head_dim: 0 }
    }

    /// Every module that is built.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for source in Source::ALL {
            for element in source.elements() {
                let module = |head_dim: &usize| Self { source: *source, element: *element, head_dim: *head_dim };
                all.extend(source.head_dims().iter().map(module));
            }
        }
        all
    }

    /// Name of the module, such as `rmsnorm-bf16`.
    pub fn name(&self) -> String {
        let head = if self.head_dim > 0 { format!("-{}", self.head_dim) } else { String::new() };
        format!("{}-{}{head}", self.source.name(), self.element.name())
    }

    /// The whole source, its definitions included.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if self.element == Dtype::BF16 {
            text.push_str("#define ELEMENT_BF16 1\n");
        }
        if self.head_dim > 0 {
            text.push_str(&format!("#define HEAD_DIM {}\n", self.head_dim));
        }
        text.push_str(DEVICE);
        text.push_str(match self.source {
            Source::Attention => TENSOR_CORES,
            Source::Adamw | Source::Adamw8bit => ADAMW,
            _ => "",
        });
        text.push_str(self.source.text());
        text
    }
}
