//! Packed weights against the same weights decoded: products of single matrices, and an adapter's gradients through a model.

use super::{Check, ORDER, batch_of, documents, gradients_of, of_largest, randomise, relative, worst};
use crate::Result;
use tunesmith_model::{AdapterConfig, Llama, Modules, Workspace};
use tunesmith_tensor::ops::{embedding, linear};
use tunesmith_tensor::packed_int::{Int8Rows, PackedInt};
use tunesmith_tensor::quant::{BlockType, all_finite};
use tunesmith_tensor::quant_encode::quantize;
use tunesmith_tensor::{Bytes, Packed, Tensor, Weight, rng::Rng};

/// Rows and columns of the matrix: the columns are whole blocks of every format.
const SHAPE: [usize; 2] = [96, 512];

/// Each format once: a product with many rows, one with a single row (which takes another path), the gradient of the
/// input, and rows of an embedding.
pub(super) fn products(observe: &mut dyn FnMut(Check)) {
    let mut weights: Vec<Packed> = BlockType::ALL.into_iter().map(random_blocks).collect();
    weights.push(Packed::nf4(&normal(&SHAPE, 9), true));
    for packed in weights {
        let name = packed.encoding();
        let dense = Weight::Dense(packed.to_tensor());
        let packed = Weight::Packed(packed);
        let (x, one, d_y) = (normal(&[9, SHAPE[1]], 1), normal(&[1, SHAPE[1]], 2), normal(&[9, SHAPE[0]], 3));
        let of = |weight: &Weight| {
            let mut found = [(); 4].map(|()| Tensor::default());
            let [many, single, d_x, rows] = &mut found;
            linear::forward(&x, weight, 0.5, many, linear::Store::Overwrite);
            linear::forward(&one, weight, 1.0, single, linear::Store::Overwrite);
            linear::input_gradient(&d_y, weight, 1.0, d_x, linear::Store::Overwrite);
            embedding::forward(weight, &[95, 0, 7], rows);
            found
        };
        let pairs = of(&packed).into_iter().zip(of(&dense));
        let errors = pairs.map(|(a, b)| of_largest(a.data(), b.data()));
        observe(Check {
            model: name.to_owned(),
            check: "packed weight = decoded one",
            compared: "products, input gradient and rows, of the largest".into(),
            error: worst(errors),
            bound: ORDER,
        });
    }
}

/// Integer products against f32 products of the very numbers that the integers stand for: repacked blocks of GGUF formats,
/// and a matrix rounded to 8 bits. What remains is the rounding of f32 sums.
pub(super) fn integers(observe: &mut dyn FnMut(Check)) {
    let held = BlockType::ALL.into_iter().filter(|kind| PackedInt::holds(*kind));
    for kind in held.map(Some).chain([None]) {
        let (packed, numbers) = match kind {
            Some(kind) => {
                let blocks = random_blocks(kind);
                let bytes = blocks.blocks().map_or(&[][..], |(_, bytes, _)| bytes);
                let len = bytes.len() / SHAPE[0];
                let row = |i: usize| &bytes[i * len..(i + 1) * len];
                (PackedInt::from_gguf(kind, SHAPE[0], SHAPE[1], row), blocks.to_tensor())
            }
            None => {
                let packed = PackedInt::from_tensor(&normal(&SHAPE, 10), 128);
                let mut numbers = Tensor::zeros(&SHAPE);
                packed.dequantize_rows(0..SHAPE[0], numbers.data_mut());
                (packed, numbers)
            }
        };
        let (mut rows, mut rounded) = (Int8Rows::default(), Tensor::default());
        let (mut got, mut want) = (Tensor::default(), Tensor::default());
        let mut errors = Vec::new();
        for num_rows in [9, 1] {
            packed.forward(&normal(&[num_rows, SHAPE[1]], 1), &mut rows, &mut got, linear::Store::Overwrite);
            rows.dequantize(&mut rounded);
            linear::matmul(&rounded, &numbers, 1.0, &mut want, linear::Store::Overwrite);
            errors.push(of_largest(got.data(), want.data()));
        }
        observe(Check {
            model: kind.map_or("8 bits", BlockType::name).to_owned(),
            check: "integer product = f32 product",
            compared: "products of the same rounded numbers, of the largest".into(),
            error: worst(errors.into_iter()),
            bound: ORDER,
        });
    }
}

