//! What training reads at a time.
use crate::{
    Preference, Sample,
    sample::{Source, plain_weights},
};

/// What one micro-batch row is made of: documents one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    /// Token ids of all documents.
    pub ids: Vec<u32>,
    /// For each id whether it is a label: whether the loss of predicting it counts. False for the first of a document.
    pub trained: Vec<bool>,
    /// How much the loss of predicting each id counts in training; empty when that is 1 where `trained` and 0
    /// elsewhere.
    pub weights: Vec<f32>,
    /// Tokens of each document; their sum is `ids.len()`. Attention and positions start anew at each.
    pub lengths: Vec<usize>,
    /// For each document the UTF-8 bytes of its trained text.
    pub bytes: Vec<usize>,
    /// For each document the row it came from.
    pub sources: Vec<Source>,
    /// For each document what it is to training on preferences. A chosen one is followed by the one rejected for it.
    pub preferences: Vec<Preference>,
    /// For each document the tokens of its prompt, which is that of both of a pair; 0 for plain ones.
    pub shared: Vec<usize>,
}

impl Block {
    /// The documents one by one.
    pub(crate) fn into_samples(self) -> Vec<Sample> {
        let mut start = 0;
        let mut samples = Vec::with_capacity(self.lengths.len());
        for (document, length) in self.lengths.iter().enumerate() {
            let rows = start..start + length;
            start = rows.end;
            samples.push(Sample {
                ids: self.ids[rows.clone()].to_vec(),
                trained: self.trained[rows.clone()].to_vec(),
                weights: self.weights.get(rows).unwrap_or_default().to_vec(),
                bytes: self.bytes[document],
                source: self.sources[document].clone(),
                preference: self.preferences[document],
                shared: self.shared[document],
            });
        }
        samples
    }

    /// Appends a document.
    pub fn push(&mut self, sample: &Sample) {
        self.ids.extend_from_slice(&sample.ids);
        if self.weights.is_empty() && !sample.weights.is_empty() {
            self.weights = plain_weights(&self.trained).collect();
        }
        self.trained.extend_from_slice(&sample.trained);
        if !sample.weights.is_empty() {
            self.weights.extend_from_slice(&sample.weights);
        } else if !self.weights.is_empty() {
            self.weights.extend(plain_weights(&sample.trained));
        }
        self.lengths.push(sample.ids.len());
        self.bytes.push(sample.bytes);
        self.sources.push(sample.source.clone());
        self.preferences.push(sample.preference);
        self.shared.push(sample.shared);
    }

    /// Number of trained tokens.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }

    /// Number of tokens whose loss counts in training.
    pub fn num_losses(&self) -> usize {
        match self.weights.is_empty() {
            true => self.num_trained(),
            false => self.weights.iter().filter(|&&weight| weight > 0.0).count(),
        }
    }

    /// Sum of the weights of all tokens in training: the number of trained tokens where there are no weights.
    pub fn total_weight(&self) -> f64 {
        match self.weights.is_empty() {
            true => self.num_trained() as f64,
            false => self.weights.iter().map(|&weight| f64::from(weight)).sum(),
        }
    }
}
