//! Repositories of the Hugging Face hub, kept in the cache layout that the hub's own tools use.
//!
//! The client is hf-hub 0.5 over ureq (blocking, rustls). Its successor 1.0 brings tokio, reqwest and the xet client: 400
//! packages instead of 70, for the same few files. What hf-hub leaves open is done here: every file comes from one pinned
//! commit, every blob is checked against the hub's checksum before it counts, and what other tools fetched is reused.

use super::{
    Progress, Resolved, Settings,
    cache::{self, Entry, Manifest, io_error},
    dataset::{self, Choice},
};
use crate::error::{Error, Result};
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// `hf:org/name[@revision][/file.gguf]` or `hf:datasets/org/name[@revision][?config=NAME][&split=NAME]`
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Repository {
    /// `org/name`
    id: String,
    /// A branch, a tag, `refs/pr/N` or a commit; `main` when the user names none.
    revision: String,
    /// The one GGUF file to fetch; the safetensors folder when absent.
    file: Option<String>,
    /// What is wanted of a data set; absent for a model.
    dataset: Option<Choice>,
}

/// The file in which a data set says of what it consists.
const CARD: &str = "README.md";

/// Files of a model or adapter folder besides its weights.
const SMALL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
    "adapter_config.json",
];

/// Lists the shards of weights that are more than one file.
const INDEX: &str = "model.safetensors.index.json";

/// Weights in one file.
const WEIGHTS: &str = "model.safetensors";

/// Times that a file is asked for before its source counts as failed; each goes on where the last one stopped.
const ATTEMPTS: u32 = 3;

