//! A micro-batch: documents one behind the other, without padding.

use tunesmith_tensor::ops::attention::Segment;

/// Token ids of several documents with what the model must know of them. Attention stays inside each document and
/// positions restart with it, so packing documents together computes the same as passing them one by one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids [T].
    pub ids: Vec<u32>,
    /// Position of each token in its document [T].
    pub positions: Vec<u32>,
    /// The documents.
    pub segments: Vec<Segment>,
    /// Rows whose prediction of the next token is scored [N], ascending.
    pub loss_rows: Vec<u32>,
    /// The tokens to be predicted at `loss_rows` [N].
    pub targets: Vec<u32>,
    /// Weights of the losses at `loss_rows` [N]; empty when all are 1.
    pub weights: Vec<f32>,
}

impl Batch {
    /// Adds a document. `trained[i]` says whether predicting `ids[i]` counts; the first token has nothing that predicts it,
    /// so `trained[0]` has no effect.
    ///
    /// # Panics
    /// When the two slices differ in length.
    pub fn push(&mut self, ids: &[u32], trained: &[bool]) {
        assert_eq!(ids.len(), trained.len(), "one mask entry a token");
        self.add(ids, |i| if trained[i] { 1.0 } else { 0.0 });
    }

    /// Adds a document in which predicting `ids[i]` counts `weights[i]` times, not at all where that is 0. `weights[0]` has no
    /// effect.
    ///
    /// # Panics
    /// When the two slices differ in length.
    pub fn push_weighted(&mut self, ids: &[u32], weights: &[f32]) {
        assert_eq!(ids.len(), weights.len(), "one weight a token");
        self.add(ids, |i| weights[i]);
    }

    fn add(&mut self, ids: &[u32], weight: impl Fn(usize) -> f32) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        let rows = start..self.ids.len();
        if rows.is_empty() {
            return;
        }
        self.segments.push(Segment { queries: rows.clone(), keys: rows });
        for i in 1..ids.len() {
            let weight = weight(i);
            if weight == 0.0 {
                continue;
            }
            self.loss_rows.push((start + i - 1) as u32);
            self.targets.push(ids[i]);
            self.push_weight(weight);
        }
    }

    /// Adds a document of class `class`, which is scored at its last token. An empty one adds nothing.
    pub fn push_class(&mut self, ids: &[u32], class: u32) {
        self.add(ids, |_| 0.0);
        if !ids.is_empty() {
            self.loss_rows.push(self.ids.len() as u32 - 1);
            self.targets.push(class);
            self.push_weight(1.0);
        }
    }

    /// Notes the weight of the last of `targets`.
    fn push_weight(&mut self, weight: f32) {
        if self.weights.is_empty() && weight != 1.0 {
            self.weights.resize(self.targets.len() - 1, 1.0);
            self.weights.push(weight);
        } else if !self.weights.is_empty() {
            self.weights.push(weight);
        }
    }

    /// Weights of the losses [N], `None` when all are 1.
    pub fn weights(&self) -> Option<&[f32]> {
        (!self.weights.is_empty()).then_some(&self.weights[..])
    }

    /// Sum of all weights: what the mean loss is divided by.
    pub fn total_weight(&self) -> f64 {
        match self.weights() {
            Some(weights) => weights.iter().map(|weight| f64::from(*weight)).sum(),
            None => self.targets.len() as f64,
        }
    }

    /// Sum of `losses` [N], each times its weight.
    pub(crate) fn weighted_sum(&self, losses: &[f32]) -> f64 {
        match self.weights() {
            Some(weights) => {
                losses.iter().zip(weights).map(|(loss, weight)| f64::from(*loss) * f64::from(*weight)).sum()
            }
            None => losses.iter().map(|loss| f64::from(*loss)).sum(),
        }
    }

    /// A batch of rows with labels as Hugging Face has them: `labels[i]` = −100 where token i is not scored.
    pub fn from_labels<'a>(rows: impl IntoIterator<Item = (&'a [u32], &'a [i64])>) -> Self {
        let mut batch = Self::default();
        for (ids, labels) in rows {
            let trained: Vec<bool> = labels.iter().map(|l| *l != -100).collect();
            batch.push(ids, &trained);
        }
        batch
    }

    /// The documents in consecutive batches of at most `max_tokens` tokens; a longer document has one to itself.
    pub fn parts(&self, max_tokens: usize) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        let mut losses = self.loss_rows.iter().zip(&self.targets).enumerate().peekable();
        for segment in &self.segments {
            let rows = segment.queries.clone();
            if parts.last().is_none_or(|p| begins_part(p.len(), rows.len(), max_tokens)) {
                parts.push(Self::default());
            }
            let Some(part) = parts.last_mut() else { continue };
            let start = part.len();
            part.ids.extend_from_slice(&self.ids[rows.clone()]);
            part.positions.extend_from_slice(&self.positions[rows.clone()]);
            part.segments.push(Segment { queries: start..start + rows.len(), keys: start..start + rows.len() });
            while let Some((n, (row, target))) = losses.next_if(|(_, (row, _))| (**row as usize) < rows.end) {
                part.loss_rows.push((*row as usize - rows.start + start) as u32);
                part.targets.push(*target);
                part.push_weight(self.weights.get(n).copied().unwrap_or(1.0));
            }
        }
        parts
    }

    /// Number of tokens T.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True when no document was added.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Whether a document of `length` tokens begins a new part behind one that has `filled` tokens.
