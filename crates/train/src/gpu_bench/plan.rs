//! What a case needs of a GPU's memory, known before it is made.

use super::Case;
use crate::config::{Config, Method, TrainingArguments};
use crate::memory::{Choice, DataShape, Inputs, Place, Plan};
use crate::optimizer::Optim;
use serde::Serialize;
use std::fmt;
use tunesmith_files::bytes::format_bytes;
use tunesmith_model::Recompute;
use tunesmith_model::memory::Offload;
use tunesmith_model::memory::gpu::{OnGpu, embedding_bytes, generation_bytes, weight_bytes};
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
    /// What would then wait in the processor's memory.
    pub offload: Option<Offload>,
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
        if let (Some(optim), Some(recompute), Some(offload)) = (self.optim, self.recompute, self.offload) {
            write!(f, " (optim {}, recompute {recompute}, offload {offload})", optim.name())?;
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
    /// How the case fits into `free` bytes of a GPU in `dtype`, and within its own limit if it can: with the moments that it asks for
    /// unless smaller ones make a step shorter by more than a twentieth, and with as little made again and elsewhere as there is room
    /// for, but not less than it asks for.
    ///
    /// # Errors
    /// When it does not fit: what it needs at least.
    pub fn settle(&self, dtype: Dtype, free: u64) -> Result<Settled, Lacking> {
        let limited = self.limit.and_then(|limit| self.settle_within(dtype, free.min(limit)).ok());
        limited.map_or_else(|| self.settle_within(dtype, free), Ok)
    }

    fn settle_within(&self, dtype: Dtype, free: u64) -> Result<Settled, Lacking> {
        let plans = [self.optim, Optim::AdamW8bit].map(|optim| (optim, self.plan(dtype, optim, free)));
        let settled = |optim: Optim, plan: &Plan| {
            let Choice { recompute, offload, .. } = plan.choice;
            Settled { case: Self { optim, recompute, offload, ..self.clone() }, bytes: plan.total }
        };
        let [(asked, (plan, time)), (small, (small_plan, small_time))] = plans;
        match (plan.total <= free, small_plan.total <= free) {
            (true, fits) if !fits || time <= 1.05 * small_time => Ok(settled(asked, &plan)),
            (_, true) => Ok(settled(small, &small_plan)),
            _ => {
                let (optim, least) = if small_plan.total < plan.total { (small, small_plan) } else { (asked, plan) };
                let Choice { recompute, offload, .. } = least.choice;
                let (model, method) = (self.model, self.method());
                let (optim, recompute, offload) = (Some(optim), Some(recompute), Some(offload));
                Err(Lacking { model, method, sequences: None, optim, recompute, offload, needed: least.total, free })
            }
        }
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
        let on = OnGpu { dtype, largest_quantised, num_trained: 0, head_trains: false, parked: false };
        let buffers = generation_bytes(&self.config, None, sequences, (context, new), on);
        let needed = weights + buffers + sizes::PRODUCTS as u64;
        if needed <= free {
            return Ok(needed);
        }
        let (optim, recompute, offload) = (None, None, None);
        let (model, method, sequences) = (self.model, "decode", Some(sequences));
        Err(Lacking { model, method, sequences, optim, recompute, offload, needed, free })
    }

    /// The fastest plan that fits, or the one that needs least; and its time, relative to others.
    fn plan(&self, dtype: Dtype, optim: Optim, free: u64) -> (Plan, f64) {
        let config = Config {
            method: if self.full { Method::Full } else { Method::Lora },
            training: TrainingArguments {
                per_device_train_batch_size: 1,
                gradient_accumulation_steps: 1,
                recompute: Some(self.recompute),
                optim,
                offload: self.offload,
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
            embedding: (!self.full && !self.config.tie_word_embeddings)
                .then(|| embedding_bytes(&self.config, self.nf4, dtype)),
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
        let plan = inputs.fastest(free);
        (plan, inputs.relative_time(plan.choice))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{QLORA_BYTES, cases};
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn case(model: &str, method: &str) -> Case {
        cases(Recompute::None).unwrap().into_iter().find(|c| (c.model, c.method()) == (model, method)).unwrap()
    }

    #[test]
    fn states_and_level_follow_from_the_room_there_is() {
        let full = case("8B", "full");
        let settled = |gb: u64| {
            let Case { optim, recompute, offload, .. } = full.settle(Dtype::BF16, gb * GB).unwrap().case;
            (optim, recompute, offload)
        };
        let moments = Offload { optimizer: true, ..Offload::NONE };
        assert_eq!(settled(80), (Optim::AdamW8bit, Recompute::Norms, moments));
        assert_eq!(settled(84), (Optim::AdamW8bit, Recompute::Block, Offload::NONE));
        assert_eq!(settled(96), (Optim::AdamW8bit, Recompute::Norms, Offload::NONE));
        // There would be room for f32 moments, but only with blocks made again.
        assert_eq!(settled(140), (Optim::AdamW8bit, Recompute::None, Offload::NONE));
        assert_eq!(settled(200), (Optim::AdamW, Recompute::None, Offload::NONE));
        // What a case asks for is kept or exceeded.
        let blocks = Case { recompute: Recompute::Block, optim: Optim::AdamW8bit, ..full.clone() };
        let settled = blocks.settle(Dtype::BF16, 200 * GB).unwrap();
        assert_eq!((settled.case.optim, settled.case.recompute), (Optim::AdamW8bit, Recompute::Block));
    }

    #[test]
    fn the_quantised_model_stays_within_its_limit() {
        let qlora = case("8B", "qlora");
        let settled = qlora.settle(Dtype::BF16, 80 * GB).unwrap();
        assert!(settled.bytes <= QLORA_BYTES, "{}", settled.bytes);
        let activations = Offload { activations: true, ..Offload::NONE };
        assert_eq!((settled.case.recompute, settled.case.offload), (Recompute::Block, activations));
        // All that can wait elsewhere does where that is needed, and there it has an end.
        let all = Offload { embedding: true, activations: true, optimizer: true };
        let least = qlora.settle(Dtype::BF16, GB).unwrap_err();
        assert_eq!((least.offload, least.needed < 5_200_000_000), (Some(all), true), "{least}");
        // A limit that cannot be kept does not keep the case from being measured.
        let strict = Case { limit: Some(GB), ..qlora };
        assert!(strict.settle(Dtype::BF16, 80 * GB).unwrap().bytes > GB);
    }

    #[test]
    fn the_least_is_enough_and_a_byte_less_is_not() {
        let full = case("8B", "full");
        let lacking = full.settle(Dtype::BF16, 40 * GB).unwrap_err();
        // 4 bytes of each weight, 4 of its gradient; moments and inputs of blocks wait elsewhere; one block, logits.
        let states = 8_030_261_248.0 * (4.0 + 4.0);
        let rest = lacking.needed as f64 - states;
        assert!((1e9..2e9).contains(&rest), "{lacking:?}");
        assert_eq!((lacking.optim, lacking.recompute), (Some(Optim::AdamW8bit), Some(Recompute::Block)));
        let text = lacking.to_string();
        for part in [
            "8B full",
            "65.88 GB at least",
            "adamw_8bit",
            "block",
            "offload [\"activations\", \"optimizer\"]",
            "40.00 GB are free",
            "25.88 GB are missing",
        ] {
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
