use super::*;
use crate::{
    Balance, OnBadRow, Overlong, Preference, Preferences, PreparedSplit, Reason, Same, Step, TextRows, TrainOn,
    fixture::{chatml, tokenizer},
};
use std::{fs, path::PathBuf};

struct Bench {
    folder: tempfile::TempDir,
    options: PrepareOptions,
}

impl Bench {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bench = Self { folder, options: PrepareOptions { max_length: 32, ..PrepareOptions::default() } };
        for (name, content) in files {
            fs::write(bench.path(name), content).unwrap();
        }
        Self { options: PrepareOptions { train: vec![bench.place(files[0].0)], ..bench.options.clone() }, ..bench }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn place(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn run(&self) -> Result<Report> {
        prepare(&self.path("out"), &self.options, &tokenizer(), Some(&chatml()), &mut |_| ())
    }

    fn refusal(&self) -> String {
        let error = self.run().unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error:?}");
        error.to_string()
    }

    fn texts(&self, split: Split) -> Vec<String> {
        let shard = PreparedSplit::open(&self.path("out"), split).unwrap();
        let mut texts = Vec::new();
        for index in 0..shard.len() {
            let block = shard.block(index).unwrap();
            assert!(block.ids.len() <= shard.max_length());
            let mut ids = &block.ids[..];
            for length in &block.lengths {
                let (document, rest) = ids.split_at(*length);
                texts.push(tokenizer().decode(document, false).unwrap());
                ids = rest;
            }
        }
        texts.sort();
        texts
    }
}

fn lines(count: usize) -> String {
    (0..count).map(|i| format!("{{\"text\": \"row {i}\"}}\n")).collect()
}

#[test]
fn rows_reach_the_blocks_once_with_their_places() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(200))]);
    (bench.options.validation_fraction, bench.options.test_fraction) = (0.2, 0.1);
    let mut steps = Vec::new();
    let report = prepare(&bench.path("out"), &bench.options, &tokenizer(), None, &mut |step| steps.push(step)).unwrap();
    let mut all: Vec<_> = Split::ALL.into_iter().flat_map(|split| bench.texts(split)).collect();
    all.sort();
    let mut expected: Vec<_> = (0..200).map(|i| format!("row {i}<|im_end|>")).collect();
    expected.sort();
    assert_eq!(all, expected);
    assert_eq!(Split::ALL.map(|split| report.split(split).counts.rows).iter().sum::<usize>(), 200);
    assert!((20..60).contains(&report.validation.documents) && (5..40).contains(&report.test.documents));
    assert!(!report.reused && report.key.len() == 64);
    assert!(steps.contains(&PrepareProgress::Reading { files_done: 1, files: 1 }));
    let bytes = fs::metadata(bench.path("d.jsonl")).unwrap().len();
    assert!(steps.contains(&PrepareProgress::Scanning { bytes_done: bytes, bytes }));
    assert!(matches!(steps.last(), Some(PrepareProgress::Tokenizing { bytes_done, .. }) if *bytes_done == bytes));
    let shard = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap();
    let (mut tokens, mut trained, mut bytes) = (0, 0, 0);
    for index in 0..shard.len() {
        let block = shard.block(index).unwrap();
        tokens += block.ids.len();
        trained += block.num_trained();
        bytes += block.bytes.iter().sum::<usize>();
        let mut start = 0;
        for (length, source) in block.lengths.iter().zip(&block.sources) {
            assert!(!block.trained[start], "the first token of a document is no label");
            let text = tokenizer().decode(&block.ids[start..start + length], true).unwrap();
            assert_eq!(text, format!("row {}", source.line - 1));
            assert_eq!(&*source.file, bench.place("d.jsonl"));
            start += length;
        }
    }
    let part = &report.train;
    assert_eq!((tokens, trained, bytes, shard.len()), (part.tokens, part.trained_tokens, part.bytes, part.blocks));
    assert_eq!(shard.num_tokens() as usize, tokens);
}

