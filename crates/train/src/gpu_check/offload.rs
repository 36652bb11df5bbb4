//! Offloading to host memory while a GPU trains, against the same run without it.

use super::{Check, shape};
use crate::Result;
use crate::objective::Objective;
use crate::optimizer::{AdamWOptions, Optim};
use crate::step::Trainer;
use std::sync::Arc;
use tunesmith_model::{Adapter, AdapterConfig, Batch, LINEAR_NAMES, Llama, Modules, Recompute, Workspace};
use tunesmith_tensor::{Device, Dtype};

/// Trains with everything on the device and with everything elsewhere that can be, small where every thread is emulated: not a bit may
/// differ, whatever the copies and the work overtake.
pub(super) fn check(device: &Device, dtype: Dtype, small: bool, observe: &mut dyn FnMut(Check)) -> Result<()> {
    let (hidden, layers, vocab, tokens) = if small { (64, 3, 300, 40) } else { (1024, 8, 8192, 2048) };
    let config = shape(hidden, layers, vocab, false)?;
    let adapter = AdapterConfig {
        r: 8,
        target_modules: Modules::List(LINEAR_NAMES.map(String::from).to_vec()),
        ..AdapterConfig::default()
    };
    let mut batch = Batch::default();
    // Two passes of different lengths: buffers shrink and grow.
    for length in [tokens, tokens / 3] {
        let ids: Vec<u32> = (0..length).map(|i| i * 7 % vocab).collect();
        batch.push(&ids, &vec![true; ids.len()]);
    }
    for (full, optim) in
        [(false, Optim::AdamW), (false, Optim::AdamW8bit), (true, Optim::AdamW), (true, Optim::AdamW8bit)]
    {
        let train = |offload: bool| -> Result<Vec<u64>> {
            let leaves = offload && !full;
            let model = Llama::random_on(config.clone(), 1, false, full, leaves, device, dtype);
            let mut own = if full { None } else { Some(Adapter::new(&model, &adapter, 1)?) };
            own.iter_mut().for_each(|adapter| adapter.move_to(device, dtype));
            let block = Recompute::Block;
            let ws = if offload { Workspace::parked(block) } else { Workspace::new(block) };
            let options = AdamWOptions { optim, offload, ..AdamWOptions::default() };
            let mut trainer = Trainer { max_grad_norm: 0.0, ..Trainer::new(Arc::new(model), own, options, ws) };
            let mut seen = Vec::new();
            for _ in 0..3 {
                let step = trainer.step(std::slice::from_ref(&batch), &Objective::default(), 1e-3)?;
                seen.extend([step.loss.sum.to_bits(), step.grad_norm.to_bits()]);
            }
            device.synchronize()?;
            Ok(seen)
        };
        let (want, got) = (train(false)?, train(true)?);
        let differing = want.iter().zip(&got).filter(|(a, b)| a != b).count();
        let method = if full { "full" } else { "LoRA" };
        let compared = format!("{method}, {}: losses and gradient norms that differ", optim.name());
        observe(Check { model: dtype.name().into(), check: "offload", compared, error: differing as f64, bound: 0.0 });
    }
    Ok(())
}
