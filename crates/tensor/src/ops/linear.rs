//! Linear layer with an optional bias and an optional LoRA pair:
//! y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ (Hu et al., "LoRA", 2021). Weights are stored [out, in], A [r, in], B [out, r].

pub use crate::contract::{Adapter, Store};
pub use crate::cpu::linear::PANEL;
use crate::cpu::matmul::{gemm, matmul_nt};
use crate::cpu::view::View;
use crate::cuda::gemm::Gemm;
use crate::cuda::linear::{self as on_gpu, beta, matrix};
use crate::{cpu, cuda};
use crate::{dtype::Dtype, tensor::Tensor, weight::Weight};

/// `y` [T, out] = or += `alpha` · `x` [T, in] · `w` [out, in]ᵀ. A packed weight is dequantised panel by panel, a strip
/// of output columns each.
pub fn forward(x: &Tensor, w: &Weight, alpha: f32, y: &mut Tensor, store: Store) {
    assert_eq!(w.cols(), x.cols(), "x {:?} against weight {:?}", x.shape(), w.shape());
    prepare(y, x, w.rows(), store);
    if let Some(gpu) = x.gpu() {
        return on_gpu::forward(gpu, matrix(x), x.rows(), w, alpha, None, matrix(y), store);
    }
    cpu::linear::forward(x.data(), w, alpha, None, y.data_mut(), store);
}

/// Logits: `y` [T, V] in f32 = `x` [T, d] · `w` [V, d]ᵀ, whatever the type of the activations.
pub fn logits(x: &Tensor, w: &Weight, y: &mut Tensor) {
    let Some(gpu) = x.gpu() else { return forward(x, w, 1.0, y, Store::Overwrite) };
    assert_eq!(w.cols(), x.cols(), "x {:?} against weight {:?}", x.shape(), w.shape());
    y.resize_on(&x.device(), Dtype::F32, &[x.rows(), w.rows()]);
    on_gpu::forward(gpu, matrix(x), x.rows(), w, 1.0, None, matrix(y), Store::Overwrite);
}

/// As [`forward`] with `alpha` 1, plus `scale` · `inner` · `outer`ᵀ of the adapter.
pub fn forward_adapted(x: &Tensor, w: &Weight, adapter: Adapter<'_>, y: &mut Tensor, store: Store) {
    assert_eq!(w.cols(), x.cols(), "x {:?} against weight {:?}", x.shape(), w.shape());
    let Adapter { inner, outer, .. } = adapter;
    assert!(inner.rows() == x.rows() && outer.shape() == [w.rows(), inner.cols()], "{inner:?} against {outer:?}");
    prepare(y, x, w.rows(), store);
    if let Some(gpu) = x.gpu() {
        return on_gpu::forward(gpu, matrix(x), x.rows(), w, 1.0, Some(adapter), matrix(y), store);
    }
    cpu::linear::forward(x.data(), w, 1.0, Some(adapter), y.data_mut(), store);
}

/// Gradient of the input: `d_x` [T, in] = or += `alpha` · `d_y` [T, out] · `w` [out, in]; a packed weight as in
/// [`forward`].
pub fn input_gradient(d_y: &Tensor, w: &Weight, alpha: f32, d_x: &mut Tensor, store: Store) {
    assert_eq!(w.rows(), d_y.cols(), "d_y {:?} against weight {:?}", d_y.shape(), w.shape());
    prepare(d_x, d_y, w.cols(), store);
    if let Some(gpu) = d_y.gpu() {
        return on_gpu::input_gradient(gpu, matrix(d_y), d_y.rows(), w, alpha, None, matrix(d_x), store);
    }
    cpu::linear::input_gradient(d_y.data(), w, alpha, None, d_x.data_mut(), store);
}

/// As [`input_gradient`] with `alpha` 1, plus `scale` · `inner` · `outer` of the adapter.
pub fn input_gradient_adapted(d_y: &Tensor, w: &Weight, adapter: Adapter<'_>, d_x: &mut Tensor, store: Store) {
    assert_eq!(w.rows(), d_y.cols(), "d_y {:?} against weight {:?}", d_y.shape(), w.shape());
    let Adapter { inner, outer, .. } = adapter;
    assert!(inner.rows() == d_y.rows() && outer.shape() == [inner.cols(), w.cols()], "{inner:?} against {outer:?}");
    prepare(d_x, d_y, w.cols(), store);
    if let Some(gpu) = d_y.gpu() {
        return on_gpu::input_gradient(gpu, matrix(d_y), d_y.rows(), w, 1.0, Some(adapter), matrix(d_x), store);
    }
    cpu::linear::input_gradient(d_y.data(), w, 1.0, Some(adapter), d_x.data_mut(), store);
}

