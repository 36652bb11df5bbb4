//! Runs that are copied to a bucket of a real S3-compatible server (moto, from PyPI), and go on from there.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

#[path = "../../hub/tests/apart/mod.rs"]
mod apart;
#[path = "../../hub/tests/moto/mod.rs"]
mod moto;
mod tiny;

use moto::Moto;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tiny::Ran;
use tunesmith_hub::{Bucket, Settings};

/// Folders of runs, and the repository's tiny configuration with its paths made absolute.
struct Setup {
    folder: tempfile::TempDir,
    config: String,
    variables: Vec<(String, String)>,
}

/// Few steps, many checkpoints.
const QUICK: [&str; 5] = [
    "training.max_steps=12",
    "training.logging_steps=1",
    "training.save_steps=4",
    "training.eval_steps=4",
    "samples.prompts=[]",
];

impl Setup {
    fn new(moto: &Moto) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let text = fs::read_to_string(root.join("tiny.toml")).unwrap();
        let config = folder.path().join("tiny.toml");
        fs::write(&config, text.replace("configs/", &format!("{}/", root.display()))).unwrap();
        let variables = moto.variables().iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        Self { config: config.to_str().unwrap().to_owned(), folder, variables }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run in folder `name`.
    fn command(&self, name: &str, set: &[&str]) -> Command {
        let output = format!("output_dir={}", self.dir(name).display());
        let mut command = tiny::binary();
        command.env_remove("TUNESMITH_OFFLINE").env("TUNESMITH_CACHE", self.dir("cache"));
        command.current_dir(self.folder.path()).envs(self.variables.iter().cloned());
        command.args(["train", &self.config]);
        for field in [output.as_str()].iter().chain(&QUICK).chain(set) {
            command.args(["--set", field]);
        }
        command
    }

    fn train(&self, name: &str, set: &[&str]) -> Ran {
        ran(self.command(name, set).spawn().unwrap())
    }

    fn resume(&self, name: &str, set: &[&str]) -> Ran {
        ran(self.command(name, set).arg("--resume").spawn().unwrap())
    }
}

fn ran(child: Child) -> Ran {
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// (step, loss, grad norm) of every step, to the bit.
fn curve(run: &Path) -> Vec<(u64, f64, f64)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let number = |r: &Value, key: &str| r[key].as_f64().unwrap();
    records
        .filter(|r| r["kind"] == "train")
        .map(|r| (r["step"].as_u64().unwrap(), number(&r, "loss"), number(&r, "grad_norm")))
        .collect()
}

/// Names of the checkpoints in a folder.
fn checkpoints(run: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits for something that is due soon.
fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(300), "{what} did not appear");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The files of the folder `dir` of a run and its copy are the same, and there are no others in the copy.
#[track_caller]
fn is_copied(moto: &Moto, prefix: &str, run: &Path, dir: &str) {
    let names: BTreeSet<String> = fs::read_dir(run.join(dir))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| run.join(dir).join(name).is_file())
        .collect();
    let keys = moto.keys("runs", &format!("{prefix}/{dir}/"));
    let copied = keys.iter().map(|key| key.rsplit('/').next().unwrap().to_owned()).collect();
    assert_eq!(names, copied, "{dir}");
    for name in names {
        let there = moto.get(&format!("runs/{prefix}/{dir}/{name}"));
        assert!(there == Some(fs::read(run.join(dir).join(&name)).unwrap()), "{dir}/{name}");
    }
}

