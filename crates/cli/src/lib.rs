//! The command line of tunesmith: parse, plan, one call. Printing and environment variables live here and nowhere below.
#![allow(clippy::print_stdout, clippy::print_stderr)]

pub mod args;
mod commands;
mod device;
pub mod load;
mod stop;
mod terminal;

use args::{Cli, Command};
use std::process::ExitCode;
use tunesmith_files::{Error, Result};

/// Runs one command line and turns its result into an exit code: 0, 2 for the user's mistakes, 130 when interrupted,
/// 1 for other failures.
pub fn run(cli: Cli) -> ExitCode {
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            if !matches!(error, Error::Stopped) {
                eprintln!("error: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    let mut settings = tunesmith_hub::Settings::from_variables(std::env::vars_os())?;
    settings.offline |= cli.offline;
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Quickstart(args) => commands::quickstart::run(&args, &settings).map(done),
        Command::Init(args) => commands::init::run(&args, &settings).map(done),
        Command::Prepare(args) => commands::prepare::run(&args, &settings).map(done),
        Command::Tokenizer(args::TokenizerCommand::Train(args)) => {
            commands::tokenizer::train(&args, &settings).map(done)
        }
        Command::Doctor(args) => commands::doctor::run(&args, &settings),
        Command::Plan(args) => commands::plan::run(&args, &settings).map(done),
        Command::Train(args) => commands::train::run(&args, &settings).map(done),
        Command::Evaluate(args) => commands::evaluate::run(&args, &settings).map(done),
        Command::Generate(args) => commands::generate::run(&args, &settings).map(done),
        Command::Chat(args) => commands::chat::run(&args, &settings).map(done),
        Command::Merge(args) => commands::merge::run(&args, &settings).map(done),
        Command::Verify(args) => commands::verify::run(&args, &settings),
        Command::Selftest(args) => commands::selftest::run(&args, &settings),
        Command::GpuCheck(args) => commands::gpu_check::run(&args, &settings),
        Command::GpuBench(args) => commands::gpu_bench::run(&args, &settings).map(done),
        Command::Bench(args) => commands::bench::run(&args, &settings).map(done),
    }
}
