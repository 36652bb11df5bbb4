//! What a case needs of a GPU's memory, known before it is made.

use super::Case;
use crate::config::{Config, Method, TrainingArguments};
use crate::memory::{DataShape, Inputs, Place, Plan, format_bytes};
use crate::optimizer::Optim;
use serde::Serialize;
use std::fmt;
use tunesmith_model::Recompute;
use tunesmith_model::memory::gpu::weight_bytes;
use tunesmith_tensor::Dtype;

/// A case with the states and the level that it is measured with.
#[derive(Clone, Debug)]
pub struct Settled {
    /// It.
    pub case: Case,
    /// Bytes that it holds at its peak.
    pub bytes: u64,
}

/// A case that a GPU has no room for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lacking {
    /// Shape of the model.
    pub model: &'static str,
    /// `full`, `lora` or `qlora`.
    pub method: &'static str,
    /// The moments with which it would need least.
    pub optim: Optim,
    /// The level with which it would need least.
    pub recompute: Recompute,
    /// The bytes that it then needs: the smallest memory that would do.
    pub needed: u64,
    /// The bytes that there are for it.
    pub free: u64,
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} is left out: it needs {} at least (optim {}, recompute {}), {} are free, {} are missing",
            self.model,
            self.method,
            format_bytes(self.needed),
            self.optim.name(),
            self.recompute,
            format_bytes(self.free),
            format_bytes(self.needed.saturating_sub(self.free)),
        )
    }
}

impl Case {
    /// How the case fits into `free` bytes of a GPU in `dtype`: with the moments that it asks for before smaller ones, and with as
    /// little made again as there is room for, but not less than it asks for.
    ///
    /// # Errors
    /// When it does not fit: what it needs at least.
    pub fn settle(&self, dtype: Dtype, free: u64) -> Result<Settled, Lacking> {
        let (model, method) = (self.model, self.method());
        let (optim, recompute) = (self.optim, self.recompute);
        let mut lacking = Lacking { model, method, optim, recompute, needed: u64::MAX, free };
        for optim in [self.optim, Optim::AdamW8bit] {
            let plan = self.plan(dtype, optim, free);
            let recompute = plan.choice.recompute;
            if plan.total <= free {
                let case = Self { optim, recompute, ..self.clone() };
                return Ok(Settled { case, bytes: plan.total });
            }
            if plan.total < lacking.needed {
                lacking = Lacking { optim, recompute, needed: plan.total, ..lacking };
            }
        }
        Err(lacking)
    }

    /// The fastest plan that fits, or the one that needs least.
    fn plan(&self, dtype: Dtype, optim: Optim, free: u64) -> Plan {
        let config = Config {
            method: if self.full { Method::Full } else { Method::Lora },
            training: TrainingArguments {
                per_device_train_batch_size: 1,
                gradient_accumulation_steps: 1,
                recompute: Some(self.recompute),
                optim,
                ..TrainingArguments::default()
            },
            ..Config::default()
        };
        let adapter = self.adapter();
        let (weights, largest_quantised) = weight_bytes(&self.config, self.nf4, dtype, self.full);
        let inputs = Inputs {
            config: &config,
            model: &self.config,
            adapter: adapter.as_ref(),
            place: Place::Gpu { dtype, largest_quantised },
            weights,
            other_weights: &[],
            loading: 0,
            baseline: 0,
            // What is free is known without it.
            driver: 0,
            host: None,
            data: &DataShape::uniform(1, self.tokens),
            sample: None,
            threads: 0,
        };
        inputs.fastest(free)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cases;
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn case(model: &str, method: &str) -> Case {
        cases(Recompute::None).unwrap().into_iter().find(|c| (c.model, c.method()) == (model, method)).unwrap()
    }

    #[test]
    fn states_and_level_follow_from_the_room_there_is() {
        let full = case("8B", "full");
        let settled = |gb: u64| full.settle(Dtype::BF16, gb * GB).map(|s| (s.case.optim, s.case.recompute)).unwrap();
        assert_eq!(settled(84), (Optim::AdamW8bit, Recompute::Block));
        assert_eq!(settled(96), (Optim::AdamW8bit, Recompute::Norms));
        assert_eq!(settled(100), (Optim::AdamW8bit, Recompute::None));
        assert_eq!(settled(140), (Optim::AdamW, Recompute::Block));
        assert_eq!(settled(200), (Optim::AdamW, Recompute::None));
        // What a case asks for is kept or exceeded.
        let blocks = Case { recompute: Recompute::Block, optim: Optim::AdamW8bit, ..full.clone() };
        let settled = blocks.settle(Dtype::BF16, 200 * GB).unwrap();
        assert_eq!((settled.case.optim, settled.case.recompute), (Optim::AdamW8bit, Recompute::Block));
        let qlora = case("8B", "qlora").settle(Dtype::BF16, 80 * GB).unwrap();
        assert_eq!((qlora.case.optim, qlora.case.recompute), (Optim::AdamW, Recompute::Block));
    }

    #[test]
    fn the_least_is_enough_and_a_byte_less_is_not() {
        let full = case("8B", "full");
        let lacking = full.settle(Dtype::BF16, 80 * GB).unwrap_err();
        // 4 bytes of each weight, 4 of its gradient, 2 of its moments; inputs of 32 blocks, one block, logits.
        let states = 8_030_261_248.0 * (4.0 + 4.0 + 2.0 + 2.0 * 4.0 / 256.0);
        let rest = lacking.needed as f64 - states;
        assert!((2e9..4e9).contains(&rest), "{lacking:?}");
        assert_eq!((lacking.optim, lacking.recompute), (Optim::AdamW8bit, Recompute::Block));
        let text = lacking.to_string();
        for part in ["8B full", "83.20 GB at least", "adamw_8bit", "block", "80.00 GB are free", "3.20 GB are missing"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(full.settle(Dtype::BF16, lacking.needed).unwrap().bytes, lacking.needed);
        assert_eq!(full.settle(Dtype::BF16, lacking.needed - 1).unwrap_err().needed, lacking.needed);
    }
}
