//! Weight matrices as they are kept in memory: dense f32, or packed as a file stores them.
//!
//! A packed matrix is dequantised to f32 a panel of rows at a time, where a product needs it; the dense matrix is never
//! built. Dequantising is exact, so products over a packed matrix are those over the dense one.

use crate::cuda::dequantize::DeviceWeight;
use crate::packed_int::{GGUF_BLOCK, PackedInt};
use crate::quant::{BlockType, all_finite, dequantize};
use crate::{device::Device, dtype::Dtype, int8_weight::Int8Weight, mapped::MappedFile, nf4::Nf4, tensor::Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// A weight in memory.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32 elements; the only form that can be trained.
    Dense(Tensor),
    /// A frozen matrix in a smaller encoding.
    Packed(Packed),
    /// A frozen matrix rounded to 8 bits, multiplied as integers.
    Int8(Int8Weight),
    /// A frozen matrix in a smaller encoding on a GPU. A dense tensor may be there too.
    Device(DeviceWeight),
}

impl Weight {
    /// The extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Dense(tensor) => tensor.shape(),
            Self::Packed(packed) => &packed.shape,
            Self::Int8(int8) => int8.shape(),
            Self::Device(weight) => weight.shape(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// True when there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of the matrix (all extents but the last, multiplied).
    pub fn rows(&self) -> usize {
        self.shape().iter().rev().skip(1).product()
    }

    /// Columns of the matrix (the last extent).
    pub fn cols(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// The elements as a tensor, where they are dense.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(tensor) => Some(tensor),
            Self::Packed(_) | Self::Int8(_) | Self::Device(_) => None,
        }
    }

    /// The dense tensor of a weight that cannot be packed: an adapter, a norm, a bias, anything that trains.
    ///
    /// # Panics
    /// When the weight is not dense.
    pub fn tensor(&self) -> &Tensor {
        match self.dense() {
            Some(tensor) => tensor,
            None => panic!("a weight of shape {:?} is {} where a dense one is needed", self.shape(), self.encoding()),
        }
    }

    /// As [`Weight::tensor`], to be changed.
    ///
    /// # Panics
    /// When the weight is not dense.
    pub fn tensor_mut(&mut self) -> &mut Tensor {
        match self {
            Self::Dense(tensor) => tensor,
            _ => panic!("a weight of shape {:?} is {} where a dense one is needed", self.shape(), self.encoding()),
        }
    }

    /// All elements as f32: a copy of a dense weight, a packed one dequantised.
    ///
    /// # Panics
    /// When the weight is rounded to 8 bits for products: its values are gone.
    pub fn to_tensor(&self) -> Tensor {
        match self {
            Self::Dense(tensor) => tensor.clone(),
            Self::Packed(packed) => packed.to_tensor(),
            Self::Int8(_) => panic!("the values of an int8 weight of shape {:?} are gone", self.shape()),
            Self::Device(_) => panic!("{ON_GPU}"),
        }
    }

    /// Copies row `i` [cols] into `out` as f32.
    ///
    /// # Panics
    /// As [`Weight::to_tensor`].
    pub fn row_into(&self, i: usize, out: &mut [f32]) {
        match self {
            Self::Dense(tensor) => out.copy_from_slice(tensor.row(i)),
            Self::Packed(packed) => packed.dequantize_rows(i..i + 1, out),
            Self::Int8(_) => panic!("the values of an int8 weight of shape {:?} are gone", self.shape()),
            Self::Device(_) => panic!("{ON_GPU}"),
        }
    }

    /// The matrix as integers with a scale for each block, whose products round the other operand to 8 bits
    /// ([`crate::ops::products`]). Blocks of a GGUF file that are such integers keep their values; everything else is
    /// rounded to 8 bits in blocks of 32. A matrix of [`Weight::Int8`] stays what it is.
    pub fn to_integers(&self) -> Self {
        let shape = [self.rows(), self.cols()];
        let integers = match self {
            Self::Int8(_) => return self.clone(),
            Self::Device(_) => panic!("{ON_GPU}"),
            Self::Dense(tensor) => PackedInt::from_tensor(tensor, GGUF_BLOCK),
            Self::Packed(packed) => match &packed.encoding {
                Encoding::Integers(integers) => integers.clone(),
                Encoding::Blocks { kind, bytes, .. } if PackedInt::holds(*kind) => {
                    let (bytes, row_bytes) = (bytes.as_slice(), bytes.as_slice().len() / shape[0].max(1));
                    PackedInt::from_gguf(*kind, shape[0], shape[1], |row| {
                        let stored = packed.stored_row(row);
                        &bytes[stored * row_bytes..(stored + 1) * row_bytes]
                    })
                }
                Encoding::Blocks { .. } | Encoding::Nf4(_) => {
                    PackedInt::quantize(shape[0], shape[1], GGUF_BLOCK, |row, out| {
                        packed.dequantize_rows(row..row + 1, out)
                    })
                }
            },
        };
        Self::Packed(Packed { shape, encoding: Encoding::Integers(integers) })
    }

