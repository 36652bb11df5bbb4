//! Documents into blocks of tokens, without padding.
//!
//! Best fit decreasing: the longest documents first, each into the fullest block that still has room. Any two blocks
//! together hold more than one block's worth, so less than half of the room is wasted; on real data it is a few percent.
use crate::{Result, Sample, Source, shard};
use std::collections::BTreeSet;

/// What one micro-batch row is made of: documents one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Token ids of all documents.
    pub ids: Vec<u32>,
    /// For each id whether it is a label: whether the loss of predicting it counts. False for the first of a document.
    pub trained: Vec<bool>,
    /// Tokens of each document; their sum is `ids.len()`. Attention and positions start anew at each.
    pub lengths: Vec<usize>,
    /// For each document the UTF-8 bytes of its trained text.
    pub bytes: Vec<usize>,
    /// For each document the row it came from.
    pub sources: Vec<Source>,
}

impl Block {
    /// Appends a document.
    pub fn push(&mut self, sample: &Sample) {
        self.ids.extend_from_slice(&sample.ids);
        self.trained.extend_from_slice(&sample.trained);
        self.lengths.push(sample.ids.len());
        self.bytes.push(sample.bytes);
        self.sources.push(sample.source.clone());
    }

    /// Number of trained tokens.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// Which documents go into which block, given the `lengths` of all documents: indices, ascending inside a block, blocks
/// in the order of their first document. A document longer than `max_length` gets a block of its own. Without `packing`
/// every document does.
pub fn plan(lengths: &[usize], max_length: usize, packing: bool) -> Vec<Vec<usize>> {
    if !packing {
        return (0..lengths.len()).map(|index| vec![index]).collect();
    }
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut blocks: Vec<Vec<usize>> = Vec::new();
    // (room left, block): the first at or above a length is the fullest block that takes it, the oldest among equals.
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in order {
        let length = lengths[index];
        let (room, block) = match rooms.range((length, 0)..).next().copied() {
            Some(found) => {
                rooms.remove(&found);
                found
            }
            None => {
                blocks.push(Vec::new());
                (max_length.max(length), blocks.len() - 1)
            }
        };
        blocks[block].push(index);
        rooms.insert((room - length, block));
    }
    blocks.iter_mut().for_each(|block| block.sort_unstable());
    blocks.sort_unstable_by_key(|block| block.first().copied());
    blocks
}

/// Packs documents as they come, in bounded memory: whenever `window` tokens wait, they are laid into blocks, the full ones
/// are written, and the documents of the others wait for more.
pub(crate) struct Packer {
    writer: shard::Writer,
    max_length: usize,
    packing: bool,
    window: usize,
    waiting: Vec<Sample>,
    tokens: usize,
}

impl Packer {
    pub(crate) fn new(writer: shard::Writer, max_length: usize, packing: bool, window: usize) -> Self {
        Self { writer, max_length, packing, window, waiting: Vec::new(), tokens: 0 }
    }

    pub(crate) fn push(&mut self, sample: Sample) -> Result<()> {
        self.tokens += sample.ids.len();
        self.waiting.push(sample);
        if self.tokens < self.window {
            return Ok(());
        }
        self.write_blocks(self.max_length / 128)?;
        // Documents that fit nowhere must not be laid out again and again.
        if self.tokens > self.window / 2 { self.write_blocks(self.max_length) } else { Ok(()) }
    }

    /// Writes what still waits; the number of blocks.
    pub(crate) fn finish(mut self) -> Result<usize> {
        self.write_blocks(self.max_length)?;
        let blocks = self.writer.num_blocks();
        self.writer.finish()?;
        Ok(blocks)
    }

