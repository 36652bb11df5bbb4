//! The tiny models of the model crate, and the binary.

// Each test target uses a part of this.
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A file or folder beside the tiny models.
pub(crate) fn fixture(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(path);
    path.to_str().unwrap().to_owned()
}

/// A folder with the tiny model `name` and a tokenizer of 500 tokens with a chat template.
pub(crate) fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    for (from, file) in [
        (PathBuf::from(fixture(name)), "config.json"),
        (PathBuf::from(fixture(name)), "generation_config.json"),
        (PathBuf::from(fixture(name)), "model.safetensors"),
        (tokenizer.clone(), "tokenizer.json"),
        (tokenizer.clone(), "tokenizer_config.json"),
        (tokenizer, "chat_template.jinja"),
    ] {
        std::fs::copy(from.join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// The binary, kept off the network.
pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.env("TUNESMITH_OFFLINE", "1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the binary with `input` on its standard input.
pub(crate) fn run_with(args: &[&str], input: &str) -> Ran {
    let mut child = binary().args(args).spawn().unwrap();
    // A command that fails early does not read its input.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs the binary.
pub(crate) fn run(args: &[&str]) -> Ran {
    run_with(args, "")
}

/// Runs the binary, which must end with `code` and say `said` on standard error.
#[track_caller]
pub(crate) fn refused(args: &[&str], code: i32, said: &str) {
    let ran = run(args);
    assert!(ran.code == code && ran.stderr.contains(said), "{args:?} should say {said:?}: {ran:?}");
}
