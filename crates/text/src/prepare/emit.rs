//! The second way through the rows: tokens, blocks, and the rows that could not be used.
use super::{
    facts::Decision,
    files::{self, DataSet, Input, Numbered, digest},
};
use crate::{
    ChatTemplate, Error, OnBadRow, PrepareOptions, PrepareProgress, Report, Result, Sample, SourceReport, Split,
    SplitReport, Tokenizer,
    atomic::Pending,
    clean::Cleaner,
    mix,
    pack::Packer,
    report::REJECTS,
    row::{self, BadRow, RowKind, place},
    sample::{self, Preference, RowCounts, SampleOptions},
    shard,
    tokenizer::hex,
};
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// Tokens of a split that wait to be packed: enough to fill blocks well, little to hold.
const WINDOW: usize = 4 << 20;

/// What is to be done.
pub(super) struct Job<'a> {
    pub(super) folder: &'a Path,
    pub(super) options: &'a PrepareOptions,
    pub(super) sets: &'a [DataSet],
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) cleaner: Cleaner,
    pub(super) inputs: &'a [Input],
    pub(super) key: [u8; 32],
    /// By row, how often it is trained on; empty when once.
    pub(super) copies: &'a [u32],
    /// By row, how much its loss counts; empty when 1.
    pub(super) weights: &'a [f32],
}

/// Ways through the rows when some are trained on several times: their copies are spread over the blocks.
const MAX_PASSES: u32 = 8;

/// How many of the `copies` of a row the pass `pass` of `passes` writes: all together make `copies`, and the first has
/// at least one.
fn copies_in_pass(copies: u32, pass: u32, passes: u32) -> u32 {
    let until = |pass: u32| (u64::from(copies) * u64::from(pass)).div_ceil(u64::from(passes));
    (until(pass + 1) - until(pass)) as u32
}

/// What became of a row.
enum Done {
    /// Its samples, how often they are written in this pass, and its label.
    Samples(Split, Vec<Sample>, RowCounts, u32, Option<String>),
    Rejected(BadRow),
    Removed,
}

/// Writes the shards and `rejects.jsonl`, and what is in them into `report`.
///
/// # Errors
/// A row that cannot be used, when that is an error; a split that was asked for and is empty; a folder that cannot be
/// written.
pub(super) fn emit(
    job: &Job<'_>,
    decisions: &[Decision],
    report: &mut Report,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<()> {
    let maker = Maker::new(job, decisions);
    let bytes = job.inputs.iter().map(|input| input.bytes).sum::<u64>() * u64::from(maker.passes);
    let tokens = AtomicU64::new(0);
    let mut writing = Writing::new(job, report, &tokens)?;
    let (mut start, mut index, mut bytes_before) = (0, 0, 0);
    for set in 0..job.sets.len() {
        let end = start + job.inputs[start..].iter().take_while(|input| input.source == set).count();
        let before = writing.report.train.clone();
        let mut next = index;
        for pass in 0..maker.passes {
            let work = |group: Vec<Numbered>| -> Vec<_> {
                group.par_iter().map(|row| (row.input, maker.make(row, pass))).collect()
            };
            next = files::for_each_group(
                job.inputs,
                (start..end, index),
                job.sets,
                &work,
                &mut |done| writing.write(done),
                &mut |read| {
                    let (bytes_done, tokens) = (bytes_before + read, tokens.load(Ordering::Relaxed));
                    progress(PrepareProgress::Tokenizing { bytes_done, bytes, tokens });
                },
            )?;
            bytes_before += job.inputs[start..end].iter().map(|input| input.bytes).sum::<u64>();
        }
        (start, index) = (end, next);
        if !job.options.sources.is_empty() {
            writing.end_source(set, &before)?;
        }
    }
    writing.finish()
}

/// Makes samples of rows.
struct Maker<'a> {
    job: &'a Job<'a>,
    decisions: &'a [Decision],
    /// Of each data set, for rows that are held out and for those that are trained on.
    options: Vec<[SampleOptions; 2]>,
    /// Ways through the rows.
    passes: u32,
}