#[test]
fn the_same_data_is_prepared_once() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(20)), ("e.jsonl", &lines(3))]);
    let first = bench.run().unwrap();
    let second = bench.run().unwrap();
    assert!(!first.reused && second.reused);
    assert_eq!(Report { reused: false, ..second }, first);
    // Whatever the blocks follow from makes new ones.
    bench.options.packing = false;
    let unpacked = bench.run().unwrap();
    assert!(!unpacked.reused && unpacked.train.blocks == unpacked.train.documents);
    assert!(unpacked.train.blocks > first.train.blocks);
    fs::write(bench.path("d.jsonl"), lines(21)).unwrap();
    assert!(!bench.run().unwrap().reused);
    let out = bench.path("out");
    let no_template = prepare(&out, &bench.options, &tokenizer(), None, &mut |_| ()).unwrap();
    assert!(!no_template.reused);
    // A damaged file is noticed.
    let shard = out.join("train.shard");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last / 2] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let again = prepare(&out, &bench.options, &tokenizer(), None, &mut |_| ()).unwrap();
    assert!(!again.reused);
    fs::remove_file(&shard).unwrap();
    assert!(!prepare(&out, &bench.options, &tokenizer(), None, &mut |_| ()).unwrap().reused);
    fs::write(out.join(REPORT), "{").unwrap();
    assert!(!prepare(&out, &bench.options, &tokenizer(), None, &mut |_| ()).unwrap().reused);
}

#[test]
fn rows_added_later_move_no_other_row() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(100))]);
    bench.options.validation_fraction = 0.3;
    bench.run().unwrap();
    let before = bench.texts(Split::Validation);
    fs::write(bench.path("d.jsonl"), format!("{{\"text\": \"new\"}}\n{}", lines(100))).unwrap();
    bench.run().unwrap();
    let after: Vec<_> = bench.texts(Split::Validation).into_iter().filter(|text| text != "new<|im_end|>").collect();
    assert_eq!(before, after);
}

#[test]
fn files_of_their_own_replace_the_fractions() {
    let mut bench = Bench::new(&[("d.txt", "one\n\ntwo\n"), ("v.jsonl", &lines(3))]);
    bench.options.validation = vec![bench.place("v.jsonl")];
    bench.options.validation_fraction = 0.9;
    bench.options.text_rows = TextRows::Line;
    let report = bench.run().unwrap();
    assert_eq!((report.train.counts.rows, report.validation.counts.rows, report.test.counts.rows), (2, 3, 0));
    assert_eq!(bench.texts(Split::Train), ["one<|im_end|>", "two<|im_end|>"]);
    assert!(PreparedSplit::open(&bench.path("out"), Split::Test).unwrap().is_empty());
    bench.options.test = vec![bench.place("d.txt")];
    assert!(bench.refusal().contains("is given for train and for test"));
}

#[test]
fn conversations_and_long_rows_are_counted() {
    let row = |answer: &str| format!("{{\"instruction\": \"he\", \"output\": \"{answer}\"}}\n");
    let mut bench = Bench::new(&[("d.jsonl", &(row("ll") + &row(&"z".repeat(100))))]);
    bench.options.max_length = 64;
    bench.options.validation_fraction = 0.0;
    let report = bench.run().unwrap();
    let counts = report.train.counts;
    assert_eq!((counts.rows, counts.overlong_rows, counts.truncated_rows, counts.turns_without_end), (2, 1, 1, 0));
    assert!(counts.tokens_lost > 50 && counts.longest_row > 120);
    bench.options.overlong = Overlong::Drop;
    assert_eq!(bench.run().unwrap().train.documents, 1);
    bench.options.train_on = TrainOn::All;
    let all = bench.run().unwrap();
    assert_eq!(all.train.trained_tokens, all.train.tokens - 1);
    bench.options.max_length = 4;
    assert!(bench.refusal().contains("all 2 rows") && bench.refusal().contains("max_length 4"));
}

#[test]
fn wrong_data_is_named_and_the_old_folder_stays() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(20))]);
    let report = bench.run().unwrap();
    fs::write(bench.path("d.jsonl"), format!("{}{{\"text\": \"\"}}\n{{\"text\": \"\"}}\n", lines(50))).unwrap();
    bench.options.validation_fraction = 0.0;
    assert!(bench.refusal().contains("d.jsonl, line 51: nothing in this row is trained"));
    assert_eq!(Report::read(&bench.path("out")).unwrap().key, report.key);
    fs::write(bench.path("d.jsonl"), "\n").unwrap();
    assert!(bench.refusal().contains("no rows: the data in"));
    fs::write(bench.path("d.jsonl"), lines(1)).unwrap();
    bench.options.validation_fraction = 0.999_999;
    assert!(bench.refusal().contains("nothing is left to train on: all 1 rows"));
    bench.options.max_length = 0;
    assert!(bench.refusal().contains("max_length is 0"));
}

