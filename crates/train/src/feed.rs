//! Where the blocks of a step come from: prepared data in the order of its epochs, or a stream that is read as training goes on.

use crate::Result;
use crate::order::{Drawn, Order};
use crate::train::Job;
use std::path::Path;
use tunesmith_text::{Block, BlockStream, PreparedSplit, Report, Split};

/// The source of training data.
pub(crate) enum Feed<'a> {
    /// Read before training began.
    Prepared { train: Box<PreparedSplit>, order: Order },
    /// Read as training goes on.
    Stream { stream: Box<BlockStream<'a>>, blocks_per_step: usize },
}

impl<'a> Feed<'a> {
    /// What `job` trains on, from the beginning.
    ///
    /// # Errors
    /// Data that cannot be read, or an empty training split.
    pub(crate) fn open(job: &Job<'a>) -> Result<Self> {
        let (config, t) = (job.config, &job.config.training);
        if config.data.streaming {
            // As they were prepared: names of sources are paths by now.
            let options = Report::read(job.data)?.options;
            let stream = BlockStream::open(&options, job.tokenizer, job.template, config.seed)?;
            let blocks_per_step = t.per_device_train_batch_size * t.gradient_accumulation_steps;
            return Ok(Self::Stream { stream: Box::new(stream), blocks_per_step });
        }
        let train = Box::new(PreparedSplit::open(job.data, Split::Train)?);
        let order = Order::new(config, &train)?;
        Ok(Self::Prepared { train, order })
    }

    /// Goes on where it was when it was saved in `checkpoint`, after the steps that the caller knows of.
    pub(crate) fn restore(&mut self, checkpoint: &Path) -> Result<()> {
        match self {
            // A function of the step.
            Self::Prepared { .. } => Ok(()),
            Self::Stream { stream, .. } => stream.restore(checkpoint),
        }
    }

    /// What a checkpoint must hold besides the step.
    pub(crate) fn stream(&self) -> Option<&BlockStream<'a>> {
        match self {
            Self::Prepared { .. } => None,
            Self::Stream { stream, .. } => Some(stream),
        }
    }

    /// The blocks of `step`, counted from 0; steps are asked for in order.
    pub(crate) fn blocks(&mut self, step: u64) -> Result<Vec<Block>> {
        match self {
            Self::Prepared { train, order } => {
                let blocks = order.blocks(step).iter().map(|i| train.block(*i as usize));
                blocks.collect::<std::result::Result<_, _>>()
            }
            Self::Stream { stream, blocks_per_step } => {
                (0..*blocks_per_step).map(|_| stream.next_block()).collect::<std::result::Result<_, _>>()
            }
        }
    }

    /// Number of blocks, where it is known.
    pub(crate) fn num_blocks(&self) -> Option<usize> {
        match self {
            Self::Prepared { train, .. } => Some(train.len()),
            Self::Stream { .. } => None,
        }
    }

    /// Epochs done after `step` steps: with a fraction where the length of one is known, else those that were read whole.
    pub(crate) fn epoch(&self, step: u64) -> f64 {
        match self {
            Self::Prepared { order, .. } => step as f64 / order.steps_per_epoch() as f64,
            Self::Stream { stream, .. } => stream.epoch() as f64,
        }
    }

    /// Steps of the whole run.
    pub(crate) fn max_steps(&self, config: &crate::config::Config) -> u64 {
        match self {
            Self::Prepared { order, .. } => order.max_steps(config),
            // A configuration without max_steps was refused.
            Self::Stream { .. } => u64::try_from(config.training.max_steps).unwrap_or(0),
        }
    }

    /// Epochs of a run of `max_steps`, rounded up, as far as they are known.
    pub(crate) fn num_train_epochs(&self, max_steps: u64) -> u64 {
        match self {
            Self::Prepared { order, .. } => max_steps.div_ceil(order.steps_per_epoch()),
            Self::Stream { stream, .. } => stream.epoch() + 1,
        }
    }

    /// What there is to say after `step` of `max_steps` steps: at the end of an epoch, or of the run, what was drawn of each of
    /// several data sets; at the end of the run, what became of the rows of a stream.
    pub(crate) fn note(&mut self, step: u64, max_steps: u64) -> Result<Option<String>> {
        match self {
            Self::Prepared { train, order } => {
                let per_epoch = order.steps_per_epoch();
                if train.sources().is_empty() || !step.is_multiple_of(per_epoch) && step != max_steps {
                    return Ok(None);
                }
                let epoch = (step - 1) / per_epoch;
                let drawn = order.drawn(train, epoch * per_epoch..step)?;
                Ok(Some(drawn_in(epoch, step - epoch * per_epoch, per_epoch, &drawn)))
            }
            Self::Stream { stream, .. } if step == max_steps => {
                let (counts, epoch) = (stream.counts(), stream.epoch());
                Ok(Some(format!(
                    "the stream gave {} documents of {} rows in {epoch} whole epochs; {} rows could not be used, {} were removed \
                     by cleaning, {} are held out too",
                    counts.documents, counts.rows, counts.rejected, counts.removed, counts.leaked
                )))
            }
            Self::Stream { .. } => Ok(None),
        }
    }
}

fn drawn_in(epoch: u64, steps: u64, per_epoch: u64, drawn: &[Drawn]) -> String {
    let all: u64 = drawn.iter().map(|source| source.tokens).sum();
    let of = |source: &Drawn| {
        let share = 100.0 * source.tokens as f64 / all.max(1) as f64;
        format!("{} {} rows, {} tokens ({share:.1} %)", source.name, source.rows, source.tokens)
    };
    let sources: Vec<String> = drawn.iter().map(of).collect();
    let steps = if steps == per_epoch { String::new() } else { format!(" in {steps} of {per_epoch} steps") };
    format!("epoch {}{steps} drew {}", epoch + 1, sources.join("; "))
}
