//! Every kernel against sums in f64 over the values that codes stand for.

use super::*;
use crate::quant::dequantize;
use crate::rng::Rng;

/// Activations with outliers in some columns and rows of different sizes.
fn activations(rng: &mut Rng, t: usize, k: usize) -> Tensor {
    let mut x = Tensor::from_slice(&[t, k], &rng.normals(t * k, 1.0));
    for i in 0..t {
        for (j, x) in x.row_mut(i).iter_mut().enumerate() {
            *x *= if j % 37 == 5 { 40.0 } else { 1.0 } * 10.0f32.powi(i as i32 % 5 - 2);
        }
    }
    x
}

/// y = x wᵀ in f64 over dequantised operands, and the same with magnitudes, which bounds rounding errors.
fn reference(x: &Int8Rows, w: &PackedInt) -> Vec<(f64, f64)> {
    let (k, n) = (w.cols(), w.rows());
    let (mut xs, mut ws) = (Tensor::default(), vec![0.0; n * k]);
    x.dequantize(&mut xs);
    w.dequantize_rows(0..n, &mut ws);
    let mut y = Vec::new();
    for t in 0..x.rows() {
        for w in ws.chunks_exact(k) {
            let products = xs.row(t).iter().zip(w).map(|(x, w)| *x as f64 * *w as f64);
            y.push(products.fold((0.0, 0.0), |(s, m), p| (s + p, m + p.abs())));
        }
    }
    y
}

fn check(what: &str, y: &[f32], want: &[(f64, f64)], before: f64) {
    assert_eq!(y.len(), want.len());
    for (i, (y, (sum, magnitude))) in y.iter().zip(want).enumerate() {
        let error = (*y as f64 - before - sum).abs();
        assert!(error <= 1e-6 * (magnitude + before.abs()) + 1e-30, "{what} element {i}: {y}, {sum} + {before}");
    }
}

/// Blocks of `kind` with random codes and sensible scales.
fn random_blocks(rng: &mut Rng, kind: BlockType, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let start = bytes.len();
        bytes.extend((0..kind.block_bytes()).map(|_| rng.below(256) as u8));
        let d = f16::from_f32(rng.normal() * 0.01).to_le_bytes();
        bytes[start..start + 2].copy_from_slice(&d);
        if matches!(kind, BlockType::Q4_1 | BlockType::Q5_1) {
            let m = f16::from_f32(rng.normal() * 0.1).to_le_bytes();
            bytes[start + 2..start + 4].copy_from_slice(&m);
        }
    }
    bytes
}

fn packed(rng: &mut Rng, kind: BlockType, n: usize, k: usize) -> PackedInt {
    let row_blocks = k / GGUF_BLOCK;
    let bytes = random_blocks(rng, kind, n * row_blocks);
    let row_bytes = row_blocks * kind.block_bytes();
    PackedInt::from_gguf(kind, n, k, |i| &bytes[i * row_bytes..(i + 1) * row_bytes])
}

const GGUF: [BlockType; 5] = [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q5_0, BlockType::Q5_1, BlockType::Q8_0];

#[test]
fn repacking_changes_no_value_and_takes_rows_in_any_order() {
    let mut rng = Rng::new(41, 0);
    for kind in GGUF {
        let (n, k) = (37, 96);
        let bytes = random_blocks(&mut rng, kind, n * k / 32);
        let mut want = vec![0.0; n * k];
        dequantize(kind, &bytes, &mut want);
        let row_bytes = kind.bytes_for(k).unwrap();
        let packed = PackedInt::from_gguf(kind, n, k, |i| &bytes[(n - 1 - i) * row_bytes..][..row_bytes]);
        let mut out = vec![f32::NAN; n * k];
        packed.dequantize_rows(0..n, &mut out);
        for (i, row) in out.chunks_exact(k).enumerate() {
            assert_eq!(row, &want[(n - 1 - i) * k..(n - i) * k], "{} row {i}", kind.name());
        }
        let mut part = vec![0.0; 3 * k];
        packed.dequantize_rows(20..23, &mut part);
        assert_eq!(part, out[20 * k..23 * k]);
    }
    // Bytes a weight: 8 or 4 bits and a scale of 16 bits (with a minimum, 32) for each 32.
    for (kind, bytes) in [(BlockType::Q8_0, 34), (BlockType::Q4_0, 18), (BlockType::Q4_1, 20)] {
        assert_eq!(packed(&mut rng, kind, 48, 64).bytes(), 48 * 64 / 32 * bytes);
    }
}

