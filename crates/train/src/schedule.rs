//! Learning-rate schedules: the factor by which a step's learning rate is multiplied.
//!
//! Names and formulas are those of Hugging Face's `lr_scheduler_type` (`transformers/optimization.py`), so that a
//! configuration carries over: warm-up rises from 0 at step 0, the decay ends at `num_training_steps`.

use std::{f64::consts::PI, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{Error, Result};

/// What `cosine_with_min_lr` ends at when the configuration names no `min_lr_rate`.
const DEFAULT_MIN_LR_RATE: f64 = 0.1;
/// What `polynomial` ends at when the configuration names no `lr_end_rate`.
const DEFAULT_LR_END_RATE: f64 = 1e-7;
/// Hugging Face's time scale of `inverse_sqrt` for a run without warm-up, in steps.
const INVERSE_SQRT_TIMESCALE: u64 = 10_000;

/// A schedule by its Hugging Face name.
///
/// In a file it is a name (`"cosine"`), or a table for the ones that take arguments
/// (`{ cosine_with_min_lr = { min_lr_rate = 0.1 } }`); a bare name takes the default arguments.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls on a straight line to 0.
    #[default]
    Linear,
    /// Falls along half a cosine to 0.
    Cosine,
    /// Stays at 1 after the warm-up. Hugging Face ignores warm-up steps here; this program honours them, so that
    /// `constant` with `warmup_steps > 0` is `constant_with_warmup` instead of an option without effect.
    Constant,
    /// Stays at 1 after the warm-up.
    ConstantWithWarmup,
    /// Falls along half a cosine to `min_lr_rate`.
    CosineWithMinLr {
        /// The last factor, a share of the learning rate in [0, 1]. Default 0.1.
        min_lr_rate: f64,
    },
    /// Falls as `(1 - progress)^power` to `lr_end_rate`.
    Polynomial {
        /// The exponent, above 0. Default 1.
        power: f64,
        /// The last factor, a share of the learning rate in [0, 1] (Hugging Face's `lr_end` divided by the learning
        /// rate). Default 1e-7.
        lr_end_rate: f64,
    },
    /// Falls as `1 / sqrt(step / timescale)` and never reaches 0.
    InverseSqrt {
        /// Time scale in steps, above 0. Default: the warm-up steps, or 10,000 without any.
        #[serde(skip_serializing_if = "Option::is_none")]
        timescale: Option<u64>,
    },
    /// Stays at 1, then falls along half a cosine over the last `num_decay_steps` (warmup-stable-decay, Hu et al. 2024,
    /// arXiv:2404.06395).
    WarmupStableDecay {
        /// Length of the fall in steps. Default: a tenth of the run, at least 1.
        #[serde(skip_serializing_if = "Option::is_none")]
        num_decay_steps: Option<u64>,
        /// The last factor, and as in Hugging Face the first one of the warm-up: a share in [0, 1]. Default 0.
        min_lr_ratio: f64,
    },
}

/// Every name, in the order of the documentation.
const NAMES: [&str; 8] = [
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
];

