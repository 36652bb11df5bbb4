//! Every launcher on the emulated device against the operation on the processor, and the emulator itself.

use super::lab::{Lab, labs};
use crate::ops::{rmsnorm, rope, swiglu};
use crate::{Dtype, Tensor};

#[test]
fn rmsnorm_and_its_gradients() {
    for mut lab in labs(1) {
        for (rows, d) in [(1, 8), (5, 64), (3, 264), (2, 4112)] {
            let [x, d_y, before] = [2.0, 1.0, 1.0].map(|std| lab.random(&[rows, d], std));
            let (weight, d_weight) = (lab.random(&[d], 1.0), lab.random(&[d], 1.0));
            let (mut y, mut rstd, mut again) = (Tensor::default(), Tensor::default(), Tensor::default());
            rmsnorm::forward(&x, &weight, 1e-5, &mut y, &mut rstd);
            let (mut d_x, mut d_w) = (before.clone(), d_weight.clone());
            rmsnorm::backward(&x, &weight, &rstd, &d_y, &mut d_x, Some(&mut d_w));

            let [gx, gw, gd_y, mut gd_x] = [&x, &weight, &d_y, &before].map(|t| lab.up(t));
            let (mut gy, mut gr, mut gd_w) = (Tensor::default(), Tensor::default(), lab.up_f32(&d_weight));
            rmsnorm::forward(&gx, &gw, 1e-5, &mut gy, &mut gr);
            rmsnorm::apply(&gx, &gw, &gr, &mut again);
            rmsnorm::backward(&gx, &gw, &gr, &gd_y, &mut gd_x, Some(&mut gd_w));
            lab.close("y", &gy, &y, 1e-6);
            lab.close("y again", &again, &y, 1e-6);
            lab.close("rstd", &gr, &rstd, 1e-6);
            lab.close("d_x", &gd_x, &d_x, 1e-6);
            lab.close("d_w", &gd_w, &d_w, 1e-5);
            rmsnorm::backward(&gx, &gw, &gr, &gd_y, &mut gd_x, None);
            assert_eq!(again.to_host().data(), gy.to_host().data(), "to the bit");
        }
    }
}

#[test]
fn swiglu_and_its_gradients() {
    for mut lab in labs(2) {
        for shape in [[1, 1], [3, 37], [16, 64], [5, 4096]] {
            let [gate, up, d_y] = [3.0, 1.0, 1.0].map(|std| lab.random(&shape, std));
            let (mut y, mut d_gate, mut d_up) = (Tensor::default(), gate.clone(), up.clone());
            swiglu::forward(&gate, &up, &mut y);
            swiglu::backward(&mut d_gate, &mut d_up, &d_y);
            let [mut gd_gate, mut gd_up, d] = [&gate, &up, &d_y].map(|t| lab.up(t));
            let mut gy = Tensor::default();
            swiglu::forward(&gd_gate, &gd_up, &mut gy);
            swiglu::backward(&mut gd_gate, &mut gd_up, &d);
            lab.close("y", &gy, &y, 1e-6);
            lab.close("d_gate", &gd_gate, &d_gate, 1e-6);
            lab.close("d_up", &gd_up, &d_up, 1e-6);
        }
        let extreme = Tensor::from_slice(&[1, 4], &[-1e4, -90.0, 90.0, 1e4]);
        let (mut d_gate, one) = (lab.up(&extreme), lab.up(&Tensor::from_slice(&[1, 4], &[1.0; 4])));
        let (mut y, mut d_up) = (Tensor::default(), one.clone());
        swiglu::forward(&d_gate, &one, &mut y);
        swiglu::backward(&mut d_gate, &mut d_up, &one);
        for t in [y, d_gate, d_up] {
            assert!(t.to_host().data().iter().all(|x| x.is_finite()), "{:?}", t.to_host());
        }
    }
}

