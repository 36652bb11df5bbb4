//! Which blocks of training data each step sees: a function of the seed and the step alone.

use crate::config::Config;
use crate::{Error, Result};
use std::collections::HashSet;
use tunesmith_tensor::rng::Rng;
use tunesmith_text::PreparedSplit;

/// Streams of random numbers under the run's seed that belong to the data order (adapter initialisation counts from 1).
const DATA_STREAM: u64 = 1 << 32;
/// Those that say which blocks of a mixed data set come first.
const MIX_STREAM: u64 = 1 << 48;

/// Blocks of training data in the order in which they are seen: a new permutation for each epoch. Of several data sets an
/// epoch draws a part or more than all: each set goes on where the epoch before it ended, and begins anew, in another
/// order, when all of its blocks were seen.
pub(crate) struct Order {
    seed: u64,
    sets: Vec<Set>,
    blocks_per_step: usize,
    epoch: Option<(u64, Vec<u32>)>,
}

/// The blocks of one data set.
#[derive(Clone, Copy)]
struct Set {
    first: u32,
    count: u32,
    per_epoch: u32,
}

/// What an epoch drew of one data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drawn {
    pub(crate) name: String,
    /// Different rows.
    pub(crate) rows: usize,
    pub(crate) tokens: u64,
}

impl Order {
    /// The order of a run over the blocks of `train`.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn new(config: &Config, train: &PreparedSplit) -> Result<Self> {
        if train.is_empty() {
            return Err(Error::Input(
                "the training split is empty: give more data, or smaller validation and test fractions".into(),
            ));
        }
        let t = &config.training;
        let blocks_per_step = t.per_device_train_batch_size * t.gradient_accumulation_steps;
        let mut sets = Vec::new();
        let mut first = 0;
        for source in train.sources() {
            sets.push(Set { first, count: source.blocks as u32, per_epoch: source.blocks_per_epoch as u32 });
            first += source.blocks as u32;
        }
        if sets.is_empty() {
            sets.push(Set { first: 0, count: train.len() as u32, per_epoch: train.len() as u32 });
        }
        Ok(Self { seed: config.seed, sets, blocks_per_step, epoch: None })
    }

    /// Steps of the whole run.
    pub(crate) fn max_steps(&self, config: &Config) -> u64 {
        let by_epochs = (config.training.num_train_epochs * self.steps_per_epoch() as f64).ceil() as u64;
        u64::try_from(config.training.max_steps).unwrap_or(by_epochs)
    }

    pub(crate) fn steps_per_epoch(&self) -> u64 {
        let blocks: usize = self.sets.iter().map(|set| set.per_epoch as usize).sum();
        blocks.div_ceil(self.blocks_per_step) as u64
    }

    /// Tokens of an epoch on average, of data sets that hold `tokens` each.
    pub(crate) fn tokens_per_epoch(&self, tokens: impl Iterator<Item = u64>) -> f64 {
        self.sets
            .iter()
            .zip(tokens)
            .map(|(s, tokens)| tokens as f64 * f64::from(s.per_epoch) / f64::from(s.count))
            .sum()
    }

    /// The blocks of `step` (counted from 0); the last step of an epoch takes what is left.
    pub(crate) fn blocks(&mut self, step: u64) -> &[u32] {
        let (epoch, in_epoch) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        if self.epoch.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let mut order = Vec::new();
            for (number, set) in self.sets.iter().enumerate() {
                set.draw(self.seed, number as u64, epoch, &mut order);
            }
            Rng::new(self.seed, DATA_STREAM + epoch).shuffle(&mut order);
            self.epoch = Some((epoch, order));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        let start = in_epoch * self.blocks_per_step;
        &order[start..(start + self.blocks_per_step).min(order.len())]
    }

    /// What the steps `steps` of an epoch drew of each data set of `train`; nothing when there is only one.
    ///
    /// # Errors
    /// When a block cannot be read.
    pub(crate) fn drawn(&mut self, train: &PreparedSplit, steps: std::ops::Range<u64>) -> Result<Vec<Drawn>> {
        let sources = train.sources();
        let mut drawn: Vec<_> = sources.iter().map(|s| Drawn { name: s.name.clone(), ..Drawn::default() }).collect();
        if drawn.is_empty() {
            return Ok(drawn);
        }
        let sets = self.sets.clone();
        let mut rows = HashSet::new();
        for step in steps {
            for &block in self.blocks(step) {
                let set = sets.iter().rposition(|set| set.first <= block).unwrap_or(0);
                for (source, length) in train.documents(block as usize)? {
                    drawn[set].tokens += length as u64;
                    drawn[set].rows += usize::from(rows.insert(source));
                }
            }
        }
        Ok(drawn)
    }
}

