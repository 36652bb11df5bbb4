//! What every client of the network shares: its runtime, its cryptography, and trying again.

use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tunesmith_files::{Error, Result};

/// Times that something is tried before it counts as failed.
pub(crate) const ATTEMPTS: u32 = 3;

/// A runtime on the calling thread.
pub(crate) fn runtime() -> Result<Runtime> {
    // One provider of cryptography for the whole program; a second call finds it there.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io { what: "cannot start the network client".into(), source })
}

/// Tries again after what may pass (a lost connection, a busy server), waiting for longer each time. A failed attempt says
/// what went wrong, and whether another may help.
pub(crate) async fn retry<T>(mut attempt: impl AsyncFnMut() -> Result<T, (Error, bool)>) -> Result<T> {
    let mut tried = 1;
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err((error, may_pass)) if !may_pass || tried == ATTEMPTS => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(400 << (2 * (tried - 1)))).await,
        }
        tried += 1;
    }
}
