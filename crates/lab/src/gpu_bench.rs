//! Training steps and generation of known shapes on a GPU, the share of its peaks that they reach, and the same steps in
//! transformers + PEFT.

mod peer;

use peer::Peer;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use tunesmith_files::{Blame, Error, Result, table::table};
use tunesmith_tensor::cuda::{Options, sizes};
use tunesmith_tensor::{Device, DeviceSpec, Dtype};
use tunesmith_train::gpu_bench::{self, Bar, Case, Decoded, Lacking, Measured, Peaks};

/// Rows and columns of the matrices that the peaks are measured with.
const LARGE: usize = 8192;

/// Sequences, tokens of each, and new tokens that are timed.
const DECODED: [(usize, usize, usize); 2] = [(1, 512, 65), (64, 512, 65)];

/// A case in transformers + PEFT.
#[derive(Debug, Serialize)]
struct Compared {
    model: &'static str,
    method: &'static str,
    compiled: bool,
    /// Our tokens/s divided by theirs.
    ratio: Option<f64>,
    peer: Option<Peer>,
    /// Why there is no measurement.
    failed: Option<String>,
}

/// What is measured, and on which GPU.
pub struct Setup<'a> {
    /// The cases of training ([`gpu_bench::cases`]).
    pub cases: Vec<Case>,
    /// The GPU.
    pub device: DeviceSpec,
    /// How it is opened: anew for each model, so that a peak of memory is its own.
    pub options: &'a Options,
    /// Steps that are timed.
    pub steps: u64,
    /// A Python with transformers and PEFT.
    pub peer: Option<PathBuf>,
    /// Whether generation is measured too.
    pub decode: bool,
}

/// What was measured.
#[derive(Debug)]
pub struct Results {
    name: String,
    peaks: Peaks,
    measured: Vec<Measured>,
    decoded: Vec<Decoded>,
    compared: Vec<Compared>,
    lacking: Vec<Lacking>,
    bars: Vec<Bar>,
}

impl Setup<'_> {
    fn open(&self) -> Result<Device> {
        Ok(self.device.open(self.options)?.0)
    }

    /// Measures all cases; `say` hears what is being measured and what does not fit.
    ///
    /// # Errors
    /// When the GPU cannot be used, or fails.
    pub fn run(&self, say: &mut dyn FnMut(&str)) -> Result<Results> {
        let device = self.open()?;
        let Some(gpu) = device.gpu() else {
            return Err(Error::Input(format!("--device {}: give a GPU by its number, such as cuda:0", self.device)));
        };
        let name = gpu.name().to_owned();
        // Where nobody says what is free, nothing is left out.
        let free = gpu.free_memory().map_or(u64::MAX, |free| free as u64).saturating_sub(sizes::MODULES as u64);
        let peaks = gpu_bench::peaks(&device, Dtype::BF16, LARGE)?;
        drop(device);
        let (mut measured, mut decoded, mut compared, mut lacking) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for case in &self.cases {
            match case.settle(Dtype::BF16, free) {
                Err(lack) => {
                    say(&lack.to_string());
                    lacking.push(lack);
                }
                Ok(settled) => {
                    say(&format!("measuring {} {}", case.model, case.method()));
                    let line = gpu_bench::measure(&self.open()?, Dtype::BF16, &settled, self.steps, &peaks)?;
                    self.compare(&settled.case, line.tokens_per_s, &mut compared, say)?;
                    measured.push(line);
                }
            }
            let sizes = DECODED.iter().filter(|_| self.decode && case.method() == "lora");
            for &sizes in sizes {
                match case.settle_decode(Dtype::BF16, sizes, free) {
                    Err(lack) => {
                        say(&lack.to_string());
                        lacking.push(lack);
                    }
                    Ok(planned) => {
                        say(&format!("generating {} sequences with {}", sizes.0, case.model));
                        let device = self.open()?;
                        decoded.push(gpu_bench::measure_decode(&device, Dtype::BF16, case, sizes, planned, &peaks)?);
                    }
                }
            }
        }
        let mut bars = gpu_bench::bars(&measured, &lacking, &decoded);
        bars.extend(measured.iter().filter_map(|m| peer_bar(m, &compared)));
        Ok(Results { name, peaks, measured, decoded, compared, lacking, bars })
    }

    /// Measures `case` in transformers + PEFT, plain and compiled, beside our `tokens_per_s`, where there is one.
    fn compare(
        &self,
        case: &Case,
        tokens_per_s: f64,
        compared: &mut Vec<Compared>,
        say: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let Some(python) = &self.peer else { return Ok(()) };
        for compiled in [false, true] {
            say(&format!("measuring {} {} of the peer", case.model, case.method()));
            let result = peer::measure(python, &peer::request(case, self.steps, self.device, compiled));
            let result = match result {
                Err(error) if error.blame() == Blame::User => return Err(error),
                result => result,
            };
            compared.push(Compared {
                model: case.model,
                method: case.method(),
                compiled,
                ratio: result.as_ref().ok().map(|peer| tokens_per_s / peer.tokens_per_s),
                failed: result.as_ref().err().map(Error::to_string),
                peer: result.ok(),
            });
        }
        Ok(())
    }
}

