//! What a run on a GPU takes besides its buffers: the driver's share of the GPU, and the process's own memory.

use super::{Choice, Inputs, Place, Plan, at_least};
use crate::config::Method;
use crate::{Error, Result};
use serde::Serialize;
use tunesmith_files::bytes::format_bytes;
use tunesmith_model::memory::{Offload, gpu};
use tunesmith_tensor::cuda::sizes;

/// What the driver of a GPU takes of it: its context, and the code that is loaded. Both are assumed, on the safe side.
pub const DRIVER: u64 = (sizes::CONTEXT + sizes::MODULES) as u64;

/// What a run on a GPU has in the process's own memory, without what follows from the tensors that train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Bytes of program, tokenizer, data and the driver's libraries.
    pub program: u64,
    /// Bytes of the base model's weights as they are loaded, before they are moved.
    pub weights: u64,
    /// Bytes that loading holds besides: the largest matrix, on its way into another encoding.
    pub loading: u64,
}

/// Bytes of the process's own memory while a run computes on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HostPlan {
    /// Program, tokenizer, data and the driver's libraries; with what is offloaded, all that there is between loading and saving.
    pub program: u64,
    /// What waits here while the GPU trains (`training.offload`), all the time.
    pub offloaded: u64,
    /// Peak from reading the weights until they have been moved to the GPU.
    pub loading_peak: u64,
    /// Peak while a checkpoint is saved: a copy of the moments, and of the weights that are written.
    pub saving_peak: u64,
    /// The larger of both.
    pub total: u64,
}

