//! A folder or file that is already there.

use crate::{Resolved, Settings};
use std::{fs, path::PathBuf};
use tunesmith_files::{Error, Result};

/// The path that `spec` means if it can only be a path (`./x`, `../x`, `/x`, `~/x`) or if something of that name exists.
pub(crate) fn as_path(spec: &str, settings: &Settings) -> Option<PathBuf> {
    if let (Some(rest), Some(home)) = (spec.strip_prefix("~/"), &settings.home) {
        return Some(home.join(rest));
    }
    let path = PathBuf::from(spec);
    (spec.starts_with('.') || spec.starts_with('~') || path.is_absolute() || path.exists()).then_some(path)
}

/// Checks that the path is there.
pub(crate) fn resolve(spec: &str, path: PathBuf) -> Result<Resolved> {
    if path.exists() {
        return Ok(Resolved { path, origin: spec.to_owned() });
    }
    let wanted = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let nearest = fs::read_dir(parent.unwrap_or(".".as_ref())).ok().and_then(|entries| {
        entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .map(|name| (strsim::jaro_winkler(&wanted, &name.to_lowercase()), name))
            .filter(|(score, _)| *score > 0.85)
            .max_by(|a, b| a.0.total_cmp(&b.0))
    });
    Err(Error::Input(match (nearest, parent) {
        (Some((_, name)), _) => format!("no such file or folder: {spec} (beside it there is `{name}`)"),
        (None, Some(parent)) if !parent.exists() => {
            format!("no such file or folder: {spec} (the folder {} does not exist either)", parent.display())
        }
        _ => format!("no such file or folder: {spec}"),
    }))
}