impl Schedule {
    /// The schedule of this Hugging Face name with its default arguments; `None` for a name that is not supported.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "linear" => Self::Linear,
            "cosine" => Self::Cosine,
            "constant" => Self::Constant,
            "constant_with_warmup" => Self::ConstantWithWarmup,
            "cosine_with_min_lr" => Self::CosineWithMinLr { min_lr_rate: DEFAULT_MIN_LR_RATE },
            "polynomial" => Self::Polynomial { power: 1.0, lr_end_rate: DEFAULT_LR_END_RATE },
            "inverse_sqrt" => Self::InverseSqrt { timescale: None },
            "warmup_stable_decay" => Self::WarmupStableDecay { num_decay_steps: None, min_lr_ratio: 0.0 },
            _ => return None,
        })
    }

    /// The Hugging Face name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
            Self::CosineWithMinLr { .. } => "cosine_with_min_lr",
            Self::Polynomial { .. } => "polynomial",
            Self::InverseSqrt { .. } => "inverse_sqrt",
            Self::WarmupStableDecay { .. } => "warmup_stable_decay",
        }
    }

    /// Checks the arguments against the length of the run; to be called when the plan is made.
    ///
    /// # Errors
    /// [`Error::Input`] when an argument is outside its range, or the warm-up (and the decay) do not fit into the run.
    pub fn check(&self, num_warmup_steps: u64, num_training_steps: u64) -> Result<()> {
        let share = |field: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                return Ok(());
            }
            Err(Error::Input(format!(
                "lr_scheduler_type {}: {field} is {value}; give a share from 0 to 1",
                self.name()
            )))
        };
        if num_warmup_steps > num_training_steps {
            return Err(Error::Input(format!(
                "warmup_steps is {num_warmup_steps}, but the run has only {num_training_steps} steps: \
                 warm up for fewer steps or train for more"
            )));
        }
        match *self {
            Self::CosineWithMinLr { min_lr_rate } => share("min_lr_rate", min_lr_rate),
            Self::Polynomial { power, lr_end_rate } => {
                if !(power > 0.0 && power.is_finite()) {
                    let name = self.name();
                    return Err(Error::Input(format!(
                        "lr_scheduler_type {name}: power is {power}; give a number above 0"
                    )));
                }
                share("lr_end_rate", lr_end_rate)
            }
            Self::InverseSqrt { timescale: Some(0) } => {
                Err(Error::Input("lr_scheduler_type inverse_sqrt: timescale is 0; give at least 1 step".into()))
            }
            Self::WarmupStableDecay { num_decay_steps, min_lr_ratio } => {
                if let Some(num_decay_steps) = num_decay_steps
                    && num_decay_steps > num_training_steps - num_warmup_steps
                {
                    return Err(Error::Input(format!(
                        "lr_scheduler_type warmup_stable_decay: num_decay_steps is {num_decay_steps}, but only {} of \
                         {num_training_steps} steps are left after the warm-up",
                        num_training_steps - num_warmup_steps
                    )));
                }
                share("min_lr_ratio", min_lr_ratio)
            }
            _ => Ok(()),
        }
    }

    /// The factor of step `step` (the number of optimizer steps already done, so 0 for the first one): in [0, 1] for
    /// arguments that pass [`Schedule::check`]. Past `num_training_steps` the decaying schedules keep their last factor.
    pub fn multiplier(&self, step: u64, num_warmup_steps: u64, num_training_steps: u64) -> f64 {
        if step < num_warmup_steps {
            let progress = step as f64 / num_warmup_steps as f64;
            return match *self {
                Self::WarmupStableDecay { min_lr_ratio, .. } => progress * (1.0 - min_lr_ratio) + min_lr_ratio,
                _ => progress,
            };
        }
        // Share of the time after the warm-up that has passed.
        let progress = share_of(step - num_warmup_steps, num_training_steps.saturating_sub(num_warmup_steps));
        match *self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => half_cosine(progress),
            Self::Constant | Self::ConstantWithWarmup => 1.0,
            Self::CosineWithMinLr { min_lr_rate } => half_cosine(progress) * (1.0 - min_lr_rate) + min_lr_rate,
            Self::Polynomial { power, lr_end_rate } => (1.0 - lr_end_rate) * (1.0 - progress).powf(power) + lr_end_rate,
            Self::InverseSqrt { timescale } => {
                let own = if num_warmup_steps > 0 { num_warmup_steps } else { INVERSE_SQRT_TIMESCALE };
                let timescale = timescale.unwrap_or(own).max(1) as f64;
                // Shifted so that the curve passes through 1 where the warm-up ends.
                1.0 / (((step - num_warmup_steps) as f64 + timescale) / timescale).sqrt()
            }
            Self::WarmupStableDecay { num_decay_steps, min_lr_ratio } => {
                let num_decay_steps = num_decay_steps.unwrap_or((num_training_steps / 10).max(1));
                let first_decay_step = num_training_steps.saturating_sub(num_decay_steps).max(num_warmup_steps);
                let progress = share_of(step.saturating_sub(first_decay_step), num_decay_steps);
                half_cosine(progress) * (1.0 - min_lr_ratio) + min_lr_ratio
            }
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `done / all`, at most 1; 0 at the start even of a stretch of no length.
fn share_of(done: u64, all: u64) -> f64 {
    (done as f64 / all.max(1) as f64).min(1.0)
}

/// From 1 at progress 0 to 0 at progress 1.
fn half_cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (PI * progress).cos())
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScheduleVisitor)
    }
}

/// The schedules that take arguments, as a table of one key.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum WithArguments {
    CosineWithMinLr {
        #[serde(default = "default_min_lr_rate")]
        min_lr_rate: f64,
    },
    Polynomial {
        #[serde(default = "default_power")]
        power: f64,
        #[serde(default = "default_lr_end_rate")]
        lr_end_rate: f64,
    },
    InverseSqrt {
        timescale: Option<u64>,
    },
    WarmupStableDecay {
        num_decay_steps: Option<u64>,
        #[serde(default)]
        min_lr_ratio: f64,
    },
}

fn default_min_lr_rate() -> f64 {
    DEFAULT_MIN_LR_RATE
}

fn default_power() -> f64 {
    1.0
}

fn default_lr_end_rate() -> f64 {
    DEFAULT_LR_END_RATE
}

/// Accepts a bare name or a table; serde's own untagged form would lose the reason of a failure.
struct ScheduleVisitor;

