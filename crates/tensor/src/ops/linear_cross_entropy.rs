//! Output head and cross-entropy in one op, chunk by chunk, so that the logits [N, V] never exist as a whole:
//! loss_n = (1 − ε) · (logsumexp(z_n) − z_n[target]) + ε · (logsumexp(z_n) − mean(z_n)) with z = h Wᵀ and label
//! smoothing ε. The gradients are those of scale · Σ w_n · loss_n, with a weight w_n for each row.

pub use crate::contract::{Gradients, HeadRows};
use crate::cpu::linear;
use crate::{contract::Store, tensor::Tensor, weight::Weight};
use crate::{cpu, cuda};

/// Numbers of a chunk of logits, at most: 128 MB.
const CHUNK: usize = 1 << 25;

/// Rows of logits that exist at a time, for a vocabulary of `vocab`: the more of them, the fewer times the head is read
/// and packed and its gradient is added to (512 instead of 256 made a step's head 1.08 times as fast at 49,152
/// entries), and the larger the buffer (rows x V x 4 bytes).
pub fn chunk_rows(vocab: usize) -> usize {
    let fitting = CHUNK / vocab.max(1);
    [512, 256, 128].into_iter().find(|rows| *rows <= fitting).unwrap_or(64)
}

/// Buffers of this op, reused from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Tensor,
    columns: Tensor,
    device: cuda::linear_cross_entropy::Scratch,
}

impl Scratch {
    /// Bytes of memory held.
    pub fn num_bytes(&self) -> usize {
        self.logits.capacity_bytes() + self.columns.capacity_bytes() + self.device.num_bytes()
    }
}

/// `loss` [N] = loss (nats) of each row of `h` [N, d] under head `w` [V, d] and `targets` [N], nothing else kept.
pub fn forward(h: &Tensor, w: &Weight, targets: &[u32], smoothing: f32, scratch: &mut Scratch, loss: &mut Vec<f32>) {
    run(h, w, targets, smoothing, scratch, loss, None);
}

/// As [`forward`], and the gradients of `scale` · Σ weight · loss in the same pass over the chunks. `loss` itself stays
/// unweighted.
pub fn forward_backward(
    h: &Tensor,
    w: &Weight,
    targets: &[u32],
    smoothing: f32,
    scratch: &mut Scratch,
    loss: &mut Vec<f32>,
    gradients: Gradients<'_>,
) {
    run(h, w, targets, smoothing, scratch, loss, Some(gradients));
}

