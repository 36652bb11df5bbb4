//! A hub inside a test: what its client asks for, how it misbehaves, and a place for what is fetched.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use crate::apart;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::{self, JoinHandle},
};
use tunesmith_files::{Error, Result};
use tunesmith_hub::{Resolved, Settings};

pub const MAIN: &str = "1111111111111111111111111111111111111111";
pub const OLD: &str = "2222222222222222222222222222222222222222";

/// How the hub misbehaves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Mood {
    #[default]
    Good,
    /// Large files need the token `good`.
    Gated,
    /// Everything needs a token.
    Private,
    /// The first answer with a large file breaks off in the middle.
    BreaksOff,
    /// Large files come with one other byte.
    Corrupts,
    /// Large files come shorter than announced, without any sign of it.
    Shortens,
    /// Answers 503 to the first requests.
    Busy,
}

/// One request as it came: method and path, then the headers that matter.
#[derive(Clone, Debug)]
pub struct Request {
    pub line: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

#[derive(Default)]
struct State {
    /// Commit -> file -> bytes. Files of more than 1000 bytes are "large": behind a redirect, with their SHA-256 as ETag.
    commits: BTreeMap<&'static str, BTreeMap<&'static str, Vec<u8>>>,
    mood: Mutex<Mood>,
    log: Mutex<Vec<Request>>,
    stop: AtomicBool,
    port: AtomicU16,
}

/// A file's name and bytes.
pub type File<'a> = (&'static str, &'a [u8]);

pub struct Hub {
    state: Arc<State>,
    address: String,
    listener: Option<JoinHandle<()>>,
}

impl Hub {
    pub fn start(commits: &[(&'static str, &[File])]) -> Self {
        let commits = commits
            .iter()
            .map(|(commit, files)| (*commit, files.iter().map(|(name, bytes)| (*name, bytes.to_vec())).collect()))
            .collect();
        let state = Arc::new(State { commits, ..State::default() });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        state.port.store(address.port(), Ordering::SeqCst);
        let shared = Arc::clone(&state);
        let listener = thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = Arc::clone(&shared);
                thread::spawn(move || state.serve(stream.unwrap()));
            }
        });
        Self { state, address: address.to_string(), listener: Some(listener) }
    }

