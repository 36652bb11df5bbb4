//! Buckets and addresses: a real S3-compatible server (moto, from PyPI), and a small server that misbehaves.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod apart;
mod moto;

use moto::Moto;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};
use tempfile::TempDir;
use tunesmith_files::{Error, Result};
use tunesmith_hub::{Resolved, Settings};

/// A cache of its own, and the variables under which buckets are reached.
struct Place {
    _folder: TempDir,
    settings: Settings,
}

impl Place {
    fn new(objects: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            objects: objects.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            ..apart::settings(folder.path())
        };
        Self { _folder: folder, settings }
    }

    fn resolve(&self, spec: &str) -> Result<Resolved> {
        tunesmith_hub::resolve(spec, &self.settings, &mut |_| {})
    }

    /// Resolves, with the names of what was transferred.
    fn fetched(&self, spec: &str) -> (PathBuf, Vec<String>) {
        let mut names = Vec::new();
        let found = tunesmith_hub::resolve(spec, &self.settings, &mut |event| {
            if let Some(name) = event.what.strip_prefix("fetching ") {
                names.push(name.to_owned());
            }
        });
        names.dedup();
        (found.unwrap().path, names)
    }
}

#[track_caller]
fn fails(result: Result<Resolved>, code: u8, said: &str) -> String {
    let error: Error = result.unwrap_err();
    assert!(
        error.exit_code() == code && error.to_string().contains(said),
        "should say {said:?} with {code}: {error:?}"
    );
    error.to_string()
}

#[test]
fn a_bucket_is_data_and_models() {
    let Some(moto) = Moto::start() else { return };
    moto.put("texts", b"");
    moto.put("texts/run/a.jsonl", b"{\"text\": \"one\"}\n");
    moto.put("texts/run/deep/b.jsonl", b"{\"text\": \"two\"}\n");
    moto.put("texts/run/notes.md", b"not data");
    moto.put("texts/runner.txt", b"beside");
    let place = Place::new(&moto.variables());
    let read = |folder: &Path, name: &str| fs::read_to_string(folder.join(name)).unwrap();

    // A prefix is a folder, an object a file, a pattern those that match.
    let (all, names) = place.fetched("s3://texts/run");
    assert_eq!(names, ["a.jsonl", "deep/b.jsonl", "notes.md"]);
    assert_eq!(read(&all, "deep/b.jsonl"), "{\"text\": \"two\"}\n");
    let (one, names) = place.fetched("s3://texts/runner.txt");
    assert_eq!((names, fs::read(&one).unwrap()), (vec!["runner.txt".to_owned()], b"beside".to_vec()));
    let files = tunesmith_hub::data_files("s3://texts/run/*.jsonl", "train", &place.settings, &mut |_| {}).unwrap();
    assert_eq!(files.len(), 1);
    assert!(files[0].join("a.jsonl").is_file() && !files[0].join("deep").exists());

    // What changed comes again, what did not does not, what is gone goes.
    assert_eq!(place.fetched("s3://texts/run").1, [""; 0]);
    moto.put("texts/run/a.jsonl", b"{\"text\": \"new\"}\n");
    moto.delete("texts/run/notes.md");
    let (all, names) = place.fetched("s3://texts/run");
    assert_eq!((names, read(&all, "a.jsonl")), (vec!["a.jsonl".to_owned()], "{\"text\": \"new\"}\n".to_owned()));
    assert!(!all.join("notes.md").exists());

    // A copy that was changed here is not the object.
    fs::write(all.join("a.jsonl"), "changed here").unwrap();
    assert_eq!(place.fetched("s3://texts/run").1, ["a.jsonl"]);

    // What is not there.
    fails(place.resolve("s3://texts/nothing"), 2, "neither an object of this name nor one below it");
    fails(place.resolve("s3://nobody/a"), 2, "s3://nobody/a: there is ");
    let nobody = Place::new(&[("AWS_ENDPOINT_URL", &moto.address)]);
    let offline = Settings { offline: true, ..place.settings.clone() };
    assert_eq!(tunesmith_hub::resolve("s3://texts/run", &offline, &mut |_| {}).unwrap().path, all);
    fails(
        tunesmith_hub::resolve("s3://texts/run", &Settings { offline: true, ..nobody.settings }, &mut |_| {}),
        2,
        "the network is off",
    );

    // Without permission: whose doing it is, and the copy stays.
    moto.lock();
    let said = fails(place.resolve("s3://texts/run"), 2, "no permission (403)");
    assert!(said.contains("AWS_ACCESS_KEY_ID"), "{said}");
    assert_eq!(read(&all, "a.jsonl"), "{\"text\": \"new\"}\n");
}