fn run(
    h: &Tensor,
    w: &Weight,
    targets: &[u32],
    smoothing: f32,
    scratch: &mut Scratch,
    loss: &mut Vec<f32>,
    mut gradients: Option<Gradients<'_>>,
) {
    let (n, d, vocab) = (targets.len(), h.cols(), w.rows());
    assert!(h.rows() == n && w.cols() == d, "h {:?}, w {:?}, {n} targets", h.shape(), w.shape());
    assert!(targets.iter().all(|t| (*t as usize) < vocab), "a target lies outside the vocabulary of {vocab}");
    let weights = gradients.as_ref().and_then(|g| g.weights);
    assert!(weights.is_none_or(|weights| weights.len() == n), "one weight a row");
    loss.resize(n, 0.0);
    if let Some(gpu) = h.gpu() {
        return cuda::linear_cross_entropy::run(gpu, h, w, targets, smoothing, &mut scratch.device, loss, gradients);
    }
    if let Some(g) = &mut gradients {
        g.d_h.resize_like(h, &[n, d]);
    }
    let chunk = chunk_rows(vocab);
    for start in (0..n).step_by(chunk) {
        let rows = chunk.min(n - start);
        let part = start * d..(start + rows) * d;
        let h = &h.data()[part.clone()];
        scratch.logits.resize(&[rows, vocab]);
        linear::forward(h, w, 1.0, None, scratch.logits.data_mut(), Store::Overwrite);
        let chunk_loss = &mut loss[start..start + rows];
        let targets = &targets[start..start + rows];
        let scale = gradients.as_ref().map(|g| g.scale);
        let weights = weights.map(|weights| &weights[start..start + rows]);
        cpu::linear_cross_entropy::rows(
            scratch.logits.data_mut(),
            vocab,
            targets,
            smoothing,
            scale,
            weights,
            chunk_loss,
        );
        if let Some(g) = &mut gradients {
            let d_h = &mut g.d_h.data_mut()[part];
            linear::input_gradient(scratch.logits.data(), w, 1.0, None, d_h, Store::Overwrite);
            if let Some(d_w) = g.d_w.as_deref_mut() {
                linear::weight_gradient(scratch.logits.data(), h, 1.0, d_w);
            }
            if let Some(HeadRows { ids, d_w }) = &mut g.d_rows {
                // The columns of these rows, as if the head had no others.
                scratch.columns.resize(&[rows, ids.len()]);
                let all = scratch.logits.data().chunks(vocab);
                for (columns, logits) in scratch.columns.data_mut().chunks_mut(ids.len()).zip(all) {
                    columns.iter_mut().zip(*ids).for_each(|(column, id)| *column = logits[*id as usize]);
                }
                linear::weight_gradient(scratch.columns.data(), h, 1.0, d_w);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, to_f64};
    use crate::rng::Rng;

    fn naive(h: &[f64], w: &[f64], targets: &[u32], eps: f64, d: usize) -> Vec<f64> {
        h.chunks(d)
            .zip(targets)
            .map(|(h, t)| {
                let z: Vec<f64> = w.chunks(d).map(|w| h.iter().zip(w).map(|(a, b)| a * b).sum()).collect();
                let largest = z.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
                let lse = z.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() + largest;
                let mean = z.iter().sum::<f64>() / z.len() as f64;
                (1.0 - eps) * (lse - z[*t as usize]) + eps * (lse - mean)
            })
            .collect()
    }

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(15, 0);
        for (n, d, vocab, eps, weighted) in [(3, 5, 11, 0.0f32, false), (4, 3, 70, 0.1, false), (5, 4, 17, 0.1, true)] {
            let weights: Vec<f32> =
                (0..n).map(|row| if weighted { [0.3, 1.0, 0.0, 2.5, 0.7][row] } else { 1.0 }).collect();
            let h = Tensor::from_slice(&[n, d], &rng.normals(n * d, 2.0));
            let w = Weight::Dense(Tensor::from_slice(&[vocab, d], &rng.normals(vocab * d, 1.0)));
            let targets: Vec<u32> = (0..n).map(|_| rng.below(vocab as u32)).collect();
            let (mut scratch, mut loss) = (Scratch::default(), Vec::new());
            let (mut d_h, mut d_w) = (Tensor::default(), Tensor::zeros(&[vocab, d]));
            let weights_given = weighted.then_some(&weights[..]);
            let ids = [1, vocab as u32 - 1];
            let mut d_two = Tensor::zeros(&[2, d]);
            let d_rows = Some(HeadRows { ids: &ids, d_w: &mut d_two });
            let gradients =
                Gradients { scale: 0.25, weights: weights_given, d_h: &mut d_h, d_w: Some(&mut d_w), d_rows };
            forward_backward(&h, &w, &targets, eps, &mut scratch, &mut loss, gradients);
            let (h64, w64) = (to_f64(h.data()), to_f64(w.tensor().data()));
            let total = |h: &[f64], w: &[f64]| {
                let loss = naive(h, w, &targets, eps as f64, d);
                loss.iter().zip(&weights).map(|(loss, weight)| loss * f64::from(*weight)).sum::<f64>() * 0.25
            };
            check_close("loss", &loss, &naive(&h64, &w64, &targets, eps as f64, d), 1e-6);
            check("d_h", h.data(), d_h.data(), 1e-5, |h| total(h, &w64));
            check("d_w", w.tensor().data(), d_w.data(), 1e-5, |w| total(&h64, w));
            for (row, id) in ids.iter().enumerate() {
                check_close("rows", d_two.row(row), &to_f64(d_w.row(*id as usize)), 1e-6);
            }
            let mut only = Vec::new();
            forward(&h, &w, &targets, eps, &mut scratch, &mut only);
            assert_eq!(only, loss);
        }
    }

    #[test]
    fn chunks_join_without_a_seam() {
        let mut rng = Rng::new(16, 0);
        let (n, d, vocab) = (2 * chunk_rows(9) + 13, 4, 9);
        let h = Tensor::from_slice(&[n, d], &rng.normals(n * d, 1.0));
        let w = Weight::Dense(Tensor::from_slice(&[vocab, d], &rng.normals(vocab * d, 1.0)));
        let targets: Vec<u32> = (0..n).map(|_| rng.below(vocab as u32)).collect();
        let (mut scratch, mut loss, mut d_h) = (Scratch::default(), Vec::new(), Tensor::default());
        let gradients = Gradients { scale: 1.0, weights: None, d_h: &mut d_h, d_w: None, d_rows: None };
        forward_backward(&h, &w, &targets, 0.0, &mut scratch, &mut loss, gradients);
        check_close("loss", &loss, &naive(&to_f64(h.data()), &to_f64(w.tensor().data()), &targets, 0.0, d), 1e-6);
        assert_eq!(d_h.shape(), [n, d]);
        let last = d_h.row(n - 1).to_vec();
        let h_last = Tensor::from_slice(&[1, d], h.row(n - 1));
        let mut d_last = Tensor::default();
        let gradients = Gradients { scale: 1.0, weights: None, d_h: &mut d_last, d_w: None, d_rows: None };
        forward_backward(&h_last, &w, &targets[n - 1..], 0.0, &mut scratch, &mut loss, gradients);
        check_close("last row", &last, &to_f64(d_last.data()), 1e-5);
    }
}
