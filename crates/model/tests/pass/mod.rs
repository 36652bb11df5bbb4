//! A training pass as the training step makes it, without an optimizer.

// Each test target uses a part of this.
#![allow(dead_code)]

use tunesmith_model::{Adapter, Batch, Gradients, Head, Llama, LossOptions, Masks, Pass, Workspace};

pub(crate) const PLAIN: LossOptions = LossOptions { head: Head::Tokens, scale: 1.0, label_smoothing: 0.0 };

/// Loss sum of `batch`, whose gradients are added to `gradients`, and the loss of each target.
pub(crate) fn loss_and_gradients(
    (llama, adapter): (&Llama, Option<&Adapter>),
    batch: &Batch,
    options: LossOptions,
    mut masks: Option<Masks>,
    ws: &mut Workspace,
    gradients: &mut Gradients,
) -> (f64, Vec<f32>) {
    let (mut sum, mut losses) = (0.0, Vec::new());
    for part in batch.parts(llama.pass_tokens()) {
        llama.forward(&part, adapter, Pass::Train(masks), ws);
        sum += llama.cross_entropy(&part, adapter, options, ws, Some(gradients));
        llama.backward(&part, adapter, masks, ws, gradients);
        losses.extend_from_slice(ws.losses());
        if let Some(masks) = &mut masks {
            masks.first_token += part.len() as u64;
        }
    }
    (sum, losses)
}

/// Loss sum of `batch` alone.
pub(crate) fn loss((llama, adapter): (&Llama, Option<&Adapter>), batch: &Batch) -> f64 {
    let mut ws = Workspace::default();
    let parts = batch.parts(llama.pass_tokens());
    let part = |part: &Batch| {
        llama.forward(part, adapter, Pass::Infer, &mut ws);
        llama.cross_entropy(part, adapter, PLAIN, &mut ws, None)
    };
    parts.iter().map(part).sum()
}
