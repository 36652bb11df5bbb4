//! What a case needs of a GPU's memory, known before it is made.

use super::Case;
use crate::config::{Config, Method, TrainingArguments};
use crate::memory::{DataShape, Inputs, Place, Plan, format_bytes};
use crate::optimizer::Optim;
use serde::Serialize;
use std::fmt;
use tunesmith_model::Recompute;
use tunesmith_model::memory::gpu::{OnGpu, generation_bytes, weight_bytes};
use tunesmith_tensor::Dtype;
use tunesmith_tensor::cuda::sizes;

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
    /// `full`, `lora` or `qlora`; `decode` for generation.
    pub method: &'static str,
    /// How many sequences are generated.
    pub sequences: Option<usize>,
    /// The moments with which training would need least.
    pub optim: Option<Optim>,
    /// The level with which training would need least.
    pub recompute: Option<Recompute>,
    /// The bytes that it then needs: the smallest memory that would do.
    pub needed: u64,
    /// The bytes that there are for it.
    pub free: u64,
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, method, .. } = self;
        match self.sequences {
            Some(sequences) => write!(f, "{model} {method} of {sequences} sequences is left out")?,
            None => write!(f, "{model} {method} is left out")?,
        }
        write!(f, ": it needs {} at least", format_bytes(self.needed))?;
        if let (Some(optim), Some(recompute)) = (self.optim, self.recompute) {
            write!(f, " (optim {}, recompute {recompute})", optim.name())?;
        }
        write!(
            f,
            ", {} are free, {} are missing",
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
        let mut lacking = Lacking {
            model: self.model,
            method: self.method(),
            sequences: None,
            optim: None,
            recompute: None,
            needed: u64::MAX,
            free,
        };
        for optim in [self.optim, Optim::AdamW8bit] {
            let plan = self.plan(dtype, optim, free);
            let recompute = plan.choice.recompute;
            if plan.total <= free {
                let case = Self { optim, recompute, ..self.clone() };
                return Ok(Settled { case, bytes: plan.total });
            }
            if plan.total < lacking.needed {
                lacking = Lacking { optim: Some(optim), recompute: Some(recompute), needed: plan.total, ..lacking };
            }
        }
        Err(lacking)
    }

    /// Bytes that generating `new` tokens behind `context` tokens in each of `sequences` sequences holds in `dtype`, of `free` that
    /// there are.
    ///
    /// # Errors
    /// When that is not enough.
    pub fn settle_decode(
        &self,
        dtype: Dtype,
        (sequences, context, new): (usize, usize, usize),
        free: u64,
    ) -> Result<u64, Lacking> {
        let (weights, largest_quantised) = weight_bytes(&self.config, self.nf4, dtype, false);
        let on = OnGpu { dtype, largest_quantised, num_trained: 0 };
        let buffers = generation_bytes(&self.config, None, sequences, (context, new), on);
        let needed = weights + buffers + sizes::PRODUCTS as u64;
        if needed <= free {
            return Ok(needed);
        }
        let (optim, recompute) = (None, None);
        Err(Lacking { model: self.model, method: "decode", sequences: Some(sequences), optim, recompute, needed, free })
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
        assert_eq!((lacking.optim, lacking.recompute), (Some(Optim::AdamW8bit), Some(Recompute::Block)));
        let text = lacking.to_string();
        for part in ["8B full", "83.20 GB at least", "adamw_8bit", "block", "80.00 GB are free", "3.20 GB are missing"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(full.settle(Dtype::BF16, lacking.needed).unwrap().bytes, lacking.needed);
        assert_eq!(full.settle(Dtype::BF16, lacking.needed - 1).unwrap_err().needed, lacking.needed);
    }
    #[test]
    fn generation_needs_weights_and_caches() {
        let lora = case("8B", "lora");
        let [one, many] = [1, 64].map(|n| lora.settle_decode(Dtype::BF16, (n, 512, 65), u64::MAX).unwrap());
        // 2 bytes of each weight, 2 of each element of 1,024 keys and values of 32 layers for each token.
        let weights = 8_030_261_248 * 2;
        let cache = |sequences: u64| sequences * 577 * 32 * 2 * 1024 * 2;
        for (planned, sequences) in [(one, 1), (many, 64)] {
            let rest = planned - weights - cache(sequences);
            assert!((32 << 20..3 * GB).contains(&rest), "{sequences}: {rest} beside weights and caches");
        }
        let lacking = lora.settle_decode(Dtype::BF16, (64, 512, 65), many - 1).unwrap_err();
        assert_eq!((lacking.needed, lacking.free, lacking.method), (many, many - 1, "decode"));
        let text = lacking.to_string();
        assert!(text.contains("8B decode of 64 sequences is left out") && !text.contains("optim"), "{text}");
        let training = case("3B", "lora").settle(Dtype::BF16, GB).unwrap_err();
        assert!(training.to_string().starts_with("3B lora is left out: it needs "), "{training}");
    }
}