#[test]
fn every_level_quantises_alike_and_within_half_a_step() {
    let mut rng = Rng::new(46, 0);
    for (t, k, block_len) in [(3, 576, 64), (2, 77, 32), (5, 1000, 96), (1, 1, 32)] {
        let x = activations(&mut rng, t, k);
        let (mut first, mut out) = (Int8Rows::default(), Tensor::default());
        first.quantize_at(Level::Portable, x.data(), k, block_len);
        first.dequantize(&mut out);
        for i in 0..t {
            for (x, out) in x.row(i).chunks(block_len).zip(out.row(i).chunks(block_len)) {
                let step = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                x.iter().zip(out).for_each(|(x, o)| assert!((x - o).abs() < 0.501 * step, "{x} {o}"));
            }
        }
        for level in Level::available() {
            let mut rows = Int8Rows::default();
            rows.quantize_at(level, x.data(), k, block_len);
            assert_eq!((&rows.codes, &rows.scales), (&first.codes, &first.scales), "{level:?}");
            assert_eq!((&rows.offsets, &rows.sums), (&first.offsets, &first.sums), "{level:?}");
        }
    }
}

#[test]
fn quantised_weights_are_within_half_a_step() {
    let mut rng = Rng::new(42, 0);
    for (n, k, block_len, size) in [(5, 70, 64, 0.02), (33, 128, 32, 1e-9), (16, 40, 64, 1e12)] {
        let w = Tensor::from_slice(&[n, k], &rng.normals(n * k, size));
        let packed = PackedInt::from_tensor(&w, block_len);
        let mut out = vec![0.0; n * k];
        packed.dequantize_rows(0..n, &mut out);
        for (w, out) in w.data().chunks_exact(k).zip(out.chunks_exact(k)) {
            for (w, out) in w.chunks(block_len).zip(out.chunks(block_len)) {
                let step = w.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                w.iter().zip(out).for_each(|(w, o)| assert!((w - o).abs() < 0.55 * step, "{w} {o}"));
            }
        }
        let mut t = Tensor::zeros(&[k, n]);
        for i in 0..k {
            for j in 0..n {
                t.row_mut(i)[j] = w.row(j)[i];
            }
        }
        let mut again = vec![0.0; n * k];
        PackedInt::from_transposed(&t, block_len).dequantize_rows(0..n, &mut again);
        assert_eq!(again, out);
    }
}

#[test]
fn every_kernel_matches_f64() {
    let mut rng = Rng::new(43, 0);
    let levels = Level::available();
    for (t, n, k) in
        [(1, 64, 32), (1, 200, 1088), (3, 17, 96), (4, 100, 576), (5, 33, 64), (70, 49, 1120), (300, 16, 32)]
    {
        let x = activations(&mut rng, t, k);
        let mut weights: Vec<PackedInt> = GGUF.iter().map(|kind| packed(&mut rng, *kind, n, k)).collect();
        let own = Tensor::from_slice(&[n, k], &rng.normals(n * k, 0.05));
        weights.extend([32, 64, 128, 192].map(|block_len| PackedInt::from_tensor(&own, block_len)));
        for w in &weights {
            let mut rows = Int8Rows::default();
            rows.quantize(&x, w.block_len());
            let want = reference(&rows, w);
            let mut results = Vec::new();
            for level in &levels {
                let what = format!("{level:?} {w:?} of {t} rows");
                let mut y = vec![f32::NAN; t * n];
                multiply_at(*level, &rows, &mut [Product { weights: w, y: &mut y, store: Store::Overwrite }]);
                check(&what, &y, &want, 0.0);
                results.push(y.clone());
                y.fill(0.5);
                multiply_at(*level, &rows, &mut [Product { weights: w, y: &mut y, store: Store::Accumulate }]);
                check(&what, &y, &want, 0.5);
            }
            // Kernels with fused multiply-add agree to the bit.
            for pair in results[1..].windows(2) {
                assert_eq!(pair[0], pair[1], "{w:?}");
            }
        }
    }
}

