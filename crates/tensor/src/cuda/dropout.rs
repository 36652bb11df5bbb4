//! Launcher of dropout; contract in `ops/dropout.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu};
use super::kernels::{Module, Source};
use crate::{contract::Mask, tensor::Tensor};

/// `y` [T, d] = or += masked and rescaled `x`.
pub(crate) fn apply(gpu: &Gpu, x: &Tensor, mask: Mask, y: &mut Tensor, add: bool) {
    if !add {
        y.resize_like(x, x.shape());
    }
    let element = x.dtype();
    let halves = |x: u64| [Arg::U32(x as u32), Arg::U32((x >> 32) as u32)];
    let ([key0, key1], [stream0, stream1]) = (halves(mask.seed), halves(mask.stream));
    let args = [
        argument(x, element),
        argument(y, element),
        Arg::U32(x.rows() as u32),
        Arg::U32(x.cols() as u32),
        Arg::U32(mask.threshold()),
        Arg::F32(mask.keep()),
        key0,
        key1,
        stream0,
        stream1,
        Arg::U64(mask.first_row),
        Arg::U32(add.into()),
    ];
    gpu.launch_threads(Module::new(Source::Dropout, element), "dropout", x.rows() * x.cols().div_ceil(4), &args);
}
