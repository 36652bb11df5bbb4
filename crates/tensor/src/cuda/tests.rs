//! The emulated device itself: what it catches, and its memory.

pub(crate) mod lab;
pub(crate) mod parity;

use crate::{Dtype, Tensor};
use lab::{Lab, labs};

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
    assert!(launch(&lab, 4, 6).contains("shared memory was written past its end"));
    assert!(launch(&other, 32, 5).contains("5 arguments where it has 6"));
    assert_eq!(launch(&third, 32, 6), "");
    // A failure stays, and what comes after it does nothing.
    let x = third.up(&Tensor::zeros(&[8]));
    assert!(launch(&third, 4, 6).contains("past its end") && third.device.synchronize().is_err());
    assert_eq!(x.to_host().data(), [0.0; 8]);
}

#[test]
fn writes_outside_a_buffer_are_caught() {
    let [lab, _] = labs(5);
    let Some(gpu) = lab.device.gpu() else { unreachable!() };
    let buffer = gpu.upload(&[1.0f32; 4]);
    let mut short = lab.up(&Tensor::zeros(&[1, 3]));
    let whole = lab.up(&Tensor::zeros(&[1, 4]));
    super::swiglu::forward(gpu, &whole, &whole, &mut short);
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
