//! Blocks made while the data is read, for sources too large to prepare: a row is read, cleaned, tokenised, put into a
//! buffer from which the next document is drawn at random, and packed with those drawn around it.
//!
//! Memory is bounded by the buffer and by what waits to be packed. Where the stream stands is the position of the next
//! row, how many random numbers were drawn, and the documents in between: that is what a checkpoint holds, so that a
//! resumed run sees the same blocks as one that was never interrupted, without tokenising a row twice.
use super::files::{self, DataSet, Input, Numbered};
use crate::{
    Block, ChatTemplate, Error, OnBadRow, PrepareOptions, PreparedSplit, Result, RowFormat, Same, Sample,
    SampleOptions, Split, Tokenizer, atomic,
    clean::{self, Cleaner},
    pack::Waiting,
    read::{self, RawRow, RawRows},
    row::{self, BadRow, place},
    sample, shard, similar,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashSet, VecDeque},
    fs,
    io::Write,
    path::Path,
    sync::Arc,
};

/// Rows that are worked on at a time, on all cores.
const GROUP_ROWS: usize = 256;
/// Bytes of rows after which a group ends too.
const GROUP_BYTES: usize = 1 << 20;
/// Blocks' worth of tokens that wait to be packed well.
const WINDOW_BLOCKS: usize = 32;
/// Documents among which the next is drawn when the options do not say.
const SHUFFLE_BUFFER: usize = 10_000;

/// Files of a checkpoint.
const STATE: &str = "stream.json";
const DOCUMENTS: &str = "stream.shard";

/// Where a stream stands, besides the documents that it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    /// Times that all files were read.
    epoch: u64,
    /// The file that is being read.
    file: usize,
    /// Rows of it read.
    row: u64,
    /// The format of its rows, once one was seen.
    format: Option<RowFormat>,
    /// Random numbers drawn.
    drawn: u64,
    /// Blocks that are ready.
    ready: usize,
    /// Documents made before this epoch: what an epoch without any is told by.
    before_epoch: u64,
    counts: StreamCounts,
}

/// What became of the rows of a stream so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamCounts {
    /// Rows read, those of every epoch.
    pub rows: u64,
    /// Rows that could not be used.
    pub rejected: u64,
    /// Rows that cleaning removed.
    pub removed: u64,
    /// Rows that are held out too.
    pub leaked: u64,
    /// Documents made of the rest.
    pub documents: u64,
}

/// Blocks of training data in the order in which they are trained on, without an end.
pub struct BlockStream<'a> {
    reader: Reader<'a>,
    inputs: Vec<Input>,
    seed: u64,
    capacity: usize,
    rows: Option<RawRows>,
    position: Position,
    buffer: Vec<Sample>,
    waiting: Waiting,
    ready: VecDeque<Vec<Sample>>,
}

/// What makes documents of rows, on all cores.
struct Reader<'a> {
    set: DataSet,
    sample_options: SampleOptions,
    cleaner: Cleaner,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    held_out: HashSet<u64>,
}

/// What became of a row.
enum Done {
    Samples(RowFormat, Vec<Sample>),
    Rejected(BadRow),
    Removed(RowFormat),
    Leaked(RowFormat),
}

impl<'a> BlockStream<'a> {
    /// The stream of `options`' training data from its beginning; `seed` says which documents are drawn.
    ///
    /// # Errors
    /// Options that do not go together, a file that cannot be read, held-out data that cannot be read.
    pub fn open(
        options: &PrepareOptions,
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        seed: u64,
    ) -> Result<Self> {
        options.check()?;
        // Another kind of tokenizer takes longer, and that is all.
        let _ = tokenizer.for_bulk();
        let mut sets = files::data_sets(options)?;
        let all = files::inputs(&sets, &mut |_| ())?;
        let (inputs, held_out): (Vec<_>, Vec<_>) = all.into_iter().partition(|input| input.digest.is_none());
        let cleaner = Cleaner::new(&options.clean)?;
        let held_out = match options.clean.leakage {
            Same::Keep => HashSet::new(),
            Same::Exact | Same::Near => hashes(&held_out, &sets, &cleaner)?,
        };
        let (Some(set), false) = (sets.pop(), inputs.is_empty()) else {
            return Err(Error::Failure("a stream was opened of data that is not streamed".into()));
        };
        let sample_options = SampleOptions::from(options);
        Ok(Self {
            reader: Reader { set, sample_options, cleaner, tokenizer, template, held_out },
            inputs,
            seed,
            capacity: options.shuffle_buffer.unwrap_or(SHUFFLE_BUFFER),
            rows: None,
            position: Position::default(),
            buffer: Vec::new(),
            waiting: Waiting::new(options.max_length, options.packing, WINDOW_BLOCKS * options.max_length),
            ready: VecDeque::new(),
        })
    }

    /// Times that all files were read.
    pub fn epoch(&self) -> u64 {
        self.position.epoch
    }

    /// What became of the rows so far.
    pub fn counts(&self) -> StreamCounts {
        self.position.counts
    }

