//! Compiled kernels for all supported GPUs in one file, which a release carries inside: [`MAGIC`], then for each module
//! its name, its architecture, a hash of its source and its code, each after its length (u32, little-endian).

use super::compiler::source_hash;
use super::kernels::Module;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// First bytes of an archive.
const MAGIC: &[u8] = b"tunesmith kernels 1\n";

/// What the library was built with; empty without an archive.
static EMBEDDED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.bin"));

/// Architectures that archives have code for: Ampere, its small sisters, Ada, Hopper, Blackwell, and Blackwell's small
/// sisters.
pub const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"];

/// Hash of the source, and the code.
type Entry = (String, Cow<'static, [u8]>);

/// Compiled kernels.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    /// By module and architecture.
    entries: BTreeMap<(String, String), Entry>,
}

impl Archive {
    /// What this program was built with.
    ///
    /// # Errors
    /// When the file that it was built with is no archive.
    pub fn embedded() -> Result<Self, String> {
        if EMBEDDED.is_empty() { Ok(Self::default()) } else { Self::parse(EMBEDDED) }
    }

    /// Reads an archive.
    ///
    /// # Errors
    /// When `bytes` are none.
    pub fn parse(bytes: &'static [u8]) -> Result<Self, String> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or("it does not begin like an archive of kernels")?;
        let mut field = || -> Result<&'static [u8], String> {
            let (len, after) = rest.split_first_chunk::<4>().ok_or("it ends inside an entry")?;
            let len = u32::from_le_bytes(*len) as usize;
            let (field, after) = after.split_at_checked(len).ok_or("it ends inside an entry")?;
            rest = after;
            Ok(field)
        };
        let mut archive = Self::default();
        let count = field()?;
        let count = <[u8; 4]>::try_from(count).map_err(|_| "it has no number of entries")?;
        for _ in 0..u32::from_le_bytes(count) {
            let [module, architecture, hash] =
                [field()?, field()?, field()?].map(|f| String::from_utf8_lossy(f).into_owned());
            archive.entries.insert((module, architecture), (hash, Cow::Borrowed(field()?)));
        }
        Ok(archive)
    }

    /// Adds the code of `module` for `architecture`.
    pub fn insert(&mut self, module: &Module, architecture: &str, code: Vec<u8>) {
        let key = (module.name(), architecture.to_owned());
        self.entries.insert(key, (source_hash(module), Cow::Owned(code)));
    }

    /// The bytes that [`Archive::parse`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut put = |field: &[u8]| {
            bytes.extend((field.len() as u32).to_le_bytes());
            bytes.extend(field);
        };
        put(&(self.entries.len() as u32).to_le_bytes());
        for ((module, architecture), (hash, code)) in &self.entries {
            [module.as_bytes(), architecture.as_bytes(), hash.as_bytes(), code].into_iter().for_each(&mut put);
        }
        bytes
    }

    /// The code of `module` for `architecture`, if it was compiled from the source that this program has.
    pub fn find(&self, module: &Module, architecture: &str) -> Option<&[u8]> {
        let (hash, code) = self.entries.get(&(module.name(), architecture.to_owned()))?;
        (*hash == source_hash(module)).then_some(code)
    }

    /// Whether every module can be had for `architecture`, so that no compiler is needed.
    pub fn is_complete(&self, architecture: &str) -> bool {
        Module::all().iter().all(|module| self.find(module, architecture).is_some())
    }

    /// True without an entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// The architecture whose code a GPU of compute capability `major`.`minor` runs: its own, or an earlier one of the same
/// generation. What ends in `a` has instructions that only this very one has.
pub fn runs(major: i32, minor: i32) -> Option<&'static str> {
    match (major, minor) {
        (8, 0..=5) => Some("sm_80"),
        (8, 6..=8) => Some("sm_86"),
        (8, _) => Some("sm_89"),
        (9, 0) => Some("sm_90a"),
        (10, 0) => Some("sm_100a"),
        (12, _) => Some("sm_120"),
        _ => None,
    }
}

/// The architecture that kernels are compiled for where no archive has them.
pub fn native(major: i32, minor: i32) -> String {
    match (major, minor) {
        (9, 0) | (10, 0) => format!("sm_{major}{minor}a"),
        _ => format!("sm_{major}{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernels::Source;
    use crate::dtype::Dtype;

    #[test]
    fn what_is_written_is_read() {
        let (rope, sample) = (Module::new(Source::Rope, Dtype::BF16), Module::new(Source::Sample, Dtype::F32));
        let mut archive = Archive::default();
        assert!(archive.is_empty());
        archive.insert(&rope, "sm_80", vec![1, 2, 3]);
        archive.insert(&sample, "sm_90a", Vec::new());
        let bytes: &'static [u8] = archive.to_bytes().leak();
        let read = Archive::parse(bytes).unwrap();
        assert_eq!(read.find(&rope, "sm_80"), Some(&[1u8, 2, 3][..]));
        assert_eq!(read.find(&sample, "sm_90a"), Some(&[][..]));
        assert_eq!((read.find(&rope, "sm_90a"), read.find(&sample, "sm_80")), (None, None));
        assert!(!read.is_complete("sm_80"));
        for end in [0, 5, MAGIC.len(), MAGIC.len() + 6, bytes.len() - 1] {
            assert!(Archive::parse(&bytes[..end]).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn code_of_another_source_is_not_used() {
        let rope = Module::new(Source::Rope, Dtype::BF16);
        let mut archive = Archive::default();
        archive.insert(&rope, "sm_80", vec![1]);
        for (hash, _) in archive.entries.values_mut() {
            hash.replace_range(0..1, "x");
        }
        assert!(archive.find(&rope, "sm_80").is_none());
    }

    #[test]
    fn every_module_makes_an_archive_complete() {
        let mut archive = Archive::default();
        Module::all().iter().for_each(|module| archive.insert(module, "sm_86", vec![0]));
        assert!(archive.is_complete("sm_86") && !archive.is_complete("sm_80"));
    }

    #[test]
    fn gpus_run_code_of_their_generation() {
        let found =
            [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)].map(|(a, b)| runs(a, b));
        let known = ["sm_80", "sm_86", "sm_86", "sm_89", "sm_90a", "sm_100a", "", "sm_120", "sm_120"];
        assert_eq!(found.map(|arch| arch.unwrap_or_default()), known);
        assert!(found.into_iter().flatten().all(|arch| ARCHITECTURES.contains(&arch)));
        assert_eq!([native(9, 0), native(10, 3), native(8, 7)], ["sm_90a", "sm_103", "sm_87"]);
    }

    #[test]
    fn what_this_program_was_built_with_can_be_read() {
        assert!(Archive::embedded().is_ok());
    }
}
