use super::*;
use crate::{
    Overlong, PreparedSplit, TextRows, TrainOn,
    fixture::{chatml, tokenizer},
};

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
    assert!(steps.contains(&PrepareProgress::Writing { split: Split::Test }));
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
fn the_first_samples_are_those_that_are_trained() {
    let mut bench = Bench::new(&[("d.jsonl", &lines(20))]);
    bench.options.validation_fraction = 0.5;
    let first = first_samples(&bench.options, &tokenizer(), None, 3).unwrap();
    assert_eq!(first.len(), 3);
    bench.run().unwrap();
    let trained = bench.texts(Split::Train);
    for sample in first {
        assert!(trained.contains(&tokenizer().decode(&sample.ids, false).unwrap()));
    }
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
    fs::write(bench.path("out/prepared.json"), text.replacen("\"format_version\": 1", "\"format_version\": 7", 1))
        .unwrap();
    assert!(Report::read(&bench.path("out")).unwrap_err().to_string().contains("format version 7"));
}