    /// The next block.
    ///
    /// # Errors
    /// A file that cannot be read or has changed; with `on_bad_row = "error"` the first row that cannot be used; files
    /// without a row that can.
    pub fn next_block(&mut self) -> Result<Block> {
        loop {
            if let Some(samples) = self.ready.pop_front() {
                let mut block = Block::default();
                samples.iter().for_each(|sample| block.push(sample));
                return Ok(block);
            }
            self.read_more()?;
        }
    }

    /// Reads a group of rows, or ends a file.
    fn read_more(&mut self) -> Result<()> {
        let (mut group, mut bytes, mut failure, mut ended) = (Vec::new(), 0, None, false);
        let rows = match &mut self.rows {
            Some(rows) => rows,
            none => none.insert(open_at(&self.inputs[self.position.file], &self.reader.set, self.position.row)?),
        };
        while group.len() < GROUP_ROWS && bytes < GROUP_BYTES {
            match rows.next() {
                Some(Ok(raw)) => {
                    bytes += raw.bytes;
                    group.push(raw);
                }
                // What stands before an error is worked on first: of several wrong rows the first is the one reported.
                Some(Err(error)) => {
                    failure = Some(error);
                    break;
                }
                None => {
                    ended = true;
                    break;
                }
            }
        }
        self.position.row += group.len() as u64;
        self.position.counts.rows += group.len() as u64;
        let (reader, file) = (&self.reader, &self.inputs[self.position.file].name);
        let done: Vec<Result<Done>> = group.par_iter().map(|raw| reader.look(raw, file)).collect();
        for (raw, done) in group.iter().zip(done) {
            self.take(raw, done?)?;
        }
        match failure {
            Some(error) => Err(error),
            None if ended => self.end_file(),
            None => Ok(()),
        }
    }

    fn name(&self) -> &Arc<str> {
        &self.inputs[self.position.file].name
    }

    /// Takes over what became of a row.
    fn take(&mut self, raw: &RawRow, done: Done) -> Result<()> {
        let format = match &done {
            Done::Samples(format, _) | Done::Removed(format) | Done::Leaked(format) => *format,
            Done::Rejected(bad) if !self.reader.skips() => return Err(bad.error(self.name())),
            Done::Rejected(_) => {
                self.position.counts.rejected += 1;
                return Ok(());
            }
        };
        let common = *self.position.format.get_or_insert(format);
        if format != common {
            if self.reader.skips() {
                self.position.counts.rejected += 1;
                return Ok(());
            }
            return Err(Error::Input(format!(
                "{}: the row is of format {}, those before it are {}; put them into separate files, name one with row_format, or \
                 set on_bad_row = \"skip\" to keep those of the first",
                place(self.name(), raw.line),
                format.name(),
                common.name()
            )));
        }
        match done {
            Done::Samples(_, samples) => {
                for sample in samples {
                    self.position.counts.documents += 1;
                    self.shuffle(sample)?;
                }
            }
            Done::Removed(_) => self.position.counts.removed += 1,
            Done::Leaked(_) => self.position.counts.leaked += 1,
            Done::Rejected(_) => {}
        }
        Ok(())
    }

    /// Puts a document into the buffer; when that is full, another one leaves it for the blocks.
    fn shuffle(&mut self, sample: Sample) -> Result<()> {
        if self.buffer.len() < self.capacity {
            self.buffer.push(sample);
            return Ok(());
        }
        let drawn = self.random(self.capacity);
        let sample = std::mem::replace(&mut self.buffer[drawn], sample);
        self.pack(sample)
    }

    fn pack(&mut self, sample: Sample) -> Result<()> {
        let ready = &mut self.ready;
        self.waiting.push(sample, &mut |block| {
            ready.push_back(block);
            Ok(())
        })
    }

    fn end_file(&mut self) -> Result<()> {
        self.inputs[self.position.file].check_unchanged()?;
        self.rows = None;
        self.position.file += 1;
        (self.position.row, self.position.format) = (0, None);
        if self.position.file < self.inputs.len() {
            return Ok(());
        }
        let counts = self.position.counts;
        if counts.documents == self.position.before_epoch {
            return Err(Error::Input(format!(
                "train: no row of {} can be trained on; of {} rows {} were rejected, {} removed by cleaning, and {} are held \
                 out too",
                self.reader.set.options.train.join(", "),
                counts.rows,
                counts.rejected,
                counts.removed,
                counts.leaked
            )));
        }
        // All rows of an epoch are seen before the first of the next.
        while !self.buffer.is_empty() {
            let drawn = self.random(self.buffer.len());
            let sample = self.buffer.swap_remove(drawn);
            self.pack(sample)?;
        }
        self.position.before_epoch = counts.documents;
        self.position.epoch += 1;
        self.position.file = 0;
        Ok(())
    }

