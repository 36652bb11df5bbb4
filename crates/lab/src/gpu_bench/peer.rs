//! The same training step in transformers + PEFT, by a Python of the user's.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use tunesmith_files::{Error, Result};
use tunesmith_model::{Config, Recompute};
use tunesmith_tensor::DeviceSpec;
use tunesmith_train::gpu_bench::Case;

const SCRIPT: &str = include_str!("peer.py");

/// What the script measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Peer {
    pub(super) tokens_per_s: f64,
    pub(super) peak_bytes: Option<u64>,
    pub(super) first_loss: f64,
    /// Whether blocks ran a second time in the backward pass.
    pub(super) checkpointing: bool,
    /// Whether the model went through torch.compile.
    pub(super) compiled: bool,
    pub(super) versions: BTreeMap<String, String>,
}

/// What the script is asked for.
pub(super) fn request(case: &Case, steps: u64, device: DeviceSpec, compile: bool) -> Value {
    json!({
        "config": shape(&case.config),
        "method": case.method(),
        "tokens": case.tokens,
        "steps": steps,
        "dtype": "bf16",
        "optim": case.optim.name(),
        "checkpointing": case.recompute == Recompute::Block,
        "compile": compile,
        "device": device.to_string(),
    })
}

/// The model's sizes as config.json names them.
fn shape(c: &Config) -> Value {
    json!({
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings, "initializer_range": c.initializer_range,
    })
}

/// Runs the script with `python`.
///
/// # Errors
/// When it cannot be started, or ends without a result: the last line that it wrote says why.
pub(super) fn measure(python: &Path, request: &Value) -> Result<Peer> {
    let failed = |what: String| Error::Failure(format!("{}: {what}", python.display()));
    let mut child = Command::new(python)
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::Input(format!("--peer {}: {e}", python.display())))?;
    if let Some(mut input) = child.stdin.take() {
        // A script that fails early does not read its input; what it says is worth more than that.
        let _ = input.write_all(request.to_string().as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    let last = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
    };
    if !output.status.success() {
        return Err(failed(format!("{}: {}", output.status, last(&output.stderr))));
    }
    serde_json::from_str(&last(&output.stdout)).map_err(|e| failed(format!("its result cannot be read: {e}")))
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use tunesmith_train::gpu_bench::cases;

    /// A stand-in for Python that reads its input and then runs `script`.
    fn python(folder: &Path, script: &str) -> PathBuf {
        let file = folder.join("python");
        std::fs::write(&file, format!("#!/bin/sh\ncat > {}/input\n{script}\n", folder.display())).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        file
    }

    #[test]
    fn the_script_is_asked_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let result = r#"{"tokens_per_s": 123.5, "peak_bytes": null, "first_loss": 11.7, "checkpointing": true,
            "compiled": false, "versions": {"torch": "2.0"}}"#;
        let fake = python(folder.path(), &format!("echo a warning; echo '{}'", result.replace('\n', " ")));
        let cases = cases(Recompute::Norms).unwrap();
        let case = cases.iter().find(|c| c.nf4).unwrap();
        let request = request(case, 3, DeviceSpec::Cuda(1), false);
        let peer = measure(&fake, &request).unwrap();
        assert_eq!((peer.tokens_per_s, peer.peak_bytes, peer.checkpointing), (123.5, None, true));
        assert_eq!(peer.versions["torch"], "2.0");
        let asked: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.path().join("input")).unwrap()).unwrap();
        assert_eq!(asked, request);
        assert_eq!((&asked["method"], &asked["checkpointing"]), (&json!("qlora"), &json!(true)));
        assert_eq!((&asked["config"]["num_hidden_layers"], &asked["tokens"]), (&json!(32), &json!(2048)));
    }

    #[test]
    fn what_fails_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let case = &cases(Recompute::Norms).unwrap()[0];
        let request = request(case, 1, DeviceSpec::Cuda(0), true);
        let error = |script: &str| measure(&python(folder.path(), script), &request).unwrap_err().to_string();
        assert!(error("echo 'No module named torch' >&2; exit 1").contains("No module named torch"));
        assert!(error("echo nothing").contains("its result cannot be read"));
        let missing = measure(&folder.path().join("nowhere"), &request).unwrap_err();
        assert!(missing.exit_code() == 2 && missing.to_string().contains("--peer"), "{missing}");
    }
}