    /// Writes the blocks in which at most `room` tokens are free.
    fn write_blocks(&mut self, room: usize) -> Result<()> {
        let lengths: Vec<usize> = self.waiting.iter().map(|sample| sample.ids.len()).collect();
        let mut written = vec![false; lengths.len()];
        for block in plan(&lengths, self.max_length, self.packing) {
            let used: usize = block.iter().map(|&index| lengths[index]).sum();
            if self.packing && used + room < self.max_length {
                continue;
            }
            self.writer.push(block.iter().map(|&index| &self.waiting[index]))?;
            block.iter().for_each(|&index| written[index] = true);
            self.tokens -= used;
        }
        let mut index = 0;
        self.waiting.retain(|_| {
            index += 1;
            !written[index - 1]
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PreparedSplit;
    use proptest::prelude::*;

    #[test]
    fn documents_fill_the_fullest_block_that_takes_them() {
        assert_eq!(plan(&[3, 6, 4, 7, 2], 10, true), [vec![0, 3], vec![1, 2], vec![4]]);
        assert_eq!(plan(&[3, 6], 10, false), [[0], [1]]);
        assert_eq!(plan(&[12, 1], 10, true), [[0], [1]]);
        assert!(plan(&[], 10, true).is_empty());
    }

    proptest! {
        #[test]
        fn every_document_once_and_no_block_too_long(
            lengths in proptest::collection::vec(1_usize..=64, 0..200),
            packing: bool,
        ) {
            let blocks = plan(&lengths, 64, packing);
            let mut all: Vec<usize> = blocks.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let sums: Vec<usize> = blocks.iter().map(|b| b.iter().map(|&i| lengths[i]).sum()).collect();
            prop_assert!(sums.iter().all(|&sum| sum <= 64));
            prop_assert!(blocks.windows(2).all(|pair| pair[0][0] < pair[1][0]));
            prop_assert!(blocks.iter().all(|block| block.windows(2).all(|pair| pair[0] < pair[1])));
            if packing {
                // No two blocks could have been one.
                let mut sorted = sums.clone();
                sorted.sort_unstable();
                prop_assert!(sorted.len() < 2 || sorted[0] + sorted[1] > 64);
            }
            prop_assert_eq!(plan(&lengths, 64, packing), blocks);
        }

        #[test]
        fn packing_as_they_come_keeps_every_document_and_fills_blocks(
            lengths in proptest::collection::vec(1_usize..=20, 100..300),
            packing: bool,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("train.shard");
            let writer = shard::Writer::create(&path, [0; 32], 128).unwrap();
            let mut packer = Packer::new(writer, 128, packing, 400);
            for (index, &length) in lengths.iter().enumerate() {
                let source = Source { file: "f".into(), line: index + 1 };
                let trained = vec![false; length];
                packer.push(Sample { ids: vec![index as u32; length], trained, bytes: 0, source }).unwrap();
                prop_assert!(packer.tokens < 400 && packer.tokens == packer.waiting.iter().map(|s| s.ids.len()).sum::<usize>());
            }
            let blocks = packer.finish().unwrap();
            let shard = PreparedSplit::open_file(&path).unwrap();
            prop_assert_eq!(shard.len(), blocks);
            let mut seen = vec![0; lengths.len()];
            for index in 0..blocks {
                let block = shard.block(index).unwrap();
                prop_assert!(block.ids.len() <= 128);
                for (length, source) in block.lengths.iter().zip(&block.sources) {
                    prop_assert_eq!(*length, lengths[source.line - 1]);
                    seen[source.line - 1] += 1;
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
            let total: usize = lengths.iter().sum();
            if packing {
                prop_assert!(blocks <= total.div_ceil(128) + 2, "{} blocks for {} tokens", blocks, total);
            } else {
                prop_assert_eq!(blocks, lengths.len());
            }
        }

        #[test]
        fn small_documents_waste_little(lengths in proptest::collection::vec(1_usize..=16, 200..400)) {
            let total: usize = lengths.iter().sum();
            let blocks = plan(&lengths, 64, true).len();
            prop_assert!(blocks <= total.div_ceil(64) + 1, "{} blocks for {} tokens", blocks, total);
        }
    }
}
