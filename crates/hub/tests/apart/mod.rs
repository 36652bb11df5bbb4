//! Settings of a test that shares nothing with the user's.

use std::path::Path;
use tunesmith_hub::Settings;

/// Everything below `folder`; a hub that nobody answers for.
pub(crate) fn settings(folder: &Path) -> Settings {
    Settings {
        cache: folder.join("cache"),
        offline: false,
        hf_endpoint: "http://127.0.0.1:9".to_owned(),
        hf_cache: folder.join("hf/hub"),
        hf_token_file: folder.join("hf/token"),
        hf_token: None,
        home: None,
        pip_args: Vec::new(),
        objects: Vec::new(),
    }
}