impl Repository {
    /// Parses what follows `hf:`.
    pub(super) fn parse(rest: &str) -> Result<Self> {
        let given = rest;
        let (is_dataset, rest) = rest.strip_prefix("datasets/").map_or((false, rest), |rest| (true, rest));
        let form = |why: &str| {
            let forms = match is_dataset {
                true => dataset::FORM,
                false => "hf:org/name, hf:org/name@revision or hf:org/name@revision/file.gguf",
            };
            Error::Input(format!("hf:{given}: {why}; write {forms}"))
        };
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) if is_dataset => (rest, Some(query)),
            _ => (rest, None),
        };
        let (org, after) = rest.split_once('/').ok_or_else(|| form("no organisation before the name"))?;
        let end = after.find(['@', '/']).unwrap_or(after.len());
        let (name, tail) = after.split_at(end);
        let (revision, file) = match (tail.strip_prefix('@'), tail.strip_prefix('/')) {
            (Some(tail), _) if is_gguf(tail) => {
                // A revision is one part of the path, except the hub's own `refs/kind/name`.
                let parts = if tail.starts_with("refs/") { 3 } else { 1 };
                match tail.match_indices('/').nth(parts - 1) {
                    Some((at, _)) => (&tail[..at], Some(&tail[at + 1..])),
                    None => (tail, None),
                }
            }
            (Some(tail), _) => (tail, None),
            (None, Some(file)) => ("main", Some(file)),
            (None, None) => ("main", None),
        };
        // All of these become parts of addresses and of file names.
        let sound = |text: &str, more: &str| {
            text.split('/').all(|part| !matches!(part, "" | "." | ".."))
                && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        for part in [org, name] {
            if !sound(part, "._-") || part.contains('/') {
                return Err(form(&format!("`{part}` is not the name of an organisation or repository")));
            }
        }
        if !sound(revision, "._-/") {
            return Err(form(&format!("`{revision}` is not a revision")));
        }
        if is_dataset && file.is_some() {
            return Err(form("a single file is not chosen, but a configuration and a split"));
        }
        if let Some(file) = file
            && (!is_gguf(file) || !sound(file, "._-/+=@,()"))
        {
            return Err(form(&format!("`{file}` is not a .gguf file; other files come with the whole repository")));
        }
        let choice = query.map_or(Ok(Choice::default()), Choice::parse).map_err(|why| form(&why))?;
        let dataset = is_dataset.then_some(choice);
        Ok(Self { id: format!("{org}/{name}"), revision: revision.to_owned(), file: file.map(str::to_owned), dataset })
    }

    /// The spec, as it can be written again.
    pub(super) fn spec(&self) -> String {
        let revision = if self.revision == "main" { String::new() } else { format!("@{}", self.revision) };
        let file = self.file.as_ref().map(|file| format!("/{file}")).unwrap_or_default();
        let query = self.dataset.as_ref().map(Choice::query).unwrap_or_default();
        format!("hf:{}{revision}{file}{query}", self.path())
    }

    /// The repository as addresses have it.
    fn path(&self) -> String {
        format!("{}{}", if self.dataset.is_some() { "datasets/" } else { "" }, self.id)
    }

    /// Whether it is one of data.
    pub(super) fn is_dataset(&self) -> bool {
        self.dataset.is_some()
    }

    /// The same with this split, if it is a data set of which none was named.
    pub(super) fn or_split(mut self, split: &str) -> Self {
        if let Some(choice) = &mut self.dataset {
            choice.split.get_or_insert_with(|| split.to_owned());
        }
        self
    }

    /// The files of a data set that was resolved.
    ///
    /// # Errors
    /// The cache lost them just now.
    pub(super) fn data_files(&self, resolved: &Resolved, settings: &Settings) -> Result<Vec<PathBuf>> {
        let commit = resolved.path.file_name().unwrap_or_default().to_string_lossy();
        let manifest = Manifest::read(&self.manifest(&commit, settings)).ok_or_else(|| {
            Error::Failure(format!("{}: the cache changed while it was read; try again", self.spec()))
        })?;
        let files = manifest.files.iter().filter(|file| file.path != CARD);
        Ok(files.map(|file| resolved.path.join(&file.path)).collect())
    }

    /// What two processes must not fetch at once: any revision of the repository, since revisions share blobs.
    pub(super) fn lock_key(&self) -> String {
        format!("hf:{}", self.path())
    }

    fn folder_name(&self) -> String {
        let kind = if self.dataset.is_some() { "datasets" } else { "models" };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    fn folder(&self, settings: &Settings) -> PathBuf {
        settings.hf_cache.join(self.folder_name())
    }

    fn snapshot(&self, commit: &str, settings: &Settings) -> PathBuf {
        self.folder(settings).join("snapshots").join(commit)
    }

    /// The list of what was fetched, in the program's own cache: the hub's layout has no room for one.
    fn manifest(&self, commit: &str, settings: &Settings) -> PathBuf {
        // Of one commit different files may be wanted.
        let part =
            self.file.clone().or_else(|| self.dataset.as_ref().map(Choice::query)).filter(|part| !part.is_empty());
        let key = part.map(|part| format!("-{}", &cache::hex(&Sha256::digest(part))[..16])).unwrap_or_default();
        settings.cache.join("hf").join(self.folder_name()).join(format!("{commit}{key}.json"))
    }

    fn resolved(&self, commit: &str, files: &[Entry], settings: &Settings) -> Resolved {
        let snapshot = self.snapshot(commit, settings);
        let origin = format!("hf:{}@{commit}", self.path());
        match files {
            _ if self.dataset.is_some() => Resolved { path: snapshot, origin },
            [only] if is_gguf(&only.path) => {
                Resolved { path: snapshot.join(&only.path), origin: format!("{origin}/{}", only.path) }
            }
            _ => Resolved { path: snapshot, origin },
        }
    }

    /// The cached copy: what this program fetched, or what another tool fetched if it is enough to load a model.
    pub(super) fn cached(&self, settings: &Settings) -> Result<Option<Resolved>> {
        let refs = self.folder(settings).join("refs");
        let commit = if is_commit(&self.revision) {
            self.revision.clone()
        } else {
            match fs::read_to_string(refs.join(&self.revision)) {
                Ok(commit) if is_commit(commit.trim()) => commit.trim().to_owned(),
                Ok(_) | Err(_) => return Ok(None),
            }
        };
        let snapshot = self.snapshot(&commit, settings);
        let manifest_path = self.manifest(&commit, settings);
        if let Some(mut manifest) = Manifest::read(&manifest_path) {
            let whole = !manifest.files.is_empty() && manifest.holds(&snapshot, &manifest_path)?;
            return Ok(whole.then(|| self.resolved(&commit, &manifest.files, settings)));
        }
        // A reference named like the commit is what a fetch of this program leaves until it has checked every file.
        if refs.join(&commit).exists() {
            return Ok(None);
        }
        Ok(match &self.file {
            Some(file) if snapshot.join(file).is_file() => {
                Some(self.resolved(&commit, &[Entry::of(&snapshot, file.clone(), None)?], settings))
            }
            None if self.dataset.is_none() && is_loadable(&snapshot) => Some(self.resolved(&commit, &[], settings)),
            _ => None,
        })
    }

    /// Fetches and checks whatever of it is not in the cache. The caller holds the lock.
    pub(super) fn fetch(&self, settings: &Settings, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Resolved> {
        let token = settings.hf_token.clone().or_else(|| {
            let text = fs::read_to_string(&settings.hf_token_file).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        });
        let hub = Hub { repository: self, settings, has_token: token.is_some() };
        let api = ApiBuilder::from_cache(Cache::new(settings.hf_cache.clone()))
            .with_endpoint(settings.hf_endpoint.clone())
            .with_token(token)
            .with_progress(false)
            .with_user_agent("tunesmith", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| hub.error(error, None).0)?;
        progress(Progress {
            what: &format!("asking {} for {}", settings.hf_endpoint, self.id),
            done_bytes: 0,
            total_bytes: None,
        });
        let repo = |revision: &str| {
            let kind = if self.dataset.is_some() { RepoType::Dataset } else { RepoType::Model };
            api.repo(Repo::with_revision(self.id.clone(), kind, revision.to_owned()))
        };
        let info = hub.insist(|| repo(&self.revision).info(), None)?;
        let commit = info.sha;
        if !is_commit(&commit) {
            return Err(Error::Failure(format!("{} names no commit for {}", settings.hf_endpoint, self.spec())));
        }
        let names: BTreeSet<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        // From here on the branch may move: every file is asked for at this commit.
        let files = Files { hub: &hub, api: &api, repo: repo(&commit), commit: &commit };
        let mut entries = Vec::new();
        let wanted = match &self.dataset {
            None => self.choose(&names)?,
            Some(choice) => {
                let mut card = None;
                if names.contains(CARD) {
                    entries.push(files.fetch(CARD, progress)?);
                    let path = self.snapshot(&commit, settings).join(CARD);
                    card = Some(fs::read_to_string(&path).map_err(io_error("cannot read", &path))?);
                }
                dataset::choose(choice, card.as_deref(), &names)
                    .map_err(|why| Error::Input(format!("{}: {why}", self.spec())))?
            }
        };
        for name in &wanted {
            entries.push(files.fetch(name, progress)?);
        }
        if wanted.contains(INDEX) {
            let index = self.snapshot(&commit, settings).join(INDEX);
            for name in shards(&index, &names)? {
                entries.push(files.fetch(&name, progress)?);
            }
        }
        let refs = self.folder(settings).join("refs");
        if self.revision != commit {
            cache::write_atomically(&refs.join(&self.revision), commit.as_bytes())?;
        }
        Manifest { source: format!("hf:{}@{commit}", self.path()), files: entries.clone() }
            .write(&self.manifest(&commit, settings))?;
        let unfinished = refs.join(&commit);
        if unfinished.exists() {
            fs::remove_file(&unfinished).map_err(io_error("cannot remove", &unfinished))?;
        }
        Ok(self.resolved(&commit, &entries, settings))
    }

    /// The files to fetch of those that the repository has; shards of an index come on top.
    fn choose(&self, names: &BTreeSet<String>) -> Result<BTreeSet<String>> {
        let input = |why: String| Err(Error::Input(format!("{}: {why}", self.spec())));
        let ggufs: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_gguf(name)).collect();
        if let Some(file) = &self.file {
            if names.contains(file) {
                return Ok([file.clone()].into());
            }
            let there = if ggufs.is_empty() { "no .gguf file at all".to_owned() } else { ggufs.join(", ") };
            return input(format!("the repository has no file `{file}`; it has {there}"));
        }
        let mut wanted: BTreeSet<String> =
            SMALL_FILES.iter().filter(|name| names.contains(**name)).map(|name| (*name).to_owned()).collect();
        let root = |name: &&String| name.ends_with(".safetensors") && !name.contains('/');
        if names.contains(INDEX) {
            wanted.insert(INDEX.to_owned());
        } else if names.contains(WEIGHTS) {
            wanted.insert(WEIGHTS.to_owned());
        } else if names.iter().any(|name| root(&name)) {
            wanted.extend(names.iter().filter(root).cloned());
        } else {
            return match ggufs[..] {
                [only] => Ok([only.to_owned()].into()),
                [] if names.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth")) => input(
                    "the repository has its weights only as PyTorch pickles, which are programs and are not read; look for a \
                     revision with safetensors (often @refs/pr/1) or another repository"
                        .to_owned(),
                ),
                [] => input("the repository has no weights (neither .safetensors nor .gguf)".to_owned()),
                [first, ..] => input(format!(
                    "the repository has several GGUF files and no safetensors: choose one, such as hf:{}{}/{first}; it has {}",
                    self.id,
                    if self.revision == "main" { String::new() } else { format!("@{}", self.revision) },
                    ggufs.join(", ")
                )),
            };
        }
        if !wanted.contains("config.json") && !wanted.contains("adapter_config.json") {
            return input("the repository has weights but neither config.json nor adapter_config.json".to_owned());
        }
        // Names come from the network and become paths.
        match wanted.iter().find(|name| !is_plain(name)) {
            Some(name) => input(format!("the repository lists the name `{name}`, which is not a plain file name")),
            None => Ok(wanted),
        }
    }
}

fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// A file name without any folder, that needs no escaping in an address.
fn is_plain(name: &str) -> bool {
    name.chars().all(|c| c.is_ascii_alphanumeric() || "._-+=".contains(c)) && !matches!(name, "" | "." | "..")
}

/// A full commit hash, SHA-1 or SHA-256.
fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The shard names of an index file, each of which the repository must list.
fn shards(index: &Path, names: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = fs::read(index).map_err(io_error("cannot read", index))?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| Error::Failure(format!("{INDEX} of the repository is no index of shards: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|name| !is_plain(name) || !names.contains(*name)) {
        Some(name) => {
            Err(Error::Failure(format!("{INDEX} names the shard `{name}`, which the repository does not have")))
        }
        None => Ok(shards),
    }
}

/// True if a snapshot that another tool made has all that a model or adapter needs. Its tokenizer's configuration is asked
/// for because a tool that only loads weights never fetches the chat template.
fn is_loadable(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    if has("adapter_config.json") && has("adapter_model.safetensors") {
        return true;
    }
    let weights = has(WEIGHTS)
        || fs::read(snapshot.join(INDEX))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok())
            .is_some_and(|index| {
                let map = index.get("weight_map").and_then(|map| map.as_object());
                map.is_some_and(|map| {
                    !map.is_empty()
                        && map.values().all(|name| name.as_str().is_some_and(|name| is_plain(name) && has(name)))
                })
            });
    weights && has("config.json") && has("tokenizer_config.json") && (has("tokenizer.json") || has("tokenizer.model"))
}

