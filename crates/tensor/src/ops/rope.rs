//! Rotary position embedding in the half-split form of Hugging Face (Su et al., "RoFormer", 2021): within a head of
//! size D, (x[i], x[i + D/2]) rotates by the angle position · frequency[i].

use crate::{cpu, cuda};
use crate::{device::Device, dtype::Dtype, tensor::Tensor};

/// Cosines and sines of the angles of each token: `cos` and `sin` are [T, D/2].
#[derive(Clone, Debug, Default)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// Bytes of memory held.
    pub fn num_bytes(&self) -> usize {
        self.cos.capacity_bytes() + self.sin.capacity_bytes()
    }

    /// Where cosines and sines are on a GPU.
    pub fn addresses(&self) -> [u64; 2] {
        [self.cos.address(), self.sin.address()]
    }

    /// Fills the table for `positions` [T] and inverse `frequencies` [D/2] (radians per position). The angle is rounded
    /// to f32 before its sine is taken, as the reference implementation does.
    pub fn fill(&mut self, positions: &[u32], frequencies: &[f32]) {
        self.fill_on(&Device::Cpu, positions, frequencies);
    }

    /// As [`Angles::fill`], where the tensors are that will be rotated.
    pub fn fill_on(&mut self, device: &Device, positions: &[u32], frequencies: &[f32]) {
        let shape = [positions.len(), frequencies.len()];
        self.cos.resize_on(device, Dtype::F32, &shape);
        self.sin.resize_on(device, Dtype::F32, &shape);
        if let Some(gpu) = device.gpu() {
            return cuda::rope::angles(gpu, positions, frequencies, &mut self.cos, &mut self.sin);
        }
        for (t, position) in positions.iter().enumerate() {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (*position as f32 * frequency).sin_cos();
                self.cos.row_mut(t)[i] = cos;
                self.sin.row_mut(t)[i] = sin;
            }
        }
    }
}

/// Rotates each head of `x` [T, heads · D] in place.
pub fn forward(x: &mut Tensor, angles: &Angles) {
    rotate(x, angles, 1.0);
}

/// The transpose of a rotation is the rotation back: rotates `d_x` [T, heads · D] in place.
pub fn backward(d_x: &mut Tensor, angles: &Angles) {
    rotate(d_x, angles, -1.0);
}

fn rotate(x: &mut Tensor, angles: &Angles, direction: f32) {
    let (cols, head_dim) = (x.cols(), 2 * angles.cos.cols());
    assert!(x.rows() == angles.cos.rows() && cols.is_multiple_of(head_dim), "x {:?}", x.shape());
    if let Some(gpu) = angles.cos.gpu() {
        return cuda::rope::rotate(gpu, x, &angles.cos, &angles.sin, direction);
    }
    cpu::rope::rotate(x.data_mut(), cols, head_dim, angles.cos.data(), angles.sin.data(), direction);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, check_close, to_f64, weighted};
    use crate::rng::Rng;

    const FREQUENCIES: [f32; 3] = [1.0, 0.1, 0.01];
    const POSITIONS: [u32; 4] = [0, 5, 2, 900];

    fn naive(x: &[f64]) -> Vec<f64> {
        let mut y = x.to_vec();
        for t in 0..4 {
            for head in 0..2 {
                for i in 0..3 {
                    let (a, b) = (t * 12 + head * 6 + i, t * 12 + head * 6 + i + 3);
                    let angle = (POSITIONS[t] as f32 * FREQUENCIES[i]) as f64;
                    y[a] = x[a] * angle.cos() - x[b] * angle.sin();
                    y[b] = x[b] * angle.cos() + x[a] * angle.sin();
                }
            }
        }
        y
    }

    #[test]
    fn matches_naive_and_differences() {
        let mut rng = Rng::new(5, 0);
        let mut angles = Angles::default();
        angles.fill(&POSITIONS, &FREQUENCIES);
        let x = rng.normals(48, 1.0);
        let mut y = Tensor::from_slice(&[4, 12], &x);
        forward(&mut y, &angles);
        check_close("y", y.data(), &naive(&to_f64(&x)), 1e-6);
        let d_y = rng.normals(48, 1.0);
        let mut d_x = Tensor::from_slice(&[4, 12], &d_y);
        backward(&mut d_x, &angles);
        check("d_x", &x, d_x.data(), 1e-5, |x| weighted(&naive(x), &d_y));
    }
}
