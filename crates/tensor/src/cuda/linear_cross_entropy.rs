//! Head and cross-entropy in chunks of rows; contract in `ops/linear_cross_entropy.rs`. Logits are f32 whatever the
//! element is: the loss of a vocabulary of 128,000 would not survive bf16.

use super::arguments::{argument, argument_at};
use super::gemm::Matrix;
use super::gpu::{Arg, Gpu};
use super::kernels::{Module, Source};
use super::linear::{self, matrix};
use crate::contract::{Gradients, HeadRows, Store};
use crate::{device::Device, dtype::Dtype, tensor::Tensor, weight::Weight};
use std::sync::Arc;

/// Logits that exist at a time while the head trains, 512 MiB: its gradient is read and written for each chunk of them.
const LOGITS_TRAINED: usize = 1 << 27;

/// The same under a frozen head, 256 MiB: enough rows for products to be bound by arithmetic.
const LOGITS_FROZEN: usize = 1 << 26;

/// Rows are a multiple of this where there are as many: those that the tiles of products have.
const TILE_ROWS: usize = 256;

/// What is kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Becomes its gradient.
    logits: Tensor,
    loss: Tensor,
    /// Those columns of the gradient that belong to rows that train by themselves.
    columns: Tensor,
}

impl Scratch {
    pub(crate) fn num_bytes(&self) -> usize {
        [&self.logits, &self.loss, &self.columns].map(Tensor::capacity_bytes).iter().sum()
    }
}

/// Rows of logits that exist at a time, of `n` in all.
pub(super) fn chunk_rows(n: usize, vocab: usize, head_trains: bool) -> usize {
    let rows = if head_trains { LOGITS_TRAINED } else { LOGITS_FROZEN } / vocab.max(1);
    let whole = if rows > TILE_ROWS { rows / TILE_ROWS * TILE_ROWS } else { rows };
    whole.clamp(1, n.max(1))
}

/// Elements from one row of columns to the next: rows begin on 16 bytes, which products of bf16 are fastest with.
fn columns_stride(columns: usize, element: Dtype) -> usize {
    columns.next_multiple_of(16 / element.bytes())
}

/// Bytes of the columns of a chunk that belong to `columns` rows of a head whose others are frozen.
pub(super) fn columns_bytes(n: usize, vocab: usize, columns: usize, element: Dtype) -> usize {
    chunk_rows(n, vocab, false) * columns_stride(columns, element) * element.bytes()
}

pub(crate) fn run(
    gpu: &Arc<Gpu>,
    h: &Tensor,
    w: &Weight,
    targets: &[u32],
    smoothing: f32,
    scratch: &mut Scratch,
    loss: &mut [f32],
    mut gradients: Option<Gradients<'_>>,
) {
    let (n, d, vocab, element) = (targets.len(), h.cols(), w.rows(), h.dtype());
    if let Some(g) = &mut gradients {
        g.d_h.resize_like(h, &[n, d]);
    }
    let device = Device::Cuda(gpu.clone());
    let step = chunk_rows(n, vocab, gradients.as_ref().is_some_and(|g| g.d_w.is_some()));
    let targets = gpu.table(targets);
    let weights = gradients.as_ref().and_then(|g| g.weights).map(|weights| {
        assert_eq!(weights.len(), n, "one weight a row");
        gpu.table(bytemuck::cast_slice(weights))
    });
    scratch.loss.resize_on(&device, Dtype::F32, &[n]);
    for start in (0..n).step_by(step) {
        let rows = step.min(n - start);
        scratch.logits.resize_on(&device, Dtype::F32, &[rows, vocab]);
        let h = matrix(h).at(start * d);
        linear::forward(gpu, h, rows, w, 1.0, None, matrix(&scratch.logits), Store::Overwrite);
        let d_arg = if gradients.is_some() { argument(&scratch.logits, Dtype::F32) } else { Arg::Null };
        let block = if vocab < 4096 { 128 } else { 1024 };
        let args = [
            argument(&scratch.logits, Dtype::F32),
            Arg::Buffer(&targets, 4 * start),
            Arg::F32(smoothing),
            Arg::F32(gradients.as_ref().map_or(0.0, |g| g.scale)),
            weights.as_ref().map_or(Arg::Null, |weights| Arg::Buffer(weights, 4 * start)),
            d_arg,
            argument_at(&scratch.loss, Dtype::F32, start),
            Arg::U32(vocab as u32),
        ];
        let module = Module::new(Source::LinearCrossEntropy, element);
        gpu.launch_row(module, "cross_entropy", (rows as u32, block, block as usize / 32 * 4), &args);
        if let Some(g) = &mut gradients {
            // A row of the gradient begins where that of the logits does, and is shorter in bf16.
            let d_logits = Matrix::new(scratch.logits.device_buffer(), element, vocab * (4 / element.bytes()));
            let d_h = matrix(g.d_h).at(start * d);
            linear::input_gradient(gpu, d_logits, rows, w, 1.0, None, d_h, Store::Overwrite);
            if let Some(d_w) = g.d_w.as_deref_mut() {
                linear::weight_gradient(gpu, d_logits, h, rows, 1.0, d_w);
            }
            if let Some(HeadRows { ids, d_w }) = &mut g.d_rows {
                assert_eq!(d_w.shape(), [ids.len(), d], "a gradient for each row");
                let (count, stride) = (ids.len(), columns_stride(ids.len(), element));
                scratch.columns.resize_on(&device, element, &[rows, stride]);
                let ids = gpu.table(ids);
                let [height, width, stride] = [rows, count, stride].map(|n| Arg::U32(n as u32));
                let args = [
                    Arg::Buffer(scratch.logits.device_buffer(), 0),
                    Arg::U64(d_logits.stride as u64),
                    Arg::Buffer(&ids, 0),
                    argument(&scratch.columns, element),
                    height,
                    width,
                    stride,
                ];
                gpu.launch_threads(module, "head_columns", rows * count, &args);
                linear::weight_gradient(gpu, matrix(&scratch.columns), h, rows, 1.0, d_w);
            }
        }
    }
    scratch.loss.read(loss);
}
