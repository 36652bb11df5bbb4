//! What waits in the processor's memory while a GPU trains, against the same run without it.

use super::{Check, shape};
use crate::Result;
use crate::optimizer::{AdamW, AdamWOptions, Optim, gradient_norm};
use tunesmith_model::{
    AdapterConfig, Batch, Gradients, LINEAR_NAMES, Llama, LossOptions, Modules, Recompute, Workspace,
};
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
            let mut model = Llama::random_on(config.clone(), 1, false, full, leaves, device, dtype);
            if !full {
                model.add_adapter(&adapter, 1)?;
                model.move_to(device, dtype);
            }
            let mut optimizer = AdamW::new(&model, AdamWOptions { optim, offload, ..AdamWOptions::default() });
            let (mut gradients, block) = (Gradients::new(&model), Recompute::Block);
            let mut ws = if offload { Workspace::parked(block) } else { Workspace::new(block) };
            let mut seen = Vec::new();
            for step in 0..3 {
                gradients.clear();
                let options =
                    LossOptions { scale: 1e-3, label_smoothing: 0.0, dropout_seed: None, step, first_token: 0 };
                seen.push(model.loss_and_gradients(&batch, options, &mut ws, &mut gradients).to_bits());
                seen.push(gradient_norm(&gradients).to_bits());
                optimizer.update(&mut model, &gradients, 1e-3, 1.0);
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
