//! Quantised weights on the device, their dequantisation and their products with few rows; formats in `quant.rs` and
//! `nf4.rs`.

use super::gemm::Matrix;
use super::gpu::{Arg, Buffer, Gpu};
use super::kernels::{Module, Source};
use crate::nf4::{self, Nf4Parts};
use crate::{dtype::Dtype, quant::BlockType, tensor::Tensor};
use std::sync::Arc;

/// A frozen matrix [rows, cols] on a GPU in a smaller encoding.
#[derive(Clone, Debug)]
pub struct DeviceWeight {
    shape: [usize; 2],
    element: Dtype,
    encoding: Encoding,
}

#[derive(Clone, Debug)]
enum Encoding {
    Blocks { kind: BlockType, bytes: Arc<Buffer>, half_head: usize },
    Nf4(Arc<Nf4>),
}

#[derive(Debug)]
struct Nf4 {
    packed: Buffer,
    code: Buffer,
    scales: Scales,
}

#[derive(Debug)]
enum Scales {
    Plain(Buffer),
    Double { codes: Buffer, table: Buffer, groups: Buffer, offset: f32 },
}

impl DeviceWeight {
    /// A matrix whose rows are whole blocks of `kind`; `interleaved_heads` as in [`crate::Packed::from_blocks`].
    pub(crate) fn blocks(
        gpu: &Arc<Gpu>,
        element: Dtype,
        shape: [usize; 2],
        kind: BlockType,
        bytes: &[u8],
        interleaved_heads: Option<usize>,
    ) -> Self {
        assert!(shape[1].is_multiple_of(8), "rows of {} elements", shape[1]);
        let half_head = interleaved_heads.map_or(0, |heads| shape[0] / heads / 2);
        Self { shape, element, encoding: Encoding::Blocks { kind, bytes: Arc::new(gpu.upload(bytes)), half_head } }
    }

    /// Where the packed elements are.
    pub(crate) fn address(&self) -> u64 {
        match &self.encoding {
            Encoding::Blocks { bytes, .. } => bytes.address(),
            Encoding::Nf4(nf4) => nf4.packed.address(),
        }
    }

    /// A matrix in NF4.
    pub(crate) fn nf4(gpu: &Arc<Gpu>, element: Dtype, shape: [usize; 2], parts: Nf4Parts<'_>) -> Self {
        assert!(shape[1].is_multiple_of(8), "rows of {} elements", shape[1]);
        let scales = match parts {
            Nf4Parts::Plain { maxima, .. } => Scales::Plain(gpu.upload(maxima)),
            Nf4Parts::Double { codes, groups, offset, .. } => Scales::Double {
                codes: gpu.upload(codes),
                table: gpu.upload(nf4::dynamic_code()),
                groups: gpu.upload(groups),
                offset,
            },
        };
        let (Nf4Parts::Plain { packed, .. } | Nf4Parts::Double { packed, .. }) = parts;
        let nf4 = Nf4 { packed: gpu.upload(packed), code: gpu.upload(&nf4::CODE), scales };
        Self { shape, element, encoding: Encoding::Nf4(Arc::new(nf4)) }
    }

    /// Rows and columns.
    pub fn shape(&self) -> &[usize; 2] {
        &self.shape
    }

    /// Type that products dequantise it to, that of the activations.
    pub(crate) fn element(&self) -> Dtype {
        self.element
    }

    /// Bytes on the device.
    pub fn num_bytes(&self) -> usize {
        match &self.encoding {
            Encoding::Blocks { bytes, .. } => bytes.bytes(),
            Encoding::Nf4(nf4) => {
                let scales = match &nf4.scales {
                    Scales::Plain(maxima) => maxima.bytes(),
                    Scales::Double { codes, table, groups, .. } => codes.bytes() + table.bytes() + groups.bytes(),
                };
                nf4.packed.bytes() + nf4.code.bytes() + scales
            }
        }
    }

    /// Name of the encoding.
    pub fn encoding(&self) -> &'static str {
        match &self.encoding {
            Encoding::Blocks { kind, .. } => kind.name(),
            Encoding::Nf4(_) => "NF4",
        }
    }

    /// The device.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        match &self.encoding {
            Encoding::Blocks { bytes, .. } => bytes.gpu(),
            Encoding::Nf4(nf4) => nf4.packed.gpu(),
        }
    }
}

/// Which rows are dequantised.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// The first and how many.
    Range(usize, usize),
    Listed(&'a Buffer),
}

/// Dequantises `count` rows from `first` on to the start of `to`, as `element`.
pub(crate) fn rows(gpu: &Gpu, w: &DeviceWeight, first: usize, count: usize, to: &Buffer, element: Dtype) {
    assert!(first + count <= w.shape[0], "rows {first} + {count} of {:?}", w.shape);
    dequantize(gpu, w, Rows::Range(first, count), to, element);
}

