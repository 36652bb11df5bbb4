//! Train, validation or test: decided for each row by a hash of what it says.
//!
//! Adding, removing or reordering rows never moves another row, and equal rows always stay together, so that what was
//! held out once stays held out.
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// One of the three parts of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Looked at while training, to choose the best checkpoint.
    Validation,
    /// Looked at once, at the end.
    Test,
}

impl Split {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// "train", "validation" or "test".
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The part that a row with this `content` belongs to. The hash gives a number in [0, 1): below `validation_fraction`
/// is validation, the next `test_fraction` is test, the rest is train. Growing `test_fraction` therefore leaves the
/// validation rows as they are.
pub fn assign(content: &[u8], seed: u64, validation_fraction: f64, test_fraction: f64) -> Split {
    let place = place(content, seed);
    if place < validation_fraction {
        Split::Validation
    } else if place < validation_fraction + test_fraction {
        Split::Test
    } else {
        Split::Train
    }
}

/// The number in [0, 1) that a hash of `content` gives.
pub(crate) fn place(content: &[u8], seed: u64) -> f64 {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    hasher.update(content);
    let digest = hasher.finalize();
    let mut number = 0_u64;
    for &byte in digest.iter().take(8) {
        number = number << 8 | u64::from(byte);
    }
    // 53 bits fill the fraction of an f64 exactly, so that the number stays below 1.
    (number >> 11) as f64 / (1_u64 << 53) as f64
}

/// How many of `rows` rows of one value go to validation and to test: their share, at least one each where a fraction
/// is asked for and one is left to train on.
pub(crate) fn stratum(rows: usize, validation_fraction: f64, test_fraction: f64) -> (usize, usize) {
    let least = |fraction: f64| usize::from(fraction > 0.0);
    let share = |fraction: f64| ((rows as f64 * fraction).round() as usize).max(least(fraction));
    let (validation, test) = (share(validation_fraction), share(test_fraction));
    if validation + test < rows { (validation, test) } else { (0, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fractions_are_kept() {
        let mut counts = [0; 3];
        for row in 0..20_000 {
            counts[assign(format!("row {row}").as_bytes(), 7, 0.1, 0.2) as usize] += 1;
        }
        assert!((1850..2150).contains(&counts[1]), "{counts:?}");
        assert!((3800..4200).contains(&counts[2]), "{counts:?}");
    }

    #[test]
    fn the_assignment_never_changes() {
        // Pinned: a change here would move rows between the splits of existing runs.
        let splits: String = (0..32).map(|i| assign(&[i], 0, 0.25, 0.25).name().as_bytes()[1] as char).collect();
        assert_eq!(splits, "aarrrraeearereerrrrrrrrraaarerrr");
    }

    #[test]
    fn strata_have_their_share_and_at_least_one() {
        assert_eq!(stratum(1000, 0.1, 0.05), (100, 50));
        assert_eq!(stratum(5, 0.1, 0.1), (1, 1));
        assert_eq!(stratum(2, 0.1, 0.1), (0, 0), "one must be left to train on");
        assert_eq!(stratum(9, 0.0, 0.0), (0, 0));
    }

    proptest! {
        #[test]
        fn nothing_is_held_out_at_zero_and_seeds_differ(content: Vec<u8>, seed: u64) {
            prop_assert_eq!(assign(&content, seed, 0.0, 0.0), Split::Train);
            let moved = (0..64).any(|s| assign(&content, s, 0.5, 0.0) != assign(&content, 64 + s, 0.5, 0.0));
            prop_assert!(moved);
        }

        #[test]
        fn more_test_rows_leave_validation_alone(content: Vec<u8>, validation in 0.0..0.5, test in 0.0..0.5) {
            let alone = assign(&content, 1, validation, 0.0) == Split::Validation;
            prop_assert_eq!(assign(&content, 1, validation, test) == Split::Validation, alone);
        }
    }
}
