//! Data sets of the hub: a repository as `datasets` writes it (`fixtures/hub-dataset/make.py`), from the name to tokens.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

mod apart;
mod fake_hub;

use fake_hub::{File, Hub, MAIN, Mood, OLD, Place, is_input};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tunesmith_files::Result;
use tunesmith_hub::Settings;

const FILES: [&str; 5] = [
    "README.md",
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/validation-00000-of-00001.parquet",
    "fr/train-00000-of-00001.parquet",
];

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hub-dataset").join(name)).unwrap()
}

fn hub() -> Hub {
    let files: Vec<File> = FILES.iter().map(|name| (*name, &*fixture(name).leak())).collect();
    // An earlier commit has rows in one file and no card.
    Hub::start(&[(MAIN, &files), (OLD, &[("rows.jsonl", b"{\"text\": \"old\"}\n")])])
}

fn data_files(spec: &str, split: &str, settings: &Settings) -> Result<Vec<PathBuf>> {
    tunesmith_hub::data_files(spec, split, settings, &mut |_| {})
}

fn names(files: &[PathBuf]) -> Vec<String> {
    files
        .iter()
        .map(|file| {
            let parts: Vec<_> = file.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
            format!("{}/{}", parts[1], parts[0])
        })
        .collect()
}

#[test]
fn splits_and_configurations_are_files_in_the_shared_cache() {
    let mut hub = hub();
    let place = Place::new(&hub);
    let train = data_files("hf:datasets/org/tiny", "train", &place.settings).unwrap();
    assert_eq!(names(&train), FILES[1..3]);
    assert!(train[0].starts_with(place.settings.hf_cache.join("datasets--org--tiny/snapshots").join(MAIN)));
    assert_eq!(fs::read(&train[1]).unwrap(), fixture(FILES[2]));
    let asked = hub.take_log();
    assert!(asked.iter().all(|request| !request.line.contains("validation") && !request.line.contains("/fr/")));
    let of = |query: &str, split: &str| {
        data_files(&format!("hf:datasets/org/tiny{query}"), split, &place.settings).map(|files| names(&files))
    };
    assert_eq!(of("", "validation").unwrap(), FILES[3..4]);
    assert_eq!(of("?split=validation", "train").unwrap(), FILES[3..4]);
    assert_eq!(of("?config=fr", "train").unwrap(), FILES[4..]);
    assert_eq!(of(&format!("@{OLD}"), "train").unwrap().len(), 1);
    assert_eq!(of("@v1/old", "train").unwrap().len(), 1);
    is_input(&of("", "test").unwrap_err(), "no split `test` of configuration `default`");
    is_input(&of("?config=es", "train").unwrap_err(), "the data set has default, fr");
    is_input(&of("@none", "train").unwrap_err(), "no repository org/tiny with a revision none");
    is_input(&place.resolve("hf:datasets/org/tiny").unwrap_err(), "is a data set; give it in data.train");

    // Without the hub, and offline.
    hub.stop();
    assert_eq!(of("", "train").unwrap(), FILES[1..3]);
    let offline = Settings { offline: true, ..place.settings.clone() };
    assert_eq!(data_files("hf:datasets/org/tiny?config=fr", "train", &offline).unwrap().len(), 1);
    is_input(&data_files("hf:datasets/org/tiny@v9", "train", &offline).unwrap_err(), "the network is off");
}

#[test]
fn a_private_data_set_names_its_own_page() {
    let hub = hub();
    let place = Place::new(&hub);
    hub.mood(Mood::Private);
    let error = data_files("hf:datasets/org/tiny", "train", &place.settings).unwrap_err();
    is_input(&error, "/datasets/org/tiny, then set HF_TOKEN");
}