    /// A random number below `below`, which follows from the seed and how many were drawn before it (SplitMix64:
    /// Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
    fn random(&mut self, below: usize) -> usize {
        self.position.drawn += 1;
        let mut z = self.seed.wrapping_add(self.position.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((u128::from(z) * below as u128) >> 64) as usize
    }

    /// Writes where the stream stands into `folder`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let options = &self.reader.set.options;
        let weighted = options.is_weighted(Split::Train);
        let mut writer = shard::Writer::create(&folder.join(DOCUMENTS), [0; 32], options.max_length, weighted)?;
        for block in &self.ready {
            writer.push(block.iter())?;
        }
        writer.push(self.waiting.samples.iter())?;
        writer.push(self.buffer.iter())?;
        writer.finish()?;
        let position = Position { ready: self.ready.len(), ..self.position.clone() };
        let json = serde_json::to_string_pretty(&position)
            .map_err(|e| Error::Failure(format!("{STATE} does not serialise: {e}")))?;
        atomic::write_file(&folder.join(STATE), |w| writeln!(w, "{json}"))
    }

    /// About how many bytes [`BlockStream::save`] writes.
    pub fn num_bytes(&self) -> usize {
        let samples = self.ready.iter().flatten().chain(&self.waiting.samples).chain(&self.buffer);
        samples.map(|sample| 8 * sample.ids.len() + 64).sum()
    }

    /// Goes on from where the stream stood when it was saved in `folder`.
    ///
    /// # Errors
    /// Files that are missing, damaged or of other data.
    pub fn restore(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(STATE);
        let text = fs::read_to_string(&path).map_err(|e| Error::io("cannot read", &path, e))?;
        let wrong = |what: &str| Error::Input(format!("{}: {what}; resume from another checkpoint", path.display()));
        let position: Position = serde_json::from_str(&text).map_err(|e| wrong(&e.to_string()))?;
        let saved = PreparedSplit::open_file(&folder.join(DOCUMENTS))?;
        if position.file >= self.inputs.len() || saved.len() != position.ready.saturating_add(2) {
            return Err(wrong("it does not fit the data"));
        }
        let mut blocks = (0..saved.len()).map(|block| Ok(saved.block(block)?.into_samples()));
        self.ready = blocks.by_ref().take(position.ready).collect::<Result<_>>()?;
        self.waiting.restore(blocks.next().transpose()?.unwrap_or_default());
        self.buffer = blocks.next().transpose()?.unwrap_or_default();
        self.rows = None;
        self.position = position;
        Ok(())
    }
}

impl Reader<'_> {
    fn look(&self, raw: &RawRow, file: &Arc<str>) -> Result<Done> {
        let understood = match row::understand(raw, file, &self.set.rows, &mut |_| ()) {
            Ok(understood) => understood,
            Err(bad) => return Ok(Done::Rejected(bad)),
        };
        let (format, mut row) = (understood.format, understood.row);
        self.cleaner.clean(&mut row);
        let text = clean::whole_text(&row.kind);
        if self.cleaner.unwanted(&text).is_some() {
            return Ok(Done::Removed(format));
        }
        if !self.held_out.is_empty() && self.held_out.contains(&similar::exact(&text, &similar::normal(&text))) {
            return Ok(Done::Leaked(format));
        }
        match sample::samples(&row, self.tokenizer, self.template, &self.sample_options) {
            Ok((samples, _)) => Ok(Done::Samples(format, samples)),
            Err(Error::Input(what)) if self.skips() => {
                Ok(Done::Rejected(BadRow { line: raw.line, what, content: raw.content.to_string() }))
            }
            Err(error) => Err(error),
        }
    }

    fn skips(&self) -> bool {
        self.set.options.on_bad_row == OnBadRow::Skip
    }
}

/// The rows of a file from row `row` on.
fn open_at(input: &Input, set: &DataSet, row: u64) -> Result<RawRows> {
    input.check_unchanged()?;
    let mut rows = read::open(&input.file, &set.rows, &Arc::default())?;
    for _ in 0..row {
        match rows.next() {
            Some(read) => drop(read?),
            None => {
                return Err(Error::Input(format!(
                    "{}: the file has fewer than the {row} rows that were read of it before; it is not the one that the run \
                     began with",
                    input.file.shown().display()
                )));
            }
        }
    }
    Ok(rows)
}

/// What the held-out rows say, as hashes.
fn hashes(inputs: &[Input], sets: &[DataSet], cleaner: &Cleaner) -> Result<HashSet<u64>> {
    let mut hashes = HashSet::new();
    let hash = |row: &Numbered| {
        let input = &inputs[row.input];
        // Rows that cannot be used were dealt with when the held-out data was prepared.
        let understood = row::understand(&row.raw, &input.name, &sets[input.source].rows, &mut |_| ());
        let mut row = understood.ok()?.row;
        cleaner.clean(&mut row);
        let text = clean::whole_text(&row.kind);
        Some(similar::exact(&text, &similar::normal(&text)))
    };
    let work = |group: Vec<Numbered>| -> Vec<u64> { group.par_iter().filter_map(hash).collect() };
    let mut take = |found: Vec<u64>| {
        hashes.extend(found);
        Ok(())
    };
    files::for_each_group(inputs, (0..inputs.len(), 0), sets, &work, &mut take, &mut |_| ())?;
    Ok(hashes)
}

#[cfg(test)]
mod tests;