/// The hub as this fetch sees it: what its errors mean depends on it.
struct Hub<'a> {
    repository: &'a Repository,
    settings: &'a Settings,
    has_token: bool,
}

impl Hub<'_> {
    /// Calls again after what may pass: a lost connection, a busy server.
    fn insist<T>(&self, mut call: impl FnMut() -> Result<T, ApiError>, file: Option<&str>) -> Result<T> {
        let mut attempt = 1;
        loop {
            match call() {
                Ok(found) => return Ok(found),
                Err(error) => {
                    let (error, may_pass) = self.error(error, file);
                    if !may_pass || attempt == ATTEMPTS {
                        return Err(error);
                    }
                }
            }
            thread::sleep(Duration::from_millis(200 << attempt));
            attempt += 1;
        }
    }

    /// What went wrong, whose doing it was and the way out; and whether trying again may help.
    fn error(&self, error: ApiError, file: Option<&str>) -> (Error, bool) {
        let endpoint = &self.settings.hf_endpoint;
        let Repository { id, revision, .. } = self.repository;
        let page = format!("{endpoint}/{}", self.repository.path());
        let spec = self.repository.spec();
        match error {
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(401) if self.has_token => {
                    let why = format!("{endpoint} does not accept the token (401)");
                    let way =
                        format!("make a new one at {endpoint}/settings/tokens, or unset HF_TOKEN for a public model");
                    (Error::Input(format!("{spec}: {why}: {way}")), false)
                }
                ureq::Error::StatusCode(401) => (
                    Error::Input(format!(
                        "{spec}: {endpoint} asks for a token (401): {id} does not exist, or is private or gated. Check the name; \
                         for a gated one accept its terms at {page}, then set HF_TOKEN to a token from \
                         {endpoint}/settings/tokens"
                    )),
                    false,
                ),
                ureq::Error::StatusCode(403) => (
                    Error::Input(format!(
                        "{spec}: no access (403): ask for it at {page} with the account whose token is in HF_TOKEN, and \
                         give the token the right to read gated repositories"
                    )),
                    false,
                ),
                ureq::Error::StatusCode(404) => (
                    Error::Input(match file {
                        Some(file) => format!("{spec}: {endpoint} has no file {file} at this revision (404)"),
                        None => format!(
                            "{spec}: {endpoint} has no repository {id} with a revision {revision} (404): check both names"
                        ),
                    }),
                    false,
                ),
                ureq::Error::StatusCode(status) => (
                    Error::Failure(format!("{spec}: {endpoint} answered with status {status}")),
                    status == 429 || status >= 500,
                ),
                error => (
                    Error::Failure(format!(
                        "{spec}: {endpoint} cannot be reached: {error}. Check the network, or set HF_ENDPOINT to a mirror"
                    )),
                    true,
                ),
            },
            // Reading from the network and writing to the disk fail alike there; the kind tells them apart.
            ApiError::IoError(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull
                        | io::ErrorKind::QuotaExceeded
                        | io::ErrorKind::FileTooLarge
                        | io::ErrorKind::PermissionDenied
                        | io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                (Error::Io { what: format!("cannot write to {}", self.settings.hf_cache.display()), source }, false)
            }
            ApiError::LockAcquisition(_) => (
                Error::Failure(format!(
                    "{spec}: another program is downloading it into {}",
                    self.settings.hf_cache.display()
                )),
                true,
            ),
            error => (Error::Failure(format!("{spec}: the download from {endpoint} failed: {error}")), true),
        }
    }
}