/// Bytes that each thread keeps for products.
pub const THREAD_BYTES: usize = crate::cpu::matmul::THREAD_BYTES;

/// `y` [T, out] = or += `alpha` · `x` [T, in] · `w` [out, in]ᵀ.
pub fn matmul(x: &Tensor, w: &Tensor, alpha: f32, y: &mut Tensor, store: Store) {
    let (m, n, k) = (x.rows(), w.rows(), x.cols());
    assert_eq!(k, w.cols(), "x {:?} against weight {:?}", x.shape(), w.shape());
    prepare(y, x, n, store);
    if let Some(gpu) = x.gpu() {
        let (a, b, beta) = (matrix(x), matrix(w).t(), beta(store));
        return gpu.gemm(&Gemm { m, n, k, alpha, a, b, beta, c: matrix(y) });
    }
    matmul_nt((m, n, k), y.data_mut(), store == Store::Accumulate, alpha, x.data(), w.data());
}

/// Gradient of the input: `d_x` [T, in] = or += `alpha` · `d_y` [T, out] · `w` [out, in].
pub fn matmul_input_gradient(d_y: &Tensor, w: &Tensor, alpha: f32, d_x: &mut Tensor, store: Store) {
    let (m, n, k) = (d_y.rows(), w.cols(), w.rows());
    assert_eq!(k, d_y.cols(), "d_y {:?} against weight {:?}", d_y.shape(), w.shape());
    prepare(d_x, d_y, n, store);
    if let Some(gpu) = d_y.gpu() {
        let (a, b, beta) = (matrix(d_y), matrix(w), beta(store));
        return gpu.gemm(&Gemm { m, n, k, alpha, a, b, beta, c: matrix(d_x) });
    }
    let (a, b) = (View::rows(d_y.data(), k), View::rows(w.data(), n));
    gemm((m, n, k), d_x.data_mut(), n, store == Store::Accumulate, alpha, a, b);
}

/// Gradient of the weight: `d_w` [out, in] **+=** `alpha` · `d_y` [T, out]ᵀ · `x` [T, in].
pub fn matmul_weight_gradient(d_y: &Tensor, x: &Tensor, alpha: f32, d_w: &mut Tensor) {
    assert!(d_y.rows() == x.rows() && d_w.shape() == [d_y.cols(), x.cols()], "d_w {:?}", d_w.shape());
    if let Some(gpu) = x.gpu() {
        return on_gpu::weight_gradient(gpu, matrix(d_y), matrix(x), x.rows(), alpha, d_w);
    }
    cpu::linear::weight_gradient(d_y.data(), x.data(), alpha, d_w);
}

/// Adds `bias` [out] to each row of `y` [T, out].
pub fn add_bias(bias: &Tensor, y: &mut Tensor) {
    let n = bias.len();
    assert_eq!(n, y.cols());
    if let Some(gpu) = y.gpu().cloned() {
        return cuda::linear::add_bias(&gpu, bias, y);
    }
    cpu::linear::add_bias(bias.data(), y.data_mut());
}

/// `d_bias` [out] += the column sums of `d_y` [T, out].
pub fn bias_gradient(d_y: &Tensor, d_bias: &mut Tensor) {
    assert_eq!(d_y.cols(), d_bias.len());
    if let Some(gpu) = d_y.gpu() {
        return cuda::linear::column_sums(gpu, d_y, d_bias);
    }
    cpu::linear::column_sums(d_y.data(), d_bias.data_mut());
}

