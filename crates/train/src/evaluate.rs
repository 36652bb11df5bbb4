//! Loss of a model on prepared data, document by document.

use crate::{Error, Result, statistics::DocumentLoss};
use std::ops::{ControlFlow, Range};
use tunesmith_model::{Batch, Llama, Sampler, Sampling, Workspace, generate_together};
use tunesmith_tensor::Device;
use tunesmith_text::{Block, Preference, PreparedSplit};

/// One micro-batch of all documents of `blocks`, for measuring: every trained token counts 1.
pub fn batch_of(blocks: &[Block]) -> Batch {
    collect(blocks, |batch, block, rows| batch.push(&block.ids[rows.clone()], &block.trained[rows]))
}

/// The same for training: where tokens have weights, these say how much each counts.
pub fn training_batch(blocks: &[Block]) -> Batch {
    collect(blocks, |batch, block, rows| match block.weights.is_empty() {
        true => batch.push(&block.ids[rows.clone()], &block.trained[rows]),
        false => batch.push_weighted(&block.ids[rows.clone()], &block.weights[rows]),
    })
}

fn collect(blocks: &[Block], push: impl Fn(&mut Batch, &Block, Range<usize>)) -> Batch {
    let mut batch = Batch::default();
    for block in blocks {
        let mut start = 0;
        for length in &block.lengths {
            push(&mut batch, block, start..start + length);
            start += length;
        }
    }
    batch
}

/// Loss, scored tokens and bytes of each document of `split`, in its order; documents without a scored token are left out.
/// `progress` gets (blocks done, blocks in all).
///
/// # Errors
/// When a block cannot be read, or a document's loss is not finite (its row is named).
pub fn document_losses(
    model: &Llama,
    split: &PreparedSplit,
    ws: &mut Workspace,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<DocumentLoss>> {
    let mut documents = Vec::new();
    for i in 0..split.len() {
        let block = split.block(i)?;
        if block.preferences.iter().any(|preference| *preference != Preference::Plain) {
            return Err(Error::Input(
                "this data holds pairs of answers for training on preferences, of which some should not be likely; prepare \
                 it with preferences = \"chosen\""
                    .into(),
            ));
        }
        let batch = batch_of(std::slice::from_ref(&block));
        model.loss(&batch, 0.0, ws);
        model.device().synchronize()?;
        let mut losses = ws.losses().iter();
        let mut row = 0;
        let filled = block.lengths.iter().enumerate().filter(|(_, length)| **length > 0);
        for (d, length) in filled {
            let trained = &block.trained[row + 1..row + length];
            row += length;
            let num_tokens = trained.iter().filter(|t| **t).count();
            if num_tokens == 0 {
                continue;
            }
            let loss_sum: f64 = losses.by_ref().take(num_tokens).map(|l| *l as f64).sum();
            if !loss_sum.is_finite() {
                let source = &block.sources[d];
                return Err(Error::Failure(format!(
                    "the loss of {source} is {loss_sum}: the model or the row is damaged"
                )));
            }
            let num_bytes = block.bytes[d] as u64;
            documents.push(DocumentLoss { loss_sum, num_tokens: num_tokens as u64, num_bytes });
        }
        progress(i + 1, split.len());
    }
    Ok(documents)
}

/// Mean loss (nats a scored token) and number of scored tokens of `documents`.
pub fn mean_loss(documents: &[DocumentLoss]) -> (f64, u64) {
    let tokens: u64 = documents.iter().map(|d| d.num_tokens).sum();
    (documents.iter().map(|d| d.loss_sum).sum::<f64>() / tokens.max(1) as f64, tokens)
}

/// Prompts that are continued at once on a GPU. On the processor one after the other: samples shall not need more memory than one.
pub(crate) const PLACES: usize = 16;

/// Most sequences that [`continuations`] of `prompts` prompts holds at once.
pub fn places(device: &Device, prompts: usize) -> usize {
    if *device == Device::Cpu { 1 } else { prompts.clamp(1, PLACES) }
}

/// Up to `max_new_tokens` tokens that `model` puts behind each of `prompts`, for the eye. Drawn with one fixed seed, so that samples of
/// different weights differ by the weights alone; not the most likely tokens, because small models repeat themselves with these.
///
/// # Errors
/// When a prompt is empty or does not fit into the context.
pub fn continuations(
    model: &Llama,
    prompts: &[&[u32]],
    end_tokens: &[u32],
    max_new_tokens: usize,
    ws: &mut Workspace,
) -> Result<Vec<Vec<u32>>> {
    let options =
        Sampling { do_sample: true, temperature: 0.7, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::default() };
    let samplers = prompts.iter().map(|_| Sampler::new(options.clone()));
    let mut samplers = samplers.collect::<std::result::Result<Vec<_>, _>>()?;
    let go_on = |_, _| ControlFlow::Continue(());
    let places = places(&model.device(), prompts.len());
    let texts = generate_together(model, prompts, &mut samplers, end_tokens, max_new_tokens, places, ws, go_on)?;
    Ok(texts.into_iter().map(|(ids, _)| ids).collect())
}