    pub fn mood(&self, mood: Mood) {
        *self.state.mood.lock().unwrap() = mood;
    }

    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.log.lock().unwrap())
    }

    pub fn stop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(listener) = self.listener.take() {
            listener.join().unwrap();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    /// One request a connection: no keep-alive to think about.
    fn serve(&self, stream: TcpStream) {
        let mut lines = BufReader::new(&stream).lines();
        let Some(Ok(line)) = lines.next() else { return };
        let mut request = Request { line, range: None, authorization: None };
        for header in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let Some((name, value)) = header.split_once(": ") else { continue };
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = Some(value.to_owned()),
                "authorization" => request.authorization = Some(value.to_owned()),
                _ => {}
            }
        }
        self.log.lock().unwrap().push(request.clone());
        let (head, body) = self.answer(&request);
        let _ = (&stream).write_all(format!("HTTP/1.1 {head}Connection: close\r\n\r\n").as_bytes());
        let _ = (&stream).write_all(&body);
    }

    fn answer(&self, request: &Request) -> (String, Vec<u8>) {
        let status = |status: &str| (format!("{status}\r\nContent-Length: 0\r\n"), Vec::new());
        let mood = *self.mood.lock().unwrap();
        if mood == Mood::Busy && self.log.lock().unwrap().len() < 3 {
            return status("503 Busy");
        }
        let token = request.authorization.as_deref().map(|value| value.trim_start_matches("Bearer "));
        if mood == Mood::Private && token != Some("good") && !request.line.contains("/large/") {
            return status("401 Unauthorized");
        }
        let path = request.line.split(' ').nth(1).unwrap_or_default();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let commit = |revision: &str| match revision {
            "main" => Some(MAIN),
            "v1%2Fold" => Some(OLD),
            other => self.commits.keys().copied().find(|commit| *commit == other),
        };
        match parts[..] {
            ["api", "models" | "datasets", "org", "tiny", "revision", revision] => {
                let Some((commit, files)) = commit(revision).and_then(|c| Some((c, self.commits.get(c)?))) else {
                    return status("404 Not Found");
                };
                let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
                let body = serde_json::json!({ "id": "org/tiny", "sha": commit, "siblings": siblings }).to_string();
                (
                    format!("200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", body.len()),
                    body.into_bytes(),
                )
            }
            ["org", "tiny", "resolve", revision, ref file @ ..]
            | ["datasets", "org", "tiny", "resolve", revision, ref file @ ..] => {
                let name = file.join("/");
                let Some(commit) = commit(revision) else { return status("404 Not Found") };
                let Some(bytes) = self.commits[commit].get(name.as_str()) else { return status("404 Not Found") };
                if bytes.len() > 1000 {
                    match (mood, token) {
                        (Mood::Gated, Some("good")) => {}
                        (Mood::Gated, Some(_)) => return status("403 Forbidden"),
                        (Mood::Gated, None) => return status("401 Unauthorized"),
                        _ => {}
                    }
                    let etag = hex(&Sha256::digest(bytes));
                    let head = format!(
                        "302 Found\r\nX-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n\
                         Location: http://{}/large/{commit}/{name}\r\nContent-Length: 0\r\n",
                        bytes.len(),
                        // Another name of the same machine: the token must not travel there.
                        format_args!("localhost:{}", self.port.load(Ordering::SeqCst)),
                    );
                    return (head, Vec::new());
                }
                let mut digest = sha1::Sha1::new();
                digest.update(format!("blob {}\0", bytes.len()));
                digest.update(bytes);
                let etag = hex(&digest.finalize());
                ranged(bytes, request, &format!("X-Repo-Commit: {commit}\r\nETag: \"{etag}\"\r\n"), None)
            }
            ["large", commit, ref file @ ..] => {
                let mut bytes = self.commits[commit][file.join("/").as_str()].clone();
                let whole = request.range.as_deref() != Some("bytes=0-0");
                let mut send = None;
                match mood {
                    Mood::Corrupts => bytes[700] ^= 1,
                    Mood::Shortens if whole => send = Some(Cut::Honest(100)),
                    Mood::BreaksOff if whole => {
                        *self.mood.lock().unwrap() = Mood::Good;
                        send = Some(Cut::Lost(1500));
                    }
                    _ => {}
                }
                ranged(&bytes, request, "ETag: \"of-the-storage\"\r\n", send)
            }
            _ => status("404 Not Found"),
        }
    }
}

enum Cut {
    /// Fewer bytes, and a length that says so.
    Honest(usize),
    /// Fewer bytes than the length says.
    Lost(usize),
}

fn ranged(bytes: &[u8], request: &Request, headers: &str, cut: Option<Cut>) -> (String, Vec<u8>) {
    let range = request.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (start, end) = match range {
        Some((start, end)) => (start.parse().unwrap(), end.parse().map_or(bytes.len(), |end: usize| end + 1)),
        None => (0, bytes.len()),
    };
    if start >= bytes.len() {
        return ("416 Range Not Satisfiable\r\nContent-Length: 0\r\n".to_owned(), Vec::new());
    }
    let (mut body, mut length) = (bytes[start..end].to_vec(), end - start);
    match cut {
        Some(Cut::Honest(count)) => {
            body.truncate(count);
            length = body.len();
        }
        Some(Cut::Lost(count)) => body.truncate(count),
        None => {}
    }
    let head = format!(
        "206 Partial Content\r\n{headers}Content-Range: bytes {start}-{}/{}\r\nContent-Length: {length}\r\n",
        end - 1,
        bytes.len()
    );
    (head, body)
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that no compression or repetition makes look right by accident.
pub fn noise(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

pub struct Place {
    pub folder: tempfile::TempDir,
    pub settings: Settings,
}

impl Place {
    pub fn new(hub: &Hub) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { hf_endpoint: format!("http://{}", hub.address), ..apart::settings(folder.path()) };
        Self { folder, settings }
    }

    pub fn resolve(&self, spec: &str) -> Result<Resolved> {
        tunesmith_hub::resolve(spec, &self.settings, &mut |_| {})
    }

    pub fn repository(&self) -> PathBuf {
        self.settings.hf_cache.join("models--org--tiny")
    }

    pub fn blob(&self, bytes: &[u8]) -> PathBuf {
        self.repository().join("blobs").join(hex(&Sha256::digest(bytes)))
    }
}

pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub fn is_input(error: &Error, words: &str) {
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}