/// The files of one commit.
struct Files<'a> {
    hub: &'a Hub<'a>,
    api: &'a Api,
    repo: ApiRepo,
    commit: &'a str,
}

impl Files<'_> {
    /// Makes sure that `name` is in the snapshot with the content that the hub has.
    fn fetch(&self, name: &str, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Entry> {
        let (repository, settings) = (self.hub.repository, self.hub.settings);
        let url = self.repo.url(name);
        let metadata = self.hub.insist(|| self.api.metadata(&url), Some(name))?;
        let etag = metadata.etag();
        // Both become file names.
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        {
            return Err(Error::Failure(format!("{url} has the unusable ETag `{etag}`")));
        }
        if metadata.commit_hash() != self.commit {
            return Err(Error::Failure(format!(
                "{url} is answered for the commit `{}` instead of `{}`: is HF_ENDPOINT a hub?",
                metadata.commit_hash(),
                self.commit
            )));
        }
        let snapshot = repository.snapshot(self.commit, settings);
        let (blob, pointer) = (repository.folder(settings).join("blobs").join(etag), snapshot.join(name));
        let entry = || {
            let sha256 = (etag.len() == 64).then(|| etag.to_owned());
            Entry::of(&snapshot, name.to_owned(), sha256)
        };
        // A pointer is a link to the blob, or the file itself where the system has no links.
        if pointer.is_file() && is_right(&pointer, &metadata)? {
            return entry();
        }
        remove(&pointer)?;
        if blob.is_file() && is_right(&blob, &metadata)? {
            point(&blob, &pointer, name)?;
            return entry();
        }
        remove(&blob)?;
        self.download(name, &blob, &pointer, &metadata, progress)?;
        entry()
    }

    /// Downloads into the blob, going on where an earlier attempt or run stopped, and checks it.
    fn download(
        &self,
        name: &str,
        blob: &Path,
        pointer: &Path,
        metadata: &Metadata,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<()> {
        let part = blob.with_extension("part");
        for attempt in 1..=ATTEMPTS {
            // A part that is not shorter than the file cannot be gone on with.
            if fs::metadata(&part).is_ok_and(|part| part.len() >= metadata.size() as u64) {
                remove(&part)?;
            }
            let bar =
                Bar { what: format!("{}: {name}", self.hub.repository.id), done: 0, total: 0, sink: &mut *progress };
            match self.repo.download_with_progress(name, bar) {
                Ok(path) => {
                    if is_right(&path, metadata)? {
                        return File::open(&path)
                            .and_then(|file| file.sync_all())
                            .map_err(io_error("cannot write", blob));
                    }
                    remove(pointer)?;
                    if fs::metadata(blob).is_ok_and(|blob| blob.len() < metadata.size() as u64) {
                        fs::rename(blob, &part).map_err(io_error("cannot rename", blob))?;
                    } else {
                        remove(blob)?;
                    }
                }
                Err(error) => {
                    let (error, may_pass) = self.hub.error(error, Some(name));
                    if !may_pass || attempt == ATTEMPTS {
                        return Err(error);
                    }
                    thread::sleep(Duration::from_millis(200 << attempt));
                }
            }
        }
        remove(&part)?;
        Err(Error::Failure(format!(
            "{}: {name} arrived {ATTEMPTS} times with other bytes than the hub announced (size {}, checksum {}); nothing was kept",
            self.hub.repository.spec(),
            metadata.size(),
            metadata.etag()
        )))
    }
}

/// Compares a file with what the hub says of it. The ETag of a large file is its SHA-256, of a small one the name that git
/// gives to its content; any other (some mirrors) leaves the size.
fn is_right(path: &Path, metadata: &Metadata) -> Result<bool> {
    let size = fs::metadata(path).map_err(io_error("cannot read", path))?.len();
    let etag = metadata.etag();
    let is_hex = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(size == metadata.size() as u64
        && match etag.len() {
            64 if is_hex => cache::sha256_of(path)?.eq_ignore_ascii_case(etag),
            40 if is_hex => cache::git_blob_of(path)?.eq_ignore_ascii_case(etag),
            _ => true,
        })
}

/// Removes a file or a link, dangling ones included; one that is not there is fine.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", path)(error)),
        _ => Ok(()),
    }
}

