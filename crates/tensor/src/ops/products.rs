//! Linear layers that go together in generation: y = or += α · x Wᵀ for several (x, W, y) at once.
//!
//! With few rows, reading the weights is what a product costs: each weight is read once for all rows, and all products
//! of a call are one parallel loop, so that those that do not depend on each other (q, k and v; gate and up) cost one
//! hand-over to other threads.
//!
//! Weights that are kept as integers ([`Weight::to_integers`]) multiply x rounded to 8 bits, in blocks with a scale of
//! their own; x is rounded once for all products that read it.

use crate::cpu::matmul::FEW_ROWS;
use crate::cpu::view::Shared;
use crate::ops::linear;
use crate::packed_int::{self, GGUF_BLOCK, Int8Rows};
use crate::{contract::Store, tensor::Tensor, weight::Weight};
use crate::{cpu, team};

/// One of the products of a call.
#[derive(Debug)]
pub struct Product<'a> {
    /// x [T, in].
    pub x: &'a Tensor,
    /// W [out, in].
    pub weight: &'a Weight,
    /// α.
    pub alpha: f32,
    /// y [T, out].
    pub y: &'a mut Tensor,
    /// What happens to what is in y.
    pub store: Store,
}

/// True when `rows` rows are few: products then read weights row by row, as one loop.
pub fn are_few(rows: usize) -> bool {
    rows <= FEW_ROWS
}

