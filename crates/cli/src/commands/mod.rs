//! One module a command: plan, run, print.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod doctor;
pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod gpu_bench;
pub(crate) mod gpu_check;
pub(crate) mod init;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod prepare;
pub(crate) mod quickstart;
pub(crate) mod sampling;
pub(crate) mod selftest;
pub(crate) mod tokenizer;
pub(crate) mod train;
pub(crate) mod verify;

use std::path::Path;
use tunesmith_files::{Error, Result, atomic};

/// Writes `value` as JSON where `file` is given, and prints what `text` says otherwise.
pub(crate) fn write_json_or(
    file: Option<&Path>,
    value: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> Result<()> {
    match file {
        Some(file) => write_json_line(file, value),
        None => {
            print!("{}", text());
            Ok(())
        }
    }
}

/// A folder for what a command needs only for itself.
pub(crate) fn temporary_folder() -> Result<tempfile::TempDir> {
    let parent = std::env::temp_dir();
    tempfile::tempdir().map_err(|e| Error::own_io("cannot create a temporary folder in", &parent, e))
}

/// Writes `value` as one line of JSON to `file`, or to standard output for `-`.
pub(crate) fn write_json_line(file: &Path, value: &impl serde::Serialize) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|e| Error::Failure(e.to_string()))?;
    if file.as_os_str() == "-" {
        println!("{line}");
        return Ok(());
    }
    atomic::write(file, line + "\n")
}