#[test]
fn rotation_there_and_back() {
    for mut lab in labs(3) {
        for (tokens, heads, head_dim) in [(4, 2, 16), (7, 3, 64), (5, 5, 12)] {
            let positions: Vec<u32> = (0..tokens as u32).map(|t| t * 131 % 977).collect();
            let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.7f32.powi(i)).collect();
            let mut angles = rope::Angles::default();
            angles.fill(&positions, &frequencies);
            let x = lab.random(&[tokens, heads * head_dim as usize], 1.0);
            let mut y = x.clone();
            rope::forward(&mut y, &angles);
            let mut device_angles = rope::Angles::default();
            device_angles.fill_on(&lab.device, &positions, &frequencies);
            let mut gy = lab.up(&x);
            rope::forward(&mut gy, &device_angles);
            lab.close("y", &gy, &y, 1e-6);
            rope::backward(&mut gy, &device_angles);
            lab.close("x", &gy, &x, 1e-6);
        }
    }
}

/// A launch that asks for what a kernel does not have, or for too little shared memory, is caught.
#[test]
fn the_emulator_sees_what_is_wrong() {
    use super::arguments::argument;
    use super::gpu::{Arg, Launch};
    use super::kernels::{Module, Source};
    let launch = |lab: &Lab, shared: usize, num_args: usize| {
        let x = lab.up(&Tensor::zeros(&[1, 2048]));
        let rstd = lab.up_f32(&Tensor::zeros(&[1]));
        let (x, rstd) = (argument(&x, lab.dtype), argument(&rstd, Dtype::F32));
        let args = [x, x, Arg::F32(1.0), x, rstd, Arg::U32(2048)];
        let module = Module::new(Source::Rmsnorm, lab.dtype);
        let Some(gpu) = lab.device.gpu() else { unreachable!() };
        let (kernel, grid) = ("rmsnorm_forward", [1; 3]);
        gpu.launch(&Launch { module, kernel, grid, block: 256, shared, args: &args[..num_args] });
        lab.device.synchronize().err().map(|e| e.to_string()).unwrap_or_default()
    };
    let [lab, other] = labs(4);
    let [third, _] = labs(4);
    assert!(launch(&lab, 4, 6).contains("shared memory was written behind its end"));
    assert!(launch(&other, 32, 5).contains("5 arguments where it has 6"));
    assert_eq!(launch(&third, 32, 6), "");
    // A failure stays, and what comes after it does nothing.
    let x = third.up(&Tensor::zeros(&[8]));
    assert!(launch(&third, 4, 6).contains("behind its end") && third.device.synchronize().is_err());
    assert_eq!(x.to_host().data(), [0.0; 8]);
}

#[test]
fn writes_outside_a_buffer_are_caught() {
    let [lab, _] = labs(5);
    let Some(gpu) = lab.device.gpu() else { unreachable!() };
    let buffer = gpu.upload(&[1.0f32; 4]);
    let mut short = lab.up(&Tensor::zeros(&[1, 3]));
    let whole = lab.up(&Tensor::zeros(&[1, 4]));
    super::elementwise::swiglu_forward(gpu, &whole, &whole, &mut short);
    lab.device.synchronize().unwrap();
    assert_eq!(short.shape(), [1, 4]);
    buffer.write(8, &2.0f32.to_le_bytes());
    let mut back = [0u8; 16];
    buffer.read(0, &mut back);
    assert_eq!(bytemuck::cast::<_, [f32; 4]>(back), [1.0, 1.0, 2.0, 1.0]);
    let read_past = std::panic::catch_unwind(|| buffer.read(12, &mut [0u8; 8]));
    assert!(read_past.is_err());
}

#[test]
fn tensors_move_and_keep_their_values() {
    for mut lab in labs(6) {
        let x = lab.random(&[300, 500], 1.0);
        let up = lab.up(&x);
        assert_eq!(up.to_host().data(), x.data());
        let mut copy = up.clone();
        copy.clear();
        assert!(copy.to_host().data().iter().all(|x| *x == 0.0));
        copy.assign(&up);
        assert_eq!((copy.to_host().data(), copy.dtype(), copy.device()), (x.data(), lab.dtype, lab.device.clone()));
        copy.assign(&x);
        assert_eq!((copy.data(), copy.device()), (x.data(), crate::Device::Cpu));
        copy.resize_like(&up, &[2, 2]);
        assert_eq!((copy.dtype(), copy.shape()), (lab.dtype, &[2, 2][..]));
        assert!(format!("{up:?}").contains("on a GPU"));
    }
}
