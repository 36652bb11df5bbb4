//! The hub, against a small one inside the test: the requests that its client makes, errors, resume, the shared cache.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

mod apart;
mod fake_hub;

use fake_hub::{File, Hub, MAIN, Mood, OLD, Place, Request, is_input, names, noise};
use std::{fs, thread};
use tunesmith_files::Progress;
use tunesmith_hub::Settings;

const SMALL: &[File] = &[
    ("config.json", b"{\"model_type\": \"llama\"}"),
    ("tokenizer.json", b"{}"),
    ("tokenizer_config.json", b"{ }"),
    ("README.md", b"not for us"),
];

/// A tiny model at two commits; `v1/old` names the older.
fn tiny() -> Hub {
    let (new, old) = (noise(1, 300_000).leak() as &[u8], noise(2, 5000).leak() as &[u8]);
    let with = |weights| [SMALL, &[("model.safetensors", weights)]].concat().leak() as &[_];
    Hub::start(&[(MAIN, with(new)), (OLD, with(old))])
}

#[test]
fn a_model_is_fetched_once_into_the_layout_that_other_tools_use() {
    let mut hub = tiny();
    let place = Place::new(&hub);
    let mut events = Vec::new();
    let found = tunesmith_hub::resolve("hf:org/tiny", &place.settings, &mut |event: Progress<'_>| {
        events.push((event.what.to_owned(), event.done, event.total));
    })
    .unwrap();
    assert_eq!(found.origin, format!("hf:org/tiny@{MAIN}"));
    assert_eq!(found.path, place.repository().join("snapshots").join(MAIN));
    assert_eq!(names(&found.path), ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), noise(1, 300_000));
    assert_eq!(names(&place.repository().join("refs")), ["main"]);
    assert_eq!(fs::read_to_string(place.repository().join("refs/main")).unwrap(), MAIN);
    assert!(place.blob(&noise(1, 300_000)).is_file());
    #[cfg(unix)]
    assert!(fs::read_link(found.path.join("config.json")).unwrap().starts_with("../../blobs"));
    let last = events.iter().rfind(|event| event.0 == "org/tiny: model.safetensors").unwrap();
    assert_eq!((last.1, last.2), (300_000, Some(300_000)));
    assert!(hub.take_log().iter().all(|request| request.authorization.is_none()));

    // Once more, by name and by the pinned origin: without the hub, and offline.
    hub.stop();
    assert_eq!(place.resolve("hf:org/tiny").unwrap(), found);
    let offline = Settings { offline: true, ..place.settings.clone() };
    assert_eq!(tunesmith_hub::resolve(&found.origin, &offline, &mut |_| panic!("nothing to do")).unwrap(), found);
    is_input(&tunesmith_hub::resolve("hf:org/tiny@v2", &offline, &mut |_| {}).unwrap_err(), "the network is off");
    let error = place.resolve("hf:org/tiny@v2").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("cannot be reached") && error.to_string().contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn a_revision_is_another_snapshot_and_shares_equal_files() {
    let hub = tiny();
    let place = Place::new(&hub);
    place.resolve("hf:org/tiny").unwrap();
    hub.take_log();
    let old = place.resolve("hf:org/tiny@v1/old").unwrap();
    assert_eq!(old.origin, format!("hf:org/tiny@{OLD}"));
    assert_eq!(fs::read(old.path.join("model.safetensors")).unwrap(), noise(2, 5000));
    assert_eq!(fs::read(old.path.join("config.json")).unwrap(), SMALL[0].1);
    assert_eq!(fs::read_to_string(place.repository().join("refs/v1/old")).unwrap(), OLD);
    let log = hub.take_log();
    let whole = |request: &&Request| request.range.as_deref().is_some_and(|range| range != "bytes=0-0");
    assert!(log.iter().filter(whole).all(|request| request.line.contains("model.safetensors")), "{log:?}");
    assert_eq!(names(&place.repository().join("snapshots")), [MAIN, OLD]);
    // By commit: nothing named like it stays among the references, which other tools would show as a branch.
    let other = Place::new(&hub);
    assert_eq!(other.resolve(&format!("hf:org/tiny@{OLD}")).unwrap().origin, old.origin);
    assert!(names(&other.repository().join("refs")).is_empty());
    assert_eq!(other.resolve(&old.origin).unwrap().origin, old.origin);
}

