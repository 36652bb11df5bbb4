//! Objects in buckets (S3, Google Cloud Storage, Azure) and files behind web addresses.
//!
//! The client is `object_store`, which knows the four protocols, their credentials and retries. What it leaves open is done here:
//! a copy in the cache is asked for again by its version (ETag), a fetch that broke off goes on where it stopped, also in a later
//! run, and only whole copies count.

use crate::{
    Resolved, Settings,
    cache::{self, Entry, Manifest, io_error, remove},
    http,
};
use futures_util::{StreamExt, TryStreamExt};
use object_store::{
    ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    http::HttpBuilder,
    path::Path as Key,
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_files::{
    atomic::{create_folder, sync_folder},
    hash::{sha256_hex, sha256_of},
};
use url::Url;

/// How specs of this kind are written.
const FORMS: &str = "s3://bucket/key, gs://bucket/key, az://container/key (an object, a prefix or a pattern), or https://host/path/file";

/// Which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    S3,
    Google,
    Azure,
    Web,
}

/// `s3://bucket/key`, `gs://bucket/key`, `az://container/key` or `https://host/path/file`
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) kind: Kind,
    /// As the user wrote it; of an address, with its query.
    spec: String,
    /// The bucket or container; the whole address of a file on the web.
    root: String,
    /// The object, the prefix or the pattern below the bucket; the name of a file on the web. Not escaped.
    pub(crate) key: String,
}

/// One object to download.
pub(crate) struct Object {
    pub(crate) location: Key,
    /// Where it belongs, below the folder of the copy; forward slashes.
    pub(crate) path: String,
    pub(crate) meta: ObjectMeta,
}

impl Object {
    /// What changes when the content does; `None` when the server tells nothing of the kind.
    fn version(&self) -> Option<String> {
        let seconds = self.meta.last_modified.timestamp();
        match (&self.meta.e_tag, &self.meta.version) {
            (Some(etag), _) => Some(format!("{etag} {}", self.meta.size)),
            (None, Some(version)) => Some(format!("{version} {}", self.meta.size)),
            // What object_store puts in place of a date that is missing.
            (None, None) if seconds == 0 => None,
            (None, None) => Some(format!("{seconds} {}", self.meta.size)),
        }
    }

    /// A file name for this version of it.
    pub(crate) fn id(&self) -> String {
        let version = self.version().unwrap_or_default();
        sha256_hex(format!("{}\n{version}", self.path))[..32].to_owned()
    }
}

