//! A frozen matrix rounded to 8 bits, for products with quantised activations and gradients.

use crate::packed_int::{Int8Rows, PackedInt, Product, multiply};
use crate::{contract::Store, tensor::Tensor};
use std::cell::Cell;

thread_local! {
    /// The quantised operand, kept between products.
    static ROWS: Cell<Int8Rows> = Cell::default();
}

/// A weight matrix [out, in] as 8-bit integers; see [`PackedInt`]. Its exact values are gone: whoever needs them reads
/// the model again.
#[derive(Clone, Debug)]
pub struct Int8Weight {
    shape: [usize; 2],
    forward: PackedInt,
    /// The transpose, with blocks along `out`: the gradient of the input sums over that.
    backward: Option<PackedInt>,
}

impl Int8Weight {
    /// Rounds `w` [out, in]; with `backward` also its transpose, which [`Int8Weight::input_gradient`] needs.
    pub fn new(w: &Tensor, backward: bool) -> Self {
        Self {
            shape: [w.rows(), w.cols()],
            forward: PackedInt::from_tensor(w, BLOCK),
            backward: backward.then(|| PackedInt::from_transposed(w, BLOCK)),
        }
    }

    /// Rows (out) and columns (in).
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of memory held.
    pub fn num_bytes(&self) -> usize {
        self.forward.bytes() + self.backward.as_ref().map_or(0, PackedInt::bytes)
    }

    /// `y` [T, out] = or += `x` [T, in] · selfᵀ, over rows that lie one after the other.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], store: Store) {
        product(&self.forward, x, y, store);
    }

    /// `d_x` [T, in] = or += `d_y` [T, out] · self.
    ///
    /// # Panics
    /// When the weight was made without its backward half.
    pub(crate) fn input_gradient(&self, d_y: &[f32], d_x: &mut [f32], store: Store) {
        let Some(backward) = &self.backward else { panic!("int8 weight {:?} has no backward half", self.shape) };
        product(backward, d_y, d_x, store);
    }
}

fn product(weights: &PackedInt, x: &[f32], y: &mut [f32], store: Store) {
    // Taken, not borrowed: while this thread waits for the others it may be given another product.
    let mut rows = ROWS.take();
    rows.quantize_rows(x, weights.cols(), weights.block_len());
    multiply(&rows, &mut [Product { weights, y, store }]);
    ROWS.set(rows);
}

/// Elements that share a scale. Longer blocks cost less (96 instead of 32: up to a quarter of a product) but let an
/// outlier spoil more of its neighbours, and with 96 the loss of a trained model was visibly higher.
const BLOCK: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Σ a · b / sqrt(Σ a² Σ b²)
    fn cosine(a: &[f32], b: &[f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    }

    #[test]
    fn products_both_ways_are_close_to_f32() {
        let mut rng = Rng::new(61, 0);
        let mut slices = |t: usize, n: usize, k: usize| {
            let w = Tensor::from_slice(&[n, k], &rng.normals(n * k, 0.05));
            (
                w,
                Tensor::from_slice(&[t, k], &rng.normals(t * k, 1.0)),
                Tensor::from_slice(&[t, n], &rng.normals(t * n, 1e-6)),
            )
        };
        for (t, n, k) in [(7, 192, 576), (2, 70, 50), (40, 130, 256)] {
            let (w, x, d_y) = slices(t, n, k);
            let int8 = Int8Weight::new(&w, true);
            let (mut y, mut d_x) = (vec![f32::NAN; t * n], vec![f32::NAN; t * k]);
            int8.forward(x.data(), &mut y, Store::Overwrite);
            int8.input_gradient(d_y.data(), &mut d_x, Store::Overwrite);
            let (mut want_y, mut want_d_x) = (Tensor::default(), Tensor::default());
            crate::ops::linear::matmul(&x, &w, 1.0, &mut want_y, Store::Overwrite);
            crate::ops::linear::matmul_input_gradient(&d_y, &w, 1.0, &mut want_d_x, Store::Overwrite);
            let cosines = [cosine(&y, want_y.data()), cosine(&d_x, want_d_x.data())];
            assert!(cosines.iter().all(|c| *c > 0.9998 && *c < 1.0), "{t} {n} {k}: {cosines:?}");
            let once = y.clone();
            int8.forward(x.data(), &mut y, Store::Accumulate);
            assert!(y.iter().zip(&once).all(|(y, once)| (y - 2.0 * once).abs() < 1e-4));
        }
    }

    #[test]
    fn takes_little_more_than_a_byte_a_weight_each_way() {
        let w = Tensor::zeros(&[192, 576]);
        let bytes = |backward| Int8Weight::new(&w, backward).num_bytes() as f64 / w.len() as f64;
        assert!(bytes(false) < 1.07 && bytes(true) < 2.14, "{} {}", bytes(false), bytes(true));
    }
}