#[test]
fn what_another_tool_fetched_is_used_as_it_is() {
    let mut hub = tiny();
    let place = Place::new(&hub);
    let snapshot = place.repository().join("snapshots").join(MAIN);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(place.repository().join("refs")).unwrap();
    fs::write(place.repository().join("refs/main"), MAIN).unwrap();
    for (name, bytes) in &SMALL[..2] {
        fs::write(snapshot.join(name), bytes).unwrap();
    }
    fs::create_dir_all(place.repository().join("blobs")).unwrap();
    fs::write(place.blob(&noise(1, 300_000)), noise(1, 300_000)).unwrap();
    // Not all is there: the rest is fetched, what is right stays, a blob without a pointer gets one.
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None);
    place.resolve("hf:org/tiny").unwrap();
    let log = hub.take_log();
    let whole: Vec<_> =
        log.iter().filter(|request| request.range.as_deref() == Some("bytes=0-")).map(|r| &r.line).collect();
    assert_eq!(whole.len(), 1, "{whole:?}");
    assert!(whole[0].contains("tokenizer_config.json"));
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), noise(1, 300_000));
    hub.stop();
    // Without this program's own list of files the snapshot is still enough.
    fs::remove_dir_all(&place.settings.cache).unwrap();
    assert_eq!(place.resolve("hf:org/tiny").unwrap().path, snapshot);
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None, "weights are missing");
}

#[test]
fn the_token_is_sent_and_its_absence_explained() {
    let hub = tiny();
    let mut place = Place::new(&hub);
    hub.mood(Mood::Private);
    let error = place.resolve("hf:org/tiny").unwrap_err();
    is_input(&error, "does not exist, or is private or gated");
    assert!(error.to_string().contains("set HF_TOKEN"), "{error}");
    hub.mood(Mood::Gated);
    is_input(&place.resolve("hf:org/tiny").unwrap_err(), "accept its terms at http://");
    place.settings.hf_token = Some("bad".to_owned());
    is_input(&place.resolve("hf:org/tiny").unwrap_err(), "no access (403)");
    hub.mood(Mood::Private);
    is_input(&place.resolve("hf:org/tiny").unwrap_err(), "does not accept the token");
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None);

    // The token of a login counts when the variable is not set.
    place.settings.hf_token = None;
    fs::create_dir_all(place.folder.path().join("hf")).unwrap();
    fs::write(&place.settings.hf_token_file, "good\n").unwrap();
    hub.take_log();
    place.resolve("hf:org/tiny").unwrap();
    let log = hub.take_log();
    let to_hub = log.iter().filter(|request| !request.line.contains("/large/"));
    assert!(to_hub.clone().count() > 4);
    assert!(to_hub.clone().all(|request| request.authorization.as_deref() == Some("Bearer good")), "{log:?}");
    let storage =
        log.iter().find(|request| request.line.contains("/large/") && request.range.as_deref() == Some("bytes=0-"));
    assert_eq!(
        storage.unwrap().authorization,
        None,
        "the bytes come from another machine, which must not learn the token"
    );
}

#[test]
fn what_is_not_there_is_said() {
    let hub = tiny();
    let place = Place::new(&hub);
    is_input(&place.resolve("hf:org/none").unwrap_err(), "no repository org/none with a revision main (404)");
    is_input(&place.resolve("hf:org/tiny@v9").unwrap_err(), "with a revision v9 (404)");
    is_input(&place.resolve("hf:org/tiny/x.gguf").unwrap_err(), "no file `x.gguf`; it has no .gguf file at all");
}

#[test]
fn a_gguf_file_is_chosen_by_name() {
    let (a, b) = (noise(3, 4000).leak() as &[u8], noise(4, 4000).leak() as &[u8]);
    let hub = Hub::start(&[(MAIN, &[("q4.gguf", a), ("sub/q8.gguf", b)]), (OLD, &[("q4.gguf", a)])]);
    let place = Place::new(&hub);
    is_input(
        &place.resolve("hf:org/tiny").unwrap_err(),
        "choose one, such as hf:org/tiny/q4.gguf; it has q4.gguf, sub/q8.gguf",
    );
    let found = place.resolve("hf:org/tiny/sub/q8.gguf").unwrap();
    assert_eq!(found.origin, format!("hf:org/tiny@{MAIN}/sub/q8.gguf"));
    assert_eq!(fs::read(&found.path).unwrap(), b);
    assert_eq!(place.resolve(&found.origin).unwrap(), found);
    // The only one needs no name, and the origin has it all the same.
    let found = place.resolve("hf:org/tiny@v1/old").unwrap();
    assert_eq!(found.origin, format!("hf:org/tiny@{OLD}/q4.gguf"));
    assert_eq!(fs::read(&found.path).unwrap(), a);
    assert_eq!(tunesmith_hub::cached("hf:org/tiny@v1/old", &place.settings).unwrap(), Some(found));
}

