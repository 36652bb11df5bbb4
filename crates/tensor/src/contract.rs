//! What operations and kernels of both devices agree on: the plain values that an op is given besides its tensors.

use crate::tensor::Tensor;
use std::ops::Range;

/// Numbers of heads and their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, H.
    pub num_heads: usize,
    /// Key/value heads, K; divides H.
    pub num_kv_heads: usize,
    /// Size of a head, D.
    pub head_dim: usize,
}

impl Heads {
    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Columns of q and o: H · D.
    pub fn q_cols(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of k and v: K · D.
    pub fn kv_cols(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// One document (or one cached sequence): the rows of q that are its queries and the rows of k and v that they may see.
/// The last query sees all keys, the one before all but the last, and so on; there are at least as many keys as
/// queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of q.
    pub queries: Range<usize>,
    /// Rows of k and v.
    pub keys: Range<usize>,
}

impl Segment {
    /// The segments of documents with these `lengths`, one after the other in a packed micro-batch.
    pub fn documents(lengths: &[usize]) -> Vec<Self> {
        let mut start = 0;
        lengths
            .iter()
            .map(|length| {
                let rows = start..start + length;
                start += length;
                Self { queries: rows.clone(), keys: rows }
            })
            .collect()
    }
}

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a> {
    /// Queries [T, H·D].
    pub q: &'a Tensor,
    /// Keys [S, K·D].
    pub k: &'a Tensor,
    /// Values [S, K·D].
    pub v: &'a Tensor,
    /// Which queries see which keys.
    pub segments: &'a [Segment],
    /// Numbers of heads and their size.
    pub heads: Heads,
}

/// Which mask: a probability of dropping, a seed for the run, and a stream for (step, layer, module).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    /// Probability that an element is dropped, in [0, 1).
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the use within the run.
    pub stream: u64,
    /// Number of the first row within the stream: tokens of the step that went before.
    pub first_row: u64,
}

impl Mask {
    /// An element is dropped when its random word is below this.
    pub(crate) fn threshold(&self) -> u32 {
        (self.p as f64 * (1u64 << 32) as f64) as u32
    }

    /// Factor of what is kept.
    pub(crate) fn keep(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }
}

/// The numbers of one update.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Number of this update, counted from 1 (bias correction).
    pub number: u64,
    /// Learning rate after the schedule.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay for this tensor.
    pub weight_decay: f64,
    /// Factor on the gradient (1, or the clipping coefficient).
    pub grad_scale: f64,
}

/// The numbers of a step as its elements need them.
pub(crate) struct Factors {
    betas: [f32; 2],
    rests: [f32; 2],
    decay: f32,
    rate: f32,
    root: f32,
    epsilon: f32,
    grad_scale: f32,
}

impl Factors {
    pub(crate) fn new(step: &Step) -> Self {
        Self {
            betas: [step.beta1 as f32, step.beta2 as f32],
            rests: [(1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32],
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            rate: (step.learning_rate / (1.0 - step.beta1.powi(step.number as i32))) as f32,
            root: (1.0 / (1.0 - step.beta2.powi(step.number as i32)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
            grad_scale: step.grad_scale as f32,
        }
    }

    /// All of them, in the order of their declaration, each of the two-element arrays one after the other.
    pub(crate) fn values(&self) -> [f32; 9] {
        let Self { betas: [b1, b2], rests: [r1, r2], decay, rate, root, epsilon, grad_scale } = *self;
        [b1, b2, r1, r2, decay, rate, root, epsilon, grad_scale]
    }

    /// Updates one weight and its moments.
    #[inline(always)]
    pub(crate) fn apply(&self, value: &mut f32, grad: f32, m: &mut f32, v: &mut f32) {
        let g = grad * self.grad_scale;
        *m = self.betas[0] * *m + self.rests[0] * g;
        *v = self.betas[1] * *v + self.rests[1] * (g * g);
        *value = *value * self.decay - self.rate * *m / (v.sqrt() * self.root + self.epsilon);
    }
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice<'a> {
    /// Divides positive and multiplies negative logits of `history` (Keskar et al., "CTRL", 2019); 1 = off.
    pub repetition_penalty: f32,
    /// Ids that occurred before, in any order.
    pub history: &'a [u32],
    /// The draw; `None` takes the largest logit, the first where several are.
    pub draw: Option<Draw>,
}

/// A draw. All fields are finite, and within what is said of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 = all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this share of the probability; above 0, at most 1.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the most likely one; 0 to 1.
    pub min_p: f32,
    /// Which of them: 0 up to, not including, 1.
    pub uniform: f64,
}

/// The second product of an adapter. It joins the layer's own, so that the destination is passed over once.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// x Aᵀ [T, r] in `forward_adapted`, its gradient in `input_gradient_adapted`.
    pub inner: &'a Tensor,
    /// B [out, r] in `forward_adapted`, A [r, in] in `input_gradient_adapted`.
    pub outer: &'a Tensor,
    /// Factor on their product.
    pub scale: f32,
}

/// What a product does to its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The destination takes the product's shape and is overwritten.
    Overwrite,
    /// The product is added to what is there.
    Accumulate,
}

/// What the backward half of `linear_cross_entropy::forward_backward` writes.
pub struct Gradients<'a> {
    /// Factor on every gradient: 1 / sum of the weights of the whole step.
    pub scale: f32,
    /// Weight of each row's loss [N]; `None` = all 1.
    pub weights: Option<&'a [f32]>,
    /// `d_h` [N, d], overwritten.
    pub d_h: &'a mut Tensor,
    /// `d_w` [V, d], added to; `None` when the head is frozen.
    pub d_w: Option<&'a mut Tensor>,
    /// The gradient of single rows of the head; `None` when none train by themselves.
    pub d_rows: Option<HeadRows<'a>>,
}

/// Rows of the head that train while the rest is frozen.
pub struct HeadRows<'a> {
    /// Which rows [n].
    pub ids: &'a [u32],
    /// Their gradient [n, d], added to.
    pub d_w: &'a mut Tensor,
}
