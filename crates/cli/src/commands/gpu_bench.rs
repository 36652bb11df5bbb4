//! `tunesmith gpu-bench`: training steps of known shapes on a GPU, and the share of its peaks that they reach.

use super::write_json_line;
use crate::args::GpuBenchArgs;
use crate::device;
use crate::error::{Error, Result};
use crate::source::Settings;
use crate::terminal;
use serde_json::json;
use tunesmith_tensor::Dtype;
use tunesmith_train::gpu_bench::{self, Measured};

/// Rows and columns of the matrices that the peaks are measured with.
const LARGE: usize = 8192;

pub(crate) fn run(args: &GpuBenchArgs, settings: &Settings) -> Result<()> {
    let to_terminal = args.json.as_ref().is_none_or(|file| file.as_os_str() != "-");
    let cases = gpu_bench::cases(args.recompute.into())?;
    if let Some(unknown) = args.models.iter().find(|m| !cases.iter().any(|c| c.model == m.as_str())) {
        return Err(Error::Input(format!("--models {unknown}: it must be among 1B, 3B and 8B")));
    }
    let cases = cases.into_iter().filter(|c| args.models.is_empty() || args.models.iter().any(|m| m == c.model));
    let mut measured: Vec<Measured> = Vec::new();
    let (mut name, mut peaks) = (String::new(), None);
    for case in cases {
        // Opened anew for each model, so that a peak of memory is its own.
        let gpu = device::open(&args.device, settings)?;
        name = gpu.gpu().map_or_else(String::new, |gpu| gpu.name().to_owned());
        let peaks = match peaks {
            Some(peaks) => peaks,
            None => *peaks.insert(gpu_bench::peaks(&gpu, Dtype::BF16, LARGE)?),
        };
        drop(gpu);
        let gpu = device::open(&args.device, settings)?;
        let bar = terminal::count_bar(&format!("measuring {}", case.model), 0);
        let line = gpu_bench::measure(&gpu, Dtype::BF16, &case, args.steps, &peaks);
        bar.finish_and_clear();
        measured.push(line?);
    }
    if to_terminal {
        print!("{}", table(&measured));
        if let Some(peaks) = &peaks {
            println!(
                "{name}: a copy moves {:.0} GB/s, a bf16 product of {LARGE} rows {:.0} TFLOP/s",
                peaks.copy / 1e9,
                peaks.product / 1e12
            );
        }
    }
    match &args.json {
        Some(file) => write_json_line(file, &json!({"device": name, "peaks": peaks, "measured": measured})),
        None => Ok(()),
    }
}

fn table(measured: &[Measured]) -> String {
    let row = |m: &Measured| {
        vec![
            format!("{} {}", m.model, m.method),
            m.tokens.to_string(),
            format!("{:.0}", m.tokens_per_s),
            format!("{:.0}", m.flops / 1e12),
            format!("{:.0} %", 100.0 * m.share),
            format!("{:.1}", m.peak_bytes as f64 / 1e9),
            format!("{:.3}", m.first_loss),
        ]
    };
    let header = ["model", "tokens", "tokens/s", "TFLOP/s", "of the peak", "GB", "first loss"];
    terminal::table(&header, &measured.iter().map(row).collect::<Vec<_>>())
}