/// How the small server answers.
#[derive(Clone, Copy, Debug, Default)]
struct Mood {
    /// Bytes after which every answer breaks off.
    breaks_after: Option<usize>,
    /// Ranges are not looked at.
    whole_only: bool,
    /// Another state of the content.
    changed: bool,
    /// The status of every answer.
    status: Option<u16>,
}

/// A server of one file of 300,000 bytes under every address, of 40 MiB and a bit under those with `huge`; it keeps the first line
/// and the start of the range of every request.
struct Server {
    address: String,
    mood: Arc<Mutex<Mood>>,
    log: Arc<Mutex<Vec<String>>>,
}

fn content(changed: bool) -> Vec<u8> {
    bytes(300_000, changed)
}

/// Bytes of the large file.
const HUGE: u32 = (40 << 20) + 5;

fn bytes(len: u32, changed: bool) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ u8::from(changed)).collect()
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (mood, log) = (Arc::new(Mutex::new(Mood::default())), Arc::new(Mutex::new(Vec::new())));
        let server = Self { address, mood: mood.clone(), log: log.clone() };
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (mood, log) = (mood.clone(), log.clone());
                // A client that goes away early is no fault.
                thread::spawn(move || answer(&stream, &mood, &log).ok());
            }
        });
        server
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

fn answer(mut stream: &TcpStream, mood: &Mutex<Mood>, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let (mut from, mut to) = (None, None);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (start, end) = range.split_once('-').unwrap_or((range, ""));
            (from, to) = (start.parse::<usize>().ok(), end.parse::<usize>().ok());
        }
    }
    log.lock().unwrap().push(format!("{first} {}", from.unwrap_or(0)));
    let mood = *mood.lock().unwrap();
    if let Some(status) = mood.status {
        return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let all = if first.contains("huge") { bytes(HUGE, mood.changed) } else { content(mood.changed) };
    let from = from.filter(|_| !mood.whole_only);
    let last = to.filter(|_| from.is_some()).unwrap_or(usize::MAX).min(all.len() - 1);
    let body = &all[from.unwrap_or(0)..=last];
    let (status, range) = match from {
        Some(from) => ("206 Partial Content", format!("Content-Range: bytes {from}-{last}/{}\r\n", all.len())),
        None => ("200 OK", String::new()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}ETag: \"v{}\"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\
         Connection: close\r\n\r\n",
        body.len(),
        u8::from(mood.changed)
    )?;
    if !first.starts_with("HEAD") {
        stream.write_all(&body[..mood.breaks_after.unwrap_or(body.len()).min(body.len())])?;
    }
    Ok(())
}

#[test]
fn a_fetch_that_broke_off_goes_on_where_it_stopped() {
    let server = Server::start();
    let place = Place::new(&[]);
    let spec = format!("{}/texts/big.bin?signature=secret", server.address);
    server.set(Mood { breaks_after: Some(1000), ..Mood::default() });
    let said = fails(place.resolve(&spec), 1, "what has arrived is kept");
    assert!(!said.contains("secret"), "{said}");
    assert!(server.take_log().iter().all(|line| line.contains("/texts/big.bin?signature=secret")));

    // Another run, the server in good health.
    server.set(Mood::default());
    let (path, names) = place.fetched(&spec);
    assert_eq!((names, fs::read(&path).unwrap() == content(false)), (vec!["big.bin".to_owned()], true));
    let log = server.take_log();
    let start: usize = log.last().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(start >= 1000, "the first bytes are not asked for again: {log:?}");
    assert!(path.ends_with("big.bin") && place.resolve(&spec).unwrap().origin.ends_with("/texts/big.bin"));
    assert_eq!(place.fetched(&spec).1, [""; 0], "nothing has changed");

    // Another query is another file; another signature is not.
    let of = |query: &str| place.fetched(&format!("{}/texts/big.bin?{query}", server.address));
    let (one, two) = (of("id=1&X-Amz-Signature=a"), of("id=2&X-Amz-Signature=a"));
    assert!(one.0 != two.0 && one.1 == two.1 && one.0 != path);
    assert_eq!(of("id=1&X-Amz-Signature=b"), (one.0, Vec::new()));

    // Other content in place of what was begun.
    let place = Place::new(&[]);
    server.set(Mood { breaks_after: Some(1000), ..Mood::default() });
    fails(place.resolve(&spec), 1, "what has arrived is kept");
    server.set(Mood { changed: true, ..Mood::default() });
    assert!(fs::read(place.fetched(&spec).0).unwrap() == content(true), "two states are not mixed");

    // A server that cannot go on in the middle.
    let place = Place::new(&[]);
    server.set(Mood { breaks_after: Some(1000), ..Mood::default() });
    fails(place.resolve(&spec), 1, "what has arrived is kept");
    server.set(Mood { whole_only: true, ..Mood::default() });
    assert!(fs::read(place.fetched(&spec).0).unwrap() == content(false));

    server.set(Mood { status: Some(404), ..Mood::default() });
    fails(place.resolve(&spec), 2, "(404)");
    server.set(Mood { status: Some(403), ..Mood::default() });
    fails(place.resolve(&spec), 2, "no permission (403)");
    fails(place.resolve("https://h.example/a/"), 2, "folders on the web cannot be listed");
}