    /// What [`Weight::to_integers`] made; `None` in other encodings.
    pub fn integers(&self) -> Option<&PackedInt> {
        match self {
            Self::Packed(Packed { encoding: Encoding::Integers(integers), .. }) => Some(integers),
            _ => None,
        }
    }

    /// Says that the next parallel loop but one will read this weight, so that threads of a [`crate::team`] that wait
    /// can fetch its beginning. Nothing where it is not read as it is.
    pub fn read_ahead(&self) {
        match self {
            Self::Dense(dense) if dense.gpu().is_none() => crate::team::read_ahead(bytemuck::cast_slice(dense.data())),
            Self::Packed(Packed { encoding: Encoding::Integers(integers), .. }) => {
                crate::team::read_ahead(integers.view().codes)
            }
            _ => {}
        }
    }

    /// Whether the weight is kept as integers, whose products round what they multiply ([`Weight::to_integers`]).
    pub fn is_integers(&self) -> bool {
        self.integers().is_some()
    }

    /// Bytes of the encoded elements.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.dtype().bytes() * tensor.len(),
            Self::Packed(packed) => packed.num_bytes(),
            Self::Int8(int8) => int8.num_bytes(),
            Self::Device(weight) => weight.num_bytes(),
        }
    }

    /// Name of the encoding, such as `F32`, `Q4_1` or `NF4`.
    pub fn encoding(&self) -> &'static str {
        match self {
            Self::Dense(_) => BlockType::F32.name(),
            Self::Packed(packed) => packed.encoding(),
            Self::Int8(_) => "int8",
            Self::Device(weight) => weight.encoding(),
        }
    }
}

impl Weight {
    /// Where the elements are.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Packed(_) | Self::Int8(_) => Device::Cpu,
            Self::Device(weight) => Device::Cuda(weight.gpu().clone()),
        }
    }

    /// Where the memory is on a GPU, for telling whether it has changed: 0 on the CPU.
    pub fn address(&self) -> u64 {
        match self {
            Self::Dense(tensor) => tensor.address(),
            Self::Packed(_) | Self::Int8(_) => 0,
            Self::Device(weight) => weight.address(),
        }
    }

    /// A copy on `device` for products with activations of `dtype`: quantised blocks and NF4 as they are, everything
    /// else dense in `dtype`.
    ///
    /// # Panics
    /// When the weight is rounded to 8 bits for the CPU's products.
    pub fn to_device(&self, device: &Device, dtype: Dtype) -> Self {
        let Some(gpu) = device.gpu() else { return self.clone() };
        match self {
            Self::Dense(tensor) => Self::Dense(tensor.to_device(device, dtype)),
            Self::Packed(packed) => match &packed.encoding {
                Encoding::Nf4(nf4) => Self::Device(DeviceWeight::nf4(gpu, dtype, packed.shape, nf4.parts())),
                Encoding::Blocks { kind, bytes, interleaved_heads } if kind.block_len() > 1 => {
                    let bytes = bytes.as_slice();
                    Self::Device(DeviceWeight::blocks(gpu, dtype, packed.shape, *kind, bytes, *interleaved_heads))
                }
                Encoding::Blocks { .. } | Encoding::Integers(_) => {
                    Self::Dense(packed.to_tensor().to_device(device, dtype))
                }
            },
            Self::Int8(_) => panic!("int8 products are the CPU's"),
            Self::Device(_) => panic!("{ON_GPU}"),
        }
    }
}

/// Why the elements cannot be had.
const ON_GPU: &str = "the weight is on a GPU in its encoding; what it was made from has its elements";

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

/// A frozen matrix [rows, cols] in a smaller encoding.
#[derive(Clone, Debug)]
pub struct Packed {
    shape: [usize; 2],
    encoding: Encoding,
}