#[test]
fn lengths_that_fill_no_block() {
    let mut rng = Rng::new(44, 0);
    for (t, n, k) in [(2, 19, 1), (7, 5, 77), (9, 50, 1000)] {
        let x = activations(&mut rng, t, k);
        let own = Tensor::from_slice(&[n, k], &rng.normals(n * k, 0.05));
        let w = PackedInt::from_tensor(&own, 64);
        let (mut rows, mut y) = (Int8Rows::default(), Tensor::default());
        w.forward(&x, &mut rows, &mut y, Store::Overwrite);
        check("y", y.data(), &reference(&rows, &w), 0.0);
        for level in Level::available() {
            multiply_at(level, &rows, &mut [Product { weights: &w, y: y.data_mut(), store: Store::Overwrite }]);
            check("y", y.data(), &reference(&rows, &w), 0.0);
        }
    }
}

#[test]
fn integers_are_exact_at_the_extremes() {
    // Codes of −128 and 127 against ±127: the largest sums a block can have, exact in f32 (scales are 1).
    let k = 64;
    let row = |code: i8| -> Vec<u8> {
        let block: Vec<u8> = f16::ONE.to_le_bytes().into_iter().chain([code as u8; 32]).collect();
        block.repeat(k / 32)
    };
    let rows = [row(-128), row(127), row(0)];
    let w = PackedInt::from_gguf(BlockType::Q8_0, 3, k, |i| &rows[i]);
    let x = Tensor::from_slice(&[2, k], &[vec![127.0; k], vec![-127.0; k]].concat());
    let mut int8 = Int8Rows::default();
    int8.quantize(&x, 32);
    for level in Level::available() {
        let mut y = [f32::NAN; 6];
        multiply_at(level, &int8, &mut [Product { weights: &w, y: &mut y, store: Store::Overwrite }]);
        let unit = (127 * k) as f32;
        assert_eq!(y, [-128.0 * unit, 127.0 * unit, 0.0, 128.0 * unit, -127.0 * unit, 0.0], "{level:?}");
    }
}

#[test]
fn rows_and_outputs_together_or_alone() {
    let mut rng = Rng::new(45, 0);
    let (t, k) = (23, 544);
    let x = activations(&mut rng, t, k);
    let (a, b) = (packed(&mut rng, BlockType::Q4_1, 77, k), packed(&mut rng, BlockType::Q8_0, 300, k));
    let mut rows = Int8Rows::default();
    rows.quantize(&x, 32);
    let (mut y_a, mut y_b) = (Tensor::zeros(&[t, 77]), Tensor::zeros(&[t, 300]));
    multiply(
        &rows,
        &mut [
            Product { weights: &a, y: y_a.data_mut(), store: Store::Overwrite },
            Product { weights: &b, y: y_b.data_mut(), store: Store::Overwrite },
        ],
    );
    let mut one = Int8Rows::default();
    for i in 0..t {
        one.quantize(&Tensor::from_slice(&[1, k], x.row(i)), 32);
        for (w, all) in [(&a, &y_a), (&b, &y_b)] {
            let mut y = vec![f32::NAN; w.rows()];
            multiply(&one, &mut [Product { weights: w, y: &mut y, store: Store::Overwrite }]);
            assert_eq!(y, all.row(i), "row {i}");
        }
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut y = vec![f32::NAN; t * 300];
        pool.install(|| multiply(&rows, &mut [Product { weights: &b, y: &mut y, store: Store::Overwrite }]));
        assert_eq!(y, y_b.data());
    }
}

#[test]
fn what_is_not_finite_reaches_the_product() {
    let w = PackedInt::from_tensor(&Tensor::from_slice(&[2, 64], &[0.5; 128]), 32);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = Tensor::from_slice(&[2, 64], &[1.0; 128]);
        x.row_mut(0)[40] = bad;
        let (mut rows, mut y) = (Int8Rows::default(), Tensor::default());
        w.forward(&x, &mut rows, &mut y, Store::Overwrite);
        assert!(y.row(0).iter().all(|y| !y.is_finite()), "{y:?}");
        assert!(y.row(1).iter().all(|y| (y - 32.0).abs() < 0.1), "{y:?}");
    }
    let (mut rows, mut y) = (Int8Rows::default(), Tensor::default());
    w.forward(&Tensor::from_slice(&[1, 64], &[1e-38; 64]), &mut rows, &mut y, Store::Overwrite);
    assert_eq!(y.data(), [0.0, 0.0]);
}