#[test]
fn a_large_object_comes_in_ranges() {
    let server = Server::start();
    let spec = format!("{}/huge.bin", server.address);
    let starts = |log: Vec<String>| {
        let mut starts: Vec<usize> = log.iter().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        starts.sort_unstable();
        starts
    };
    let mib = |n: usize| n << 20;
    let place = Place::new(&[]);
    assert!(fs::read(place.fetched(&spec).0).unwrap() == bytes(HUGE, false));
    // The first request asks what there is.
    assert_eq!(starts(server.take_log()), [0, 0, mib(8), mib(16), mib(24), mib(32), mib(40)]);

    // Ranges that break off, in one run and the next: what stands in the file is not asked for again.
    let place = Place::new(&[]);
    server.set(Mood { breaks_after: Some(mib(1)), ..Mood::default() });
    fails(place.resolve(&spec), 1, "what has arrived is kept");
    server.set(Mood::default());
    assert!(fs::read(place.fetched(&spec).0).unwrap() == bytes(HUGE, false));

    // Another state of the object is noticed in the middle, and the two are not mixed.
    let place = Place::new(&[]);
    server.take_log();
    let mood = server.mood.clone();
    let change = |event: tunesmith_files::Progress<'_>| {
        if event.done == 8 << 20 {
            mood.lock().unwrap().changed = true;
        }
    };
    fails(tunesmith_hub::resolve(&spec, &place.settings, &mut { change }), 1, "it changed while it was fetched");
    assert!(fs::read(place.fetched(&spec).0).unwrap() == bytes(HUGE, true));

    // A server that has no ranges is asked for the whole.
    let place = Place::new(&[]);
    server.set(Mood { whole_only: true, ..Mood::default() });
    assert!(fs::read(place.fetched(&spec).0).unwrap() == bytes(HUGE, false));
}

#[test]
fn other_clouds_are_asked_in_their_own_ways() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let account = folder.path().join("account.json");
    let text = format!(
        "{{\"gcs_base_url\": \"{}\", \"disable_oauth\": true, \"client_email\": \"\", \"private_key\": \"\", \"private_key_id\": \"\"}}",
        server.address
    );
    fs::write(&account, text).unwrap();
    let google = Place::new(&[("GOOGLE_SERVICE_ACCOUNT", account.to_str().unwrap())]);
    assert!(fs::read(google.fetched("gs://bucket/data/a.bin").0).unwrap() == content(false));
    let log = server.take_log();
    assert!(log.iter().any(|line| line.contains("GET /bucket/data%2Fa%2Ebin")), "{log:?}");

    let endpoint = format!("{}/account", server.address);
    let azure = Place::new(&[
        ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ("AZURE_STORAGE_ENDPOINT", &endpoint),
        ("AZURE_SKIP_SIGNATURE", "true"),
    ]);
    assert!(fs::read(azure.fetched("az://container/data/a.bin").0).unwrap() == content(false));
    let log = server.take_log();
    assert!(log.iter().any(|line| line.contains("/container/data/a.bin")), "{log:?}");
    server.set(Mood { status: Some(401), ..Mood::default() });
    fails(azure.resolve("az://container/data/a.bin"), 2, "AZURE_STORAGE_ACCOUNT_KEY");
    fails(Place::new(&[]).resolve("az://container/a"), 2, "AZURE_STORAGE_ACCOUNT_NAME");
}
