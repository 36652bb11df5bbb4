//! All tests of this crate once more at each instruction set below the best one of this CPU, so that the paths that
//! other CPUs take are run here.
//!
//! A level holds for a process, as it does in the program: each is tried in a child that runs this test binary. The
//! level travels as `--skip simd-level=NAME`, an argument that the test harness takes and that fits no test.

use super::{Level, best};
use std::process::Command;

const ARGUMENT: &str = "simd-level=";

const LEVELS: &[Level] = &[
    Level::Baseline,
    #[cfg(target_arch = "x86_64")]
    Level::Avx2,
    #[cfg(target_arch = "x86_64")]
    Level::Avx512,
];

/// The level that this process was told to use.
pub(super) fn forced() -> Option<Level> {
    let name = std::env::args().find_map(|argument| argument.strip_prefix(ARGUMENT).map(str::to_owned))?;
    LEVELS.iter().copied().find(|level| level.name() == name)
}

#[test]
fn every_test_passes_at_every_level() {
    if let Some(level) = forced() {
        assert_eq!(super::level(), level, "the kernels run at the level that was asked for");
        return;
    }
    let best = LEVELS.iter().position(|level| *level == best()).unwrap();
    for level in &LEVELS[..best] {
        let argument = format!("{ARGUMENT}{}", level.name());
        // Kernels of GPUs do not depend on the CPU.
        let arguments = ["--skip", &argument, "--skip", "cuda::"];
        let tests = Command::new(std::env::current_exe().unwrap()).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&tests.stdout);
        assert!(tests.status.success(), "at level {}:\n{said}", level.name());
        // The child has run tests, and this one among them: the assertion on the level above.
        assert!(said.contains("every_test_passes_at_every_level ... ok"), "{said}");
    }
}
