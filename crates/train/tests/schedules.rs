//! Every schedule against the factors that Hugging Face's own schedulers gave: 100 steps, 10 of them warm-up.

use std::{collections::BTreeMap, fs};

use tunesmith_train::schedule::Schedule;

#[test]
fn factors_equal_the_reference() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schedules.json")).unwrap();
    let reference: BTreeMap<String, Vec<f64>> = serde_json::from_str(&text).unwrap();
    assert_eq!(reference.len(), 7);
    for (name, factors) in reference {
        // The arguments of the reference; the others run with the defaults.
        let schedule = match name.as_str() {
            "cosine_with_min_lr" => Schedule::CosineWithMinLr { min_lr_rate: 0.1 },
            "warmup_stable_decay" => Schedule::WarmupStableDecay { num_decay_steps: Some(20), min_lr_ratio: 0.0 },
            _ => Schedule::from_name(&name).unwrap(),
        };
        assert_eq!(factors.len(), 100);
        for (step, expected) in factors.into_iter().enumerate() {
            let got = schedule.multiplier(step as u64, 10, 100);
            assert!((got - expected).abs() < 1e-12, "{name} at step {step}: {got} instead of {expected}");
        }
    }
}
