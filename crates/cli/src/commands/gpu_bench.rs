//! `tunesmith gpu-bench`: training steps and generation of known shapes on a GPU, beside its peaks and other programs.

use super::write_json_line;
use crate::args::GpuBenchArgs;
use crate::device;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_lab::gpu_bench::Setup;
use tunesmith_train::gpu_bench;

pub(crate) fn run(args: &GpuBenchArgs, settings: &Settings) -> Result<()> {
    let mut cases = gpu_bench::cases(args.recompute.into())?;
    if let Some(unknown) = args.models.iter().find(|m| !cases.iter().any(|c| c.model == m.as_str())) {
        return Err(Error::Input(format!("--models {unknown}: it must be among 1B, 3B and 8B")));
    }
    cases.retain(|c| args.models.is_empty() || args.models.iter().any(|m| m == c.model));
    let options = device::options(settings)?;
    let (steps, peer, decode) = (args.steps, args.peer.clone(), !args.no_decode);
    let setup = Setup { cases, device: args.device, options: &options, steps, peer, decode };
    let results = setup.run(&mut |what| eprintln!("{what}"))?;
    if args.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
        print!("{}", results.describe());
    }
    args.json.as_ref().map_or(Ok(()), |file| write_json_line(file, &results.to_json()))
}
