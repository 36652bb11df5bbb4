//! Documents into blocks of tokens, without padding.
//!
//! Best fit decreasing: the longest documents first, each into the fullest block that still has room. Any two blocks
//! together hold more than one block's worth, so less than half of the room is wasted; on real data it is a few
//! percent.
use crate::{Preference, Result, Sample, shard};
use std::collections::BTreeSet;

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

/// Documents that wait to be laid into blocks, in bounded memory: whenever `window` tokens wait, the blocks that they
/// fill are handed on, and the documents of the others wait for more.
pub(crate) struct Waiting {
    max_length: usize,
    packing: bool,
    window: usize,
    pub(crate) samples: Vec<Sample>,
    tokens: usize,
}

impl Waiting {
    pub(crate) fn new(max_length: usize, packing: bool, window: usize) -> Self {
        Self { max_length, packing, window, samples: Vec::new(), tokens: 0 }
    }

    /// Puts back what waited when it was saved.
    pub(crate) fn restore(&mut self, samples: Vec<Sample>) {
        self.tokens = samples.iter().map(|sample| sample.ids.len()).sum();
        self.samples = samples;
    }

    /// Adds a document and hands what is full to `write`.
    pub(crate) fn push(&mut self, sample: Sample, write: &mut dyn FnMut(Vec<Sample>) -> Result<()>) -> Result<()> {
        self.tokens += sample.ids.len();
        // A pair stays together.
        let is_whole = sample.preference != Preference::Chosen;
        self.samples.push(sample);
        if self.tokens < self.window || !is_whole {
            return Ok(());
        }
        self.lay(self.max_length / 128, write)?;
        // Documents that fit nowhere must not be laid out again and again.
        if self.tokens > self.window / 2 { self.flush(write) } else { Ok(()) }
    }

    /// Hands on all that waits.
    pub(crate) fn flush(&mut self, write: &mut dyn FnMut(Vec<Sample>) -> Result<()>) -> Result<()> {
        self.lay(self.max_length, write)
    }

    /// Hands on the blocks in which at most `room` tokens are free.
    fn lay(&mut self, room: usize, write: &mut dyn FnMut(Vec<Sample>) -> Result<()>) -> Result<()> {
        // A pair is laid into a block as one.
        let mut units: Vec<Vec<Sample>> = Vec::new();
        for sample in std::mem::take(&mut self.samples) {
            match units.last_mut().filter(|_| sample.preference == Preference::Rejected) {
                Some(pair) => pair.push(sample),
                None => units.push(vec![sample]),
            }
        }
        let lengths: Vec<usize> = units.iter().map(|unit| unit.iter().map(|sample| sample.ids.len()).sum()).collect();
        for block in plan(&lengths, self.max_length, self.packing) {
            let used: usize = block.iter().map(|&index| lengths[index]).sum();
            if self.packing && used + room < self.max_length {
                continue;
            }
            self.tokens -= used;
            write(block.into_iter().flat_map(|index| std::mem::take(&mut units[index])).collect())?;
        }
        self.samples = units.into_iter().flatten().collect();
        Ok(())
    }
}

/// Packs documents as they come into a shard.
pub(crate) struct Packer {
    writer: shard::Writer,
    waiting: Waiting,
}

impl Packer {
    pub(crate) fn new(writer: shard::Writer, max_length: usize, packing: bool, window: usize) -> Self {
        Self { writer, waiting: Waiting::new(max_length, packing, window) }
    }

    pub(crate) fn push(&mut self, sample: Sample) -> Result<()> {
        let Self { writer, waiting } = self;
        waiting.push(sample, &mut |block| writer.push(block.iter()))
    }

    /// Writes what still waits, so that what follows shares no block with it; the number of blocks so far.
    pub(crate) fn flush(&mut self) -> Result<usize> {
        let Self { writer, waiting } = self;
        waiting.flush(&mut |block| writer.push(block.iter()))?;
        Ok(writer.num_blocks())
    }

    /// Writes what still waits; the number of blocks.
    pub(crate) fn finish(mut self) -> Result<usize> {
        let blocks = self.flush()?;
        self.writer.finish()?;
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PreparedSplit, Source};
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
            let writer = shard::Writer::create(&path, [0; 32], 128, false).unwrap();
            let mut packer = Packer::new(writer, 128, packing, 400);
            for (index, &length) in lengths.iter().enumerate() {
                let source = Source { file: "f".into(), line: index + 1 };
                let trained = vec![false; length];
                let ids = vec![index as u32; length];
                packer.push(Sample { ids, trained, source, ..Sample::default() }).unwrap();
                let Waiting { samples, tokens, .. } = &packer.waiting;
                prop_assert!(*tokens < 400 && *tokens == samples.iter().map(|s| s.ids.len()).sum::<usize>());
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
