//! Launchers of RMSNorm; contract in `ops/rmsnorm.rs`.

use super::arguments::{argument, row_threads};
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::{dtype::Dtype, tensor::Tensor};

fn check_row(x: &Tensor) {
    let width = 16 / x.dtype().bytes();
    assert!(x.cols().is_multiple_of(width), "rows of {} elements; the GPU takes multiples of {width}", x.cols());
}

pub(crate) fn forward(gpu: &Gpu, x: &Tensor, weight: &Tensor, eps: f32, y: &mut Tensor, rstd: &mut Tensor) {
    check_row(x);
    y.resize_like(x, x.shape());
    rstd.resize_on(&x.device(), Dtype::F32, &[x.rows()]);
    let block = row_threads(x);
    let d = Arg::U32(x.cols() as u32);
    let args = [
        argument(x, x.dtype()),
        argument(weight, x.dtype()),
        Arg::F32(eps),
        argument(y, x.dtype()),
        argument(rstd, Dtype::F32),
        d,
    ];
    gpu.launch_row(
        Module::new(Source::Rmsnorm, x.dtype()),
        "rmsnorm_forward",
        (x.rows() as u32, block, 4 * block as usize / 32),
        &args,
    );
}

pub(crate) fn apply(gpu: &Gpu, x: &Tensor, weight: &Tensor, rstd: &Tensor, y: &mut Tensor) {
    check_row(x);
    y.resize_like(x, x.shape());
    let (element, d) = (x.dtype(), Arg::U32(x.cols() as u32));
    let args = [argument(x, element), argument(weight, element), argument(rstd, Dtype::F32), argument(y, element), d];
    gpu.launch_row(Module::new(Source::Rmsnorm, element), "rmsnorm_apply", (x.rows() as u32, row_threads(x), 0), &args);
}

pub(crate) fn backward(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    d_y: &Tensor,
    d_x: &mut Tensor,
    d_weight: Option<&mut Tensor>,
) {
    check_row(x);
    let (element, block, d) = (x.dtype(), row_threads(x), Arg::U32(x.cols() as u32));
    let module = Module::new(Source::Rmsnorm, element);
    let [x_arg, w, d_y] = [x, weight, d_y].map(|t| argument(t, element));
    let r = argument(rstd, Dtype::F32);
    let args = [x_arg, w, r, d_y, argument(d_x, element), d];
    gpu.launch_row(module, "rmsnorm_backward", (x.rows() as u32, block, 4 * block as usize / 32), &args);
    if let Some(d_weight) = d_weight {
        let args = [x_arg, r, d_y, argument(d_weight, Dtype::F32), Arg::U32(x.rows() as u32), d];
        gpu.launch_row(module, "rmsnorm_weight_gradient", (blocks(x.cols(), 32), 1024, 4 * 1024), &args);
    }
}
