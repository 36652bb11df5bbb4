//! Every configuration in configs/ must be one that runs.

use crate::{Result, read};
use std::path::{Path, PathBuf};
use tunesmith_train::config::Config;

/// Plans all of configs/ and prints what each would do.
pub(crate) fn plan_all(root: &Path) -> Result<()> {
    for path in list(root)? {
        let config = plan(root, &path)?;
        println!(
            "{}: {:?} of {} on {} places",
            path.display(),
            config.method,
            config.model.source,
            config.data.train.len()
        );
    }
    Ok(())
}

/// configs/*.toml, relative to the root, sorted.
fn list(root: &Path) -> Result<Vec<PathBuf>> {
    let folder = root.join("configs");
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| Path::new("configs").join(entry.file_name()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        .collect();
    found.sort();
    if found.is_empty() { Err("configs/ has no configuration".into()) } else { Ok(found) }
}

/// Reads one configuration as `tunesmith train` would, and checks that its first line is the command that runs it and
/// that the files of this repository that it names are there.
fn plan(root: &Path, path: &Path) -> Result<Config> {
    let name = path.display().to_string();
    let text = read(&root.join(path))?;
    let command = format!("# tunesmith train {name}");
    if text.lines().next() != Some(&command) {
        return Err(format!("{name}: the first line must be `{command}`"));
    }
    let config = Config::parse(&text, &name, &[]).map_err(|e| e.to_string())?;
    let warmup = config.warmup_steps(u64::try_from(config.training.max_steps).unwrap_or(u64::MAX));
    config.training.lr_scheduler_type.check(warmup, u64::MAX).map_err(|e| format!("{name}: {e}"))?;
    let data = &config.data;
    let places = data.train.iter().chain(&data.validation).chain(&data.test);
    for place in places.chain([&config.model.source]).filter(|place| place.starts_with("configs/")) {
        if !root.join(place).exists() {
            return Err(format!("{name}: {place} does not exist"));
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_committed_configuration_is_planned() {
        let root = crate::root();
        let found = list(&root).unwrap();
        assert!(found.len() >= 4);
        let mut folders = Vec::new();
        for path in found {
            folders.push(plan(&root, &path).unwrap().output_dir);
        }
        let num_configs = folders.len();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), num_configs, "each run has a folder of its own");
    }

    #[test]
    fn a_wrong_first_line_or_place_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let plan = |text: &str| {
            crate::write(&folder.path().join("configs/a.toml"), text).unwrap();
            plan(folder.path(), Path::new("configs/a.toml")).unwrap_err()
        };
        assert!(plan("[model]\n").contains("the first line must be `# tunesmith train configs/a.toml`"));
        let first = "# tunesmith train configs/a.toml";
        assert!(plan(&format!("{first}\n[model]\nsource = \"m\"\n")).contains("data.train"));
        let rest = "[model]\nsource = \"m\"\n[data]\ntrain = [\"configs/none.jsonl\"]\n";
        assert!(plan(&format!("{first}\n{rest}")).contains("configs/none.jsonl does not exist"));
    }
}
