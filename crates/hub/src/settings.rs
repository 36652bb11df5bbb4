//! Where things are fetched from and kept: read once from the variables of an environment, and handed down as a value.

use crate::cache;
use std::{ffi::OsString, path::PathBuf};
use tunesmith_files::{Error, Result};

/// Everything that decides where a source is fetched from and kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Root of the program's own cache: `TUNESMITH_CACHE`, else `tunesmith` in the platform's cache folder.
    pub cache: PathBuf,
    /// No network at all: `TUNESMITH_OFFLINE` or `HF_HUB_OFFLINE` is 1, true, yes or on (the command line may set it too).
    pub offline: bool,
    /// The hub's address without a trailing slash: `HF_ENDPOINT`.
    pub hf_endpoint: String,
    /// The hub's cache of repositories, shared with other tools: `HF_HUB_CACHE`, else `hub` in the Hugging Face home.
    pub hf_cache: PathBuf,
    /// The file that a hub login writes: `HF_TOKEN_PATH`, else `token` in the Hugging Face home. Read when `hf_token` is absent.
    pub hf_token_file: PathBuf,
    /// The hub's access token: `HF_TOKEN`.
    pub hf_token: Option<String>,
    /// The user's home folder, for paths that start with `~/`.
    pub home: Option<PathBuf>,
    /// Further arguments of `pip download`. Empty from the environment: pip reads its own configuration.
    pub pip_args: Vec<String>,
    /// Variables that say how buckets are reached, names and values: those that begin with `AWS_`, `GOOGLE_` or `AZURE_`.
    pub objects: Vec<(String, String)>,
}

impl Settings {
    /// Reads the variables of an environment; an empty value counts as absent.
    ///
    /// # Errors
    /// [`Error::Input`] when `HF_ENDPOINT` is no web address, or when neither a home folder nor the variables that
    /// replace it are set.
    pub fn from_variables(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self> {
        let variables: Vec<_> = variables.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        let variable = |name: &str| variables.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        let path = |name: &str| variable(name).map(PathBuf::from);
        let text = |name: &str| variable(name).map(|value| value.to_string_lossy().trim().to_owned());
        let switch = |name: &str| {
            text(name).is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
        };
        let home = path("HOME").or_else(|| path("USERPROFILE"));
        let need = |found: Option<PathBuf>, name: &str| {
            found.ok_or_else(|| {
                Error::Input(format!("no home folder is known: set HOME, or {name} to a folder for the cache"))
            })
        };
        let xdg = path("XDG_CACHE_HOME");
        let dot_cache = xdg.clone().or_else(|| home.as_ref().map(|home| home.join(".cache")));
        let platform = if cfg!(target_os = "windows") {
            path("LOCALAPPDATA").or_else(|| dot_cache.clone())
        } else if cfg!(target_os = "macos") {
            xdg.or_else(|| home.as_ref().map(|home| home.join("Library/Caches")))
        } else {
            dot_cache.clone()
        };
        let cache = path("TUNESMITH_CACHE").or_else(|| platform.map(|folder| folder.join("tunesmith")));
        // The hub's own tools use ~/.cache on every platform.
        let hf_home = need(path("HF_HOME").or_else(|| dot_cache.map(|folder| folder.join("huggingface"))), "HF_HOME")?;
        let hf_endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        if !["https://", "http://"]
            .iter()
            .any(|scheme| hf_endpoint.len() > scheme.len() && hf_endpoint.starts_with(scheme))
        {
            return Err(Error::Input(format!(
                "HF_ENDPOINT is `{hf_endpoint}`: it must start with https:// or http://"
            )));
        }
        Ok(Self {
            cache: cache::absolute(need(cache, "TUNESMITH_CACHE")?)?,
            offline: switch("TUNESMITH_OFFLINE") || switch("HF_HUB_OFFLINE"),
            hf_endpoint: hf_endpoint.trim_end_matches('/').to_owned(),
            hf_cache: cache::absolute(path("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub")))?,
            hf_token_file: path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token")),
            hf_token: text("HF_TOKEN").filter(|token| !token.is_empty()),
            home,
            pip_args: Vec::new(),
            objects: variables
                .iter()
                .filter_map(|(name, value)| Some((name.to_str()?.to_owned(), value.to_str()?.to_owned())))
                .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|start| name.starts_with(start)))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn defaults_are_the_usual_folders() {
        let found = settings(&[("HOME", "/home/a")]).unwrap();
        assert_eq!(found.cache, Path::new("/home/a/.cache/tunesmith"));
        assert_eq!(found.hf_cache, Path::new("/home/a/.cache/huggingface/hub"));
        assert_eq!(found.hf_token_file, Path::new("/home/a/.cache/huggingface/token"));
        assert_eq!(
            (found.hf_endpoint.as_str(), found.offline, found.hf_token),
            ("https://huggingface.co", false, None)
        );
        assert!(found.pip_args.is_empty());
        let found = settings(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x")]).unwrap();
        assert_eq!(found.cache, Path::new("/x/tunesmith"));
        assert_eq!(found.hf_cache, Path::new("/x/huggingface/hub"));
    }

    #[test]
    fn variables_replace_them() {
        let found = settings(&[
            ("TUNESMITH_CACHE", "cache"),
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "http://127.0.0.1:1/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "Yes"),
        ])
        .unwrap();
        assert!(
            found.cache.is_absolute() && found.cache.ends_with("cache"),
            "a relative cache would move with the shell"
        );
        assert_eq!(found.hf_token_file, Path::new("/hf/token"));
        assert_eq!(found.hf_endpoint, "http://127.0.0.1:1");
        assert_eq!((found.hf_token.as_deref(), found.offline), (Some("hf_secret"), true));
        assert!(settings(&[("HOME", "/a"), ("TUNESMITH_OFFLINE", "1")]).unwrap().offline);
        assert!(!settings(&[("HOME", "/a"), ("TUNESMITH_OFFLINE", "0"), ("HF_HUB_OFFLINE", "")]).unwrap().offline);
    }

    #[test]
    fn what_cannot_work_is_said_at_once() {
        let error = settings(&[("HOME", "/a"), ("HF_ENDPOINT", "mirror.example")]).unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().contains("HF_ENDPOINT is `mirror.example`")), (2, true));
        assert!(settings(&[]).unwrap_err().to_string().contains("no home folder"));
    }
}