impl Results {
    /// As JSON.
    pub fn to_json(&self) -> Value {
        let reached: Vec<_> = self.bars.iter().map(|bar| json!({"bar": bar, "reached": bar.reached()})).collect();
        json!({"device": self.name, "peaks": self.peaks, "measured": self.measured, "lacking": self.lacking,
            "decoded": self.decoded, "peer": self.compared, "bars": reached})
    }

    /// As tables.
    pub fn describe(&self) -> String {
        let mut text = training_table(&self.measured);
        if !self.decoded.is_empty() {
            text.push_str(&format!("\n{}", decode_table(&self.decoded)));
        }
        if !self.compared.is_empty() {
            text.push_str(&format!("\n{}", peer_table(&self.compared)));
        }
        let (name, copy, product) = (&self.name, self.peaks.copy / 1e9, self.peaks.product / 1e12);
        text.push_str(&format!(
            "\n{name}: a copy moves {copy:.0} GB/s, a bf16 product of {LARGE} rows {product:.0} TFLOP/s\n\n{}",
            bar_table(&self.bars)
        ));
        text
    }
}

/// One and a half times the faster of what the peer reached.
fn peer_bar(measured: &Measured, compared: &[Compared]) -> Option<Bar> {
    let same = compared.iter().filter(|c| (c.model, c.method) == (measured.model, measured.method));
    let found = same.filter_map(|c| c.ratio).min_by(f64::total_cmp)?;
    let what = format!("{} {}, ratio to transformers + PEFT", measured.model, measured.method);
    Some(Bar { what, found, wanted: 1.5, at_most: false })
}

fn training_table(measured: &[Measured]) -> String {
    let row = |m: &Measured| {
        vec![
            format!("{} {}", m.model, m.method),
            m.tokens.to_string(),
            format!("{:.0}", m.tokens_per_s),
            format!("{:.0}", m.flops / 1e12),
            format!("{:.0} %", 100.0 * m.share),
            format!("{:.1}", m.peak_bytes as f64 / 1e9),
            format!("{:.1}", m.planned_bytes as f64 / 1e9),
            m.optim.name().to_owned(),
            m.recompute.to_string(),
            m.offload.to_string(),
            format!("{:.3}", m.first_loss),
        ]
    };
    let header = [
        "model",
        "tokens",
        "tokens/s",
        "TFLOP/s",
        "of the peak",
        "GB",
        "planned",
        "optim",
        "recompute",
        "offload",
        "first loss",
    ];
    table(&header, &measured.iter().map(row).collect::<Vec<_>>())
}

fn decode_table(decoded: &[Decoded]) -> String {
    let row = |d: &Decoded| {
        vec![
            d.model.to_owned(),
            d.sequences.to_string(),
            d.context.to_string(),
            format!("{:.0}", d.tokens_per_s),
            format!("{:.0} %", 100.0 * d.share),
            format!("{:.1}", d.peak_bytes as f64 / 1e9),
            format!("{:.1}", d.planned_bytes as f64 / 1e9),
        ]
    };
    let header = ["generation", "sequences", "context", "tokens/s", "of the bandwidth", "GB", "planned"];
    table(&header, &decoded.iter().map(row).collect::<Vec<_>>())
}