/// Dequantises the rows `index` to `y` [N, cols], which has its shape.
pub(crate) fn listed_rows(gpu: &Arc<Gpu>, w: &DeviceWeight, index: &[u32], y: &Tensor) {
    dequantize(gpu, w, Rows::Listed(&gpu.table(index)), y.device_buffer(), y.dtype());
}

fn dequantize(gpu: &Gpu, w: &DeviceWeight, rows: Rows<'_>, to: &Buffer, element: Dtype) {
    let cols = w.shape[1];
    let (index, first, count) = match rows {
        Rows::Range(first, count) => (Arg::Null, first, count),
        Rows::Listed(index) => (Arg::Buffer(index, 0), 0, index.bytes() / 4),
    };
    assert!(count * cols * element.bytes() <= to.bytes(), "{count} rows of {:?}", w.shape);
    let kernel = match &w.encoding {
        Encoding::Blocks { .. } => "dequantize_blocks",
        Encoding::Nf4(_) => "dequantize_nf4",
    };
    let args = [index, Arg::Buffer(to, 0), Arg::U32(first as u32), Arg::U32(count as u32)];
    launch(gpu, w, element, kernel, count * cols / 8, &args);
}

/// Rows of x that [`multiply`] takes: more are better multiplied with dequantised tiles.
pub(crate) const MOST_ROWS: usize = 8;

/// `y` [rows, out] = or += `alpha` x wᵀ for up to [`MOST_ROWS`] rows of `x`, without decoding the matrix to memory.
pub(crate) fn multiply(
    gpu: &Gpu,
    w: &DeviceWeight,
    x: Matrix<'_>,
    rows: usize,
    alpha: f32,
    y: Matrix<'_>,
    accumulate: bool,
) {
    let [n, _] = w.shape;
    assert!(rows <= MOST_ROWS && !x.transposed && !y.transposed, "{rows} rows of {x:?}");
    let width = 16 / x.dtype.bytes();
    assert!(x.stride.is_multiple_of(width) && x.offset.is_multiple_of(width), "rows of {x:?}");
    x.check(rows, w.shape[1]);
    y.check(rows, n);
    let kernel = match &w.encoding {
        Encoding::Blocks { .. } => "multiply_blocks",
        Encoding::Nf4(_) => "multiply_nf4",
    };
    let start = |m: &Matrix<'_>| m.offset * m.dtype.bytes();
    let as_float = y.dtype != x.dtype;
    let [outputs, m, x_stride, y_stride] = [n, rows, x.stride, y.stride].map(|v| Arg::U32(v as u32));
    let args = [
        Arg::Buffer(x.buffer, start(&x)),
        Arg::Buffer(y.buffer, start(&y)),
        outputs,
        m,
        x_stride,
        y_stride,
        Arg::F32(alpha),
        Arg::U32(accumulate.into()),
        Arg::U32(as_float.into()),
    ];
    launch(gpu, w, x.dtype, kernel, 32 * n, &args);
}

/// A launch of `threads` threads over the matrix, whose own arguments come before `args`.
fn launch(gpu: &Gpu, w: &DeviceWeight, element: Dtype, kernel: &'static str, threads: usize, args: &[Arg<'_>]) {
    let cols = Arg::U32(w.shape[1] as u32);
    let own = match &w.encoding {
        Encoding::Blocks { kind, bytes, half_head } => {
            let [number, len, size, half] =
                [kind.ggml() as usize, kind.block_len(), kind.block_bytes(), *half_head].map(|x| Arg::U32(x as u32));
            vec![Arg::Buffer(bytes, 0), number, len, size, cols, half]
        }
        Encoding::Nf4(nf4) => {
            let (maxima, codes, table, groups, offset) = match &nf4.scales {
                Scales::Plain(maxima) => (Arg::Buffer(maxima, 0), Arg::Null, Arg::Null, Arg::Null, 0.0),
                Scales::Double { codes, table, groups, offset } => {
                    (Arg::Null, Arg::Buffer(codes, 0), Arg::Buffer(table, 0), Arg::Buffer(groups, 0), *offset)
                }
            };
            let [packed, code] = [&nf4.packed, &nf4.code].map(|b| Arg::Buffer(b, 0));
            vec![packed, code, maxima, codes, table, groups, Arg::F32(offset), cols]
        }
    };
    let args: Vec<Arg<'_>> = own.into_iter().chain(args.iter().copied()).collect();
    gpu.launch_threads(Module::new(Source::Dequantize, element), kernel, threads, &args);
}