/// Puts the blob into the snapshot under its name.
fn point(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    if let Some(folder) = pointer.parent() {
        cache::create_folder(folder)?;
    }
    let fail = io_error("cannot write", pointer);
    #[cfg(unix)]
    {
        // snapshots/<commit>/<name> -> ../../blobs/<etag>, one step more for each folder in the name.
        let mut target = PathBuf::from("../..");
        target.extend(name.matches('/').map(|_| ".."));
        target.push("blobs");
        target.extend(blob.file_name());
        std::os::unix::fs::symlink(target, pointer).map_err(fail)
    }
    #[cfg(not(unix))]
    {
        let _ = name;
        fs::copy(blob, pointer).map(drop).map_err(fail)
    }
}

/// Passes hf-hub's progress on.
struct Bar<'a> {
    what: String,
    done: u64,
    total: u64,
    sink: &'a mut dyn FnMut(Progress<'_>),
}

impl hf_hub::api::Progress for Bar<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.sink)(Progress { what: &self.what, done_bytes: self.done, total_bytes: Some(self.total) });
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(rest: &str) -> (String, String, Option<String>) {
        let Repository { id, revision, file, dataset } = Repository::parse(rest).unwrap();
        assert_eq!(dataset, None);
        (id, revision, file)
    }

    #[test]
    fn specs_are_read() {
        let is = |rest, id: &str, revision: &str, file: Option<&str>| {
            assert_eq!(parse(rest), (id.to_owned(), revision.to_owned(), file.map(str::to_owned)), "{rest}");
        };
        is("a/b", "a/b", "main", None);
        is("a/b-1.5@v1.0", "a/b-1.5", "v1.0", None);
        is("a/b@feature/x", "a/b", "feature/x", None);
        is("a/b/x.Q4_0.gguf", "a/b", "main", Some("x.Q4_0.gguf"));
        is("a/b@v1/sub/x.GGUF", "a/b", "v1", Some("sub/x.GGUF"));
        is("a/b@refs/pr/3/x.gguf", "a/b", "refs/pr/3", Some("x.gguf"));
        for rest in ["datasets/a/b", "datasets/a/b@refs/convert/parquet", "datasets/a/b@v1?config=fr&split=test"] {
            let repository = Repository::parse(rest).unwrap();
            assert_eq!((repository.id.as_str(), repository.is_dataset()), ("a/b", true));
            assert_eq!(repository.spec(), format!("hf:{rest}"));
        }
        for (rest, says) in [
            ("datasets/a/b/x.parquet", "a single file"),
            ("datasets/a/b?x", "neither"),
            ("datasets/a", "no organisation"),
        ] {
            let error = Repository::parse(rest).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("write hf:datasets/org/name"), "{error}");
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        for rest in [
            "",
            "a",
            "a/",
            "/b",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b/c",
            "a/b/../x.gguf",
            "a/b@v/x y.gguf",
            "a/b c",
        ] {
            let error = Repository::parse(rest).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{rest}");
            assert!(error.to_string().contains("write hf:org/name"), "{error}");
        }
    }

    fn choose(spec: &str, names: &[&str]) -> Result<Vec<String>> {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Ok(Repository::parse(spec)?.choose(&names)?.into_iter().collect())
    }

    #[test]
    fn only_what_a_model_needs_is_fetched() {
        let names = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "consolidated.safetensors",
            "original/x.safetensors",
        ];
        assert_eq!(choose("a/b", &names).unwrap(), ["config.json", "model.safetensors", "tokenizer.json"]);
        let names = ["config.json", INDEX, "model-00001-of-00002.safetensors", "pytorch_model.bin", "x.gguf"];
        assert_eq!(choose("a/b", &names).unwrap(), ["config.json", INDEX], "shards follow from the index");
        let names = ["adapter_config.json", "adapter_model.safetensors", "x.gguf"];
        assert_eq!(choose("a/b", &names).unwrap(), ["adapter_config.json", "adapter_model.safetensors"]);
        assert_eq!(choose("a/b", &["only.gguf", "README.md"]).unwrap(), ["only.gguf"]);
        assert_eq!(
            choose("a/b/x.gguf", &["x.gguf", "y.gguf", "config.json", "model.safetensors"]).unwrap(),
            ["x.gguf"]
        );
    }

    #[test]
    fn repositories_without_usable_weights_say_why() {
        let why = |spec, names: &[&str]| choose(spec, names).unwrap_err().to_string();
        let several = why("a/b@v1", &["x.gguf", "y.gguf", "config.json"]);
        assert!(several.contains("such as hf:a/b@v1/x.gguf; it has x.gguf, y.gguf"), "{several}");
        assert!(why("a/b/z.gguf", &["x.gguf"]).contains("no file `z.gguf`; it has x.gguf"));
        assert!(why("a/b/z.gguf", &["a"]).contains("no .gguf file at all"));
        assert!(why("a/b", &["config.json", "pytorch_model.bin"]).contains("PyTorch pickles"));
        assert!(why("a/b", &["README.md"]).contains("no weights"));
        assert!(why("a/b", &["model.safetensors"]).contains("neither config.json nor"));
        assert!(why("a/b", &["config.json", "a b.safetensors"]).contains("not a plain file name"));
    }

    #[test]
    fn an_index_may_only_name_files_of_the_repository() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        let names = BTreeSet::from(["a.safetensors".to_owned()]);
        fs::write(&index, r#"{"metadata":{},"weight_map":{"x":"a.safetensors","y":"a.safetensors"}}"#).unwrap();
        assert_eq!(shards(&index, &names).unwrap(), names);
        for bad in [r#"{"weight_map":{"x":"../a.safetensors"}}"#, r#"{"weight_map":{"x":"b.safetensors"}}"#, "{}", "["]
        {
            fs::write(&index, bad).unwrap();
            assert_eq!(shards(&index, &names).unwrap_err().exit_code(), 1, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_spec_prints_as_one_that_parses_to_the_same(rest in "[a/.@v-]{1,10}(/x\\.gguf)?") {
            if let Ok(repository) = Repository::parse(&rest) {
                let spec = repository.spec();
                prop_assert_eq!(Repository::parse(&spec[3..]).unwrap(), repository);
            }
        }
    }
}