impl Location {
    /// Parses a spec; `None` when it begins with none of the schemes.
    pub(crate) fn parse(spec: &str) -> Result<Option<Self>> {
        let kind = match spec.split_once("://").map(|(scheme, _)| scheme) {
            Some("s3") => Kind::S3,
            Some("gs") => Kind::Google,
            Some("az") => Kind::Azure,
            Some("https" | "http") => Kind::Web,
            _ => return Ok(None),
        };
        let shown = spec.split_once('?').filter(|_| kind == Kind::Web).map_or(spec, |(path, _)| path);
        let form = |why: &str| Error::Input(format!("{shown}: {why}; write {FORMS}"));
        let location = |root: &str, key: &str| {
            Some(Self { kind, spec: spec.to_owned(), root: root.to_owned(), key: key.to_owned() })
        };
        if kind != Kind::Web {
            // Keys are taken as they are: `?` and `#` may stand in them.
            let rest = spec.split_once("://").map_or("", |(_, rest)| rest);
            let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
            let sound = |c: char| c.is_ascii_alphanumeric() || "._-$".contains(c);
            if bucket.is_empty() || !bucket.chars().all(sound) {
                return Err(form(&format!("`{bucket}` is not the name of a bucket")));
            }
            if !key.is_empty() && !is_plain(key.strip_suffix('/').unwrap_or(key)) {
                return Err(form(&format!("`{key}` is not a plain key")));
            }
            return Ok(location(bucket, key));
        }
        let url = Url::parse(spec).map_err(|error| form(&format!("not an address ({error})")))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Error::Input(
                "an address with a user name or password in it is not taken, as it would land in files of the run; use a \
                 signed address, or fetch the file and give its path"
                    .into(),
            ));
        }
        if url.fragment().is_some() {
            return Err(form("`#` has no place in the address of a file"));
        }
        let last = url.path_segments().and_then(Iterator::last).unwrap_or_default().to_owned();
        let key = Key::from_url_path(&last).map_err(|error| form(&error.to_string()))?;
        let name = key.to_string();
        if last.is_empty() || name.contains('/') || !is_plain(&name) {
            return Err(form("the address ends in no name of a file, and folders on the web cannot be listed"));
        }
        Ok(location(url.as_str(), &name))
    }

    /// The spec as it can be written again; of an address without the query, which may hold a signature.
    pub(crate) fn spec(&self) -> String {
        match self.kind {
            Kind::Web => self.spec.split_once('?').map_or(&*self.spec, |(path, _)| path).to_owned(),
            _ => self.spec.clone(),
        }
    }

    /// What two processes must not fetch at once.
    pub(crate) fn lock_key(&self) -> String {
        self.spec()
    }

    fn folder(&self, settings: &Settings) -> PathBuf {
        // Two buckets of one name on two servers are two buckets, and two queries two files.
        let of = |key: &str| settings.objects.iter().find(|(name, _)| name == key).map_or("", |(_, value)| value);
        let server = match self.kind {
            Kind::S3 => of("AWS_ENDPOINT_URL_S3").to_owned() + of("AWS_ENDPOINT_URL") + of("AWS_ENDPOINT"),
            Kind::Azure => of("AZURE_STORAGE_ACCOUNT_NAME").to_owned() + of("AZURE_STORAGE_ENDPOINT"),
            Kind::Google => String::new(),
            // The query may choose the content. A signature does not, and it is another one each time.
            Kind::Web => self.query_without_signature(),
        };
        let mut name = cache::file_name_of(&self.spec());
        if !server.is_empty() {
            name = format!("{name}-{}", &sha256_hex(server)[..8]);
        }
        settings.cache.join("objects").join(name)
    }

    /// The query of an address, without the parameters of signatures of S3 and Google.
    fn query_without_signature(&self) -> String {
        let query = self.root.split_once('?').map_or("", |(_, query)| query);
        let signs = |part: &str| {
            let part = part.to_ascii_lowercase();
            ["x-amz-", "x-goog-"].iter().any(|start| part.starts_with(start))
        };
        query.split('&').filter(|part| !signs(part)).collect::<Vec<_>>().join("&")
    }

    /// The copy of one object, or the folder of those below a prefix.
    fn resolved(&self, files: &Path, manifest: &Manifest) -> Resolved {
        let name = self.key.rsplit('/').next().unwrap_or_default();
        let path = match &manifest.files[..] {
            [only] if only.path == name && !is_pattern(&self.key) => files.join(name),
            _ => files.to_owned(),
        };
        Resolved { path, origin: self.spec() }
    }

    /// The copy in the cache, if it is whole.
    pub(crate) fn cached(&self, settings: &Settings) -> Result<Option<Resolved>> {
        let folder = self.folder(settings);
        let (files, path) = (folder.join("files"), folder.join("manifest.json"));
        let Some(mut manifest) = Manifest::read(&path) else { return Ok(None) };
        let whole = !manifest.files.is_empty() && manifest.holds(&files, &path)?;
        Ok(whole.then(|| self.resolved(&files, &manifest)))
    }

    /// Asks the server what there is now and downloads what the cache does not have in this version. The caller holds the lock.
    pub(crate) fn fetch(&self, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
        http::runtime()?.block_on(self.download(settings, progress))
    }

    async fn download(&self, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
        progress(Progress::bytes(&format!("asking for {}", self.spec()), 0, None));
        let store = self.store(settings).map_err(|error| self.error(error, settings).0)?;
        let objects = self.list(&*store, settings).await?;
        let folder = self.folder(settings);
        let (files, manifest_path) = (folder.join("files"), folder.join("manifest.json"));
        let (done, parts) = (folder.join("done"), folder.join("parts"));
        for folder in [&files, &done, &parts] {
            create_folder(folder)?;
        }
        let mut entries = Vec::new();
        let mut missing = Vec::new();
        for object in &objects {
            let record = done.join(object.id());
            // A record of one file, so that a fetch of many that broke off need not download those again that had arrived.
            let mut kept = object.version().and_then(|_| Manifest::read(&record));
            let whole = match &mut kept {
                Some(kept) => kept.holds(&files, &record)?,
                None => false,
            };
            match kept.filter(|_| whole).and_then(|mut kept| kept.files.pop()) {
                Some(entry) => entries.push(entry),
                None => missing.push(object),
            }
        }
        // What was downloaded, also by a fetch that broke off, and is not there any more, or not in this version.
        let wanted: BTreeSet<String> = objects.iter().map(Object::id).collect();
        let paths: BTreeSet<&str> = objects.iter().map(|object| &*object.path).collect();
        let records = fs::read_dir(&done).map_err(io_error("cannot read", &done))?.flatten();
        let old: Vec<PathBuf> = records
            .filter(|record| !wanted.contains(&*record.file_name().to_string_lossy()))
            .map(|record| record.path())
            .collect();
        if !missing.is_empty() || !old.is_empty() {
            // Until the end the folder is neither the old state nor the new one.
            remove(&manifest_path)?;
        }
        for record in old {
            let entries = Manifest::read(&record).map_or_else(Vec::new, |record| record.files);
            for entry in entries.iter().filter(|entry| !paths.contains(&*entry.path)) {
                remove(&files.join(&entry.path))?;
            }
            remove(&record)?;
        }
        for object in missing {
            let part = parts.join(object.id());
            if object.version().is_none() {
                remove(&part)?;
            }
            self.download_object(&*store, object, &part, settings, progress).await?;
            let sha256 = sha256_of(&part)?;
            let file = files.join(&object.path);
            if let Some(parent) = file.parent() {
                create_folder(parent)?;
                fs::rename(&part, &file).map_err(io_error("cannot write", &file))?;
                sync_folder(parent)?;
            }
            let entry = Entry::of(&files, object.path.clone(), Some(sha256))?;
            Manifest { source: self.spec(), files: vec![entry.clone()] }.write(&done.join(object.id()))?;
            entries.push(entry);
        }
        // All has arrived, so what is left is of versions that are gone.
        fs::remove_dir_all(&parts).map_err(io_error("cannot remove", &parts))?;
        let manifest = Manifest { source: self.spec(), files: entries };
        manifest.write(&manifest_path)?;
        Ok(self.resolved(&files, &manifest))
    }

    /// The client of the protocol, with the variables that the providers' own tools read.
    pub(crate) fn store(&self, settings: &Settings) -> object_store::Result<Box<dyn ObjectStore>> {
        let client = ClientOptions::new()
            .with_allow_http(true) // where the user writes http://, it is meant
            .with_connect_timeout(Duration::from_secs(10))
            .with_read_timeout(Duration::from_secs(60))
            .with_timeout_disabled();
        let retry = RetryConfig { max_retries: 3, retry_timeout: Duration::from_secs(60), ..RetryConfig::default() };
        macro_rules! build {
            ($builder:ty, $key:ty, $named:ident) => {{
                let mut builder = <$builder>::new().with_client_options(client).with_retry(retry).$named(&self.root);
                for (name, value) in &settings.objects {
                    if let Ok(key) = name.to_ascii_lowercase().parse::<$key>() {
                        builder = builder.with_config(key, value);
                    }
                }
                Ok(Box::new(builder.build()?))
            }};
        }
        match self.kind {
            Kind::S3 => build!(AmazonS3Builder, AmazonS3ConfigKey, with_bucket_name),
            Kind::Google => build!(GoogleCloudStorageBuilder, GoogleConfigKey, with_bucket_name),
            Kind::Azure => build!(MicrosoftAzureBuilder, AzureConfigKey, with_container_name),
            Kind::Web => {
                let mut base = self.root.clone();
                if let Ok(mut url) = Url::parse(&self.root) {
                    // The name is put back by the store; the query stays.
                    if let Ok(mut segments) = url.path_segments_mut() {
                        segments.pop();
                    }
                    base = url.into();
                }
                Ok(Box::new(HttpBuilder::new().with_url(base).with_client_options(client).with_retry(retry).build()?))
            }
        }
    }

    /// The objects that the spec means, in the order of their names.
    async fn list(&self, store: &dyn ObjectStore, settings: &Settings) -> Result<Vec<Object>> {
        let fail = |error| self.error(error, settings).0;
        let name = || self.key.rsplit('/').next().unwrap_or_default().to_owned();
        if self.kind == Kind::Web {
            // Signed addresses allow GET alone, so the question is a download that is dropped at once.
            let location = Key::parse(&self.key).map_err(|error| fail(error.into()))?;
            let meta = store.get(&location).await.map_err(fail)?.meta;
            return Ok(vec![Object { location, path: name(), meta }]);
        }
        let pattern = is_pattern(&self.key).then(|| glob::Pattern::new(&self.key)).transpose().map_err(|error| {
            Error::Input(format!("{}: not a pattern: {} at character {}", self.spec, error.msg, error.pos))
        })?;
        let key = |text: &str| Key::parse(text.trim_end_matches('/')).map_err(|error| fail(error.into()));
        if pattern.is_none() && !self.key.is_empty() && !self.key.ends_with('/') {
            let location = key(&self.key)?;
            match store.head(&location).await {
                Ok(meta) => return Ok(vec![Object { location, path: name(), meta }]),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        let below = match self.key.find(['*', '?', '[']) {
            Some(at) if pattern.is_some() => self.key[..at].rsplit_once('/').map_or("", |(folder, _)| folder),
            _ => &self.key,
        };
        let below = key(below)?;
        let prefix = (!below.as_ref().is_empty()).then_some(&below);
        let found: Vec<ObjectMeta> = store.list(prefix).try_collect().await.map_err(fail)?;
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
        let mut objects = Vec::new();
        for meta in found {
            let path = meta.location.as_ref();
            // Consoles mark folders by empty objects with the folder's name.
            let below = path.strip_prefix(below.as_ref()).unwrap_or(path).trim_start_matches('/').to_owned();
            if below.is_empty() || pattern.as_ref().is_some_and(|pattern| !pattern.matches_with(path, options)) {
                continue;
            }
            if !is_plain(&below) {
                return Err(Error::Input(format!(
                    "{}: the object `{path}` cannot be a file here: its name has a backslash or a control character; \
                     rename it, or narrow the prefix",
                    self.spec
                )));
            }
            objects.push(Object { location: meta.location.clone(), path: below, meta });
        }
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        if objects.is_empty() {
            return Err(Error::NotFound(format!(
                "{}: there is neither an object of this name nor one below it; check bucket and key (they know capitals)",
                self.spec
            )));
        }
        Ok(objects)
    }

    /// Downloads an object into `part`, going on where an earlier attempt or run stopped.
    pub(crate) async fn download_object(
        &self,
        store: &dyn ObjectStore,
        object: &Object,
        part: &Path,
        settings: &Settings,
        progress: &mut Observer<'_>,
    ) -> Result<()> {
        let size = object.meta.size;
        let what = format!("fetching {}", object.path);
        let mut in_ranges = object.goes_in_ranges();
        let attempt = async || {
            let fail = |error: Error| (error, false);
            let mut have = fs::metadata(part).map_or(0, |part| part.len());
            if have > size {
                remove(part).map_err(fail)?;
                have = 0;
            }
            let cannot = |e| fail(io_error("cannot write", part)(e));
            let mut file = File::options().create(true).append(true).open(part).map_err(cannot)?;
            progress(Progress::bytes(&what, have, Some(size)));
            let mut failed = None;
            let mut pieces = (have < size).then(|| object.pieces(store, have, in_ranges));
            while let Some(pieces) = &mut pieces
                && let Some(piece) = pieces.next().await
            {
                match piece {
                    Ok(bytes) => {
                        file.write_all(&bytes).map_err(cannot)?;
                        have += bytes.len() as u64;
                        progress(Progress::bytes(&what, have, Some(size)));
                    }
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            file.sync_all().map_err(cannot)?;
            match failed {
                None if have == size => Ok(()),
                None => {
                    let (spec, path) = (self.spec(), &object.path);
                    Err((Error::Network(format!("{spec}: {path} came with {have} bytes of {size}")), true))
                }
                Some(error @ object_store::Error::NotSupported { .. }) => {
                    // The server cannot go on in the middle.
                    remove(part).map_err(fail)?;
                    in_ranges = false;
                    Err((self.error(error, settings).0, true))
                }
                Some(error) => Err(self.error(error, settings)),
            }
        };
        http::retry(attempt).await
    }

    /// What went wrong, whose doing it was and the way out; and whether trying again may help.
    fn error(&self, error: object_store::Error, settings: &Settings) -> (Error, bool) {
        self.explain(error, settings, "read and list it", "Check the network and try again: what has arrived is kept")
    }

    /// As [`Location::error`]; `rights` are those that the task needs, `way_on` is what to do when the network failed.
    pub(crate) fn explain(
        &self,
        error: object_store::Error,
        settings: &Settings,
        rights: &str,
        way_on: &str,
    ) -> (Error, bool) {
        let spec = self.spec();
        let way = match self.kind {
            Kind::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL where needed), \
                 or AWS_SKIP_SIGNATURE=true for a public bucket"
            }
            Kind::Google => {
                "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or GOOGLE_SKIP_SIGNATURE=true for a public \
                 bucket"
            }
            Kind::Azure => {
                "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, or \
                 AZURE_SKIP_SIGNATURE=true for a public container"
            }
            Kind::Web => "get a signed address, or fetch the file another way and give its path",
        };
        let text = |error: &dyn std::fmt::Display| {
            let text = error.to_string();
            match self.root.split_once('?') {
                Some((_, query)) if self.kind == Kind::Web => text.replace(query, "..."),
                _ => text,
            }
        };
        let has = |name: &str| settings.objects.iter().any(|(key, _)| key == name);
        let forbidden = || Error::Input(format!("{spec}: no permission (403): ask for the right to {rights}; {way}"));
        let unknown = || Error::Input(format!("{spec}: the server asks who you are (401): {way}"));
        let said = text(&error);
        // The answers to listing come as one kind of error, whatever their status.
        let status = |code: &str| said.contains(&format!("status code: {code}"));
        match error {
            object_store::Error::NotFound { .. } => (
                Error::NotFound(format!("{spec}: there is no such bucket, object or file (404): check the name")),
                false,
            ),
            _ if status("404") => (
                Error::NotFound(format!("{spec}: there is no such bucket (404): check the name and the server")),
                false,
            ),
            object_store::Error::PermissionDenied { .. } => (forbidden(), false),
            // Of one of many that are deleted together the answer has no status.
            _ if status("403") || said.contains("AccessDenied") => (forbidden(), false),
            object_store::Error::Unauthenticated { .. } => (unknown(), false),
            _ if status("401") => (unknown(), false),
            object_store::Error::InvalidPath { source } => {
                (Error::Input(format!("{spec}: not a key: {source}; write {FORMS}")), false)
            }
            object_store::Error::Precondition { .. } => {
                (Error::Network(format!("{spec}: it changed while it was fetched; try again")), false)
            }
            _ => {
                // Without credentials the client asks the machine it runs on, which only a cloud's own machine answers.
                let asked_machine = said.contains("169.254.169.254") || said.contains("metadata.google.internal");
                let no_account = self.kind == Kind::Azure && !has("AZURE_STORAGE_ACCOUNT_NAME");
                let half = ["Missing AccessKeyId", "Missing SecretAccessKey"].iter().any(|half| said.contains(half));
                if asked_machine || no_account || half {
                    return (Error::Input(format!("{spec}: no credentials were found: {way}")), false);
                }
                (Error::Network(format!("{spec}: {said}. {way_on}")), true)
            }
        }
    }
}

/// Whether a key stands for several.
pub(crate) fn is_pattern(key: &str) -> bool {
    key.contains(['*', '?', '['])
}

/// A relative path of ordinary names.
pub(crate) fn is_plain(path: &str) -> bool {
    !path.contains('\\')
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(spec: &str) -> (Kind, String, String) {
        let location = Location::parse(spec).unwrap().unwrap();
        (location.kind, location.root, location.key)
    }

    #[test]
    fn specs_are_taken_apart() {
        assert_eq!(parts("s3://b/a/c.jsonl"), (Kind::S3, "b".into(), "a/c.jsonl".into()));
        assert_eq!(parts("gs://b.c/*.gz"), (Kind::Google, "b.c".into(), "*.gz".into()));
        assert_eq!(parts("az://c"), (Kind::Azure, "c".into(), String::new()));
        let address = "https://h.example/a/b%20c.jsonl?X-Sig=1";
        assert_eq!(parts(address), (Kind::Web, address.into(), "b c.jsonl".into()));
        assert_eq!(Location::parse(address).unwrap().unwrap().spec(), "https://h.example/a/b%20c.jsonl");
        for other in ["hf:a/b", "s3/a", "./x", "ftp://h/a"] {
            assert_eq!(Location::parse(other).unwrap(), None, "{other}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let said = |spec: &str| {
            let error = Location::parse(spec).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(said("s3:///key").contains("`` is not the name of a bucket"));
        for key in ["a/../c", "/a", "a//b", "a\\b", "a//"] {
            assert!(said(&format!("s3://b/{key}")).contains(&format!("`{key}` is not a plain key")));
        }
        assert!(said("https://h.example/a/").contains("folders on the web cannot be listed"));
        let secret = said("https://me:secret@h.example/a.jsonl");
        assert!(secret.contains("signed address") && !secret.contains("secret"), "{secret}");
        let signed = said("https://h.example/?sig=secret");
        assert!(!signed.contains("secret"), "{signed}");
    }
}