#[test]
fn a_folder_of_mixed_origin_is_refused() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(20))]);
    bench.run().unwrap();
    let old = fs::read(bench.path("out/train.shard")).unwrap();
    bench.options.split_seed = 9;
    bench.run().unwrap();
    fs::write(bench.path("out/train.shard"), old).unwrap();
    let error = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap_err().to_string();
    assert!(error.contains("belongs to other data") && error.ends_with("prepare the data again"), "{error}");
    let error = PreparedSplit::open(&bench.path("none"), Split::Train).unwrap_err().to_string();
    assert!(error.contains("prepared.json: no such file"), "{error}");
    let text = fs::read_to_string(bench.path("out/prepared.json")).unwrap();
    fs::write(
        bench.path("out/prepared.json"),
        text.replacen(&format!("\"format_version\": {}", FORMAT_VERSION), "\"format_version\": 7", 1),
    )
    .unwrap();
    assert!(Report::read(&bench.path("out")).unwrap_err().to_string().contains("format version 7"));
}

#[test]
fn mixed_rows_are_an_error_or_the_rare_ones_are_left_out() {
    let data = "{\"prompt\": \"p\", \"completion\": \"c\"}\n{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    let mut bench = Bench::new(&[("d.jsonl", data)]);
    bench.options.validation_fraction = 0.0;
    let text = bench.refusal();
    assert!(text.contains("d.jsonl, line 1: ") && text.contains("2 of text: text (first: 2)"), "{text}");
    bench.options.on_bad_row = OnBadRow::Skip;
    let report = bench.run().unwrap();
    assert_eq!((report.train.documents, report.rejected_rows, report.files[0].bad_rows), (2, 1, 1));
    assert_eq!(report.files[0].format, Some(crate::RowFormat::Text));
}

#[test]
fn rows_that_cannot_be_used_are_counted_and_kept_aside() {
    let data = [
        r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"messages": 5, "id": 1}"#,
        "nonsense",
        r#"{"messages": [{"role": "user", "content": "u"}], "id": "two"}"#,
    ];
    let mut bench = Bench::new(&[("d.jsonl", &data.join("\n"))]);
    (bench.options.validation_fraction, bench.options.max_length) = (0.0, 128);
    assert!(bench.refusal().contains("d.jsonl, line 2: \"messages\" must be a list of messages"));
    bench.options.on_bad_row = OnBadRow::Skip;
    let report = bench.run().unwrap();
    assert_eq!((report.train.counts.rows, report.train.documents, report.rejected_rows), (1, 1, 3));
    let file = &report.files[0];
    assert_eq!((file.rows, file.bad_rows), (4, 2));
    assert_eq!(file.keys["id"].rows, 2);
    assert_eq!(file.keys["id"].types.iter().collect::<Vec<_>>(), ["a number", "a string"]);
    assert_eq!(report, Report { reused: false, ..Report::read(&bench.path("out")).unwrap() });
    let rejects = fs::read_to_string(bench.path("out/rejects.jsonl")).unwrap();
    let rejects: Vec<serde_json::Value> = rejects.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lines: Vec<_> = rejects.iter().map(|r| (r["line"].as_u64().unwrap(), r["row"].as_str().unwrap())).collect();
    assert_eq!(lines, [(2, data[1]), (3, data[2]), (4, data[3])]);
    assert!(rejects[2]["error"].as_str().unwrap().starts_with("nothing in this row is trained"), "{rejects:?}");
    // The next preparation has none, and says so.
    fs::write(bench.path("d.jsonl"), data[0]).unwrap();
    assert_eq!(bench.run().unwrap().rejected_rows, 0);
    assert!(!bench.path("out/rejects.jsonl").exists());
    fs::write(bench.path("d.jsonl"), data[1]).unwrap();
    assert!(bench.refusal().contains("can be used; 1 were rejected"));
}