#[derive(Clone, Debug)]
enum Encoding {
    Blocks { kind: BlockType, bytes: Bytes, interleaved_heads: Option<usize> },
    Nf4(Nf4),
    Integers(PackedInt),
}

/// Bytes in memory or in a mapped file, where they cost memory only while they are in use.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// In memory.
    Owned(Vec<u8>),
    /// A range of a mapped file.
    Mapped(Arc<MappedFile>, Range<usize>),
}

impl Bytes {
    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(file, range) => &file[range.clone()],
        }
    }
}

impl Packed {
    /// A matrix of `shape` whose rows are whole blocks of `kind`. `interleaved_heads` is the number of heads when rows
    /// are stored in the order of interleaved rotation (q and k in GGUF files): row `2 j + s` of a head is then row `s
    /// * head_dim / 2 + j` of the matrix.
    ///
    /// # Panics
    /// When the bytes do not have the length that shape and encoding ask for, or the heads do not divide the rows.
    pub fn from_blocks(shape: [usize; 2], kind: BlockType, bytes: Bytes, interleaved_heads: Option<usize>) -> Self {
        let row_bytes = kind.bytes_for(shape[1]);
        let expected = row_bytes.and_then(|row| row.checked_mul(shape[0]));
        assert_eq!(expected, Some(bytes.as_slice().len()), "{} of shape {shape:?}", kind.name());
        if let Some(heads) = interleaved_heads {
            assert!(heads > 0 && shape[0].is_multiple_of(2 * heads), "{heads} heads in {} rows", shape[0]);
        }
        Self { shape, encoding: Encoding::Blocks { kind, bytes, interleaved_heads } }
    }

    /// `matrix` [rows, cols] rounded to NF4; see [`Nf4`].
    pub fn nf4(matrix: &Tensor, double: bool) -> Self {
        let encoding = Encoding::Nf4(Nf4::quantize(matrix.data(), double));
        Self { shape: [matrix.rows(), matrix.cols()], encoding }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The GGUF block type, its bytes and, for q and k, the heads by which its rows are interleaved (see
    /// [`Packed::from_blocks`]); `None` in other encodings.
    pub fn blocks(&self) -> Option<(BlockType, &[u8], Option<usize>)> {
        match &self.encoding {
            Encoding::Blocks { kind, bytes, interleaved_heads } => Some((*kind, bytes.as_slice(), *interleaved_heads)),
            Encoding::Nf4(_) | Encoding::Integers(_) => None,
        }
    }

    /// Where row `row` of the matrix stands in the stored order.
    pub fn stored_row(&self, row: usize) -> usize {
        match &self.encoding {
            Encoding::Blocks { interleaved_heads: Some(heads), .. } => {
                let half = self.shape[0] / heads / 2;
                let (head, row) = (row / (2 * half), row % (2 * half));
                head * 2 * half + row % half * 2 + row / half
            }
            _ => row,
        }
    }

    /// Dequantises `rows` into `out` [rows, cols].
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let cols = self.shape[1];
        assert_eq!(out.len(), rows.len() * cols, "rows {rows:?} of {cols} columns");
        match &self.encoding {
            Encoding::Nf4(nf4) => nf4.dequantize(rows.start * cols..rows.end * cols, out),
            Encoding::Integers(integers) => integers.dequantize_rows(rows, out),
            Encoding::Blocks { kind, bytes, interleaved_heads } => {
                let row_bytes = bytes.as_slice().len() / self.shape[0].max(1);
                let part = |first: usize, last: usize| &bytes.as_slice()[first * row_bytes..last * row_bytes];
                if interleaved_heads.is_none() {
                    return dequantize(*kind, part(rows.start, rows.end), out);
                }
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    let stored = self.stored_row(row);
                    dequantize(*kind, part(stored, stored + 1), out);
                }
            }
        }
    }

    /// Dequantises `rows` into `out` [rows, cols] on all threads.
    pub fn dequantize_rows_parallel(&self, rows: Range<usize>, out: &mut [f32]) {
        let cols = self.shape[1];
        let step = (1usize << 14).div_ceil(cols.max(1));
        out.par_chunks_mut(step * cols).enumerate().for_each(|(i, out)| {
            let first = rows.start + i * step;
            self.dequantize_rows(first..first + out.len() / cols, out);
        });
    }

