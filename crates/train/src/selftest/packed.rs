//! Packed weights against the same weights decoded: products of single matrices, and an adapter's gradients through a model.

use super::{Check, ORDER, batch_of, documents, gradients_of, of_largest, randomise, relative, worst};
use crate::Result;
use tunesmith_model::{AdapterConfig, Llama, Modules, Workspace};
use tunesmith_tensor::ops::{embedding, linear};
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
            linear::forward(&x, weight, 0.5, many, linear::Into::Overwrite);
            linear::forward(&one, weight, 1.0, single, linear::Into::Overwrite);
            linear::input_gradient(&d_y, weight, 1.0, d_x, linear::Into::Overwrite);
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
