//! The second way through the rows: tokens, blocks, and the rows that could not be used.
use super::{
    PrepareProgress, REJECTS, Report, files,
    files::{Input, Numbered, digest},
    nothing_in,
    scan::Fate,
};
use crate::{
    ChatTemplate, Error, OnBadRow, PrepareOptions, Result, RowOptions, Sample, Split, Tokenizer,
    atomic::Pending,
    clean::Cleaner,
    pack::Packer,
    row::{self, BadRow, place},
    sample::{self, RowCounts},
    shard,
    tokenizer::hex,
};
use rayon::prelude::*;
use std::{
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
    pub(super) row_options: &'a RowOptions,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) cleaner: Cleaner,
    pub(super) inputs: &'a [Input],
    pub(super) key: [u8; 32],
}

/// What became of a row.
enum Done {
    Samples(Split, Vec<Sample>, RowCounts),
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
    fates: &[Fate],
    report: &mut Report,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<()> {
    let options = job.options;
    let sample_options = options.into();
    let bytes = job.inputs.iter().map(|input| input.bytes).sum();
    let mut packers = Vec::with_capacity(3);
    for split in Split::ALL {
        let writer = shard::Writer::create(&job.folder.join(shard::file_name(split)), job.key, options.max_length)?;
        packers.push(Packer::new(writer, options.max_length, options.packing, WINDOW));
    }
    let mut rejects = Rejects { pending: None, rows: 0 };
    let tokens = AtomicU64::new(0);
    let work = |row: &Numbered| -> Result<Done> {
        let Some(fate) = fates.get(row.index) else { return Err(changed(job, row)) };
        let file = &job.inputs[row.input].name;
        let line = row.raw.line;
        if matches!(fate, Fate::Removed(_)) {
            return Ok(Done::Removed);
        }
        let understood = row::understand(&row.raw, file, job.row_options, &mut |_| ());
        let split = match (fate, &understood) {
            (Fate::Goes(split), _) => *split,
            (Fate::Removed(_), _) => return Ok(Done::Removed),
            (Fate::Rejected, Err(bad)) => return Ok(Done::Rejected(bad.clone())),
            (Fate::Rejected, Ok(odd)) => {
                let what = format!(": the row is of format {}, unlike most rows of the file", odd.format.name());
                return Ok(Done::Rejected(BadRow { line, what, content: row.raw.content.to_string() }));
            }
        };
        let Ok(mut understood) = understood else { return Err(changed(job, row)) };
        job.cleaner.clean(&mut understood.row);
        match sample::samples(&understood.row, job.tokenizer, job.template, &sample_options) {
            Ok((samples, counts)) => Ok(Done::Samples(split, samples, counts)),
            Err(Error::Input(what)) if options.on_bad_row == OnBadRow::Skip => {
                let what = what.strip_prefix(&place(file, line)).unwrap_or(&what).to_owned();
                Ok(Done::Rejected(BadRow { line, what, content: row.raw.content.to_string() }))
            }
            Err(error) => Err(error),
        }
    };
    let work = |group: Vec<Numbered>| -> Vec<_> { group.par_iter().map(|row| (row.input, work(row))).collect() };
    let mut pack = |done: Vec<(usize, Result<Done>)>| {
        // In order, so that of several wrong rows the first is the one reported.
        for (input, done) in done {
            match done? {
                Done::Removed => {}
                Done::Rejected(bad) => rejects.write(job.folder, &job.inputs[input].name, &bad)?,
                Done::Samples(split, samples, counts) => {
                    let part = report.split_mut(split);
                    part.counts += counts;
                    for sample in samples {
                        part.documents += 1;
                        part.tokens += sample.ids.len();
                        part.trained_tokens += sample.num_trained();
                        part.bytes += sample.bytes;
                        tokens.fetch_add(sample.ids.len() as u64, Ordering::Relaxed);
                        packers[split as usize].push(sample)?;
                    }
                }
            }
        }
        Ok(())
    };
    files::for_each_group(job.inputs, job.row_options, &work, &mut pack, &mut |bytes_done| {
        progress(PrepareProgress::Tokenizing { bytes_done, bytes, tokens: tokens.load(Ordering::Relaxed) });
    })?;
    job.inputs.iter().try_for_each(Input::check_unchanged)?;
    report.rejected_rows = rejects.rows;
    for split in Split::ALL {
        if !options.places(split).is_empty() && report.split(split).documents == 0 {
            return Err(nothing_in(split, options, report));
        }
    }
    for (split, packer) in Split::ALL.into_iter().zip(packers) {
        report.split_mut(split).blocks = packer.finish()?;
        report.split_mut(split).sha256 = hex(&digest(&job.folder.join(shard::file_name(split)))?);
    }
    rejects.finish(job.folder)
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
