//! One module a command: plan, run, print.

pub(crate) mod bench;
mod bench_generate;
pub(crate) mod chat;
pub(crate) mod continuation;
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
pub(crate) mod selftest;
pub(crate) mod tokenizer;
pub(crate) mod train;
mod upload;
pub(crate) mod verify;

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;

/// Writes a file as a whole or not at all: temporary name, sync, rename. Makes its folder if need be.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)
    };
    write().map(drop).map_err(|e| Error::io("cannot write", path, e))
}

/// Writes `value` as one line of JSON to `file`, or to standard output for `-`.
pub(crate) fn write_json_line(file: &Path, value: &impl serde::Serialize) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|e| Error::Failure(e.to_string()))?;
    if file.as_os_str() == "-" {
        println!("{line}");
        return Ok(());
    }
    write_atomically(file, (line + "\n").as_bytes())
}

/// Threads that the kernels use.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