impl<'a> Maker<'a> {
    fn new(job: &'a Job<'a>, decisions: &'a [Decision]) -> Self {
        // What is held out is measured by what is trained alone, so that runs with other weights compare.
        let both = |set: &DataSet| {
            let train = SampleOptions::from(&set.options);
            [SampleOptions { prompt_loss_weight: 0.0, ..train.clone() }, train]
        };
        let passes = job.copies.iter().copied().max().unwrap_or(1).clamp(1, MAX_PASSES);
        Self { job, decisions, options: job.sets.iter().map(both).collect(), passes }
    }

    /// What becomes of a row in a pass. A row that is not kept is told of once, in the first.
    fn make(&self, row: &Numbered, pass: u32) -> Result<Done> {
        let Self { job, decisions, passes, .. } = self;
        let Some(decision) = decisions.get(row.index) else { return Err(changed(job, row)) };
        let input = &job.inputs[row.input];
        let copies = copies_in_pass(job.copies.get(row.index).copied().unwrap_or(1), pass, *passes);
        if matches!(decision, Decision::Removed(_)) || copies == 0 || *decision == Decision::Rejected && pass > 0 {
            return Ok(Done::Removed);
        }
        let rejected = |what| {
            let content = row.raw.content.to_string();
            Ok(Done::Rejected(BadRow { line: row.raw.line, what, content }))
        };
        let understood = row::understand(&row.raw, &input.name, &job.sets[input.source].rows, &mut |_| ());
        let split = match (decision, &understood) {
            (Decision::Keep(split), _) => *split,
            (Decision::Removed(_), _) => return Ok(Done::Removed),
            (Decision::Rejected, Err(bad)) => return Ok(Done::Rejected(bad.clone())),
            (Decision::Rejected, Ok(odd)) => {
                return rejected(format!(": the row is of format {}, unlike most rows of the file", odd.format.name()));
            }
        };
        let Ok(mut understood) = understood else { return Err(changed(job, row)) };
        job.cleaner.clean(&mut understood.row);
        let options = &self.options[input.source][usize::from(split == Split::Train)];
        match sample::samples(&understood.row, job.tokenizer, job.template, options) {
            Ok((mut samples, counts)) => {
                if let Some(&weight) = job.weights.get(row.index).filter(|_| split == Split::Train) {
                    samples.iter_mut().for_each(|sample| sample.scale_weights(weight));
                }
                let counts = if pass == 0 { counts } else { RowCounts::default() };
                Ok(Done::Samples(split, samples, counts, copies, label(&understood.row.kind)))
            }
            Err(Error::Input(_)) if job.options.on_bad_row == OnBadRow::Skip && pass > 0 => Ok(Done::Removed),
            Err(Error::Input(what)) if job.options.on_bad_row == OnBadRow::Skip => {
                rejected(what.strip_prefix(&place(&input.name, row.raw.line)).unwrap_or(&what).to_owned())
            }
            Err(error) => Err(error),
        }
    }
}

/// What is written, and counted.
struct Writing<'a> {
    job: &'a Job<'a>,
    report: &'a mut Report,
    packers: Vec<Packer>,
    rejects: Rejects,
    labels: [Labels; 3],
    tokens: &'a AtomicU64,
}

impl<'a> Writing<'a> {
    fn new(job: &'a Job<'a>, report: &'a mut Report, tokens: &'a AtomicU64) -> Result<Self> {
        let options = job.options;
        let packer = |split| {
            let (path, weighted) = (job.folder.join(shard::file_name(split)), options.is_weighted(split));
            let writer = shard::Writer::create(&path, job.key, options.block_length(), weighted)?;
            Ok(Packer::new(writer, options.block_length(), options.packing, WINDOW))
        };
        let packers = Split::ALL.into_iter().map(packer).collect::<Result<_>>()?;
        let rejects = Rejects { pending: None, rows: 0 };
        Ok(Self { job, report, packers, rejects, labels: [const { Labels::new() }; 3], tokens })
    }

