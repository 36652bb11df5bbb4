//! From files to a folder of token blocks: `train.shard`, `validation.shard`, `test.shard` and `prepared.json`.
//!
//! Rows are read twice, in groups, so that memory does not grow with the data: [`scan`] looks at all of them and
//! decides what becomes of each, [`emit`] tokenises those that stay and packs them into blocks.
//!
//! A folder is keyed by a hash of everything that its content follows from: the bytes and names of the files, the
//! tokenizer, the chat template, the options and the format version. With the same key and sound files nothing is done.
mod balance;
mod doctor;
mod emit;
mod facts;
mod files;
mod lengths;
mod scan;
mod streaming;
mod train_tokenizer;

use crate::{
    ChatTemplate, Error, PrepareOptions, PrepareProgress, Report, Result, Split, SplitReport, Tokenizer, atomic,
    clean::Cleaner,
    report::{FORMAT_VERSION, REPORT},
    shard,
    tokenizer::hex,
};
use files::{Input, digest};
use sha2::{Digest, Sha256};
use std::{io::Write, path::Path};

pub use doctor::{Check, Diagnosis, Finding, examine};
pub use lengths::{LengthClass, Lengths};
pub use streaming::{BlockStream, StreamCounts};
pub use train_tokenizer::{TokenizerOptions, TrainedTokenizer, train_tokenizer};

/// Prepares `options`' data in `folder`, unless the folder already holds exactly that and its files are sound.
/// `progress` is called now and then.
///
/// # Errors
/// Options out of range; unreadable or wrong data, named by file and line; a split to train on without rows; a folder
/// that cannot be written.
pub fn prepare(
    folder: &Path,
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Report> {
    options.check()?;
    let sets = files::data_sets(options)?;
    let mut inputs = files::inputs(&sets, progress)?;
    let key = key(options, tokenizer, template, &inputs)?;
    // What is read as training goes on is not looked at now.
    inputs.retain(|input| input.digest.is_some());
    if let Some(report) = reusable(folder, &key)? {
        return Ok(report);
    }
    let encoder = tokenizer.for_bulk().map_or_else(str::to_owned, |()| Report::BULK.to_owned());
    let scan = scan::scan(options, &sets, &inputs, progress)?;
    let mut report = Report {
        format_version: FORMAT_VERSION,
        key: hex(&key),
        tokenizer: tokenizer.fingerprint()?,
        encoder,
        options: options.clone(),
        train: SplitReport::default(),
        validation: SplitReport::default(),
        test: SplitReport::default(),
        files: scan.files,
        rejected_rows: 0,
        clean: scan.clean,
        sources: Vec::new(),
        balance: scan.balance.values,
        reused: false,
    };
    for (split, share) in Split::ALL.into_iter().zip(scan.shares) {
        let part = report.split_mut(split);
        (part.values, part.groups, part.largest_group) = (share.values, share.groups, share.largest_group);
    }
    let cleaner = Cleaner::new(&options.clean)?;
    let (copies, weights) = (&scan.balance.copies, &scan.balance.weights);
    let job =
        emit::Job { folder, options, sets: &sets, tokenizer, template, cleaner, inputs: &inputs, key, copies, weights };
    emit::emit(&job, &scan.decisions, &mut report, progress)?;
    let json = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::Failure(format!("the report of prepared data does not serialise: {e}")))?;
    atomic::write_file(&folder.join(REPORT), |w| writeln!(w, "{json}"))?;
    Ok(report)
}

fn key(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    inputs: &[Input],
) -> Result<[u8; 32]> {
    let inputs: Vec<_> = inputs.iter().map(|input| (input.name.to_string(), input.split, input.identity())).collect();
    // A template that tells the date renders the same row differently tomorrow, so the date belongs to the key.
    let template = template.map(|template| (template.source(), template.date()));
    let parts = (FORMAT_VERSION, options, tokenizer.fingerprint()?, tokenizer.special_tokens(), template, inputs);
    let bytes = serde_json::to_vec(&parts)
        .map_err(|e| Error::Failure(format!("the key of the prepared data does not serialise: {e}")))?;
    Ok(Sha256::digest(bytes).into())
}

/// The report of `folder`, if it holds what `key` stands for and every file is as it was written.
fn reusable(folder: &Path, key: &[u8; 32]) -> Result<Option<Report>> {
    let mut report = match Report::read(folder) {
        Ok(report) if report.key == hex(key) => report,
        Ok(_) | Err(Error::Input(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    for split in Split::ALL {
        let path = folder.join(shard::file_name(split));
        match digest(&path) {
            Ok(digest) if hex(&digest) == report.split(split).sha256 => {}
            Ok(_) | Err(Error::Input(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    report.reused = true;
    Ok(Some(report))
}

#[cfg(test)]
mod tests;
