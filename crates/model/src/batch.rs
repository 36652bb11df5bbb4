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
}

impl Batch {
    /// Adds a document. `trained[i]` says whether predicting `ids[i]` counts; the first token has nothing that predicts it,
    /// so `trained[0]` has no effect.
    ///
    /// # Panics
    /// When the two slices differ in length.
    pub fn push(&mut self, ids: &[u32], trained: &[bool]) {
        assert_eq!(ids.len(), trained.len(), "one mask entry a token");
        if ids.is_empty() {
            return;
        }
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        let rows = start..self.ids.len();
        self.segments.push(Segment { queries: rows.clone(), keys: rows });
        for i in 1..ids.len() {
            if trained[i] {
                self.loss_rows.push((start + i - 1) as u32);
                self.targets.push(ids[i]);
            }
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

    /// The tokens `ids` of one sequence behind `cached` earlier ones.
    pub(crate) fn continuation(ids: &[u32], cached: usize) -> Self {
        let end = cached + ids.len();
        Self {
            ids: ids.to_vec(),
            positions: (cached as u32..end as u32).collect(),
            segments: vec![Segment { queries: 0..ids.len(), keys: 0..end }],
            ..Self::default()
        }
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
}
