//! What of a model on a GPU waits in the processor's memory.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// Parts of a run on a GPU that wait in the processor's memory. What is computed stays the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offload {
    /// The embedding, where it is frozen and not the head too: rows are sent for each pass.
    pub embedding: bool,
    /// The inputs of blocks between their forward and their backward pass, with [`super::Recompute::Block`]: copied beside the work.
    pub activations: bool,
    /// The optimizer's moments: they come and go piece by piece at each step.
    pub optimizer: bool,
}

/// The names in a configuration.
const NAMES: [&str; 3] = ["embedding", "activations", "optimizer"];

impl Offload {
    /// Nothing waits elsewhere.
    pub const NONE: Self = Self { embedding: false, activations: false, optimizer: false };

    /// Every combination, the one without anything first.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..8u8).map(|bits| Self::from_parts(std::array::from_fn(|i| bits >> i & 1 == 1)))
    }

    /// Whether everything that waits in `other` waits here too.
    pub fn contains(self, other: Self) -> bool {
        self.parts().iter().zip(other.parts()).all(|(here, there)| *here || !there)
    }

    fn parts(self) -> [bool; 3] {
        [self.embedding, self.activations, self.optimizer]
    }

    fn from_parts([embedding, activations, optimizer]: [bool; 3]) -> Self {
        Self { embedding, activations, optimizer }
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.into_iter().zip(self.parts()).filter_map(|(name, waits)| waits.then_some(name))
    }
}

impl fmt::Display for Offload {
    /// As a configuration has it: `["embedding", "activations"]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.names().collect::<Vec<_>>())
    }
}

impl Serialize for Offload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for Offload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut parts = [false; 3];
        for name in Vec::<String>::deserialize(deserializer)? {
            match NAMES.iter().position(|known| *known == name) {
                Some(i) => parts[i] = true,
                None => {
                    let message = format!(
                        "offload has {name:?}, which is none of {}",
                        NAMES.map(|n| format!("{n:?}")).join(", ")
                    );
                    return Err(de::Error::custom(message));
                }
            }
        }
        Ok(Self::from_parts(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_there_and_back() {
        for offload in Offload::all() {
            let text = serde_json::to_string(&offload).unwrap();
            assert_eq!(serde_json::from_str::<Offload>(&text).unwrap(), offload, "{text}");
            assert_eq!(offload.to_string().replace(", ", ","), text);
            assert!(offload.contains(Offload::NONE) && offload.contains(offload));
        }
        assert_eq!(Offload::all().collect::<std::collections::HashSet<_>>().len(), 8);
        let some = Offload { activations: true, ..Offload::NONE };
        assert!(!Offload::NONE.contains(some) && !Offload { optimizer: true, ..Offload::NONE }.contains(some));
        let error = serde_json::from_str::<Offload>("[\"gradients\"]").unwrap_err().to_string();
        assert!(
            error.contains("\"gradients\", which is none of \"embedding\", \"activations\", \"optimizer\""),
            "{error}"
        );
    }
}
