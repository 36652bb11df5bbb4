//! Development tasks: `cargo xtask TASK`. Nothing here is part of the program.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench_against;
mod bench_peer;
mod bench_prepare;
mod circles;
mod cli_docs;
mod config_docs;
mod configs;
mod docs;
mod kernels;
mod limits;
mod size;
mod tiny_model;
mod valgrind;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A task fails with one message for the developer.
type Result<T> = std::result::Result<T, String>;

/// Development tasks of tunesmith.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Write docs/cli.md, docs/config.md and docs/config.schema.json from the code.
    Docs {
        /// Write nothing; fail when a committed file differs.
        #[arg(long)]
        check: bool,
    },
    /// Plan every configuration in configs/ without running it.
    Configs,
    /// Compile every CUDA kernel for every supported GPU and check registers and instructions; needs no GPU.
    Kernels {
        /// Write the compiled kernels to this file too; TUNESMITH_KERNELS=FILE then builds them into the program.
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
    },
    /// Find files of a crate that depend on each other in a loop, and say through what.
    Circles {
        /// Show those too that are made by what modules take from those that they are in.
        #[arg(long)]
        parents: bool,
    },
    /// Lines of code, longest files, crates in the dependency tree, size of the release binary.
    Size,
    /// Run this program and its peers (transformers + PEFT, llama.cpp) in turn, and compare speed and memory.
    BenchPeer(Box<bench_peer::Args>),
    /// Run an older binary and this program in turn, and compare speed and memory pair by pair.
    BenchAgainst(bench_against::Args),
    /// Prepare a large file of real text, and compare speed and memory with `datasets.map`.
    BenchPrepare(bench_prepare::Args),
    /// Write the random model that configs/tiny.toml trains.
    TinyModel,
    /// Run the tests of kernels and models under valgrind.
    Valgrind,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Docs { check: false } => docs::write(&root()),
        Task::Docs { check: true } => docs::check(&root()),
        Task::Configs => configs::plan_all(&root()),
        Task::Kernels { archive } => kernels::check(&root(), archive.as_deref()),
        Task::Circles { parents } => circles::check(&root(), parents),
        Task::Size => size::report(&root()),
        Task::BenchPeer(args) => bench_peer::run(&root(), &args),
        Task::BenchAgainst(args) => bench_against::run(&root(), &args),
        Task::BenchPrepare(args) => bench_prepare::run(&root(), &args),
        Task::TinyModel => tiny_model::write(&root()),
        Task::Valgrind => valgrind::run(&root()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the repository.
fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::write(path, content))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}
