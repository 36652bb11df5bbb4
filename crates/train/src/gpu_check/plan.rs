//! What was planned of a GPU's memory against the peak of its allocator.

use super::{Check, shape};
use crate::Result;
use crate::objective::Objective;
use crate::optimizer::{AdamWOptions, Optim};
use crate::step::Trainer;
use std::sync::Arc;
use tunesmith_model::memory::PassShape;
use tunesmith_model::memory::gpu::{OnGpu, dense_bytes, float_bytes, training_bytes};
use tunesmith_model::{Batch, Llama, Recompute, Workspace};
use tunesmith_tensor::cuda::sizes;
use tunesmith_tensor::{Device, Dtype};

/// Trains a model fully for two steps, small where every thread is emulated.
pub(super) fn check(device: &Device, dtype: Dtype, small: bool, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let Some(gpu) = device.gpu() else { return Ok(()) };
    let (hidden, layers, vocab, tokens) = if small { (64, 2, 300, 90) } else { (1024, 4, 8192, 2048) };
    let config = shape(hidden, layers, vocab, true)?;
    for recompute in Recompute::ALL {
        let (before, _) = gpu.memory();
        gpu.reset_peak();
        let model = Llama::random_on(config.clone(), 1, false, true, false, device, dtype);
        let ws = Workspace::new(recompute);
        let mut trainer = Trainer::new(Arc::new(model), None, AdamWOptions::default(), ws);
        let mut batch = Batch::default();
        let ids: Vec<u32> = (0..tokens).map(|i| i * 7 % vocab).collect();
        batch.push(&ids, &vec![true; ids.len()]);
        for _ in 0..2 {
            trainer.step(std::slice::from_ref(&batch), &Objective::default(), 1e-3)?;
        }
        device.synchronize()?;
        let peak = (gpu.memory().1 - before) as f64;
        let lens: Vec<usize> = trainer.trained().map(|p| p.value.len()).collect();
        let state = |len: &usize| {
            dense_bytes(*len, dtype, true) + float_bytes(*len) + Optim::AdamW.gpu_state_bytes(*len) as u64
        };
        let on = OnGpu { dtype, largest_quantised: 0, num_trained: lens.len(), head_trains: true, parked: false };
        let tokens = tokens as usize;
        let shape = PassShape { tokens, loss_rows: tokens, threads: 0, int8: false };
        let pass = training_bytes(&config, None, shape, recompute, on);
        // The workspace of products was there before.
        let kernels = pass.kernels - sizes::PRODUCTS as u64;
        let planned = lens.iter().map(state).sum::<u64>() + pass.activations + pass.workspace + kernels;
        let (planned, error) = (planned as f64 / 1e6, (planned as f64 / peak - 1.0).abs());
        let compared = format!("recompute {recompute}: {planned:.1} MB, and the allocator's peak");
        observe(Check { model: dtype.name().into(), check: "memory plan", compared, error, bound: 0.1 });
    }
    Ok(())
}
