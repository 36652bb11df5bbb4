//! The binary: parse, run, exit code.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // `tunesmith ... | head` ends quietly, as other programs do, instead of with a panic of println!.
    sigpipe::reset();
    tunesmith::run(tunesmith::args::Cli::parse())
}