fn peer_table(compared: &[Compared]) -> String {
    let row = |c: &Compared| {
        let name = format!("{} {}{}", c.model, c.method, if c.compiled { ", compiled" } else { "" });
        let Some(peer) = &c.peer else {
            let failed = c.failed.clone().unwrap_or_default();
            return vec![name, "-".into(), "-".into(), "-".into(), "-".into(), failed];
        };
        vec![
            name,
            format!("{:.0}", peer.tokens_per_s),
            c.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            peer.peak_bytes.map_or_else(|| "-".into(), |bytes| format!("{:.1}", bytes as f64 / 1e9)),
            format!("{:.3}", peer.first_loss),
            if peer.checkpointing { "blocks run twice".into() } else { String::new() },
        ]
    };
    let header = ["transformers + PEFT", "tokens/s", "ratio", "GB", "first loss", ""];
    table(&header, &compared.iter().map(row).collect::<Vec<_>>())
}

fn bar_table(bars: &[Bar]) -> String {
    let row = |bar: &Bar| {
        let number = |x: f64| if x < 1000.0 { format!("{x:.1}") } else { format!("{x:.0}") };
        let sign = if bar.at_most { "<=" } else { ">=" };
        let verdict = if bar.reached() { "reached" } else { "MISSED" };
        vec![bar.what.clone(), number(bar.found), format!("{sign} {}", number(bar.wanted)), verdict.into()]
    };
    let header = ["aimed at on one H100", "found", "wanted", ""];
    table(&header, &bars.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_model::Recompute;
    use tunesmith_model::memory::Offload;
    use tunesmith_train::optimizer::Optim;

    fn measured() -> Measured {
        Measured {
            model: "8B",
            method: "lora",
            tokens: 4096,
            tokens_per_s: 3000.0,
            flops: 1e12,
            share: 0.25,
            peak_bytes: 20_000_000_000,
            planned_bytes: 21_000_000_000,
            optim: Optim::AdamW,
            recompute: Recompute::Norms,
            offload: Offload { activations: true, ..Offload::NONE },
            first_loss: 11.8,
        }
    }

    fn compared(compiled: bool, ratio: Option<f64>) -> Compared {
        let failed = ratio.is_none().then(|| "out of memory".to_owned());
        Compared { model: "8B", method: "lora", compiled, ratio, peer: None, failed }
    }

    #[test]
    fn the_faster_peer_counts() {
        let line = measured();
        let bar = peer_bar(&line, &[compared(false, Some(1.7)), compared(true, Some(1.4))]).unwrap();
        assert!(bar.found == 1.4 && !bar.reached(), "{bar:?}");
        let bar = peer_bar(&line, &[compared(false, Some(1.7)), compared(true, None)]).unwrap();
        assert!(bar.found == 1.7 && bar.reached(), "{bar:?}");
        assert!(peer_bar(&line, &[compared(true, None)]).is_none());
    }

    #[test]
    fn tables_say_what_was_reached() {
        let bars = gpu_bench::bars(&[measured()], &[], &[]);
        let text = bar_table(&bars);
        assert!(text.contains(">= 15000") && text.contains("MISSED"), "{text}");
        assert!(peer_table(&[compared(true, None)]).contains("out of memory"));
        let decoded = Decoded {
            model: "8B",
            sequences: 64,
            context: 512,
            tokens_per_s: 3100.0,
            limit: 6200.0,
            share: 0.5,
            peak_bytes: 20_700_000_000,
            planned_bytes: 21_300_000_000,
        };
        let text = decode_table(&[decoded]);
        assert!(["64", "50 %", "20.7", "21.3", "planned"].iter().all(|part| text.contains(part)), "{text}");
        let text = training_table(&[measured()]);
        assert!(text.contains("25 %") && text.contains("[\"activations\"]"), "{text}");
    }
}
