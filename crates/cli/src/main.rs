//! The binary: parse, run, exit code.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    tunesmith::run(tunesmith::args::Cli::parse())
}