#[test]
fn a_killed_run_goes_on_from_its_copy_on_another_machine() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let setup = Setup::new(&moto);
    for (method, place) in [("full", "deep/a"), ("lora", "b")] {
        let method = format!("method={method}");
        let upload = format!("upload=s3://runs/{place}");
        let long = [
            method.as_str(),
            "lora.lora_dropout=0.1",
            "training.max_steps=60",
            "training.save_total_limit=100",
            "training.load_best_model_at_end=true",
        ];
        let set = [&long[..], &[&upload]].concat();
        let (whole, killed, other) = (format!("{place}/whole"), format!("{place}/killed"), format!("{place}/other"));
        let ran = setup.train(&whole, &long);
        assert_eq!(ran.code, 0, "{ran:?}");

        let mut child = setup.command(&killed, &set).spawn().unwrap();
        let marker = format!("runs/{place}/checkpoints/step-8/complete.json");
        wait_for(&marker, || moto.get(&marker).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_dir_all(setup.dir(&killed)).unwrap();

        let resumed = setup.resume(&other, &set);
        assert_eq!(resumed.code, 0, "{resumed:?}");
        assert!(resumed.stdout.contains(&format!("fetched s3://runs/{place}/checkpoints/step-")), "{resumed:?}");
        assert!(resumed.stdout.contains(" for 60 steps from step "), "{resumed:?}");
        assert!(resumed.stdout.contains(&format!("copy:    s3://runs/{place}\n")), "{resumed:?}");
        assert!(resumed.stderr.is_empty() || resumed.stderr.starts_with("note: the configuration"), "{resumed:?}");
        let (whole, other) = (setup.dir(&whole), setup.dir(&other));
        assert_eq!(curve(&other), curve(&whole));
        let weights = if method == "method=full" { "model.safetensors" } else { "adapter_model.safetensors" };
        let read = |run: &Path| fs::read(run.join("final").join(weights)).unwrap();
        assert!(read(&other) == read(&whole), "the weights are those of the run that was never interrupted");
        assert!(checkpoints(&other).iter().all(|name| name.starts_with("step-")), "nothing half-fetched is left");

        // All of it is there, as it is here.
        is_copied(&moto, place, &other, "final");
        for step in checkpoints(&other) {
            is_copied(&moto, place, &other, &format!("checkpoints/{step}"));
        }
        for file in ["run.toml", "lock.json", "metrics.jsonl", "evaluation.json", "report.html"] {
            assert!(moto.get(&format!("runs/{place}/{file}")) == Some(fs::read(other.join(file)).unwrap()), "{file}");
        }

        // Other commands read it from there.
        let model = setup.folder.path().join("model").display().to_string();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny/model");
        let source =
            if method == "method=full" { format!("s3://runs/{place}/final") } else { root.display().to_string() };
        let adapter = format!("s3://runs/{place}/final");
        let mut generate = tiny::binary();
        generate.env_remove("TUNESMITH_OFFLINE").env("TUNESMITH_CACHE", model).envs(setup.variables.iter().cloned());
        generate.args(["generate", "--greedy", "--max-new-tokens", "4", "--model", &source]);
        if method == "method=lora" {
            generate.args(["--adapter", &adapter]);
        }
        let ran = ran_of(generate.arg("What comes after 3?"));
        assert!(ran.code == 0 && !ran.stdout.is_empty(), "{ran:?}");
        if method == "method=lora" {
            // Another run goes on with the adapter.
            let further = format!("model.adapter={adapter}");
            let ran = setup.train("further", &[&method, &further, "training.max_steps=2"]);
            assert_eq!(ran.code, 0, "{ran:?}");
            let config = fs::read_to_string(setup.dir("further").join("run.toml")).unwrap();
            assert!(config.contains(&format!("adapter = \"{adapter}\"")), "{config}");
        }
    }
}

fn ran_of(command: &mut Command) -> Ran {
    ran(command.spawn().unwrap())
}

