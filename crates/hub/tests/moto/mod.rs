//! A real S3-compatible server for tests: moto, installed from PyPI once.

// Each test target uses a part of this.
#![allow(dead_code)]

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Until credentials are checked, moto asks for the form of a signature alone.
const OWNER: &str =
    "AWS4-HMAC-SHA256 Credential=who/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";

/// moto in a process of its own; killed at the end.
pub(crate) struct Moto {
    child: Child,
    port: u16,
    pub(crate) address: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    /// `None` where the network is off.
    pub(crate) fn start() -> Option<Self> {
        if std::env::var_os("TUNESMITH_OFFLINE").is_some() || std::env::var_os("HF_HUB_OFFLINE").is_some() {
            println!("skipped: TUNESMITH_OFFLINE (or HF_HUB_OFFLINE) is set, and this test installs moto");
            return None;
        }
        let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("moto-5.2.5");
        if !packages.is_dir() {
            // Whole or not at all, so that a test that was stopped leaves nothing that looks whole.
            let fresh = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let pip = Command::new("python3")
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"])
                .arg("--target")
                .arg(fresh.path())
                .args(["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"])
                .output()
                .unwrap();
            assert!(pip.status.success(), "{}", String::from_utf8_lossy(&pip.stderr));
            // A test beside this one may have been faster.
            fs::rename(fresh.keep(), &packages).or_else(|e| packages.is_dir().then_some(()).ok_or(e)).unwrap();
        }
        // A port that was free just now.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Some(Self::on(port))
    }

    /// A server on `port`, with nothing in it.
    pub(crate) fn on(port: u16) -> Self {
        let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("moto-5.2.5");
        let child = Command::new("python3")
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .env("PYTHONPATH", &packages)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moto = Self { child, port, address: format!("http://127.0.0.1:{port}") };
        let since = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(since.elapsed() < Duration::from_secs(120), "moto does not start");
            thread::sleep(Duration::from_millis(50));
        }
        moto
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends the server; the port it had.
    pub(crate) fn stop(self) -> u16 {
        self.port
    }

    /// An object, if it is there.
    pub(crate) fn get(&self, path: &str) -> Option<Vec<u8>> {
        let answer = ureq::get(format!("{}/{path}", self.address)).header("Authorization", OWNER).call();
        answer.ok()?.body_mut().with_config().limit(1 << 30).read_to_vec().ok()
    }

    /// The keys of a bucket below a prefix.
    pub(crate) fn keys(&self, bucket: &str, prefix: &str) -> Vec<String> {
        let list = self.get(&format!("{bucket}?list-type=2&prefix={prefix}")).unwrap();
        let list = String::from_utf8(list).unwrap();
        list.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap().to_owned()).collect()
    }

    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        ureq::put(format!("{}/{path}", self.address)).header("Authorization", OWNER).send(bytes).unwrap();
    }

    pub(crate) fn delete(&self, path: &str) {
        ureq::delete(format!("{}/{path}", self.address)).header("Authorization", OWNER).call().unwrap();
    }

    /// From now on credentials are checked, and nobody has any.
    pub(crate) fn lock(&self) {
        ureq::post(format!("{}/moto-api/reset-auth", self.address)).send("0").unwrap();
    }

    pub(crate) fn variables(&self) -> Vec<(&str, &str)> {
        vec![
            ("AWS_ENDPOINT_URL", self.address.as_str()),
            ("AWS_ACCESS_KEY_ID", "who"),
            ("AWS_SECRET_ACCESS_KEY", "ever"),
            ("AWS_REGION", "us-east-1"),
        ]
    }
}
