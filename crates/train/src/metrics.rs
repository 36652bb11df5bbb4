//! `metrics.jsonl`: what happened in a run, one JSON object a line, appended while it trains.
//!
//! A line is written by one call and reaches the operating system at once, so that a run that dies loses at most the
//! line it was writing. Readers therefore forgive a broken last line, and only that.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};
use tunesmith_files::atomic;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// One line of `metrics.jsonl`. Numbers that are not finite are written as `null` and read as NaN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MetricRecord {
    /// Training, once every logging interval.
    Train {
        /// Optimizer steps done.
        step: u64,
        /// Passes over the training data, with the fraction of the present one.
        epoch: f64,
        /// Mean loss over the trained tokens since the last record, in nats.
        #[serde(deserialize_with = "number_or_nan")]
        loss: f64,
        /// Learning rate of the last step.
        #[serde(deserialize_with = "number_or_nan")]
        learning_rate: f64,
        /// Norm of the whole gradient before clipping.
        #[serde(deserialize_with = "number_or_nan")]
        grad_norm: f64,
        /// Trained tokens (those that carry loss) so far.
        num_tokens: u64,
        /// Tokens that went through the model per second since the last record.
        #[serde(deserialize_with = "number_or_nan")]
        tokens_per_s: f64,
        /// Seconds of training so far, those before a resume included.
        #[serde(deserialize_with = "number_or_nan")]
        elapsed_s: f64,
        /// Resident memory of the process in bytes.
        rss_bytes: u64,
    },
    /// An evaluation on the validation split.
    Eval {
        /// Optimizer steps done.
        step: u64,
        /// As in `Train`.
        epoch: f64,
        /// Mean loss over the scored tokens, in nats.
        #[serde(deserialize_with = "number_or_nan")]
        eval_loss: f64,
        /// `exp(eval_loss)`.
        #[serde(deserialize_with = "number_or_nan")]
        eval_perplexity: f64,
        /// Scored tokens of the validation split.
        num_tokens: u64,
    },
    /// A text generated while training.
    Sample {
        /// Optimizer steps done.
        step: u64,
        /// The prompt, as the user wrote it.
        prompt: String,
        /// What the model answered.
        text: String,
    },
    /// Something worth knowing afterwards: a resume, a warning, a checkpoint.
    Note {
        /// Optimizer steps done.
        step: u64,
        /// One sentence.
        message: String,
    },
}

impl MetricRecord {
    /// Optimizer steps done when the record was made.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train { step, .. }
            | Self::Eval { step, .. }
            | Self::Sample { step, .. }
            | Self::Note { step, .. } => *step,
        }
    }
}

fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Appends records to a `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
    /// Bytes of whole lines: where the next line begins.
    len: u64,
}

impl MetricsWriter {
    /// Starts a new file.
    ///
    /// # Errors
    /// [`Error::Input`] when there is one already (its records would be lost) or the folder is missing; [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().write(true).create_new(true).open(path).map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => Error::Input(format!(
                    "{} exists already: resume that run, or choose another folder for this one",
                    path.display()
                )),
                _ => Error::io("cannot create", path, source),
            })?;
        Ok(Self { file, path: path.to_owned(), len: 0 })
    }

    /// Continues a file after `step`: records of later steps, which the resumed run will make again, are removed, all
    /// others stay byte for byte. The file is replaced as a whole or not at all. Without a file it starts a new one.
    ///
    /// # Errors
    /// [`Error::Input`] for a broken line (other than the last); [`Error::Io`].
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Self::create(path),
            Err(source) => return Err(Error::io("cannot read", path, source)),
        };
        let mut kept = Vec::with_capacity(bytes.len());
        for (line, record) in parse(&bytes, path)? {
            if record.step() <= step {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        if kept != bytes {
            atomic::write(path, &kept)?;
        }
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("cannot open", path, e))?;
        Ok(Self { file, path: path.to_owned(), len: kept.len() as u64 })
    }

    /// Appends one record and hands it to the operating system.
    ///
    /// # Errors
    /// [`Error::Io`], for example on a full disk; then no part of the line is left in the file.
    pub fn write(&mut self, record: &MetricRecord) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| Error::Failure(format!("cannot write a record of {}: {error}", self.path.display())))?;
        line.push(b'\n');
        if let Err(source) = self.file.write_all(&line) {
            // Half a line would make the next one unreadable too. Should even this fail, the first error says why.
            let _ = self.file.set_len(self.len);
            return Err(Error::io("cannot write", &self.path, source));
        }
        self.len += line.len() as u64;
        Ok(())
    }

    /// Waits until everything written is on the disk; to be called before a checkpoint is declared complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::io("cannot write", &self.path, source))
    }
}

/// All records of a `metrics.jsonl`, in the order of the file. A last line that is broken, as a run that was killed may
/// leave it, is left out.
///
/// # Errors
/// [`Error::Input`] naming file, line and column for any other broken line, or when there is no such file; [`Error::Io`].
pub fn read_metrics(path: &Path) -> Result<Vec<MetricRecord>> {
    let bytes = fs::read(path).map_err(|source| Error::io("cannot read", path, source))?;
    Ok(parse(&bytes, path)?.into_iter().map(|(_, record)| record).collect())
}

/// The lines that hold a record, without their line ends, and the records.
fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<Vec<(&'a [u8], MetricRecord)>> {
    let lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).collect();
    let last = lines.iter().rposition(|line| !line.is_empty());
    let mut records = Vec::new();
    for (i, line) in lines.into_iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(record) => records.push((line, record)),
            Err(_) if Some(i) == last => {}
            Err(error) => {
                // serde_json counts lines within the slice, which is always one.
                let reason = error.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                return Err(Error::Input(format!(
                    "{}, line {}, column {}: {reason}; remove or repair the line",
                    path.display(),
                    i + 1,
                    error.column()
                )));
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn train(step: u64, loss: f64) -> MetricRecord {
        MetricRecord::Train {
            step,
            epoch: step as f64 / 10.0,
            loss,
            learning_rate: 2e-4,
            grad_norm: 0.75,
            num_tokens: 1000 * step,
            tokens_per_s: 512.5,
            elapsed_s: 2.0 * step as f64,
            rss_bytes: 1 << 30,
        }
    }

    fn note(step: u64, message: &str) -> MetricRecord {
        MetricRecord::Note { step, message: message.into() }
    }

    fn all_kinds() -> Vec<MetricRecord> {
        vec![
            train(1, 3.5),
            MetricRecord::Eval { step: 1, epoch: 0.1, eval_loss: 3.25, eval_perplexity: 25.79, num_tokens: 77 },
            MetricRecord::Sample { step: 1, prompt: "To be".into(), text: "or\n\"not\" \u{1F600}".into() },
            note(1, "saved"),
        ]
    }

    #[test]
    fn records_survive_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for record in all_kinds() {
            writer.write(&record).unwrap();
        }
        writer.sync().unwrap();
        // Readable while the writer still holds it.
        assert_eq!(read_metrics(&path).unwrap(), all_kinds());
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 4);
        assert!(text.starts_with(r#"{"kind":"train","step":1,"#), "{text}");
        let message = MetricsWriter::create(&path).unwrap_err().to_string();
        assert!(message.contains("exists already"), "{message}");
    }

    #[test]
    fn numbers_that_are_not_finite_come_back_as_nan() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::create(&path).unwrap().write(&train(1, f64::INFINITY)).unwrap();
        let records = read_metrics(&path).unwrap();
        assert!(matches!(records[..], [MetricRecord::Train { loss, step: 1, .. }] if loss.is_nan()));
    }

    #[test]
    fn a_torn_last_line_is_forgiven_and_a_broken_one_inside_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let good = serde_json::to_string(&note(1, "a")).unwrap();
        for tail in ["{\"kind\":\"no", "{\"kind\":\"note\",\"step\":3}\n\n", "\u{0}\u{0}\u{0}"] {
            fs::write(&path, format!("{good}\n\n{tail}")).unwrap();
            assert_eq!(read_metrics(&path).unwrap(), [note(1, "a")], "{tail:?}");
        }
        fs::write(&path, [good.as_bytes(), b"\n{\"kind\":\"note\",\"message\":\"\xF0\x9F"].concat()).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [note(1, "a")]);
        fs::write(&path, format!("{good}\n{{\"kind\":\"note\",\"step\":x}}\n{good}\n")).unwrap();
        let message = read_metrics(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl, line 2, column 23"), "{message}");
        let message = read_metrics(&folder.path().join("none")).unwrap_err().to_string();
        assert!(message.contains("no such file"), "{message}");
    }

    #[test]
    fn resuming_forgets_later_steps_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for step in 0..6 {
            writer.write(&note(step, "first")).unwrap();
        }
        drop(writer);
        let before = fs::read(&path).unwrap();
        fs::write(&path, [&before[..], b"{\"kind\":"].concat()).unwrap();
        let mut writer = MetricsWriter::resume(&path, 3).unwrap();
        assert!(before.starts_with(&fs::read(&path).unwrap()));
        writer.write(&note(4, "second")).unwrap();
        let records = read_metrics(&path).unwrap();
        assert_eq!(records.iter().map(MetricRecord::step).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(records[4], note(4, "second"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left behind");
        // A run whose file is gone starts a new one.
        let mut writer = MetricsWriter::resume(&folder.path().join("new.jsonl"), 3).unwrap();
        writer.write(&note(4, "third")).unwrap();
    }

    proptest! {
        #[test]
        fn any_cut_leaves_the_whole_lines(texts in prop::collection::vec(".*", 1..6), cut in 0.0f64..1.0) {
            let path = Path::new("metrics.jsonl");
            let records: Vec<_> = texts.iter().enumerate().map(|(i, text)| note(i as u64, text)).collect();
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            for record in &records {
                bytes.extend(serde_json::to_vec(record).unwrap());
                ends.push(bytes.len());
                bytes.push(b'\n');
            }
            let cut = (cut * bytes.len() as f64) as usize;
            let whole = ends.iter().filter(|&&end| end <= cut).count();
            let read: Vec<_> = parse(&bytes[..cut], path).unwrap().into_iter().map(|(_, record)| record).collect();
            prop_assert_eq!(&read[..], &records[..whole]);
        }
    }
}