#[test]
fn old_checkpoints_go_and_torn_ones_do_not_count() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let setup = Setup::new(&moto);
    let set = ["upload=s3://runs/a", "training.save_total_limit=1"];
    let first = setup.train("first", &set);
    assert_eq!(first.code, 0, "{first:?}");
    let there = |moto: &Moto| -> BTreeSet<String> {
        let keys = moto.keys("runs", "a/checkpoints/");
        keys.iter().map(|key| key.split('/').nth(2).unwrap().to_owned()).collect()
    };
    assert_eq!(there(&moto), checkpoints(&setup.dir("first")), "what was deleted here was deleted there");

    // Another run must not land in it.
    let second = setup.train("second", &set);
    assert!(second.code == 2 && second.stderr.contains("s3://runs/a holds a run already"), "{second:?}");
    assert!(!setup.dir("second").exists());

    // A checkpoint of which not all has arrived, one whose bytes are not what its marker says, and something of the user's.
    moto.put("runs/a/checkpoints/step-12/notes.txt", b"mine");
    moto.put("runs/a/checkpoints/step-13/model.safetensors", b"half");
    moto.put("runs/a/checkpoints/step-14/model.safetensors", b"other");
    moto.put("runs/a/checkpoints/step-14/complete.json", br#"{"model.safetensors": "00"}"#);
    moto.put("runs/a/checkpoints/step-15/complete.json", br#"{"model.safetensors": "00"}"#);
    let more = [&set[..], &["training.max_steps=20"]].concat();
    let resumed = setup.resume("second", &more);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert!(resumed.stdout.contains("from step 12"), "{resumed:?}");
    for said in [
        "step-14 is passed over: model.safetensors is not what",
        "step-15 is passed over: model.safetensors is missing",
    ] {
        assert!(resumed.stderr.contains(said), "{said}: {resumed:?}");
    }
    let kept = moto.keys("runs", "a/checkpoints/step-1");
    let ours = checkpoints(&setup.dir("second"));
    for step in ["step-12", "step-13", "step-14", "step-15"].iter().filter(|step| !ours.contains(**step)) {
        let left: Vec<&String> = kept.iter().filter(|key| key.contains(&format!("{step}/"))).collect();
        let mine = format!("a/checkpoints/{step}/notes.txt");
        assert!(left.iter().all(|key| **key == mine), "{left:?}");
    }
    assert_eq!(moto.get("runs/a/checkpoints/step-12/notes.txt").unwrap(), b"mine");
    for step in &ours {
        is_there(&moto, step);
    }

    // What is here and newer than there stays, and goes there.
    for key in moto.keys("runs", "a/") {
        moto.delete(&format!("runs/{key}"));
    }
    let again = setup.resume("second", &more);
    assert!(again.code == 0 && !again.stdout.contains("fetched"), "{again:?}");
    assert_eq!(there(&moto), ours);
    is_copied(&moto, "a", &setup.dir("second"), "final");
}

#[track_caller]
fn is_there(moto: &Moto, step: &str) {
    assert!(moto.get(&format!("runs/a/checkpoints/{step}/complete.json")).is_some(), "{step}");
}

#[test]
fn what_cannot_work_is_said_before_anything_is_done() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let setup = Setup::new(&moto);
    let refused = |set: &[&str], said: &str| {
        for ran in [setup.train("run", set), setup.resume("run", set)] {
            assert!(ran.code == 2 && ran.stderr.contains(said), "{set:?} should say {said:?}: {ran:?}");
            assert!(!setup.dir("run").exists(), "nothing was prepared");
        }
    };
    refused(&["upload=s3://nobody/a"], "there is no such bucket");
    refused(&["upload=https://h.example/a"], "it must be s3://bucket/prefix");
    refused(&["upload=s3://runs/*"], "upload = \"s3://runs/*\" is not a place to write to");
    refused(&["output_dir=s3://runs/a"], "output_dir = \"s3://runs/a\" is not allowed; it is a local folder");
    let offline = ran_of(setup.command("run", &["upload=s3://runs/a"]).arg("--offline"));
    assert!(offline.code == 2 && offline.stderr.contains("needs the network, which is off"), "{offline:?}");
    let nobody = ran_of(setup.command("run", &["upload=s3://runs/a"]).env_remove("AWS_ACCESS_KEY_ID"));
    assert!(nobody.code == 2 && nobody.stderr.contains("no credentials were found"), "{nobody:?}");
    moto.lock();
    refused(&["upload=s3://runs/a"], "no permission (403): ask for the right to list, read, write and delete");
    assert!(!setup.dir("s3:").exists() && !setup.dir("run").exists());
}

#[test]
fn a_server_that_goes_away_costs_no_training() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let setup = Setup::new(&moto);
    let set = ["upload=s3://runs/a", "training.max_steps=300", "training.save_steps=20", "training.eval_steps=0"];
    let child = setup.command("run", &set).spawn().unwrap();
    wait_for("a checkpoint", || moto.keys("runs", "a/checkpoints/").iter().any(|key| key.ends_with("complete.json")));
    let port = moto.stop();
    let ran = ran(child);
    // All of the training was done, and kept.
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("error: s3://runs/a is not up to date: "), "{ran:?}");
    assert!(ran.stderr.contains("go on with --resume to upload what is missing"), "{ran:?}");
    let run = setup.dir("run");
    assert_eq!(curve(&run).len(), 300);
    assert!(run.join("final/complete.json").exists() && run.join("report.html").exists());

    // The server is back (and empty): what is missing goes there.
    let moto = Moto::on(port);
    moto.put("runs", b"");
    let resumed = setup.resume("run", &set);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    is_copied(&moto, "a", &run, "final");
    for step in checkpoints(&run) {
        is_copied(&moto, "a", &run, &format!("checkpoints/{step}"));
    }
}