/// Rounding weights and activations to 8 bits changes a model's logits by about a hundredth of the largest.
const EIGHT_BITS: f64 = 5e-2;

/// A model that computes in 8 bits, and in f32.
pub(super) fn int8_model(make: &dyn Fn() -> Result<Llama>, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let mut model = make()?;
    let batch = batch_of(&documents(model.config.vocab_size));
    let mut ws = Workspace::default();
    let exact = model.logits(&batch, &mut ws).data().to_vec();
    model.compute_int8(false)?;
    observe(Check {
        model: "8 bits".into(),
        check: "compute int8 = f32 within its rounding",
        compared: "logits, of the largest".into(),
        error: of_largest(model.logits(&batch, &mut ws).data(), &exact),
        bound: EIGHT_BITS,
    });
    Ok(())
}

/// QLoRA: the gradients of an adapter on packed matrices, and on the same matrices decoded.
pub(super) fn adapters(make: &dyn Fn() -> Result<Llama>, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let config =
        AdapterConfig { r: 4, target_modules: Modules::Pattern("all-linear".into()), ..AdapterConfig::default() };
    for kind in [Some(BlockType::Q8_0), Some(BlockType::Q4_0), None] {
        let encode = |matrix: &Tensor| match kind {
            Some(kind) => {
                let bytes = Bytes::Owned(quantize(kind, matrix.data()));
                Packed::from_blocks([matrix.rows(), matrix.cols()], kind, bytes, None)
            }
            None => Packed::nf4(matrix, true),
        };
        let mut of = Vec::new();
        for decode in [false, true] {
            let mut model = make()?;
            for parameter in model.parameters.iter_mut().filter(|p| p.value.shape().len() == 2) {
                let packed = encode(parameter.value.tensor());
                parameter.value = if decode { packed.to_tensor().into() } else { Weight::Packed(packed) };
            }
            model.add_adapter(&config, 1)?;
            randomise(&mut model, "lora_B", 0.05);
            let batch = batch_of(&documents(model.config.vocab_size));
            of.push(gradients_of(&model, &[batch], None, &mut Workspace::default()));
        }
        observe(Check {
            model: kind.map_or("NF4", BlockType::name).to_owned(),
            check: "adapter on packed weights = on decoded ones",
            compared: "gradients, relative".into(),
            error: relative(&of[0], &of[1]),
            bound: ORDER,
        });
    }
    Ok(())
}

fn normal(shape: &[usize], stream: u64) -> Tensor {
    Tensor::from_slice(shape, &Rng::new(8, stream).normals(shape.iter().product(), 1.0))
}

/// A matrix whose blocks of `kind` hold random bits, except those that mean no number.
fn random_blocks(kind: BlockType) -> Packed {
    let mut rng = Rng::new(7, kind.ggml().into());
    let mut bytes = Vec::new();
    for _ in 0..SHAPE[0] * SHAPE[1] / kind.block_len() {
        let block = loop {
            let block: Vec<u8> = (0..kind.block_bytes()).map(|_| rng.next_u32() as u8).collect();
            if usable(kind, &block) {
                break block;
            }
        };
        bytes.extend(block);
    }
    Packed::from_blocks(SHAPE, kind, Bytes::Owned(bytes), None)
}

/// Numbers, and none so large that products of them overflow.
fn usable(kind: BlockType, block: &[u8]) -> bool {
    let mut decoded = vec![0.0; kind.block_len()];
    tunesmith_tensor::quant::dequantize(kind, block, &mut decoded);
    all_finite(kind, block) && decoded.iter().all(|x| x.abs() < 1e6)
}