/// Gives the product of `x` [m, ..] its shape [m, n], where `x` is, or checks it.
pub(crate) fn prepare(y: &mut Tensor, x: &Tensor, n: usize, store: Store) {
    let m = x.rows();
    match store {
        Store::Overwrite => y.resize_like(x, &[m, n]),
        Store::Accumulate => assert!(y.rows() == m && y.cols() == n, "cannot add [{m}, {n}] to {:?}", y.shape()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, to_f64, weighted};
    use crate::quant::BlockType;
    use crate::rng::Rng;
    use crate::{Bytes, Packed};

    /// y[m, n] = x[m, k] w[n, k]ᵀ + bias[n]
    fn naive(x: &[f64], w: &[f64], bias: &[f64], k: usize) -> Vec<f64> {
        x.chunks(k)
            .flat_map(|x| {
                w.chunks(k)
                    .zip(bias)
                    .map(|(w, b)| b + x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>())
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(3, 0);
        for (t, n, k) in [(1, 70, 9), (6, 7, 5), (9, 33, 20)] {
            let x = Tensor::from_slice(&[t, k], &rng.normals(t * k, 1.0));
            let w = Tensor::from_slice(&[n, k], &rng.normals(n * k, 1.0));
            let b = Tensor::from_slice(&[n], &rng.normals(n, 1.0));
            let d_y = Tensor::from_slice(&[t, n], &rng.normals(t * n, 1.0));
            let (xs, ws, bs) = (to_f64(x.data()), to_f64(w.data()), to_f64(b.data()));
            let mut y = Tensor::default();
            matmul(&x, &w, 1.0, &mut y, Store::Overwrite);
            add_bias(&b, &mut y);
            check_close("y", y.data(), &naive(&xs, &ws, &bs, k), 1e-5);
            let (mut d_x, mut d_w, mut d_b) = (Tensor::default(), Tensor::zeros(&[n, k]), Tensor::zeros(&[n]));
            matmul_input_gradient(&d_y, &w, 1.0, &mut d_x, Store::Overwrite);
            matmul_weight_gradient(&d_y, &x, 1.0, &mut d_w);
            bias_gradient(&d_y, &mut d_b);
            check("d_x", x.data(), d_x.data(), 1e-5, |x| weighted(&naive(x, &ws, &bs, k), d_y.data()));
            check("d_w", w.data(), d_w.data(), 1e-5, |w| weighted(&naive(&xs, w, &bs, k), d_y.data()));
            check("d_b", b.data(), d_b.data(), 1e-5, |b| weighted(&naive(&xs, &ws, b, k), d_y.data()));
            let once = d_x.data().to_vec();
            matmul_input_gradient(&d_y, &w, 2.0, &mut d_x, Store::Accumulate);
            check_close("3 d_x", d_x.data(), &once.iter().map(|x| 3.0 * *x as f64).collect::<Vec<_>>(), 1e-5);
        }
    }

    #[test]
    fn lora_pair_matches_differences() {
        // y = s (x Aᵀ) Bᵀ, the way the model composes it of three products each way.
        let (t, k, r, n, s) = (5, 6, 2, 7, 1.5f32);
        let mut rng = Rng::new(4, 0);
        let x = Tensor::from_slice(&[t, k], &rng.normals(t * k, 1.0));
        let a = Tensor::from_slice(&[r, k], &rng.normals(r * k, 1.0));
        let b = Tensor::from_slice(&[n, r], &rng.normals(n * r, 1.0));
        let d_y = Tensor::from_slice(&[t, n], &rng.normals(t * n, 1.0));
        let full = |x: &[f64], a: &[f64], b: &[f64]| {
            let xa = naive(x, a, &vec![0.0; r], k);
            naive(&xa, b, &vec![0.0; n], r).iter().map(|y| y * s as f64).collect::<Vec<_>>()
        };
        let (mut xa, mut y) = (Tensor::default(), Tensor::default());
        matmul(&x, &a, 1.0, &mut xa, Store::Overwrite);
        matmul(&xa, &b, s, &mut y, Store::Overwrite);
        let (xs, a64, b64) = (to_f64(x.data()), to_f64(a.data()), to_f64(b.data()));
        check_close("y", y.data(), &full(&xs, &a64, &b64), 1e-5);
        let (mut d_xa, mut d_x) = (Tensor::default(), Tensor::default());
        let (mut d_a, mut d_b) = (Tensor::zeros(&[r, k]), Tensor::zeros(&[n, r]));
        matmul_input_gradient(&d_y, &b, s, &mut d_xa, Store::Overwrite);
        matmul_weight_gradient(&d_y, &xa, s, &mut d_b);
        matmul_weight_gradient(&d_xa, &x, 1.0, &mut d_a);
        matmul_input_gradient(&d_xa, &a, 1.0, &mut d_x, Store::Overwrite);
        check("d_x", x.data(), d_x.data(), 1e-5, |x| weighted(&full(x, &a64, &b64), d_y.data()));
        check("d_a", a.data(), d_a.data(), 1e-5, |a| weighted(&full(&xs, a, &b64), d_y.data()));
        check("d_b", b.data(), d_b.data(), 1e-5, |b| weighted(&full(&xs, &a64, b), d_y.data()));
    }

    #[test]
    fn adapters_join_the_layers_own_product() {
        let mut rng = Rng::new(9, 0);
        let (n, k, r, scale) = (70, 33, 5, 0.5);
        for (t, packed) in [(2, false), (9, false), (2, true), (9, true)] {
            let [w, b] = [k, r].map(|cols| Tensor::from_slice(&[n, cols], &rng.normals(n * cols, 0.3)));
            let a = Tensor::from_slice(&[r, k], &rng.normals(r * k, 0.3));
            let [x, d_y] = [k, n].map(|cols| Tensor::from_slice(&[t, cols], &rng.normals(t * cols, 1.0)));
            let [xa, d_xa] = [(); 2].map(|_| Tensor::from_slice(&[t, r], &rng.normals(t * r, 1.0)));
            let weight = if packed {
                let bytes = w.data().iter().flat_map(|x| x.to_le_bytes()).collect();
                Weight::Packed(Packed::from_blocks([n, k], BlockType::F32, Bytes::Owned(bytes), None))
            } else {
                Weight::Dense(w.clone())
            };
            let (mut y, mut want_y) = (Tensor::default(), Tensor::default());
            forward_adapted(&x, &weight, Adapter { inner: &xa, outer: &b, scale }, &mut y, Store::Overwrite);
            forward(&x, &weight, 1.0, &mut want_y, Store::Overwrite);
            matmul(&xa, &b, scale, &mut want_y, Store::Accumulate);
            check_close("y", y.data(), &to_f64(want_y.data()), 1e-5);
            let (mut d_x, mut want_d_x) = (Tensor::default(), Tensor::default());
            let adapter = Adapter { inner: &d_xa, outer: &a, scale };
            input_gradient_adapted(&d_y, &weight, adapter, &mut d_x, Store::Overwrite);
            input_gradient(&d_y, &weight, 1.0, &mut want_d_x, Store::Overwrite);
            matmul_input_gradient(&d_xa, &a, scale, &mut want_d_x, Store::Accumulate);
            check_close("d_x", d_x.data(), &to_f64(want_d_x.data()), 1e-5);
        }
    }

    /// Products over a packed weight are those over its dequantised form, both ways, for one row and for many, in one
    /// panel and in several.
    #[test]
    fn packed_equals_dequantised() {
        let mut rng = Rng::new(8, 0);
        for (t, n, k) in [(1, 96, 64), (7, 96, 64), (5, PANEL / 512 + 3, 512)] {
            let dense = Tensor::from_slice(&[n, k], &rng.normals(n * k, 0.5));
            let bytes: Vec<u8> = dense.data().iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
            let blocks = Packed::from_blocks([n, k], BlockType::BF16, Bytes::Owned(bytes), None);
            for packed in [blocks, Packed::nf4(&dense, true)] {
                let dequantized = packed.to_tensor();
                let weight = Weight::Packed(packed);
                let x = Tensor::from_slice(&[t, k], &rng.normals(t * k, 1.0));
                let d_y = Tensor::from_slice(&[t, n], &rng.normals(t * n, 1.0));
                let (mut y, mut d_x) = (Tensor::default(), Tensor::default());
                let (mut want_y, mut want_d_x) = (Tensor::default(), Tensor::default());
                forward(&x, &weight, 1.0, &mut y, Store::Overwrite);
                forward(&x, &weight, 0.5, &mut y, Store::Accumulate);
                matmul(&x, &dequantized, 1.5, &mut want_y, Store::Overwrite);
                check_close("y", y.data(), &to_f64(want_y.data()), 1e-5);
                input_gradient(&d_y, &weight, 1.0, &mut d_x, Store::Overwrite);
                input_gradient(&d_y, &weight, 0.5, &mut d_x, Store::Accumulate);
                matmul_input_gradient(&d_y, &dequantized, 1.5, &mut want_d_x, Store::Overwrite);
                check_close("d_x", d_x.data(), &to_f64(want_d_x.data()), 1e-5);
            }
        }
    }
}