impl Inputs<'_> {
    /// What waits in the processor's memory.
    fn offloaded(&self, choice: Choice, trained: &[usize]) -> u64 {
        let Place::Gpu { dtype, .. } = self.place else { return 0 };
        let Offload { embedding, activations, optimizer } = choice.offload;
        let optim = self.config.training.optim;
        // The embedding as it was loaded, f32 at most.
        let table = if embedding { 4 * (self.model.vocab_size * self.model.hidden_size) as u64 } else { 0 };
        let parked = if activations { gpu::parked_bytes(self.model, choice.pass_tokens, dtype) } else { 0 };
        let moments = |len: &usize| optim.offloaded_state_bytes(*len) as u64;
        table + parked + if optimizer { trained.iter().map(moments).sum() } else { 0 }
    }

    /// What the process has itself while the model is on a GPU; `trained` are the elements of each tensor that trains.
    pub(super) fn host_plan(&self, host: Host, choice: Choice, trained: &[usize]) -> HostPlan {
        let optim = self.config.training.optim;
        let offloaded = self.offloaded(choice, trained);
        let moments: u64 = trained.iter().map(|len| optim.state_bytes(*len) as u64).sum();
        let tensors = self.model.expected_tensors();
        let largest = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or(0) as u64;
        let (beside, written) = match self.config.method {
            // One tensor after the other is put together from its halves.
            Method::Full => (0, 8 * largest),
            // An adapter begins on the processor, and is copied whole.
            Method::Lora => [4 * trained.iter().sum::<usize>() as u64; 2].into(),
        };
        // Everything is loaded, and then moved tensor by tensor: a matrix may be decoded or rounded on its way.
        let loading_peak = host.program + host.weights + beside + (moments + 4 * largest).max(host.loading);
        // Moments that wait here are copied to there while the weights are still being moved.
        let arriving = if choice.offload.optimizer { moments } else { 0 };
        let loading_peak = loading_peak + arriving;
        let saving_peak = host.program + offloaded + moments + written;
        HostPlan { program: host.program, offloaded, loading_peak, saving_peak, total: loading_peak.max(saving_peak) }
    }

    /// Whether `plan` has room on a GPU called `name` of which `free` bytes are free, now that its context is there.
    ///
    /// # Errors
    /// When it has not: what it needs, and what would make it smaller.
    pub fn check_room(&self, plan: &Plan, name: &str, free: u64) -> Result<()> {
        // The context is among what is no longer free.
        let context = plan.driver.min(sizes::CONTEXT as u64);
        let limit = free.saturating_add(context);
        if plan.total <= limit {
            return Ok(());
        }
        let mut message = format!(
            "{name} has {} free, and the run needs {} ({} of buffers, {} for loaded code; a context is there already)",
            format_bytes(free),
            format_bytes(plan.total - context),
            format_bytes(plan.buffers()),
            format_bytes(plan.driver - context),
        );
        let set = limit / 1_000_000;
        let plan = self.fastest(set * 1_000_000);
        if plan.total <= set * 1_000_000 {
            let c = plan.choice;
            message.push_str(&format!(
                "; with training.per_device_train_batch_size = {}, training.gradient_accumulation_steps = {}, \
                 training.recompute = \"{}\" and training.offload = {} it needs {} (memory_limit = \"{set}MB\" chooses these for a \
                 new run)",
                c.per_device_train_batch_size,
                c.gradient_accumulation_steps,
                c.recompute,
                c.offload,
                format_bytes(plan.total - context)
            ));
            return Err(Error::DoesNotFit(message));
        }
        let least = plan.total;
        message.push_str(&format!(
            "; the least that would do is {}, with {}",
            format_bytes(least - context),
            at_least(&plan)
        ));
        for suggestion in self.suggestions(limit, least, context) {
            message.push_str("; ");
            message.push_str(&suggestion);
        }
        Err(Error::DoesNotFit(message))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DataShape, Place};
    use super::*;
    use crate::config::{Config, TrainingArguments};
    use crate::optimizer::Optim;
    use tunesmith_model::{AdapterConfig, Config as Model, LINEAR_NAMES, Modules, Recompute, Storage, memory::gpu};
    use tunesmith_tensor::Dtype;

    const HOST: Host = Host { program: 1_000_000, weights: 40_000_000, loading: 3_000_000 };
    const DATA: (usize, usize) = (4, 512);

    fn model() -> Model {
        let text = serde_json::json!({
            "model_type": "llama", "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": true,
        });
        Model::from_json(&text.to_string(), "config.json").unwrap()
    }

    /// What `see` finds of a run with four blocks in a micro-batch that keeps everything.
    fn with_inputs<T>(method: Method, optim: Optim, see: impl FnOnce(&Inputs<'_>) -> T) -> T {
        let training = TrainingArguments {
            per_device_train_batch_size: DATA.0,
            gradient_accumulation_steps: 1,
            optim,
            ..TrainingArguments::default()
        };
        let config = Config { method, training, ..Config::default() };
        let adapter = AdapterConfig {
            r: 8,
            target_modules: Modules::List(LINEAR_NAMES.map(String::from).to_vec()),
            ..AdapterConfig::default()
        };
        let full = method == Method::Full;
        let weights = |nf4| gpu::weight_bytes(&model(), nf4, Dtype::BF16, full).0;
        see(&Inputs {
            config: &config,
            model: &model(),
            adapter: (!full).then_some(&adapter),
            place: Place::Gpu { dtype: Dtype::BF16, largest_quantised: 0 },
            weights: weights(false),
            embedding: None,
            other_weights: &[(Storage::Nf4, weights(true))],
            loading: 0,
            baseline: 0,
            driver: DRIVER,
            host: Some(HOST),
            data: &DataShape::uniform(DATA.0, DATA.1),
            sample: None,
            threads: 1,
        })
    }

    #[test]
    fn the_driver_counts_for_the_limit_and_not_for_the_buffers() {
        with_inputs(Method::Lora, Optim::AdamW, |inputs| {
            let plan = inputs.plan();
            let alone = Inputs { driver: 0, host: None, ..inputs.clone() }.plan();
            assert_eq!((plan.total, plan.buffers(), plan.driver), (alone.total + DRIVER, alone.total, DRIVER));
            assert_eq!((plan.training_peak, alone.host), (alone.training_peak, None));
            assert_eq!(inputs.fastest(plan.total).choice, plan.choice);
            // A byte less and something smaller is chosen, though the buffers alone would fit by far.
            let fitted = inputs.fastest(plan.total - 1);
            assert!(fitted.total < plan.total && fitted.choice != plan.choice, "{fitted:?}");
            let refused = inputs.fit(alone.weights).unwrap_err().to_string();
            let least = format_bytes(inputs.fastest(0).total);
            assert!(refused.contains(&least) && least.ends_with("MB"), "{refused}");
        });
    }

    #[test]
    fn what_is_free_is_enough_or_the_way_out_is_named() {
        with_inputs(Method::Lora, Optim::AdamW, |inputs| {
            let plan = inputs.plan();
            let needed = plan.total - sizes::CONTEXT as u64;
            inputs.check_room(&plan, "a GPU", needed).unwrap();
            inputs.check_room(&plan, "a GPU", u64::MAX).unwrap();
            // Settings that compute the same with less; they fit, and the limit chooses them.
            let free = needed - 2_000_000;
            let refused = inputs.check_room(&plan, "a GPU", free).unwrap_err();
            assert!(matches!(refused, Error::DoesNotFit(_)), "{refused:?}");
            let text = refused.to_string();
            let set = text.split("memory_limit = \"").nth(1).unwrap().split("MB").next().unwrap();
            let fitted = inputs.fit(set.parse::<u64>().unwrap() * 1_000_000).unwrap();
            inputs.check_room(&fitted, "a GPU", free).unwrap();
            let c = fitted.choice;
            for part in [
                format!("a GPU has {} free", format_bytes(free)),
                format!("needs {} (", format_bytes(needed)),
                format!("per_device_train_batch_size = {},", c.per_device_train_batch_size),
                format!(
                    "recompute = \"{}\" and training.offload = {} it needs {}",
                    c.recompute,
                    c.offload,
                    format_bytes(fitted.total - sizes::CONTEXT as u64)
                ),
            ] {
                assert!(text.contains(&part), "{part}: {text}");
            }
            // Nothing fits: the least, and what would alter the results.
            let text = inputs.check_room(&plan, "a GPU", 1_000_000).unwrap_err().to_string();
            let least = inputs.fastest(0);
            assert_eq!((least.choice.per_device_train_batch_size, least.choice.recompute), (1, Recompute::Block));
            for part in [
                &format!("the least that would do is {}", format_bytes(least.total - sizes::CONTEXT as u64)),
                "model.storage = \"nf4\" would need",
                "optim = \"adamw_8bit\" would need",
            ] {
                assert!(text.contains(part), "{part}: {text}");
            }
            assert!(!text.contains("which fits"), "{text}");
        });
    }

    #[test]
    fn the_process_holds_what_is_loaded_and_what_is_saved() {
        let model = model();
        let (all, embedding) = (model.num_params() as u64, (model.vocab_size * model.hidden_size) as u64);
        let lora = with_inputs(Method::Lora, Optim::AdamW, |inputs| inputs.plan().host.unwrap());
        // Rank 8 on the seven matrices of four blocks.
        let adapter = 4 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)) as u64;
        assert_eq!(lora.program, HOST.program);
        assert_eq!(lora.loading_peak, HOST.program + HOST.weights + 4 * adapter + 8 * adapter + 4 * embedding);
        assert_eq!(lora.saving_peak, HOST.program + 8 * adapter + 4 * adapter);
        assert_eq!(lora.total, lora.loading_peak);
        let full = with_inputs(Method::Full, Optim::AdamW, |inputs| inputs.plan().host.unwrap());
        assert_eq!(full.loading_peak, HOST.program + HOST.weights + 8 * all + 4 * embedding);
        assert_eq!(full.saving_peak, HOST.program + 8 * all + 8 * embedding);
        let small = with_inputs(Method::Full, Optim::AdamW8bit, |inputs| inputs.plan().host.unwrap());
        assert!(small.saving_peak < full.saving_peak - 5 * all, "{small:?}");
    }
}
