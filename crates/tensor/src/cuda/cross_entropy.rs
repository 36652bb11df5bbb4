//! Head and cross-entropy in chunks of rows; contract in `ops/linear_cross_entropy.rs`. Logits are f32 whatever the element is:
//! the loss of a vocabulary of 128,000 would not survive bf16.

use super::arguments::{argument, argument_at, blocks};
use super::gemm::{Gemm, Matrix};
use super::gpu::{Arg, Gpu, Launch};
use super::kernels::{Module, Source};
use super::linear::{self, matrix};
use crate::contract::{Gradients, Head, HeadRows, Store};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Logits that exist at a time while the head trains, 512 MiB: its gradient is read and written for each chunk of them.
const LOGITS_TRAINED: usize = 1 << 27;

/// The same under a frozen head, 256 MiB: enough rows for products to be bound by arithmetic.
const LOGITS_FROZEN: usize = 1 << 26;

/// Rows are a multiple of this where there are as many: those that the tiles of products have.
const TILE_ROWS: usize = 256;

/// Threads of a block that copies elements.
const BLOCK: u32 = 256;

/// What is kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Becomes its gradient.
    logits: Tensor,
    loss: Tensor,
    /// Those columns that belong to rows that stand in for the head's: logits in f32, and their gradient.
    own_logits: Tensor,
    columns: Tensor,
}

impl Scratch {
    pub(crate) fn num_bytes(&self) -> usize {
        [&self.logits, &self.loss, &self.own_logits, &self.columns].map(Tensor::capacity_bytes).iter().sum()
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

/// Bytes of the columns of a chunk that belong to `columns` rows that stand in for the head's: logits, and their gradient.
pub(super) fn columns_bytes(n: usize, vocab: usize, columns: usize, element: Dtype) -> [usize; 2] {
    let rows = chunk_rows(n, vocab, false);
    [4 * rows * columns, rows * columns_stride(columns, element) * element.bytes()]
}

/// Columns `own.ids` of the f32 logits `y` [rows, V] = `h` [rows, d] · `own.w`ᵀ; `columns` is a buffer.
pub(crate) fn replace_logits(
    gpu: &Arc<Gpu>,
    h: Matrix<'_>,
    rows: usize,
    own: HeadRows<'_>,
    columns: &mut Tensor,
    y: &mut Tensor,
) {
    let (n, k) = (own.w.rows(), own.w.cols());
    columns.resize_on(&Device::Cuda(gpu.clone()), Dtype::F32, &[rows, n]);
    gpu.gemm(&Gemm { m: rows, n, k, alpha: 1.0, a: h, b: matrix(own.w).t(), beta: 0.0, c: matrix(columns) });
    let ids = gpu.table(own.ids);
    gpu.launch(&Launch {
        module: Module::new(Source::CrossEntropy, h.dtype),
        kernel: "replace_columns",
        grid: [blocks(rows * n, BLOCK), 1, 1],
        block: BLOCK,
        shared: 0,
        args: &[
            argument(columns, Dtype::F32),
            Arg::Buffer(&ids, 0),
            argument(y, Dtype::F32),
            Arg::U32(rows as u32),
            Arg::U32(n as u32),
            Arg::U32(y.cols() as u32),
        ],
    });
}

pub(crate) fn run(
    gpu: &Arc<Gpu>,
    h: &Tensor,
    head: Head<'_>,
    targets: &[u32],
    smoothing: f32,
    scratch: &mut Scratch,
    loss: &mut [f32],
    mut gradients: Option<Gradients<'_>>,
) {
    let Head { w, rows: own } = head;
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
        if let Some(own) = own {
            replace_logits(gpu, h, rows, own, &mut scratch.own_logits, &mut scratch.logits);
        }
        let d_arg = if gradients.is_some() { argument(&scratch.logits, Dtype::F32) } else { Arg::Null };
        let block = if vocab < 4096 { 128 } else { 1024 };
        gpu.launch(&Launch {
            module: Module::new(Source::CrossEntropy, element),
            kernel: "cross_entropy",
            grid: [rows as u32, 1, 1],
            block,
            shared: block as usize / 32 * 4,
            args: &[
                argument(&scratch.logits, Dtype::F32),
                Arg::Buffer(&targets, 4 * start),
                Arg::F32(smoothing),
                Arg::F32(gradients.as_ref().map_or(0.0, |g| g.scale)),
                weights.as_ref().map_or(Arg::Null, |weights| Arg::Buffer(weights, 4 * start)),
                d_arg,
                argument_at(&scratch.loss, Dtype::F32, start),
                Arg::U32(vocab as u32),
            ],
        });
        if let Some(g) = &mut gradients {
            // A row of the gradient begins where that of the logits does, and is shorter in bf16.
            let d_logits = Matrix::new(scratch.logits.device_buffer(), element, vocab * (4 / element.bytes()));
            if let Some(HeadRows { ids, .. }) = own {
                let (count, stride) = (ids.len(), columns_stride(ids.len(), element));
                scratch.columns.resize_on(&device, element, &[rows, stride]);
                let ids = gpu.table(ids);
                gpu.launch(&Launch {
                    module: Module::new(Source::CrossEntropy, element),
                    kernel: "take_columns",
                    grid: [blocks(rows * count, BLOCK), 1, 1],
                    block: BLOCK,
                    shared: 0,
                    args: &[
                        Arg::Buffer(scratch.logits.device_buffer(), 0),
                        Arg::U64(d_logits.stride as u64),
                        Arg::Buffer(&ids, 0),
                        argument(&scratch.columns, element),
                        Arg::U32(rows as u32),
                        Arg::U32(count as u32),
                        Arg::U32(stride as u32),
                    ],
                });
            }
            let d_h = matrix(g.d_h).at(start * d);
            linear::input_gradient(gpu, d_logits, rows, w, 1.0, None, d_h, Store::Overwrite);
            if let Some(d_w) = g.d_w.as_deref_mut() {
                linear::weight_gradient(gpu, d_logits, h, rows, 1.0, d_w);
            }
            if let Some(HeadRows { ids, w }) = own {
                let (k, a) = (ids.len(), matrix(&scratch.columns));
                gpu.gemm(&Gemm { m: rows, n: d, k, alpha: 1.0, a, b: matrix(w), beta: 1.0, c: d_h });
                if let Some(d_rows) = g.d_rows.as_deref_mut() {
                    assert_eq!(d_rows.shape(), [k, d], "a gradient for each row");
                    linear::weight_gradient(gpu, a, h, rows, 1.0, d_rows);
                }
            }
        }
    }
    scratch.loss.read(loss);
}
