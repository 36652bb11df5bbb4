//! Decoded blocks against values that the formats' reference decoder made.

use safetensors::SafeTensors;
use tunesmith_tensor::nf4::{Nf4, dynamic_code};
use tunesmith_tensor::quant::{BlockType, dequantize};

#[test]
fn every_block_type_equals_the_reference_bit_for_bit() {
    let file = include_bytes!("fixtures/quant_blocks.safetensors");
    let file = SafeTensors::deserialize(file).unwrap();
    let mut checked = 0;
    for kind in BlockType::ALL.into_iter().filter(|kind| *kind != BlockType::F32) {
        let bytes = file.tensor(&format!("{}.bytes", kind.name())).unwrap();
        let values = file.tensor(&format!("{}.values", kind.name())).unwrap();
        let mut out = vec![f32::NAN; values.data().len() / 4];
        dequantize(kind, bytes.data(), &mut out);
        for (i, (ours, theirs)) in out.iter().zip(values.data().as_chunks::<4>().0).enumerate() {
            let theirs = f32::from_le_bytes(*theirs);
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{} element {i}: {ours} and {theirs}", kind.name());
            checked += 1;
        }
    }
    assert_eq!(checked, 12 * 512);
}

/// Rounded and decoded as bitsandbytes does it.
#[test]
fn nf4_equals_the_reference() {
    let file = include_bytes!("fixtures/nf4.safetensors");
    let file = SafeTensors::deserialize(file).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap();
        data.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let input = floats("NF4.input");
    assert_eq!(floats("NF4_double.code2"), dynamic_code());
    for (name, double) in [("NF4", false), ("NF4_double", true)] {
        let ours = Nf4::quantize(&input, double);
        assert_eq!(ours.packed(), file.tensor(&format!("{name}.packed")).unwrap().data(), "{name}: codes");
        let mut values = vec![f32::NAN; input.len()];
        ours.dequantize(0..input.len(), &mut values);
        for (i, (ours, theirs)) in values.iter().zip(floats(&format!("{name}.values"))).enumerate() {
            // The mean that double quantisation subtracts is summed in another order there.
            let bound = if double { 2e-6 * theirs.abs() } else { 0.0 };
            assert!((ours - theirs).abs() <= bound, "{name} element {i}: {ours} and {theirs}");
        }
    }
}
