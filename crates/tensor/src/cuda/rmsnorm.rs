//! Launchers of RMSNorm; contract in `ops/rmsnorm.rs`.

use super::arguments::{argument, blocks, row_threads};
use super::gpu::{Arg, Gpu, Launch};
use super::kernels::{Module, Source};
use crate::dtype::Dtype;
use crate::tensor::Tensor;

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
    gpu.launch(&Launch {
        module: Module::new(Source::Rmsnorm, x.dtype()),
        kernel: "rmsnorm_forward",
        grid: [x.rows() as u32, 1, 1],
        block,
        shared: 4 * block as usize / 32,
        args: &[
            argument(x, x.dtype()),
            argument(weight, x.dtype()),
            Arg::F32(eps),
            argument(y, x.dtype()),
            argument(rstd, Dtype::F32),
            d,
        ],
    });
}

pub(crate) fn apply(gpu: &Gpu, x: &Tensor, weight: &Tensor, rstd: &Tensor, y: &mut Tensor) {
    check_row(x);
    y.resize_like(x, x.shape());
    let (element, d) = (x.dtype(), Arg::U32(x.cols() as u32));
    gpu.launch(&Launch {
        module: Module::new(Source::Rmsnorm, element),
        kernel: "rmsnorm_apply",
        grid: [x.rows() as u32, 1, 1],
        block: row_threads(x),
        shared: 0,
        args: &[argument(x, element), argument(weight, element), argument(rstd, Dtype::F32), argument(y, element), d],
    });
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
    gpu.launch(&Launch {
        module,
        kernel: "rmsnorm_backward",
        grid: [x.rows() as u32, 1, 1],
        block,
        shared: 4 * block as usize / 32,
        args: &[x_arg, w, r, d_y, argument(d_x, element), d],
    });
    if let Some(d_weight) = d_weight {
        gpu.launch(&Launch {
            module,
            kernel: "rmsnorm_weight_gradient",
            grid: [blocks(x.cols(), 32), 1, 1],
            block: 1024,
            shared: 4 * 1024,
            args: &[x_arg, r, d_y, argument(d_weight, Dtype::F32), Arg::U32(x.rows() as u32), d],
        });
    }
}
