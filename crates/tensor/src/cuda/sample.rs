//! Launchers of the choice of tokens; contract in `ops/sample.rs`.

use super::arguments::argument;
use super::gpu::{Arg, Gpu, blocks};
use super::kernels::{Module, Source};
use crate::{contract::Choice, dtype::Dtype, tensor::Tensor};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

const BLOCK: u32 = 1024;

/// As the kernel reads it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Draw {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: u32,
    uniform: f64,
}

/// A token for each row of `logits` [T, V] (f32), in which penalised logits are changed; waits for the device.
pub(crate) fn rows(gpu: &Arc<Gpu>, logits: &mut Tensor, choices: &[Choice<'_>]) -> Vec<u32> {
    penalise(gpu, logits, choices);
    if choices.iter().all(|c| c.draw.is_none()) {
        return argmax(gpu, logits);
    }
    // The most likely token is the draw among one.
    let draws: Vec<Draw> = choices
        .iter()
        .map(|c| match c.draw {
            Some(d) => Draw {
                temperature: d.temperature,
                top_p: d.top_p,
                min_p: d.min_p,
                top_k: u32::try_from(d.top_k).unwrap_or(u32::MAX),
                uniform: d.uniform,
            },
            None => Draw { temperature: 1.0, top_p: 1.0, min_p: 0.0, top_k: 1, uniform: 0.0 },
        })
        .collect();
    let draws = gpu.upload(&draws);
    let candidates = gpu.allocate(4 * logits.len());
    let (rows, vocab) = (logits.rows(), logits.cols());
    let index = gpu.allocate(4 * rows);
    launch(
        gpu,
        "sample",
        rows as u32,
        8 * BLOCK as usize / 32 + 8,
        &[
            argument(logits, Dtype::F32),
            Arg::Buffer(&draws, 0),
            Arg::Buffer(&candidates, 0),
            Arg::Buffer(&index, 0),
            Arg::U32(vocab as u32),
        ],
    );
    let mut found = vec![0u32; rows];
    index.read(0, bytemuck::cast_slice_mut(&mut found));
    found
}

/// Changes the logits of what occurred before, each once.
fn penalise(gpu: &Arc<Gpu>, logits: &mut Tensor, choices: &[Choice<'_>]) {
    let mut entries: Vec<[u32; 2]> = Vec::new();
    for (row, choice) in (0..).zip(choices).filter(|(_, c)| c.repetition_penalty != 1.0) {
        assert!(choice.history.iter().all(|id| (*id as usize) < logits.cols()), "an id outside {logits:?}");
        entries.extend(choice.history.iter().map(|id| [row, *id]));
    }
    if entries.is_empty() {
        return;
    }
    entries.sort_unstable();
    entries.dedup();
    let penalties: Vec<f32> = choices.iter().map(|c| c.repetition_penalty).collect();
    let (uploaded, penalties) = (gpu.upload(&entries), gpu.upload(&penalties));
    launch(
        gpu,
        "penalise",
        blocks(entries.len(), BLOCK),
        0,
        &[
            argument(logits, Dtype::F32),
            Arg::Buffer(&uploaded, 0),
            Arg::Buffer(&penalties, 0),
            Arg::U32(entries.len() as u32),
            Arg::U32(logits.cols() as u32),
        ],
    );
}

/// Index of the largest logit of each row of `logits` [T, V] (f32); waits for the device.
fn argmax(gpu: &Arc<Gpu>, logits: &Tensor) -> Vec<u32> {
    let index = gpu.allocate(4 * logits.rows());
    launch(
        gpu,
        "argmax",
        logits.rows() as u32,
        8 * BLOCK as usize,
        &[argument(logits, Dtype::F32), Arg::Buffer(&index, 0), Arg::U32(logits.cols() as u32)],
    );
    let mut found = vec![0u32; logits.rows()];
    index.read(0, bytemuck::cast_slice_mut(&mut found));
    found
}

fn launch(gpu: &Gpu, kernel: &'static str, grid: u32, shared: usize, args: &[Arg<'_>]) {
    gpu.launch_row(Module::new(Source::Sample, Dtype::F32), kernel, (grid, BLOCK, shared), args);
}