impl<'de> Visitor<'de> for ScheduleVisitor {
    type Value = Schedule;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "one of {}, or a table of one of them with its arguments", NAMES.join(", "))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Schedule, E> {
        Schedule::from_name(name).ok_or_else(|| E::unknown_variant(name, &NAMES))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Schedule, A::Error> {
        Ok(match WithArguments::deserialize(MapAccessDeserializer::new(map))? {
            WithArguments::CosineWithMinLr { min_lr_rate } => Schedule::CosineWithMinLr { min_lr_rate },
            WithArguments::Polynomial { power, lr_end_rate } => Schedule::Polynomial { power, lr_end_rate },
            WithArguments::InverseSqrt { timescale } => Schedule::InverseSqrt { timescale },
            WithArguments::WarmupStableDecay { num_decay_steps, min_lr_ratio } => {
                Schedule::WarmupStableDecay { num_decay_steps, min_lr_ratio }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_name_reads_and_writes() {
        for name in NAMES {
            let schedule: Schedule = serde_json::from_value(serde_json::json!(name)).unwrap();
            assert_eq!(schedule.name(), name);
            let written = serde_json::to_value(schedule).unwrap();
            let again: Schedule = serde_json::from_value(written).unwrap();
            assert_eq!(again, schedule);
        }
    }

    #[test]
    fn arguments_come_from_a_table() {
        #[derive(Deserialize)]
        struct Config {
            lr_scheduler_type: Schedule,
        }
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.lr_scheduler_type);
        assert_eq!(read("lr_scheduler_type = 'cosine'").unwrap(), Schedule::Cosine);
        assert_eq!(
            read("lr_scheduler_type = { cosine_with_min_lr = { min_lr_rate = 0.25 } }").unwrap(),
            Schedule::CosineWithMinLr { min_lr_rate: 0.25 }
        );
        assert_eq!(
            read("lr_scheduler_type = { warmup_stable_decay = { num_decay_steps = 7 } }").unwrap(),
            Schedule::WarmupStableDecay { num_decay_steps: Some(7), min_lr_ratio: 0.0 }
        );
        let message = read("lr_scheduler_type = 'cosin'").unwrap_err().to_string();
        assert!(message.contains("cosin") && message.contains("warmup_stable_decay"), "{message}");
        let message = read("lr_scheduler_type = { polynomial = { powr = 2.0 } }").unwrap_err().to_string();
        assert!(message.contains("powr"), "{message}");
        assert!(read("lr_scheduler_type = 3").unwrap_err().to_string().contains("one of linear"));
    }

    #[test]
    fn constant_honours_warm_up() {
        assert_eq!(Schedule::Constant.multiplier(0, 0, 10), 1.0);
        assert_eq!(Schedule::Constant.multiplier(1, 4, 10), 0.25);
        assert_eq!(Schedule::Constant.multiplier(400, 4, 10), 1.0);
    }

    #[test]
    fn ends_stay_where_they_are() {
        assert_eq!(Schedule::Linear.multiplier(100, 10, 100), 0.0);
        assert_eq!(Schedule::Linear.multiplier(5000, 10, 100), 0.0);
        assert!(Schedule::Cosine.multiplier(5000, 10, 100).abs() < 1e-12);
        assert!((Schedule::CosineWithMinLr { min_lr_rate: 0.1 }.multiplier(5000, 10, 100) - 0.1).abs() < 1e-12);
        // A run of warm-up alone, and an empty one.
        assert_eq!(Schedule::Cosine.multiplier(10, 10, 10), 1.0);
        assert_eq!(Schedule::Linear.multiplier(0, 0, 0), 1.0);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let message = |schedule: Schedule, warmup: u64, all: u64| schedule.check(warmup, all).unwrap_err().to_string();
        assert!(message(Schedule::Linear, 11, 10).contains("warmup_steps is 11"));
        assert!(message(Schedule::CosineWithMinLr { min_lr_rate: 1.5 }, 0, 10).contains("min_lr_rate is 1.5"));
        assert!(message(Schedule::Polynomial { power: 0.0, lr_end_rate: 0.0 }, 0, 10).contains("power is 0"));
        assert!(message(Schedule::InverseSqrt { timescale: Some(0) }, 0, 10).contains("timescale"));
        let decay = Schedule::WarmupStableDecay { num_decay_steps: Some(8), min_lr_ratio: 0.0 };
        assert!(message(decay, 5, 10).contains("num_decay_steps is 8"));
        assert!(Schedule::WarmupStableDecay { num_decay_steps: Some(5), min_lr_ratio: f64::NAN }.check(5, 10).is_err());
        for name in NAMES {
            Schedule::from_name(name).unwrap().check(3, 10).unwrap();
        }
    }

    proptest! {
        #[test]
        fn factors_are_shares_and_fall_after_the_warm_up(
            name in prop::sample::select(&NAMES[..]), warmup in 0u64..50, rest in 0u64..200, step in 0u64..400,
        ) {
            let schedule = Schedule::from_name(name).unwrap();
            let factor = schedule.multiplier(step, warmup, warmup + rest);
            prop_assert!((0.0..=1.0).contains(&factor), "{factor}");
            if step >= warmup {
                prop_assert!(schedule.multiplier(step + 1, warmup, warmup + rest) <= factor + 1e-12);
            }
        }
    }
}
