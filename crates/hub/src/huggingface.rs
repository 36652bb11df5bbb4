//! Repositories of the Hugging Face hub, kept in the cache layout that the hub's own tools use.
//!
//! Three requests are all that is needed: what a revision consists of, what a file is, its bytes. Every file comes from one
//! pinned commit, every blob is checked against the hub's checksum before it counts, a download that broke off goes on where
//! it stopped, and what other tools downloaded is reused.

use crate::{
    Resolved, Settings,
    cache::{self, Entry, Manifest, io_error, remove},
    dataset::{self, Subset},
    http,
};
use reqwest::{
    Client, Response, StatusCode,
    header::{CONTENT_RANGE, ETAG, LOCATION, RANGE},
    redirect::Policy,
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_files::{
    atomic::{self, create_folder, folder_of, sync_folder},
    hash::{sha256_hex, sha256_of},
};

/// `hf:org/name[@revision][/file.gguf]` or `hf:datasets/org/name[@revision][?config=NAME][&split=NAME]`
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Repository {
    /// `org/name`
    id: String,
    /// A branch, a tag, `refs/pr/N` or a commit; `main` when the user names none.
    revision: String,
    /// The one GGUF file to fetch; the safetensors folder when absent.
    file: Option<String>,
    /// What is wanted of a data set; absent for a model.
    dataset: Option<Subset>,
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

impl Repository {
    /// Parses what follows `hf:`.
    pub(crate) fn parse(rest: &str) -> Result<Self> {
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
        let subset = query.map_or(Ok(Subset::default()), Subset::parse).map_err(|why| form(&why))?;
        let dataset = is_dataset.then_some(subset);
        Ok(Self { id: format!("{org}/{name}"), revision: revision.to_owned(), file: file.map(str::to_owned), dataset })
    }

    /// The spec, as it can be written again.
    pub(crate) fn spec(&self) -> String {
        let revision = if self.revision == "main" { String::new() } else { format!("@{}", self.revision) };
        let file = self.file.as_ref().map(|file| format!("/{file}")).unwrap_or_default();
        let query = self.dataset.as_ref().map(Subset::query).unwrap_or_default();
        format!("hf:{}{revision}{file}{query}", self.path())
    }

    /// The repository as addresses have it.
    fn path(&self) -> String {
        format!("{}{}", if self.dataset.is_some() { "datasets/" } else { "" }, self.id)
    }

    /// Whether it is one of data.
    pub(crate) fn is_dataset(&self) -> bool {
        self.dataset.is_some()
    }

    /// The same with this split, if it is a data set of which none was named.
    pub(crate) fn or_split(mut self, split: &str) -> Self {
        if let Some(subset) = &mut self.dataset {
            subset.split.get_or_insert_with(|| split.to_owned());
        }
        self
    }

    /// The files of a data set that was resolved.
    ///
    /// # Errors
    /// The cache lost them just now.
    pub(crate) fn data_files(&self, resolved: &Resolved, settings: &Settings) -> Result<Vec<PathBuf>> {
        let commit = resolved.path.file_name().unwrap_or_default().to_string_lossy();
        let manifest = Manifest::read(&self.manifest(&commit, settings)).ok_or_else(|| {
            Error::Failure(format!("{}: the cache changed while it was read; try again", self.spec()))
        })?;
        let files = manifest.files.iter().filter(|file| file.path != CARD);
        Ok(files.map(|file| resolved.path.join(&file.path)).collect())
    }

    /// What two processes must not fetch at once: any revision of the repository, since revisions share blobs.
    pub(crate) fn lock_key(&self) -> String {
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
            self.file.clone().or_else(|| self.dataset.as_ref().map(Subset::query)).filter(|part| !part.is_empty());
        let key = part.map(|part| format!("-{}", &sha256_hex(part)[..16])).unwrap_or_default();
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
    pub(crate) fn cached(&self, settings: &Settings) -> Result<Option<Resolved>> {
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

    /// Downloads and checks whatever of it is not in the cache. The caller holds the lock.
    pub(crate) fn fetch(&self, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
        http::runtime()?.block_on(self.download(settings, progress))
    }

    async fn download(&self, settings: &Settings, progress: &mut Observer<'_>) -> Result<Resolved> {
        let hub = Hub::new(self, settings)?;
        progress(Progress::bytes(&format!("asking {} for {}", settings.hf_endpoint, self.id), 0, None));
        let info = http::retry(async || hub.info().await.map_err(|error| hub.error(error, None))).await?;
        let commit = info.sha;
        if !is_commit(&commit) {
            return Err(Error::Network(format!("{} names no commit for {}", settings.hf_endpoint, self.spec())));
        }
        let names: BTreeSet<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let refs = self.folder(settings).join("refs");
        // Until every file has been checked, a reference named like the commit says that the snapshot is not complete.
        let unfinished = refs.join(&commit);
        atomic::write(&unfinished, &commit)?;
        // From here on the branch may move: every file is asked for at this commit.
        let files = Files { hub: &hub, commit: &commit };
        let mut entries = Vec::new();
        let wanted = match &self.dataset {
            None => self.choose(&names)?,
            Some(subset) => {
                let mut card = None;
                if names.contains(CARD) {
                    entries.push(files.fetch(CARD, progress).await?);
                    let path = self.snapshot(&commit, settings).join(CARD);
                    card = Some(fs::read_to_string(&path).map_err(io_error("cannot read", &path))?);
                }
                dataset::choose(subset, card.as_deref(), &names)
                    .map_err(|why| Error::Input(format!("{}: {why}", self.spec())))?
            }
        };
        for name in &wanted {
            entries.push(files.fetch(name, progress).await?);
        }
        if wanted.contains(INDEX) {
            let index = self.snapshot(&commit, settings).join(INDEX);
            for name in shards(&index, &names)? {
                entries.push(files.fetch(&name, progress).await?);
            }
        }
        if self.revision != commit {
            atomic::write(&refs.join(&self.revision), commit.as_bytes())?;
        }
        Manifest { source: format!("hf:{}@{commit}", self.path()), files: entries.clone() }
            .write(&self.manifest(&commit, settings))?;
        remove(&unfinished)?;
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

/// What a revision consists of.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// What the hub says of a file.
struct Metadata {
    etag: String,
    size: u64,
    commit: String,
}

/// Why a request failed.
enum Failure {
    Status(StatusCode),
    /// The connection failed, before an answer or in the middle of one.
    Connection(reqwest::Error),
    /// The answer lacks something.
    Answer(String),
    /// What arrived cannot be written.
    Io(io::Error),
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The hub as this download sees it: what its errors mean depends on it.
struct Hub<'a> {
    repository: &'a Repository,
    settings: &'a Settings,
    token: Option<String>,
    client: Client,
    /// Answers with a redirection as it is.
    no_redirect: Client,
}

impl<'a> Hub<'a> {
    fn new(repository: &'a Repository, settings: &'a Settings) -> Result<Self> {
        let token = settings.hf_token.clone().or_else(|| {
            let text = fs::read_to_string(&settings.hf_token_file).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        });
        let client = |policy| {
            Client::builder()
                .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(Duration::from_secs(10))
                .read_timeout(Duration::from_secs(60))
                .redirect(policy)
                .build()
                .map_err(|error| Error::Network(format!("cannot start the network client: {error}")))
        };
        let (client, no_redirect) = (client(Policy::default())?, client(Policy::none())?);
        Ok(Self { repository, settings, token, client, no_redirect })
    }

    /// Asks for `url`, or a range of it. The token does not follow a redirection to another host.
    async fn get(&self, client: &Client, url: &str, range: Option<&str>) -> Result<Response, Failure> {
        let mut request = client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(range) = range {
            request = request.header(RANGE, range);
        }
        let answer = request.send().await?;
        let status = answer.status();
        if status.is_client_error() || status.is_server_error() { Err(Failure::Status(status)) } else { Ok(answer) }
    }

    async fn info(&self) -> Result<Info, Failure> {
        let Repository { id, revision, .. } = self.repository;
        let kind = if self.repository.is_dataset() { "datasets" } else { "models" };
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/{kind}/{id}/revision/{revision}", self.settings.hf_endpoint);
        let bytes = self.get(&self.client, &url, None).await?.bytes().await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::Answer(format!("{url} is not what a hub says: {error}")))
    }

    /// Asks what the file at `url` is. The hub says it before it redirects to where large files are, and a redirection
    /// within the hub is another name of the repository.
    async fn metadata(&self, url: &str) -> Result<Metadata, Failure> {
        const FIRST: Option<&str> = Some("bytes=0-0");
        let mut url = url.to_owned();
        let mut answer = self.get(&self.no_redirect, &url, FIRST).await?;
        for _ in 0..5 {
            let location = header(&answer, LOCATION.as_str()).filter(|l| l.starts_with('/') && !l.starts_with("//"));
            let Some(location) = location.filter(|_| answer.status().is_redirection()) else { break };
            url = format!("{}{location}", self.settings.hf_endpoint);
            answer = self.get(&self.no_redirect, &url, FIRST).await?;
        }
        let lacks = |what: &str| Failure::Answer(format!("the answer for {url} has no {what}"));
        let etag = header(&answer, "x-linked-etag").or_else(|| header(&answer, ETAG.as_str()));
        let etag = etag.ok_or_else(|| lacks("ETag"))?.replace('"', "");
        let commit = header(&answer, "x-repo-commit").ok_or_else(|| lacks("X-Repo-Commit"))?.to_owned();
        let size = match header(&answer, "x-linked-size").and_then(|size| size.parse().ok()) {
            Some(size) => size,
            None => {
                if answer.status().is_redirection() {
                    answer = self.get(&self.client, &url, FIRST).await?;
                }
                let range = header(&answer, CONTENT_RANGE.as_str());
                let size = range.and_then(|range| range.rsplit('/').next()?.parse().ok());
                size.ok_or_else(|| lacks("size"))?
            }
        };
        Ok(Metadata { etag, size, commit })
    }

    /// Appends to `part` what is missing of the `size` bytes at `url`.
    async fn append(
        &self,
        url: &str,
        part: &Path,
        size: u64,
        what: &str,
        progress: &mut Observer<'_>,
    ) -> Result<(), Failure> {
        let mut file = File::options().create(true).append(true).open(part)?;
        let mut have = file.metadata()?.len();
        // One that is not shorter than the file cannot be gone on with.
        if have >= size {
            file.set_len(0)?;
            have = 0;
        }
        let mut answer = self.get(&self.client, url, Some(&format!("bytes={have}-"))).await?;
        if have > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
            file.set_len(0)?;
            have = 0;
        }
        progress(Progress::bytes(what, have, Some(size)));
        while let Some(bytes) = answer.chunk().await? {
            file.write_all(&bytes)?;
            have += bytes.len() as u64;
            progress(Progress::bytes(what, have, Some(size)));
        }
        Ok(file.sync_all()?)
    }

    /// What went wrong, whose doing it was and the way out; and whether trying again may help.
    fn error(&self, failure: Failure, file: Option<&str>) -> (Error, bool) {
        let endpoint = &self.settings.hf_endpoint;
        let Repository { id, revision, .. } = self.repository;
        let page = format!("{endpoint}/{}", self.repository.path());
        let spec = self.repository.spec();
        match failure {
            Failure::Status(StatusCode::UNAUTHORIZED) if self.token.is_some() => {
                let why = format!("{endpoint} does not accept the token (401)");
                let way = format!("make a new one at {endpoint}/settings/tokens, or unset HF_TOKEN for a public model");
                (Error::Input(format!("{spec}: {why}: {way}")), false)
            }
            Failure::Status(StatusCode::UNAUTHORIZED) => (
                Error::Input(format!(
                    "{spec}: {endpoint} asks for a token (401): {id} does not exist, or is private or gated. Check the name; \
                     for a gated one accept its terms at {page}, then set HF_TOKEN to a token from {endpoint}/settings/tokens"
                )),
                false,
            ),
            Failure::Status(StatusCode::FORBIDDEN) => (
                Error::Input(format!(
                    "{spec}: no access (403): ask for it at {page} with the account whose token is in HF_TOKEN, and give the \
                     token the right to read gated repositories"
                )),
                false,
            ),
            Failure::Status(StatusCode::NOT_FOUND) => (
                Error::NotFound(match file {
                    Some(file) => format!("{spec}: {endpoint} has no file {file} at this revision (404)"),
                    None => format!(
                        "{spec}: {endpoint} has no repository {id} with a revision {revision} (404): check both names"
                    ),
                }),
                false,
            ),
            Failure::Status(status) => (
                Error::Network(format!("{spec}: {endpoint} answered with status {}", status.as_u16())),
                status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error(),
            ),
            Failure::Connection(error) if error.is_connect() || error.is_request() => (
                Error::Network(format!(
                    "{spec}: {endpoint} cannot be reached: {error}. Check the network, or set HF_ENDPOINT to a mirror"
                )),
                true,
            ),
            Failure::Connection(error) => {
                (Error::Network(format!("{spec}: the download from {endpoint} failed: {error}")), true)
            }
            Failure::Answer(why) => (Error::Network(format!("{spec}: {why}: is HF_ENDPOINT a hub?")), false),
            Failure::Io(source) => {
                (Error::Io { what: format!("cannot write to {}", self.settings.hf_cache.display()), source }, false)
            }
        }
    }
}

/// A header of an answer, if it is text.
fn header<'a>(answer: &'a Response, name: &str) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

/// The files of one commit.
struct Files<'a> {
    hub: &'a Hub<'a>,
    commit: &'a str,
}

impl Files<'_> {
    /// Makes sure that `name` is in the snapshot with the content that the hub has.
    async fn fetch(&self, name: &str, progress: &mut Observer<'_>) -> Result<Entry> {
        let (repository, settings) = (self.hub.repository, self.hub.settings);
        let url = format!("{}/{}/resolve/{}/{name}", settings.hf_endpoint, repository.path(), self.commit);
        let fail = |failure| self.hub.error(failure, Some(name));
        let metadata = http::retry(async || self.hub.metadata(&url).await.map_err(fail)).await?;
        let etag = metadata.etag.as_str();
        // Both become file names.
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        {
            return Err(Error::Network(format!("{url} has the unusable ETag `{etag}`")));
        }
        if metadata.commit != self.commit {
            return Err(Error::Network(format!(
                "{url} is answered for the commit `{}` instead of `{}`: is HF_ENDPOINT a hub?",
                metadata.commit, self.commit
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
        self.download(name, &url, &blob, &metadata, progress).await?;
        point(&blob, &pointer, name)?;
        entry()
    }

    /// Downloads into the blob, going on where an earlier attempt or run stopped, and checks it.
    async fn download(
        &self,
        name: &str,
        url: &str,
        blob: &Path,
        metadata: &Metadata,
        progress: &mut Observer<'_>,
    ) -> Result<()> {
        let (part, blobs) = (blob.with_extension("part"), folder_of(blob));
        create_folder(blobs)?;
        let what = format!("{}: {name}", self.hub.repository.id);
        for _ in 0..http::ATTEMPTS {
            let append = async || {
                let appended = self.hub.append(url, &part, metadata.size, &what, &mut *progress).await;
                appended.map_err(|failure| self.hub.error(failure, Some(name)))
            };
            http::retry(append).await?;
            if is_right(&part, metadata)? {
                fs::rename(&part, blob).map_err(io_error("cannot write", blob))?;
                return sync_folder(blobs);
            }
        }
        remove(&part)?;
        Err(Error::Network(format!(
            "{}: {name} arrived {} times with other bytes than the hub announced (size {}, checksum {}); nothing was kept",
            self.hub.repository.spec(),
            http::ATTEMPTS,
            metadata.size,
            metadata.etag
        )))
    }
}

/// Compares a file with what the hub says of it. The ETag of a large file is its SHA-256, of a small one the name that git
/// gives to its content; any other (some mirrors) leaves the size.
fn is_right(path: &Path, metadata: &Metadata) -> Result<bool> {
    let size = fs::metadata(path).map_err(io_error("cannot read", path))?.len();
    let etag = metadata.etag.as_str();
    let is_hex = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(size == metadata.size
        && match etag.len() {
            64 if is_hex => sha256_of(path)?.eq_ignore_ascii_case(etag),
            40 if is_hex => cache::git_blob_of(path)?.eq_ignore_ascii_case(etag),
            _ => true,
        })
}

/// Puts the blob into the snapshot under its name.
fn point(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    if let Some(folder) = pointer.parent() {
        create_folder(folder)?;
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