fn settings(folder: &Path, variables: &[(&str, &str)]) -> Settings {
    let objects = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Settings { objects, ..apart::settings(folder) }
}

#[test]
fn large_files_go_in_parts() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let folder = tempfile::tempdir().unwrap();
    let bucket = Bucket::open("upload", "s3://runs/big", &settings(folder.path(), &moto.variables())).unwrap();
    bucket.check().unwrap();
    assert_eq!(moto.keys("runs", ""), [""; 0], "the check leaves nothing behind");
    let path = folder.path().join("file");
    // Three parts and a bit, and exactly two parts.
    for len in [3 * (8 << 20) + 5, 16 << 20] {
        let content: Vec<u8> = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        fs::write(&path, &content).unwrap();
        let file = fs::File::open(&path).unwrap();
        // An open file is read whole even when its name is gone.
        fs::remove_file(&path).unwrap();
        bucket.put("file", &file, len as u64, &path).unwrap();
        assert!(moto.get("runs/big/file") == Some(content));
        let shrunk = bucket.put("other", &file, len as u64 + 1, &path).unwrap_err();
        assert!(shrunk.to_string().contains("became shorter"), "{shrunk}");
    }
    assert_eq!(moto.keys("runs", ""), ["big/file"]);
    let (parts, to) = (folder.path().join("parts"), folder.path().join("to"));
    bucket.fetch("file", &parts, &to, &mut |_| {}).unwrap().unwrap();
    assert_eq!(fs::metadata(&to).unwrap().len(), 16 << 20);
    assert!(bucket.fetch("nothing", &parts, &to, &mut |_| {}).unwrap().is_none());
    bucket.delete("file").unwrap();
    bucket.delete("file").unwrap();
    assert_eq!((bucket.get("file").unwrap(), bucket.children("").unwrap().len()), (None, 0));
}

#[test]
fn a_server_in_trouble_is_asked_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    // More refusals than the client takes by itself; ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let refused = count.fetch_add(1, Ordering::SeqCst) < 5;
            answer(stream, if refused { "503 Slow Down" } else { "200 OK" }).ok();
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("AWS_ENDPOINT_URL", address.as_str()),
        ("AWS_ACCESS_KEY_ID", "who"),
        ("AWS_SECRET_ACCESS_KEY", "ever"),
        ("AWS_REGION", "us-east-1"),
    ];
    let bucket = Bucket::open("upload", "s3://runs/a", &settings(folder.path(), &variables)).unwrap();
    bucket.put_bytes("file", b"content".to_vec()).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 6);
}

/// Reads a request and answers it.
fn answer(stream: TcpStream, status: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(&stream);
    let (mut line, mut length) = (String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some(number) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = number.trim().parse().unwrap();
        }
        line.clear();
    }
    reader.take(length).read_to_end(&mut Vec::new())?;
    write!(&stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nETag: \"v\"\r\nConnection: close\r\n\r\n")
}

#[cfg(unix)]
#[test]
fn control_c_uploads_what_it_saves() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let setup = Setup::new(&moto);
    let set = ["upload=s3://runs/a", "training.save_steps=0", "training.eval_steps=0", "training.max_steps=100000"];
    let child = setup.command("run", &set).spawn().unwrap();
    let metrics = setup.dir("run/metrics.jsonl");
    wait_for("a step", || fs::read_to_string(&metrics).is_ok_and(|metrics| metrics.lines().count() > 3));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let stopped = ran(child);
    assert_eq!(stopped.code, 130, "{stopped:?}");
    let before = curve(&setup.dir("run"));
    let step = format!("step-{}", before.len());
    assert!(stopped.stdout.contains(&format!("uploaded s3://runs/a/checkpoints/{step}\n")), "{stopped:?}");
    is_copied(&moto, "a", &setup.dir("run"), &format!("checkpoints/{step}"));
    let more = format!("training.max_steps={}", before.len() + 2);
    let resumed = setup.resume("other", &[&set[..3], &[&more]].concat());
    assert_eq!(resumed.code, 0, "{resumed:?}");
    let after = curve(&setup.dir("other"));
    assert_eq!((after.len(), &after[..before.len()]), (before.len() + 2, &before[..]));
}

