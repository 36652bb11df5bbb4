//! `tunesmith gpu-check`: does the GPU compute what the processor computes?

use super::selftest::{table, write_checks};
use crate::args::GpuCheckArgs;
use crate::device;
use crate::terminal;
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tunesmith_files::Result;
use tunesmith_files::bytes::format_bytes;
use tunesmith_hub::Settings;
use tunesmith_train::gpu_check::{self, Size};
use tunesmith_train::selftest::Check;

pub(crate) fn run(args: &GpuCheckArgs, settings: &Settings) -> Result<ExitCode> {
    let start = Instant::now();
    let (device, gpu) = device::open_gpu(args.device, settings)?;
    let name = gpu.name();
    // Other inputs every time, unless a failure is looked into.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let seed = args.seed.unwrap_or(now);
    let bar = terminal::count_bar("checking", 0);
    let mut checks: Vec<Check> = Vec::new();
    let done = gpu_check::run(&device, seed, Size::Large, &mut |check| {
        bar.set_message(format!("{}: {}", check.model, check.check));
        bar.inc(1);
        checks.push(check);
    });
    bar.finish_and_clear();
    let failed = checks.iter().filter(|check| !check.passed()).count();
    if args.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
        print!("{}", table(&checks));
        println!(
            "{name}: {} checks with seed {seed}, {}, in {:.1} s, {} at the peak",
            checks.len(),
            if failed == 0 { "all passed".to_owned() } else { format!("{failed} FAILED") },
            start.elapsed().as_secs_f64(),
            format_bytes(gpu.memory().1 as u64),
        );
    }
    done?;
    if let Some(file) = &args.json {
        write_checks(file, &checks)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
