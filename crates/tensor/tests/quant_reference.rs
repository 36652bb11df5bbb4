//! Decoded blocks against values that the formats' reference decoder made.

use safetensors::SafeTensors;
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