#[test]
fn the_better_answers_are_trained_on_when_asked() {
    let data = "{\"prompt\": \"he\", \"completion\": \"ll\", \"label\": true}\n\
                {\"prompt\": \"he\", \"completion\": \"xx\", \"label\": false}\n";
    let mut bench =
        Bench::new(&[("d.jsonl", data), ("p.jsonl", r#"{"prompt": "he", "chosen": "yy", "rejected": "z"}"#)]);
    bench.options.train.push(bench.place("p.jsonl"));
    bench.options.validation_fraction = 0.0;
    assert!(bench.refusal().contains("line 1: these rows hold answers that are preferred"));
    bench.options.preferences = Preferences::Chosen;
    let report = bench.run().unwrap();
    assert_eq!((report.train.counts.rows, report.train.counts.undesirable_rows, report.train.documents), (3, 1, 2));
    assert_eq!(bench.texts(Split::Train), ["hell<|im_end|>", "heyy<|im_end|>"]);
    fs::write(bench.path("d.jsonl"), "{\"text\": \"he\", \"label\": 1}\n").unwrap();
    assert!(bench.refusal().contains("these rows hold a text and its class"));
    bench.options.template = Some("{text}:".into());
    bench.options.train.pop();
    bench.run().unwrap();
    assert_eq!(bench.texts(Split::Train), ["he: 1<|im_end|>"]);
}

#[test]
fn cleaning_is_counted_and_reaches_the_tokens() {
    let data = ["cafÃ© one two three", "cafÃ© one two three", "hi", "<b>he</b> mail a@b.de"]
        .map(|text| serde_json::json!({ "text": text }).to_string());
    let mut bench = Bench::new(&[("d.jsonl", &data.join("\n"))]);
    bench.options.validation_fraction = 0.0;
    let clean = &mut bench.options.clean;
    (clean.mojibake, clean.html, clean.mask_emails, clean.min_chars, clean.duplicates) =
        (true, true, true, 3, Same::Exact);
    let report = bench.run().unwrap();
    assert_eq!(bench.texts(Split::Train), ["café one two three<|im_end|>", "he mail [EMAIL]<|im_end|>"]);
    let changed = [(Step::Mojibake, 2), (Step::Html, 1), (Step::MaskEmails, 1)];
    assert_eq!(report.clean.changed, changed.into());
    assert_eq!(report.clean.removed, [(Reason::TooShort, 1), (Reason::Duplicate, 1)].into());
    assert_eq!(report.train.counts.rows, 2);
    bench.options.clean.min_chars = 100;
    assert!(bench.refusal().contains("no row of") && bench.refusal().contains("4 shorter than clean.min_chars"));
}

#[test]
fn held_out_rows_do_not_leak_into_training() {
    let words = |from: usize| (0..60).map(|i| format!("w{} ", if i < from { i } else { 100 + i })).collect::<String>();
    let text = |text: &str| serde_json::json!({ "text": text }).to_string();
    let train = [text("Same text!"), text(&words(58)), text(&words(0)), text("Same text!")].join("\n");
    let held_out = [text("same  TEXT"), text(&words(60))].join("\n");
    let mut bench = Bench::new(&[("d.jsonl", &train), ("v.jsonl", &held_out)]);
    bench.options.validation = vec![bench.place("v.jsonl")];
    bench.options.max_length = 1024;
    let run = |bench: &Bench| {
        let report = bench.run().unwrap();
        (report.train.counts.rows, report.validation.counts.rows, report.clean.removed)
    };
    assert_eq!(run(&bench), (2, 2, [(Reason::Leak, 2)].into()), "exact is the default");
    bench.options.clean.leakage = Same::Near;
    assert_eq!(run(&bench), (1, 2, [(Reason::Leak, 2), (Reason::NearLeak, 1)].into()));
    bench.options.clean.leakage = Same::Keep;
    assert_eq!(run(&bench), (4, 2, [].into()));
    bench.options.clean.duplicates = Same::Exact;
    assert_eq!(run(&bench), (3, 2, [(Reason::Duplicate, 1)].into()));
    bench.options.validation = vec![];
    fs::write(bench.path("d.jsonl"), [text(&words(58)), text(&words(60)), text(&words(0))].join("\n")).unwrap();
    (bench.options.validation_fraction, bench.options.clean.duplicates) = (0.0, Same::Near);
    assert_eq!(run(&bench), (2, 0, [(Reason::NearDuplicate, 1)].into()));
}

#[test]
fn a_licence_in_rows_of_its_own_is_cut() {
    let book = "Header\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\nOne\n\nTwo\n\n\
                *** END OF THE PROJECT GUTENBERG EBOOK X ***\n\nLicence\n";
    let mut bench = Bench::new(&[("d.txt", book)]);
    bench.options.validation_fraction = 0.0;
    bench.options.clean.gutenberg = true;
    for (rows, expected) in
        [(TextRows::Paragraph, &["One<|im_end|>", "Two<|im_end|>"][..]), (TextRows::File, &["One\n\nTwo<|im_end|>"])]
    {
        bench.options.text_rows = rows;
        let report = bench.run().unwrap();
        assert_eq!(bench.texts(Split::Train), expected);
        let removed = report.clean.removed.values().sum::<usize>();
        assert_eq!(removed, if rows == TextRows::File { 0 } else { 4 }, "{:?}", report.clean);
    }
}

#[test]
fn groups_stay_together_and_values_are_shared_out() {
    let rows: String = (0..400)
        .map(|i| {
            let label = if i % 10 == 0 { "rare" } else { "common" };
            format!("{{\"text\": \"row {i}\", \"author\": {}, \"label\": \"{label}\"}}\n", i % 40)
        })
        .collect();
    let mut bench = Bench::new(&[("d.jsonl", &rows)]);
    (bench.options.validation_fraction, bench.options.test_fraction) = (0.2, 0.1);
    bench.options.row_format = Some(crate::RowFormat::Text);
    bench.options.group_by = Some("author".into());
    let report = bench.run().unwrap();
    assert_eq!(Split::ALL.map(|split| report.split(split).groups).iter().sum::<usize>(), 40, "no author on two sides");
    assert_eq!(Split::ALL.map(|split| report.split(split).counts.rows % 10), [0; 3]);
    assert!(report.validation.groups > 0);
    bench.options.group_by = None;
    bench.options.stratify_by = Some("label".into());
    let report = bench.run().unwrap();
    let values = |common: usize, rare: usize| [("common".to_owned(), common), ("rare".to_owned(), rare)].into();
    assert_eq!(report.train.values, values(252, 28));
    assert_eq!(report.validation.values, values(72, 8));
    assert_eq!(report.test.values, values(36, 4));
    bench.options.stratify_by = Some("lable".into());
    let text = bench.refusal();
    assert!(text.contains("line 1: there is no \"lable\", which stratify_by names; the keys are \"text\""), "{text}");
}

#[test]
fn archives_are_read_like_folders_and_packed_rows_are_named() {
    let mut bench = Bench::new(&[("a.jsonl", &lines(3)), ("b.csv", "text\nthe he\n")]);
    let zip = bench.path("data.zip");
    let pack = |second: &str| {
        let mut writer = zip::ZipWriter::new(fs::File::create(&zip).unwrap());
        for (name, content) in [("sub/a.jsonl", &lines(3)[..]), ("b.csv", second), ("notes.md", "no data")] {
            writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(content.as_bytes()).unwrap();
        }
        writer.finish().unwrap();
    };
    pack("text\nthe he\n");
    bench.options.validation_fraction = 0.0;
    bench.options.train = vec![bench.place("b.csv"), bench.place("a.jsonl")];
    let loose = bench.run().unwrap();
    let texts = bench.texts(Split::Train);
    bench.options.train = vec![bench.place("data.zip")];
    let packed = bench.run().unwrap();
    assert_ne!(packed.key, loose.key);
    assert_eq!(bench.texts(Split::Train), texts);
    assert_eq!(packed.files.iter().map(|file| file.rows).collect::<Vec<_>>(), [1, 3]);
    assert!(packed.files[1].file.ends_with("data.zip/sub/a.jsonl"));
    assert_eq!(packed.encoder, Report::BULK);
    pack("text\nthe,he\n");
    assert!(bench.refusal().contains("data.zip/b.csv, line 2: 2 fields"));
    bench.options.validation = vec![bench.place("data.zip")];
    assert!(bench.refusal().contains("data.zip/b.csv is given for train and for validation"));
}

/// 30 rows, every fifth of label "b", whose text is longer.
fn two_labels() -> Bench {
    let row = |i| match i % 5 {
        0 => format!("{{\"text\": \"row number {i}\", \"label\": \"b\"}}\n"),
        _ => format!("{{\"text\": \"r {i}\", \"label\": \"a\"}}\n"),
    };
    let mut bench = Bench::new(&[("d.jsonl", &(0..30).map(row).collect::<String>())]);
    bench.options.row_format = Some(crate::RowFormat::Text);
    bench.options.validation_fraction = 0.0;
    bench
}

#[test]
fn labels_are_counted_without_being_asked_for() {
    let mut bench = two_labels();
    let report = bench.run().unwrap();
    assert_eq!(report.train.values, [("a".to_owned(), 24), ("b".to_owned(), 6)].into());
    assert!(report.warnings().is_empty() && report.balance.is_empty());
    let rows = "{\"text\": \"x\", \"label\": \"rare\"}\n".to_owned()
        + &(0..11).map(|i| format!("{{\"text\": \"r {i}\", \"label\": 7}}\n")).collect::<String>();
    fs::write(bench.path("d.jsonl"), rows).unwrap();
    let warnings = bench.run().unwrap().warnings();
    assert!(warnings[0].starts_with("7 has 11 rows to train on and rare only 1"), "{warnings:?}");
    // Half of what is held out is of a label that is never trained.
    fs::write(bench.path("v.jsonl"), "{\"text\": \"y\", \"label\": \"other\"}\n{\"text\": \"z\"}\n").unwrap();
    bench.options.validation = vec![bench.place("v.jsonl")];
    let warnings = bench.run().unwrap().warnings();
    assert_eq!(warnings[1], "validation has rows of other, which no row to train on is of");
    bench.options.group_by = Some("label".into());
    fs::write(bench.path("v.jsonl"), "{\"text\": \"y\", \"label\": \"other\"}\n").unwrap();
    let report = bench.run().unwrap();
    assert_eq!((report.train.groups, report.train.largest_group), (2, 11));
    assert!(report.warnings()[2].starts_with("one of 2 groups has 11 of 12 rows"), "{:?}", report.warnings());
}

#[test]
fn training_rows_are_balanced_and_held_out_ones_are_not() {
    let mut bench = two_labels();
    fs::copy(bench.path("d.jsonl"), bench.path("v.jsonl")).unwrap();
    bench.options.validation = vec![bench.place("v.jsonl")];
    bench.options.clean.leakage = Same::Keep;
    let plain = bench.run().unwrap();
    let count = |bench: &Bench, split, what: &str| bench.texts(split).iter().filter(|text| text.contains(what)).count();

    bench.options.balance = Balance::Oversample;
    let over = bench.run().unwrap();
    assert_eq!((count(&bench, Split::Train, "number"), over.train.documents), (24, 48));
    assert_eq!(over.train.counts.rows, 30, "rows are counted once");
    assert!(bench.texts(Split::Train).iter().all(|text| {
        let copies = count(&bench, Split::Train, text);
        copies == if text.contains("number") { 4 } else { 1 }
    }));
    assert_eq!(over.balance["b"], crate::Balanced { rows: 6, drawn: 24, weight: 1.0 });
    assert_eq!((over.validation.documents, &over.train.values), (30, &plain.train.values));
    // Copies of a row do not share a block when that can be helped.
    let shard = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap();
    let mut twice = 0;
    for index in 0..shard.len() {
        let mut sources: Vec<usize> = shard.block(index).unwrap().sources.iter().map(|source| source.line).collect();
        let all = sources.len();
        sources.sort_unstable();
        sources.dedup();
        twice += all - sources.len();
    }
    assert!(twice <= 12, "{twice}");

    bench.options.balance = Balance::Undersample;
    let under = bench.run().unwrap();
    assert_eq!((count(&bench, Split::Train, "number"), under.train.documents), (6, 12));
    assert_eq!((under.clean.removed[&Reason::Balance], under.validation.documents), (18, 30));
    let first = bench.texts(Split::Train);
    bench.options.balance_seed = 1;
    bench.run().unwrap();
    assert_ne!(bench.texts(Split::Train), first, "another seed draws other rows");

    bench.options.balance = Balance::LossWeight;
    bench.options.balance_target = [("a".to_owned(), 3.0), ("b".to_owned(), 1.0)].into();
    let weighted = bench.run().unwrap();
    assert_eq!((weighted.train.documents, weighted.train.weighted_tokens), (30, 0));
    assert_eq!((weighted.balance["a"].weight, weighted.balance["b"].weight), (0.9375, 1.25));
    let shard = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap();
    for index in 0..shard.len() {
        let block = shard.block(index).unwrap();
        let mut start = 0;
        for (length, source) in block.lengths.iter().zip(&block.sources) {
            let weight = if source.line % 5 == 1 { 1.25 } else { 0.9375 };
            let rows = start..start + length;
            for (trained, found) in block.trained[rows.clone()].iter().zip(&block.weights[rows]) {
                assert_eq!(*found, if *trained { weight } else { 0.0 });
            }
            start += length;
        }
    }
    let held_out = PreparedSplit::open(&bench.path("out"), Split::Validation).unwrap();
    assert!(held_out.block(0).unwrap().weights.is_empty());

    bench.options.balance_target.insert("c".into(), 1.0);
    assert!(bench.refusal().contains("names \"c\", but no row to train on has it"));
    bench.options.balance_by = Some("lable".into());
    assert!(bench.refusal().contains("line 1: there is no \"lable\", which balance_by names"));
}

#[test]
fn data_sets_are_mixed_each_with_its_own_mapping() {
    let reviews: String = (0..40).map(|i| format!("{{\"body\": \"review {i}\", \"stars\": {i}}}\n")).collect();
    let mut bench = Bench::new(&[("d.jsonl", &lines(100)), ("r.jsonl", &reviews), ("v.jsonl", &lines(3))]);
    let source = |name: &str, file: &str| crate::DataSource {
        name: name.into(),
        train: vec![bench.place(file)],
        ..crate::DataSource::default()
    };
    let mut sources = vec![source("plain", "d.jsonl"), source("reviews", "r.jsonl")];
    (sources[0].validation, sources[0].weight) = (vec![bench.place("v.jsonl")], 2.0);
    (sources[1].template, sources[1].completion) = (Some("{body}:".into()), Some(" {stars}".into()));
    sources[1].prompt_loss_weight = Some(0.5);
    bench.options.train = Vec::new();
    (bench.options.sources, bench.options.validation_fraction, bench.options.clean.leakage) =
        (sources, 0.25, Same::Keep);
    let report = bench.run().unwrap();
    let [plain, reviews] = &report.sources[..] else { panic!("{:?}", report.sources) };
    assert_eq!((plain.rows, report.validation.counts.rows - 3 + reviews.rows), (100, 40));
    assert!(report.validation.counts.rows > 6, "a fraction of the reviews, beside the file of the others");
    assert_eq!(plain.tokens + reviews.tokens, report.train.tokens);
    assert_eq!(plain.blocks + reviews.blocks, report.train.blocks);
    let epoch = plain.blocks_per_epoch + reviews.blocks_per_epoch;
    assert!(epoch.abs_diff(report.train.blocks) <= 1 && plain.blocks_per_epoch > plain.blocks);
    // No block holds both, and the weights are those of the source.
    let shard = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap();
    assert_eq!(shard.sources(), report.sources);
    for index in 0..shard.len() {
        let block = shard.block(index).unwrap();
        let file = if index < plain.blocks { "d.jsonl" } else { "r.jsonl" };
        assert!(block.sources.iter().all(|source| source.file.ends_with(file)), "{index}");
        let halves = block.weights.iter().filter(|weight| **weight == 0.5).count();
        assert_eq!(halves > 0, index >= plain.blocks);
    }
    let texts = bench.texts(Split::Train);
    let filled: Vec<&str> = texts.iter().filter_map(|text| text.strip_prefix("review ")).collect();
    assert_eq!(filled.len(), reviews.rows);
    for text in filled {
        let (number, stars) = text.strip_suffix("<|im_end|>").unwrap().split_once(": ").unwrap();
        assert_eq!(number, stars);
    }
    // Balance goes over all of them, and copies stay with their source.
    bench.options.balance = Balance::Oversample;
    bench.options.balance_by = Some("kind".into());
    for (name, kind) in [("d.jsonl", "x"), ("r.jsonl", "y")] {
        let text = fs::read_to_string(bench.path(name)).unwrap();
        fs::write(bench.path(name), text.replace('}', &format!(", \"kind\": \"{kind}\"}}"))).unwrap();
    }
    fs::write(bench.path("v.jsonl"), "{\"text\": \"v\", \"kind\": \"x\"}\n").unwrap();
    let balanced = bench.run().unwrap();
    assert_eq!((balanced.sources[0].rows, balanced.sources[0].documents), (100, 100));
    assert_eq!((balanced.sources[1].rows, balanced.sources[1].documents), (reviews.rows, 100));
    let again = bench.place("d.jsonl");
    bench.options.sources[1].train.push(again);
    assert!(bench.refusal().contains("is given in two sources"));
}

#[test]
fn both_sides_of_a_preference_are_kept_for_whoever_trains_on_them() {
    let pair = |i: usize, chosen: &str| {
        let [user, chosen, rejected] =
            [("user", format!("question {i}")), ("assistant", chosen.to_owned()), ("assistant", "nope".to_owned())]
                .map(|(role, content)| serde_json::json!({"role": role, "content": content}));
        serde_json::json!({"prompt": [user], "chosen": [chosen], "rejected": [rejected]}).to_string()
    };
    let pairs: Vec<String> = (0..30).map(|i| pair(i, &"ab".repeat(i % 5 + 1))).collect();
    let judged = "{\"prompt\": \"a\", \"completion\": \"ll\", \"label\": true}\n\
                  {\"prompt\": \"a\", \"completion\": \"xx\", \"label\": false}\n";
    let mut bench = Bench::new(&[("p.jsonl", &pairs.join("\n")), ("k.jsonl", judged)]);
    let judged = bench.place("k.jsonl");
    bench.options.train.push(judged);
    (bench.options.preferences, bench.options.validation_fraction, bench.options.max_length) =
        (Preferences::Keep, 0.0, 128);
    let report = bench.run().unwrap();
    let preferences = [
        (Preference::Chosen, 30),
        (Preference::Rejected, 30),
        (Preference::Desirable, 1),
        (Preference::Undesirable, 1),
    ];
    assert_eq!(report.train.preferences, preferences.into());
    let shard = PreparedSplit::open(&bench.path("out"), Split::Train).unwrap();
    assert_eq!(shard.max_length(), 256);
    let mut seen = 0;
    for index in 0..shard.len() {
        let block = shard.block(index).unwrap();
        let mut start = 0;
        let mut prompt: Option<Vec<u32>> = None;
        for document in 0..block.lengths.len() {
            let rows = start..start + block.lengths[document];
            (start, seen) = (rows.end, seen + 1);
            let (ids, shared) = (&block.ids[rows.clone()], block.shared[document]);
            let text = |ids: &[u32]| tokenizer().decode(ids, false).unwrap();
            let trained = ids.iter().zip(&block.trained[rows]).filter(|(_, trained)| **trained);
            let answer = text(&trained.map(|(id, _)| *id).collect::<Vec<_>>());
            match block.preferences[document] {
                Preference::Chosen => {
                    assert!(text(&ids[..shared]).ends_with("assistant\n") && answer.starts_with("ab"), "{answer}");
                    prompt = Some(ids[..shared].to_vec());
                }
                Preference::Rejected => {
                    assert_eq!(prompt.take().expect("the chosen one stands before it"), ids[..shared]);
                    assert_eq!(answer, "nope<|im_end|>");
                }
                Preference::Desirable => {
                    assert_eq!((text(&ids[..shared]), answer), ("a".into(), "ll<|im_end|>".into()))
                }
                Preference::Undesirable => assert_eq!(answer, "xx<|im_end|>"),
                Preference::Plain => panic!("all are answers"),
            }
        }
    }
    assert_eq!(seen, 62);
    let shown = crate::preview(&shard, 1, &tokenizer()).unwrap();
    assert_eq!(
        shown.iter().map(|d| d.preference).collect::<Vec<_>>(),
        [Preference::Chosen, Preference::Rejected],
        "both preferences are shown"
    );
    // A long answer is cut, or goes with the other one.
    let longest = report.train.counts.longest_row;
    bench.options.max_length = longest - 2;
    let report = bench.run().unwrap();
    assert!(report.train.counts.truncated_rows > 0 && report.train.counts.dropped_rows == 0);
    assert_eq!(report.train.preferences, preferences.into());
    bench.options.overlong = Overlong::Drop;
    let report = bench.run().unwrap();
    let dropped = report.train.counts.dropped_rows;
    assert!(dropped > 0);
    assert_eq!(
        (report.train.preferences[&Preference::Chosen], report.train.preferences[&Preference::Rejected]),
        (30 - dropped, 30 - dropped)
    );
    fs::write(bench.path("k.jsonl"), "{\"text\": \"plain\"}\n").unwrap();
    assert!(bench.refusal().contains("k.jsonl, line 1: preferences = \"keep\" prepares answers"));
}