impl Set {
    /// Appends the blocks of set `number` that `epoch` draws.
    fn draw(self, seed: u64, number: u64, epoch: u64, order: &mut Vec<u32>) {
        let (count, per_epoch) = (u64::from(self.count), u64::from(self.per_epoch));
        if per_epoch.is_multiple_of(count) {
            // Whole passes: what comes first does not matter, since the epoch is shuffled.
            (0..per_epoch / count).for_each(|_| order.extend(self.first..self.first + self.count));
            return;
        }
        let (mut at, end) = (epoch * per_epoch, (epoch + 1) * per_epoch);
        while at < end {
            let (pass, from) = (at / count, at % count);
            let until = count.min(from + end - at);
            let mut blocks: Vec<u32> = (self.first..self.first + self.count).collect();
            Rng::new(seed, MIX_STREAM + (number << 32) + pass).shuffle(&mut blocks);
            order.extend_from_slice(&blocks[from as usize..until as usize]);
            at += until - from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(sets: &[(u32, u32)], blocks_per_step: usize) -> Order {
        let mut first = 0;
        let sets = sets.iter().map(|&(count, per_epoch)| {
            first += count;
            Set { first: first - count, count, per_epoch }
        });
        Order { seed: 1, sets: sets.collect(), blocks_per_step, epoch: None }
    }

    fn epoch(order: &mut Order, epoch: u64) -> Vec<u32> {
        let steps = order.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|step| order.blocks(step).to_vec()).collect()
    }

    #[test]
    fn every_block_once_an_epoch_in_an_order_of_its_own() {
        let mut order = order(&[(10, 10)], 4);
        assert_eq!(order.steps_per_epoch(), 3);
        let [a, b, again] = [0, 1, 0].map(|number| epoch(&mut order, number));
        assert_eq!(a, again);
        assert_ne!(a, b);
        for mut blocks in [a, b] {
            blocks.sort_unstable();
            assert_eq!(blocks, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn each_set_has_its_share_of_every_epoch_and_shows_all_of_itself_before_it_begins_anew() {
        let mut order = order(&[(6, 4), (3, 7), (2, 4)], 5);
        assert_eq!(order.steps_per_epoch(), 3);
        let epochs: Vec<Vec<u32>> = (0..6).map(|number| epoch(&mut order, number)).collect();
        let of = |blocks: &[u32], range: std::ops::Range<u32>| -> Vec<u32> {
            blocks.iter().copied().filter(|block| range.contains(block)).collect()
        };
        for blocks in &epochs {
            let counts = [0..6, 6..9, 9..11].map(|range| of(blocks, range).len());
            assert_eq!(counts, [4, 7, 4]);
        }
        // Three epochs of four are two passes of six.
        let three: Vec<u32> = epochs[..3].concat();
        for block in 0..6 {
            assert_eq!(three.iter().filter(|&&b| b == block).count(), 2);
        }
        let first: HashSet<u32> = of(&epochs[0], 0..6).into_iter().collect();
        assert_eq!(first.len(), 4, "no block twice before all were seen");
        assert_eq!(order.blocks(7).to_vec(), order.blocks(7).to_vec());
        assert_eq!(epochs[1], epoch(&mut order, 1), "a function of the epoch alone");
        let tokens = order.tokens_per_epoch([60, 30, 20].into_iter());
        assert_eq!(tokens, 40.0 + 70.0 + 40.0);
    }
}