/// Computes all products; each element by one thread in a fixed order. `rounded` is a buffer.
///
/// # Panics
/// When shapes do not fit, or α is not 1 for a weight of integers.
pub fn forward(products: &mut [Product<'_>], rounded: &mut Int8Rows) {
    // On a GPU each product is a launch of its own.
    let few = products.iter().all(|p| are_few(p.x.rows()) && p.x.gpu().is_none());
    let (mut inputs, mut integers, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for Product { x, weight, alpha, y, store } in products {
        if let Some(weights) = weight.integers() {
            assert_eq!(*alpha, 1.0, "a factor on a product with integers");
            linear::prepare(y, x, weights.rows(), *store);
            inputs.push(*x);
            integers.push(packed_int::Product { weights, y: y.data_mut(), store: *store });
        } else if few && !matches!(weight, Weight::Int8(_)) {
            others.push(Product { x, weight, alpha: *alpha, y, store: *store });
        } else {
            linear::forward(x, weight, *alpha, y, *store);
        }
    }
    let mut rest = &mut integers[..];
    for together in inputs.chunk_by(|a, b| std::ptr::eq(*a, *b)) {
        let (outputs, after) = rest.split_at_mut(together.len());
        rounded.quantize(together[0], GGUF_BLOCK);
        packed_int::multiply(rounded, outputs);
        rest = after;
    }
    if !others.is_empty() {
        few_rows(&mut others);
    }
}

/// Elements of a weight that one task reads: long enough to make its hand-over cheap, short enough to share the work.
const TASK: usize = 16 * 1024;

/// Weight rows that one task takes.
fn strip(cols: usize) -> usize {
    (TASK / cols.max(1)).max(1)
}

#[allow(unsafe_code)]
fn few_rows(products: &mut [Product<'_>]) {
    let mut num_tasks = 0;
    let mut plans = Vec::with_capacity(products.len());
    for p in products {
        let (n, k) = (p.weight.rows(), p.x.cols());
        assert_eq!(k, p.weight.cols(), "x {:?} against weight {:?}", p.x.shape(), p.weight.shape());
        linear::prepare(p.y, p.x, n, p.store);
        let first = num_tasks;
        num_tasks += n.div_ceil(strip(k));
        plans.push((first, p.x, p.weight, p.alpha, p.store == Store::Accumulate, Shared::new(p.y.data_mut())));
    }
    team::for_each(num_tasks, |task| {
        let Some((first, x, weight, alpha, accumulate, y)) = plans.iter().rfind(|plan| plan.0 <= task) else { return };
        let (n, k) = (weight.rows(), weight.cols());
        let start = (task - first) * strip(k);
        let rows = start..(start + strip(k)).min(n);
        let multiply = |w: &[f32]| {
            for i in 0..x.rows() {
                // SAFETY: the task's columns of row i: tasks of one product have different columns, products different
                // y.
                let y = unsafe { y.slice(i * n + rows.start, rows.len()) };
                cpu::products::rows(x.row(i), w, *alpha, *accumulate, y);
            }
        };
        match weight {
            Weight::Dense(w) => multiply(&w.data()[rows.start * k..rows.end * k]),
            Weight::Int8(_) | Weight::Device(_) => unreachable!("`forward` keeps these for `linear::forward`"),
            Weight::Packed(w) => {
                let mut dequantized = vec![0.0; rows.len() * k];
                w.dequantize_rows(rows.clone(), &mut dequantized);
                multiply(&dequantized);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Packed;
    use crate::rng::Rng;

    #[test]
    fn several_products_match_single_ones() {
        let mut rng = Rng::new(41, 0);
        for (m, k) in [(1, 576), (3, 70), (4, 2), (2, 20_000), (9, 64)] {
            let mut random =
                |rows: usize, cols: usize| Tensor::from_slice(&[rows, cols], &rng.normals(rows * cols, 1.0));
            let (x, z, before) = (random(m, k), random(m, 64), random(m, 7));
            let a = Weight::from(random(300, k));
            let b = Weight::Packed(Packed::nf4(&random(7, 64), false));
            let (mut y, mut sum) = (Tensor::default(), before.clone());
            forward(
                &mut [
                    Product { x: &x, weight: &a, alpha: 1.0, y: &mut y, store: Store::Overwrite },
                    Product { x: &z, weight: &b, alpha: -2.0, y: &mut sum, store: Store::Accumulate },
                ],
                &mut Int8Rows::default(),
            );
            let (mut want, mut want_sum) = (Tensor::default(), before);
            linear::forward(&x, &a, 1.0, &mut want, Store::Overwrite);
            linear::forward(&z, &b, -2.0, &mut want_sum, Store::Accumulate);
            let close = |got: &Tensor, want: &Tensor| {
                got.shape() == want.shape()
                    && got.data().iter().zip(want.data()).all(|(a, b)| (a - b).abs() < 4e-5 * (k as f32).sqrt())
            };
            assert!(close(&y, &want) && close(&sum, &want_sum), "{m} {k}");
        }
    }

    #[test]
    fn integers_multiply_rounded_rows() {
        let mut rng = Rng::new(42, 0);
        for m in [1, 2, 7] {
            let mut random =
                |rows: usize, cols: usize| Tensor::from_slice(&[rows, cols], &rng.normals(rows * cols, 1.0));
            let (x, z, before) = (random(m, 96), random(m, 64), random(m, 40));
            let weights = [random(40, 96), random(33, 96), random(40, 64)].map(|w| Weight::from(w).to_integers());
            let (mut a, mut b, mut sum) = (Tensor::default(), Tensor::default(), before.clone());
            let mut rounded = Int8Rows::default();
            forward(
                &mut [
                    Product { x: &x, weight: &weights[0], alpha: 1.0, y: &mut a, store: Store::Overwrite },
                    Product { x: &x, weight: &weights[1], alpha: 1.0, y: &mut b, store: Store::Overwrite },
                    Product { x: &z, weight: &weights[2], alpha: 1.0, y: &mut sum, store: Store::Accumulate },
                ],
                &mut rounded,
            );
            for (x, weight, y, start) in
                [(&x, &weights[0], &a, None), (&x, &weights[1], &b, None), (&z, &weights[2], &sum, Some(&before))]
            {
                let mut x_rounded = Tensor::default();
                rounded.quantize(x, GGUF_BLOCK);
                rounded.dequantize(&mut x_rounded);
                let mut want = start.cloned().unwrap_or_default();
                let store = if start.is_some() { Store::Accumulate } else { Store::Overwrite };
                linear::forward(&x_rounded, weight, 1.0, &mut want, store);
                for (a, b) in y.data().iter().zip(want.data()) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
                assert_eq!(y.shape(), want.shape());
            }
        }
    }
}