/// A door before a server: what is to be written below `checkpoints` waits while it is held.
struct Door {
    address: String,
    held: Arc<AtomicBool>,
    /// The first line of the first request that had to wait.
    first: Arc<Mutex<Option<String>>>,
}

impl Door {
    fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let door = Self { address, held: Arc::new(AtomicBool::new(true)), first: Arc::default() };
        let (held, first) = (door.held.clone(), door.first.clone());
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (held, first) = (held.clone(), first.clone());
                thread::spawn(move || pass(&stream, port, &held, &first).ok());
            }
        });
        door
    }
}

/// Passes one request on, and its answer back.
fn pass(stream: &TcpStream, port: u16, held: &AtomicBool, first: &Mutex<Option<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while reader.read_line(&mut head)? > 2 {}
    if head.starts_with("PUT") && head.contains("/checkpoints/") && held.load(Ordering::SeqCst) {
        first.lock().unwrap().get_or_insert_with(|| head.lines().next().unwrap().to_owned());
        while held.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(2));
        }
    }
    let server = TcpStream::connect(("127.0.0.1", port))?;
    // One request a connection, so that each is looked at.
    write!(&server, "{}Connection: close\r\n\r\n", head.trim_end_matches("\r\n").to_owned() + "\r\n")?;
    let mut body = server.try_clone()?;
    thread::spawn(move || std::io::copy(&mut reader, &mut body).ok());
    std::io::copy(&mut &server, &mut &*stream)?;
    stream.shutdown(std::net::Shutdown::Both)
}

#[test]
fn training_does_not_wait_for_uploads() {
    let Some(moto) = Moto::start() else { return };
    moto.put("runs", b"");
    let door = Door::before(moto.port());
    let mut setup = Setup::new(&moto);
    setup.variables.push(("AWS_ENDPOINT_URL".into(), door.address.clone()));
    let set = [
        "upload=s3://runs/a",
        "training.max_steps=200",
        "training.save_steps=4",
        "training.eval_steps=0",
        "training.save_total_limit=1",
    ];
    let child = setup.command("run", &set).spawn().unwrap();
    let run = setup.dir("run");
    wait_for("the last step", || {
        fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|m| m.contains("\"step\":200,"))
    });
    wait_for("a request", || door.first.lock().unwrap().is_some());
    let request = door.first.lock().unwrap().clone().unwrap();
    let (_, rest) = request.split_once("/checkpoints/").unwrap();
    let step = rest.split('/').next().unwrap();
    // All steps were made while the first file of a checkpoint waited, and the run has deleted the checkpoint meanwhile.
    wait_for("the rotation", || !run.join("checkpoints").join(step).exists());
    assert_eq!(moto.keys("runs", "a/checkpoints/"), [""; 0]);
    door.held.store(false, Ordering::SeqCst);
    let ran = ran(child);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stderr.is_empty(), "{ran:?}");
    assert!(ran.stdout.contains(&format!("uploaded s3://runs/a/checkpoints/{step}\n")), "{ran:?}");
    // Those that came and went meanwhile were passed over.
    let uploads = ran.stdout.matches("uploaded s3://runs/a/checkpoints/").count();
    assert!((2..=4).contains(&uploads), "{ran:?}");
    for step in checkpoints(&run) {
        is_copied(&moto, "a", &run, &format!("checkpoints/{step}"));
    }
    is_copied(&moto, "a", &run, "final");
    let there: BTreeSet<String> =
        moto.keys("runs", "a/checkpoints/").iter().map(|key| key.split('/').nth(2).unwrap().to_owned()).collect();
    assert_eq!(there, checkpoints(&run));
}
