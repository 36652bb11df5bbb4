//! `tunesmith bench`: speed and memory of training steps, of generation, and of what steps are made of.

use super::write_json_or;
use crate::args::StorageName;
use crate::args::{Bench, BenchArgs, BenchGenerateArgs, BenchMachineArgs, BenchMethod, BenchTrainArgs, ComputeName};
use crate::load;
use crate::terminal;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_infer::Opened;
use tunesmith_lab::bench::{self, Setup};
use tunesmith_lab::{generation, machine};
use tunesmith_model::{Batch, Checkpoint, Llama, Storage};
use tunesmith_text::{PrepareOptions, PreparedSplit, Split};
use tunesmith_train::evaluate::batch_of;

pub(crate) fn run(args: &BenchArgs, settings: &Settings) -> Result<()> {
    match &args.what {
        Some(Bench::Train(args)) => train(args, settings),
        Some(Bench::Generate(args)) => generate(args, settings),
        None => parts(&args.machine, settings),
    }
}

fn train(args: &BenchTrainArgs, settings: &Settings) -> Result<()> {
    let setup = Setup {
        full: args.method == BenchMethod::Full,
        int8: args.compute == ComputeName::Int8,
        batch: args.batch,
        seq: args.seq,
        recompute: args.recompute.into(),
        optim: args.optim.into(),
    };
    setup.check()?;
    if args.steps == 0 {
        return Err(Error::Input("--steps must be at least 1".into()));
    }
    if setup.full && args.storage != StorageName::F32 {
        return Err(Error::Input("--storage is for frozen weights; with --method full leave it at f32".into()));
    }
    let opened = load::open(&args.model, settings)?;
    let data = if args.data.is_empty() { None } else { Some(packed_rows(args, &opened, settings)?) };
    let mut model = load::llama(&opened, args.storage.into())?;
    drop(opened);
    let result = bench::train(&setup, &mut model, args.steps, data)?;
    write_json_or(args.json.as_deref(), &result, || bench::describe(&result))
}

/// The rows of `--data` in steps of `--batch` blocks of up to `--seq` tokens, and how many rows they are.
fn packed_rows(args: &BenchTrainArgs, opened: &Opened, settings: &Settings) -> Result<(Vec<Batch>, usize)> {
    let options = PrepareOptions {
        train: args.data.clone(),
        validation_fraction: 0.0,
        max_length: args.seq,
        ..PrepareOptions::default()
    };
    let folder = super::temporary_folder()?;
    let report = super::prepare::prepare(&options, opened, folder.path(), settings)?;
    let split = PreparedSplit::open(folder.path(), Split::Train)?;
    let blocks = (0..split.len()).map(|i| split.block(i)).collect::<Result<Vec<_>>>()?;
    let batches = blocks.chunks(args.batch).map(batch_of).collect();
    Ok((batches, report.split(Split::Train).counts.rows))
}

fn parts(args: &BenchMachineArgs, settings: &Settings) -> Result<()> {
    let (full, int8) = (args.method == BenchMethod::Full, args.compute == ComputeName::Int8);
    let setup = Setup { full, int8, batch: args.batch, seq: args.seq, ..Setup::default() };
    setup.check()?;
    let bar = terminal::count_bar("reading the model", 0);
    let read = |spec: &String| {
        let checkpoint = Checkpoint::open(&load::resolve(spec, settings)?.path)?;
        Ok::<_, Error>((spec.clone(), Llama::load(&checkpoint, Storage::F32, |_, _| ())?))
    };
    let model = args.model.as_ref().map(read).transpose()?;
    let report = machine::measure(&setup, model, &mut |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let report = report?;
    write_json_or(args.json.as_deref(), &report, || machine::describe(&report))
}

fn generate(args: &BenchGenerateArgs, settings: &Settings) -> Result<()> {
    let &BenchGenerateArgs { prompt, new, context, repeat, .. } = args;
    if prompt == 0 || new == 0 || repeat == 0 {
        return Err(Error::Input("--prompt, --new and --repeat must be at least 1".into()));
    }
    let opened = load::open(&args.model, settings)?;
    let llama = load::generator(&opened, args.compute, None, None, settings)?;
    let options = generation::Options { prompt, new, context, repeat };
    let result = generation::measure(&options, &llama, || first_token_seconds(args, settings))?;
    write_json_or(args.json.as_deref(), &result, || generation::describe(&result))
}

/// Starts this program anew to write one token.
fn first_token_seconds(args: &BenchGenerateArgs, settings: &Settings) -> Result<f64> {
    let failed = |e: std::io::Error| Error::Io { what: "cannot start this program a second time".into(), source: e };
    let program = std::env::current_exe().map_err(failed)?;
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(settings.offline.then_some("--offline"))
        .args(["generate", "--greedy", "--max-new-tokens", "1", "--model", &args.model])
        .args(args.compute.map(|compute| if compute == ComputeName::F32 { "--compute=f32" } else { "--compute=int8" }))
        .arg("The capital of France is")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let Some(mut out) = child.stdout.take() else {
        return Err(Error::Failure("the output of a started program cannot be read".into()));
    };
    let read = out.read(&mut [0]).map_err(failed)?;
    let seconds = start.elapsed().as_secs_f64();
    // The rest is read too: a closed pipe would end the program early.
    std::io::copy(&mut out, &mut std::io::sink()).map_err(failed)?;
    let status = child.wait().map_err(failed)?;
    if read == 0 || !status.success() {
        return Err(Error::Failure(format!("`generate` for the time of a cold start ended with {status}")));
    }
    Ok(seconds)
}
