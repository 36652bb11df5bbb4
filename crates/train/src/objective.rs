//! What a model is trained for: an objective makes a loss, and the gradient of hidden states, from what a forward pass leaves.

use tunesmith_model::{Adapter, Batch, Gradients, Head, Llama, LossOptions, Pass, Workspace};

/// A loss over the hidden states of [`Batch::loss_rows`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Cross-entropy of each next token.
    NextToken {
        /// Label smoothing ε.
        label_smoothing: f32,
    },
    /// Cross-entropy of the class of a sequence, scored at its last token (transformers' `LlamaForSequenceClassification`).
    Classification {
        /// Label smoothing ε.
        label_smoothing: f32,
    },
}

impl Default for Objective {
    fn default() -> Self {
        Self::NextToken { label_smoothing: 0.0 }
    }
}

impl Objective {
    /// What the summed loss of `batches` is divided by: the weights of their targets, 1 each unless the data says otherwise.
    pub fn weight(&self, batches: &[Batch]) -> f64 {
        let weight: f64 = batches.iter().map(Batch::total_weight).sum();
        // Every block has a target, so this only keeps a step of foreign data finite.
        if weight > 0.0 { weight } else { 1.0 }
    }

    /// Weighted loss sum in nats of `batch`, which has just gone through [`Llama::forward`]; each loss is then in
    /// [`Workspace::losses`]. With a scale and gradients, those of scale · sum are added for the head and left in `ws` for
    /// [`Llama::backward`].
    pub fn loss(
        &self,
        model: &Llama,
        adapter: Option<&Adapter>,
        batch: &Batch,
        ws: &mut Workspace,
        gradients: Option<(f32, &mut Gradients)>,
    ) -> f64 {
        let (head, label_smoothing) = match *self {
            Self::NextToken { label_smoothing } => (Head::Tokens, label_smoothing),
            Self::Classification { label_smoothing } => (Head::Classes, label_smoothing),
        };
        let (scale, gradients) = gradients.map_or((1.0, None), |(scale, gradients)| (scale, Some(gradients)));
        model.cross_entropy(batch, adapter, LossOptions { head, scale, label_smoothing }, ws, gradients)
    }

    /// The loss in nats of each of [`Batch::targets`], unweighted, and their weighted sum; without gradients or dropout.
    pub fn losses(
        &self,
        model: &Llama,
        adapter: Option<&Adapter>,
        batch: &Batch,
        ws: &mut Workspace,
    ) -> (Vec<f32>, f64) {
        let (mut losses, mut sum) = (Vec::with_capacity(batch.targets.len()), 0.0);
        for part in batch.parts(model.pass_tokens()) {
            model.forward(&part, adapter, Pass::Infer, ws);
            sum += self.loss(model, adapter, &part, ws, None);
            losses.extend_from_slice(ws.losses());
        }
        (losses, sum)
    }
}
