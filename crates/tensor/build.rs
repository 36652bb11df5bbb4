//! Puts the archive of compiled kernels into the library: the file that `TUNESMITH_KERNELS` names when it is built
//! (written by `cargo xtask kernels --archive FILE`), nothing without it.

#![allow(clippy::print_stdout, reason = "how a build script talks to cargo")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=TUNESMITH_KERNELS");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set");
        return ExitCode::FAILURE;
    };
    let archive = match env::var_os("TUNESMITH_KERNELS").filter(|file| !file.is_empty()) {
        None => Ok(Vec::new()),
        Some(file) => {
            println!("cargo::rerun-if-changed={}", PathBuf::from(&file).display());
            fs::read(&file).map_err(|e| format!("TUNESMITH_KERNELS={}: {e}", PathBuf::from(file).display()))
        }
    };
    let written = archive.and_then(|bytes| fs::write(out.join("kernels.bin"), bytes).map_err(|e| e.to_string()));
    if let Err(error) = written {
        println!("cargo::error={error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