#[test]
fn shards_follow_from_the_index() {
    let index = br#"{"metadata": {}, "weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}"#;
    let files = [
        SMALL,
        &[
            ("model.safetensors.index.json", index as &[u8]),
            ("model-00001-of-00002.safetensors", b"first"),
            ("model-00002-of-00002.safetensors", b"second"),
            ("unused.safetensors", b"third"),
        ],
    ]
    .concat();
    let hub = Hub::start(&[(MAIN, &files)]);
    let place = Place::new(&hub);
    let found = place.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(found.path.join("model-00002-of-00002.safetensors")).unwrap(), b"second");
    assert!(!found.path.join("unused.safetensors").exists());
    fs::remove_dir_all(&place.settings.cache).unwrap();
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), Some(found.clone()));
    fs::remove_file(found.path.join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None);
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let hub = tiny();
    let place = Place::new(&hub);
    hub.mood(Mood::BreaksOff);
    let found = place.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), noise(1, 300_000));
    let ranges: Vec<_> = hub
        .take_log()
        .into_iter()
        .filter(|request| request.line.contains("/large/"))
        .filter_map(|request| request.range)
        .collect();
    assert!(ranges.contains(&"bytes=0-".to_owned()) && ranges.contains(&"bytes=1500-".to_owned()), "{ranges:?}");

    // The same over a restart: a part file is there, and only the rest is asked for.
    let other = Place::new(&hub);
    let blob = other.blob(&noise(1, 300_000));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(blob.with_extension("part"), &noise(1, 300_000)[..200_000]).unwrap();
    let found = other.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), noise(1, 300_000));
    let log = hub.take_log();
    assert!(log.iter().any(|request| request.range.as_deref() == Some("bytes=200000-")), "{log:?}");
    assert!(!names(&other.repository().join("blobs")).iter().any(|name| name.ends_with(".part")));

    // A part file with wrong bytes is noticed at the end, and the file fetched from the start.
    let third = Place::new(&hub);
    let blob = third.blob(&noise(1, 300_000));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(blob.with_extension("part"), [7; 1000]).unwrap();
    let found = third.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), noise(1, 300_000));
}

#[test]
fn wrong_bytes_never_count() {
    let hub = tiny();
    for mood in [Mood::Corrupts, Mood::Shortens] {
        let place = Place::new(&hub);
        hub.mood(mood);
        let error = place.resolve("hf:org/tiny").unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("with other bytes than the hub announced"), "{error}");
        assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None);
        assert!(!place.repository().join("snapshots").join(MAIN).join("model.safetensors").exists());
        hub.mood(Mood::Good);
        place.resolve("hf:org/tiny").unwrap();
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let hub = tiny();
    hub.mood(Mood::Busy);
    Place::new(&hub).resolve("hf:org/tiny").unwrap();
}

#[test]
fn a_damaged_cache_is_mended() {
    let hub = tiny();
    let place = Place::new(&hub);
    let found = place.resolve("hf:org/tiny").unwrap();
    let weights = found.path.join("model.safetensors");
    fs::write(place.blob(&noise(1, 300_000)), b"cut").unwrap();
    assert_eq!(tunesmith_hub::cached("hf:org/tiny", &place.settings).unwrap(), None);
    let offline = Settings { offline: true, ..place.settings.clone() };
    is_input(
        &tunesmith_hub::resolve("hf:org/tiny", &offline, &mut |_| {}).unwrap_err(),
        "not (or not completely) in the cache",
    );
    assert_eq!(place.resolve("hf:org/tiny").unwrap(), found);
    assert_eq!(fs::read(&weights).unwrap(), noise(1, 300_000));
    // The same size with other bytes, and a dangling pointer.
    let mut other = noise(1, 300_000);
    other[9] ^= 1;
    fs::write(place.blob(&noise(1, 300_000)), other).unwrap();
    place.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(&weights).unwrap(), noise(1, 300_000));
    fs::remove_file(place.blob(&noise(1, 300_000))).unwrap();
    place.resolve("hf:org/tiny").unwrap();
    assert_eq!(fs::read(&weights).unwrap(), noise(1, 300_000));
}

#[test]
fn two_that_fetch_at_once_fetch_once() {
    let hub = tiny();
    let place = Place::new(&hub);
    thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| place.resolve("hf:org/tiny").unwrap()));
        let [a, b] = both.map(|one| one.join().unwrap());
        assert_eq!(a, b);
    });
    let whole = |request: &Request| request.line.contains("/large/") && request.range.as_deref() == Some("bytes=0-");
    assert_eq!(hub.take_log().iter().filter(|request| whole(request)).count(), 1);
}