fn begins_part(filled: usize, length: usize, max_tokens: usize) -> bool {
    filled + length > max_tokens
}

/// Tokens of the largest part that a training pass of at most `max_tokens` tokens over documents of these `lengths` takes at once:
/// what sizes its buffers.
pub fn largest_part(lengths: impl IntoIterator<Item = usize>, max_tokens: usize) -> usize {
    let (mut filled, mut largest) = (0, 0);
    for length in lengths {
        filled = if begins_part(filled, length, max_tokens) { length } else { filled + length };
        largest = largest.max(filled);
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_predict_their_successors() {
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7], &[true, true, true]);
        batch.push(&[], &[]);
        batch.push(&[8, 9], &[false, true]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!((batch.loss_rows.as_slice(), batch.targets.as_slice()), (&[0, 1, 3][..], &[6, 7, 9][..]));
        assert_eq!(batch.segments, Segment::documents(&[3, 2]));
        let same = Batch::from_labels([(&[5, 6, 7][..], &[5i64, 6, 7][..]), (&[8, 9][..], &[-100, 9][..])]);
        assert_eq!(batch, same);
    }

    #[test]
    fn parts_are_the_documents_in_order() {
        let documents: Vec<(Vec<u32>, Vec<bool>)> =
            [3u32, 1, 9, 4, 2, 2].iter().map(|n| ((0..*n).collect(), (0..*n).map(|i| i % 3 > 0).collect())).collect();
        let batch = |documents: &[(Vec<u32>, Vec<bool>)]| {
            let mut batch = Batch::default();
            documents.iter().for_each(|(ids, trained)| batch.push(ids, trained));
            batch
        };
        let parts = batch(&documents).parts(6);
        let want = [&documents[..2], &documents[2..3], &documents[3..5], &documents[5..]].map(batch);
        assert_eq!(parts, want);
        assert!(Batch::default().parts(6).is_empty());
    }

    #[test]
    fn weights_are_kept_only_where_they_differ_and_follow_their_rows() {
        let mut plain = Batch::default();
        plain.push(&[5, 6, 7], &[false, true, true]);
        let mut ones = Batch::default();
        ones.push_weighted(&[5, 6, 7], &[9.0, 1.0, 1.0]);
        assert_eq!(ones, plain);
        assert_eq!((plain.weights(), plain.total_weight()), (None, 2.0));
        plain.push_weighted(&[8, 9, 10, 11], &[1.0, 0.5, 0.0, 1.0]);
        plain.push(&[12, 13], &[true, true]);
        assert_eq!(plain.targets, [6, 7, 9, 11, 13]);
        assert_eq!(plain.weights(), Some(&[1.0, 1.0, 0.5, 1.0, 1.0][..]));
        assert_eq!((plain.total_weight(), plain.weighted_sum(&[1.0, 1.0, 4.0, 1.0, 1.0])), (4.5, 6.0));
        let weights: Vec<_> = plain.parts(4).into_iter().map(|part| part.weights).collect();
        assert_eq!(weights, [vec![], vec![0.5, 1.0], vec![]]);
    }

    #[test]
    fn the_largest_part_is_known_from_lengths() {
        for lengths in [&[500usize, 500, 500][..], &[1024, 1], &[3000, 10], &[700, 400, 600], &[1, 1, 1], &[]] {
            let mut batch = Batch::default();
            lengths.iter().for_each(|n| batch.push(&vec![1; *n], &vec![true; *n]));
            let want = batch.parts(1024).iter().map(Batch::len).max().unwrap_or(0);
            assert_eq!(largest_part(lengths.iter().copied(), 1024), want);
        }
    }
}