    /// The whole matrix as f32.
    pub fn to_tensor(&self) -> Tensor {
        let mut tensor = Tensor::zeros(&self.shape);
        self.dequantize_rows_parallel(0..self.shape[0], tensor.data_mut());
        tensor
    }

    /// Bytes of the encoded elements and their scales.
    pub fn num_bytes(&self) -> usize {
        match &self.encoding {
            Encoding::Blocks { bytes, .. } => bytes.as_slice().len(),
            Encoding::Nf4(nf4) => nf4.num_bytes(),
            Encoding::Integers(integers) => integers.bytes(),
        }
    }

    /// Name of the encoding, such as `Q4_1` or `NF4`.
    pub fn encoding(&self) -> &'static str {
        match &self.encoding {
            Encoding::Blocks { kind, .. } => kind.name(),
            Encoding::Nf4(_) => "NF4",
            Encoding::Integers(_) => "integers",
        }
    }

    /// Whether every element dequantises to a finite number.
    pub fn is_finite(&self) -> bool {
        match &self.encoding {
            Encoding::Blocks { kind, bytes, .. } => all_finite(*kind, bytes.as_slice()),
            // Made from finite numbers by this program.
            Encoding::Nf4(_) | Encoding::Integers(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn q8(rows: usize, cols: usize) -> Vec<u8> {
        let mut rng = Rng::new(5, 0);
        (0..rows * cols / 32)
            .flat_map(|_| {
                let scale = half::f16::from_f32(0.01 + rng.uniform()).to_le_bytes();
                scale.into_iter().chain((0..32).map(|_| rng.below(256) as u8).collect::<Vec<_>>())
            })
            .collect()
    }

    #[test]
    fn rows_decode_alone_and_together() {
        let packed = Packed::from_blocks([6, 64], BlockType::Q8_0, Bytes::Owned(q8(6, 64)), None);
        let whole = packed.to_tensor();
        let mut row = vec![0.0; 64];
        let weight = Weight::Packed(packed);
        for i in 0..6 {
            weight.row_into(i, &mut row);
            assert_eq!(row, whole.row(i));
        }
        assert_eq!((weight.rows(), weight.cols(), weight.num_bytes(), weight.encoding()), (6, 64, 6 * 68, "Q8_0"));
        assert_eq!(weight.to_tensor().data(), whole.data());
        assert!(weight.dense().is_none());
    }

    #[test]
    fn interleaved_rows_come_out_in_halves() {
        // Two heads of four rows: stored 0 1 2 3 are rows 0 2 1 3 of the head.
        let bytes = q8(8, 32);
        let plain = Packed::from_blocks([8, 32], BlockType::Q8_0, Bytes::Owned(bytes.clone()), None).to_tensor();
        let mixed = Packed::from_blocks([8, 32], BlockType::Q8_0, Bytes::Owned(bytes), Some(2)).to_tensor();
        for (row, stored) in [0, 2, 1, 3, 4, 6, 5, 7].into_iter().enumerate() {
            assert_eq!(mixed.row(row), plain.row(stored));
        }
    }

    #[test]
    fn integers_keep_the_values_of_blocks() {
        let stored = Packed::from_blocks([8, 64], BlockType::Q8_0, Bytes::Owned(q8(8, 64)), Some(2));
        let stored = Weight::Packed(stored);
        let integers = stored.to_integers();
        assert_eq!(integers.to_tensor().data(), stored.to_tensor().data());
        assert_eq!(integers.to_integers().to_tensor().data(), stored.to_tensor().data());
        let dense = Weight::from(stored.to_tensor()).to_integers();
        for (a, b) in dense.to_tensor().data().iter().zip(stored.to_tensor().data()) {
            // Half a step of the largest scale.
            assert!((a - b).abs() < 0.6, "{a} {b}");
        }
        assert!(dense.integers().is_some() && stored.integers().is_none());
        assert_eq!(dense.encoding(), "integers");
    }

    #[test]
    fn infinite_scales_are_seen() {
        let mut bytes = q8(2, 64);
        let fine = Packed::from_blocks([2, 64], BlockType::Q8_0, Bytes::Owned(bytes.clone()), None);
        assert!(fine.is_finite());
        bytes[34..36].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert!(!Packed::from_blocks([2, 64], BlockType::Q8_0, Bytes::Owned(bytes), None).is_finite());
    }
}