    /// Writes what became of rows, each with its file, in order, so that of several wrong rows the first is the one
    /// reported.
    fn write(&mut self, done: Vec<(usize, Result<Done>)>) -> Result<()> {
        for (input, done) in done {
            match done? {
                Done::Removed => {}
                Done::Rejected(bad) => self.rejects.write(self.job.folder, &self.job.inputs[input].name, &bad)?,
                Done::Samples(split, samples, counts, copies, label) => {
                    let part = self.report.split_mut(split);
                    part.counts += counts;
                    // Counted with the first of its copies.
                    if counts.rows > 0 {
                        self.labels[split as usize].add(label);
                    }
                    if counts.longest_row > 0 {
                        part.lengths.add(counts.longest_row);
                    }
                    for sample in std::iter::repeat_n(samples, copies as usize).flatten() {
                        part.documents += 1;
                        part.tokens += sample.ids.len();
                        part.trained_tokens += sample.num_trained();
                        part.weighted_tokens += sample.num_only_weighted();
                        part.bytes += sample.bytes;
                        if sample.preference != Preference::Plain {
                            *part.preferences.entry(sample.preference).or_default() += 1;
                        }
                        self.tokens.fetch_add(sample.ids.len() as u64, Ordering::Relaxed);
                        self.packers[split as usize].push(sample)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets the training blocks of a data set end with it, and notes what it held; `before` is what there was before
    /// it.
    fn end_source(&mut self, set: usize, before: &SplitReport) -> Result<()> {
        let written = self.packers[Split::Train as usize].flush()?;
        let (train, sources) = (&self.report.train, &mut self.report.sources);
        let blocks = written - sources.iter().map(|source| source.blocks).sum::<usize>();
        sources.push(SourceReport {
            name: self.job.options.sources[set].name.clone(),
            rows: train.counts.rows - before.counts.rows,
            documents: train.documents - before.documents,
            tokens: train.tokens - before.tokens,
            trained_tokens: train.trained_tokens - before.trained_tokens,
            blocks,
            blocks_per_epoch: 0,
        });
        Ok(())
    }

    /// Checks that nothing is missing, closes the files and completes the report.
    fn finish(self) -> Result<()> {
        let Self { job, report, packers, rejects, labels, .. } = self;
        let options = job.options;
        job.inputs.iter().try_for_each(Input::check_unchanged)?;
        report.rejected_rows = rejects.rows;
        for split in Split::ALL {
            let streamed = options.streaming && split == Split::Train;
            if !streamed && !options.places(split).is_empty() && report.split(split).documents == 0 {
                return Err(nothing_in(split, options, report));
            }
        }
        if let Some(empty) = report.sources.iter().find(|source| source.blocks == 0) {
            return Err(Error::Input(format!(
                "source {:?}: no row of it is left to train on; take it out",
                empty.name
            )));
        }
        mix::plan(&mut report.sources, options);
        for ((split, labels), packer) in Split::ALL.into_iter().zip(labels).zip(packers) {
            let part = report.split_mut(split);
            part.completions = labels.found();
            part.blocks = packer.finish()?;
            part.sha256 = hex(&digest(&job.folder.join(shard::file_name(split)))?);
        }
        rejects.finish(job.folder)
    }
}

fn nothing_in(split: Split, options: &PrepareOptions, report: &Report) -> Error {
    let places = options.places(split).join(", ");
    let held_out = report.validation.counts.rows + report.test.counts.rows;
    let removed: usize = report.clean.removed.values().sum();
    Error::Input(match report.split(split).counts {
        RowCounts { rows: 0, .. } if removed > 0 => {
            let reasons: Vec<_> =
                report.clean.removed.iter().map(|(reason, rows)| format!("{rows} {}", reason.words())).collect();
            format!("{split}: no row of {places} is left after cleaning; removed were {}", reasons.join(", "))
        }
        RowCounts { rows: 0, .. } if report.rejected_rows > 0 => {
            format!("{split}: no row of {places} can be used; {} were rejected", report.rejected_rows)
        }
        RowCounts { rows: 0, .. } if split == Split::Train && held_out > 0 => format!(
            "nothing is left to train on: all {held_out} rows of {places} went to validation and test; give more rows, a \
             smaller validation_fraction or another split_seed"
        ),
        RowCounts { rows: 0, .. } => format!("{split}: no rows: the data in {places} is empty"),
        RowCounts { dropped_rows, .. } => format!(
            "{split}: all {dropped_rows} rows of {places} are longer than max_length {} and were left out; raise \
             max_length or set overlong = \"split\"",
            options.max_length
        ),
    })
}

/// Different completions that may be labels; more of them are texts.
const MAX_LABELS: usize = 50;
/// Bytes of a completion that may be a label.
const LABEL_BYTES: usize = 100;

/// What is to be learned from a row, where it is short.
fn label(kind: &RowKind) -> Option<String> {
    let text = match kind {
        RowKind::PromptCompletion { completion, .. } => completion,
        RowKind::Labelled { label, .. } => label,
        RowKind::Judged { label, .. } => return Some(if *label { "liked" } else { "not liked" }.into()),
        RowKind::Messages { messages, .. } => &messages.last().filter(|last| last.role == "assistant")?.content,
        RowKind::Text(_) | RowKind::Preference { .. } => return None,
    };
    Some(text.trim()).filter(|text| text.len() <= LABEL_BYTES).map(str::to_owned)
}

/// The completions of a split, as long as they may be labels.
struct Labels {
    rows: BTreeMap<String, usize>,
    are_texts: bool,
}

impl Labels {
    const fn new() -> Self {
        Self { rows: BTreeMap::new(), are_texts: false }
    }

    fn add(&mut self, label: Option<String>) {
        match label {
            Some(label) if !self.are_texts => *self.rows.entry(label).or_default() += 1,
            Some(_) => {}
            None => self.are_texts = true,
        }
        if self.are_texts || self.rows.len() > MAX_LABELS {
            *self = Self { rows: BTreeMap::new(), are_texts: true };
        }
    }

    /// Rows by label: where texts are repeated, five times or more on average.
    fn found(self) -> Option<BTreeMap<String, usize>> {
        let all: usize = self.rows.values().sum();
        (!self.rows.is_empty() && all >= 5 * self.rows.len()).then_some(self.rows)
    }
}

/// The rows are others than those that were scanned.
fn changed(job: &Job<'_>, row: &Numbered) -> Error {
    let input = &job.inputs[row.input];
    input.check_unchanged().err().unwrap_or_else(|| {
        Error::Failure(format!("{}: the row reads differently the second time", place(&input.name, row.raw.line)))
    })
}

/// `rejects.jsonl`, made when there is a first one.
struct Rejects {
    pending: Option<Pending>,
    rows: usize,
}

impl Rejects {
    fn write(&mut self, folder: &Path, file: &str, bad: &BadRow) -> Result<()> {
        self.rows += 1;
        let what = bad.what.trim_start_matches([':', ',', ' ']);
        let entry = serde_json::json!({"file": file, "line": bad.line, "error": what, "row": bad.content});
        let pending = match &mut self.pending {
            Some(pending) => pending,
            none => none.insert(Pending::create(&folder.join(REJECTS))?),
        };
        pending.write(|writer| writeln!(writer, "{entry}"))
    }

    /// Gives the file its name, or removes one of an earlier time.
    fn finish(self, folder: &Path) -> Result<()> {
        let path = folder.join(REJECTS);
        match self.pending {
            Some(pending) => pending.finish(),
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io("cannot remove", &path, error))
                }
                _ => Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_spread_and_none_is_lost() {
        for copies in [0, 1, 2, 7, 8, 9, 100] {
            let passes: Vec<u32> = (0..8).map(|pass| copies_in_pass(copies, pass, 8)).collect();
            assert_eq!(passes.iter().sum::<u32>(), copies);
            assert!(passes[0] >= copies.min(1) && passes.iter().all(|&n| n <= copies.div_ceil(8)), "{passes:?}");
        }
    }
}
