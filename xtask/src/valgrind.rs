//! Tests under valgrind's memcheck: reads and writes outside of what was allocated, and branches on what was never written.
//! Tens of times slower than the tests alone: `training_curves` of the second group takes about ten minutes on two cores.

use crate::Result;
use std::path::Path;
use std::process::Command;

/// Which tests: kernels first, then whole models against the reference numbers. The emulated GPU changes stacks, which memcheck
/// takes for errors.
const TESTS: [&[&str]; 2] = [
    &["--package", "tunesmith-tensor", "--lib", "--", "--skip", "cuda::"],
    &["--package", "tunesmith-train", "--test", "reference"],
];

/// Runs `TESTS` with valgrind between cargo and each test binary; the children of a test binary run without it.
pub(crate) fn run(root: &Path) -> Result<()> {
    let runner = r#"target."cfg(unix)".runner = ["valgrind", "--quiet", "--error-exitcode=1", "--leak-check=no"]"#;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    for tests in TESTS {
        let mut command = Command::new(&cargo);
        command.args(["--config", runner, "test"]).args(tests).current_dir(root);
        let status = command.status().map_err(|e| format!("cannot run cargo: {e}"))?;
        if !status.success() {
            return Err(format!("cargo test {} failed under valgrind", tests.join(" ")));
        }
    }
    Ok(())
}
