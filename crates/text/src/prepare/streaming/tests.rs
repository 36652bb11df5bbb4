use super::*;
use crate::fixture::{chatml, tokenizer};
use std::collections::HashMap;

struct Bench {
    folder: tempfile::TempDir,
    options: PrepareOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Bench {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut train = Vec::new();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
            train.push(folder.path().join(name).display().to_string());
        }
        let options = PrepareOptions {
            train,
            streaming: true,
            shuffle_buffer: Some(16),
            validation_fraction: 0.0,
            max_length: 32,
            ..PrepareOptions::default()
        };
        Self { folder, options, tokenizer: tokenizer(), template: chatml() }
    }

    fn rewrite(&self, content: &str) {
        fs::write(self.folder.path().join("a.jsonl"), content).unwrap();
    }

    fn open(&self) -> BlockStream<'_> {
        self.try_open().unwrap()
    }

    fn try_open(&self) -> Result<BlockStream<'_>> {
        BlockStream::open(&self.options, &self.tokenizer, Some(&self.template), 7)
    }

    fn prepare(&self) -> crate::Report {
        let out = self.folder.path().join("out");
        crate::prepare(&out, &self.options, &self.tokenizer, Some(&self.template), &mut |_| ()).unwrap()
    }

    fn error(&self) -> String {
        self.open().next_block().unwrap_err().to_string()
    }
}

/// File and line of the documents of the next block.
fn sources(stream: &mut BlockStream<'_>) -> Vec<(String, usize)> {
    let block = stream.next_block().unwrap();
    assert!(block.ids.len() <= 32);
    block.sources.iter().map(|source| (source.file.rsplit('/').next().unwrap().to_owned(), source.line)).collect()
}

fn lines(count: usize) -> String {
    (0..count).map(|i| format!("{{\"text\": \"{}{i}\"}}\n", "r".repeat(i % 13 + 1))).collect()
}

#[test]
fn an_epoch_has_every_row_once_in_an_order_of_its_own() {
    let bench = Bench::new(&[("a.jsonl", &lines(300)), ("b.jsonl", &lines(50))]);
    let mut stream = bench.open();
    let (mut counts, mut order, mut blocks) = (HashMap::new(), Vec::new(), 0);
    while stream.epoch() < 3 {
        blocks += 1;
        for source in sources(&mut stream) {
            *counts.entry(source.clone()).or_insert(0) += 1;
            order.push(source);
        }
    }
    assert_eq!(counts.len(), 350);
    // What is not yet in a block waits; nothing is seen more often than there were epochs.
    assert!(counts.values().all(|&n| n <= 3) && order.len() > 2 * 350, "{}", order.len());
    let lines: Vec<usize> = order[..100].iter().map(|(_, line)| *line).collect();
    assert!(!lines.is_sorted(), "{lines:?}");
    assert_eq!(stream.counts().rows, 3 * 350);
    let mut again = bench.open();
    let again: Vec<_> = (0..blocks).flat_map(|_| sources(&mut again)).collect();
    assert_eq!(again, order, "a function of the seed");
}

#[test]
fn a_restored_stream_goes_on_with_the_same_blocks() {
    for (packing, weight, buffer) in [(true, 0.0, Some(16)), (false, 0.5, Some(3)), (true, 0.0, None)] {
        let rows: String = (0..300)
            .map(|i| format!("{{\"prompt\": \"p{i}\", \"completion\": \"{}\"}}\n", "c".repeat(i % 9 + 1)))
            .collect();
        let mut bench = Bench::new(&[("a.jsonl", &rows), ("b.jsonl", &rows)]);
        (bench.options.packing, bench.options.prompt_loss_weight, bench.options.shuffle_buffer) =
            (packing, weight, buffer);
        let mut straight = bench.open();
        let blocks: Vec<Block> = (0..400).map(|_| straight.next_block().unwrap()).collect();
        for at in [0, 1, 57, 58, 200, 390] {
            let mut first = bench.open();
            for block in &blocks[..at] {
                assert_eq!(&first.next_block().unwrap(), block);
            }
            let folder = tempfile::tempdir().unwrap();
            first.save(folder.path()).unwrap();
            let size = fs::metadata(folder.path().join(DOCUMENTS)).unwrap().len() as usize;
            assert!(size < first.num_bytes() + 200 * first.ready.len() + 1000, "{size} {}", first.num_bytes());
            let mut second = bench.open();
            second.restore(folder.path()).unwrap();
            for (number, block) in blocks.iter().enumerate().skip(at) {
                assert_eq!(&second.next_block().unwrap(), block, "block {number} after {at}");
            }
            assert_eq!(second.counts(), straight.counts());
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let bench = Bench::new(&[("a.jsonl", &lines(100)), ("b.jsonl", &lines(10))]);
    let mut stream = bench.open();
    stream.next_block().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let missing = stream.restore(folder.path()).unwrap_err().to_string();
    assert!(missing.contains("stream.json: no such file"), "{missing}");
    stream.save(folder.path()).unwrap();
    let state = fs::read_to_string(folder.path().join(STATE)).unwrap();
    for change in
        [state.replace("\"file\": 0", "\"file\": 2"), state.replace("\"ready\": ", "\"ready\": 1"), "{}".into()]
    {
        assert_ne!(change, state);
        fs::write(folder.path().join(STATE), change).unwrap();
        let text = stream.restore(folder.path()).unwrap_err().to_string();
        assert!(text.contains("stream.json: ") && text.ends_with("resume from another checkpoint"), "{text}");
    }
}

#[test]
fn memory_is_bounded_by_the_buffer_and_the_window() {
    let bench = Bench::new(&[("a.jsonl", &lines(20_000))]);
    let mut stream = bench.open();
    for _ in 0..2000 {
        stream.next_block().unwrap();
        let held: usize = stream.ready.iter().flatten().chain(&stream.waiting.samples).map(|s| s.ids.len()).sum();
        // A group of rows, and what waited before it.
        assert!(held <= GROUP_ROWS * 24 + 2 * WINDOW_BLOCKS * 32 && stream.buffer.len() <= 16, "{held}");
    }
}

#[test]
fn bad_rows_stop_the_stream_or_are_counted() {
    let rows = format!("{}nonsense\n{{\"prompt\": \"p\", \"completion\": \"c\"}}\n{}", lines(3), lines(3));
    let mut bench = Bench::new(&[("a.jsonl", &rows)]);
    assert!(bench.error().contains("a.jsonl, line 4, column 2: broken JSON"), "{}", bench.error());
    bench.rewrite(&rows.replace("nonsense\n", ""));
    let text = bench.error();
    assert!(
        text.contains("a.jsonl, line 4: the row is of format prompt_completion, those before it are text"),
        "{text}"
    );
    bench.rewrite(&rows);
    bench.options.on_bad_row = OnBadRow::Skip;
    let mut stream = bench.open();
    while stream.epoch() == 0 {
        stream.read_more().unwrap();
    }
    let counts = StreamCounts { rows: 8, rejected: 2, documents: 6, ..StreamCounts::default() };
    assert_eq!(stream.counts(), counts);
    bench.options.clean.min_chars = 100;
    let text = bench.error();
    assert!(text.contains("no row of") && text.contains("2 were rejected, 6 removed by cleaning"), "{text}");
}

#[test]
fn held_out_rows_are_left_out_and_files_that_change_are_refused() {
    let held_out = "{\"text\": \"RR1!\"}\n{\"text\": \"rrr2\"}\n";
    let mut bench = Bench::new(&[("a.jsonl", &lines(30)), ("v.jsonl", held_out)]);
    bench.options.validation = vec![bench.options.train.pop().unwrap()];
    let mut stream = bench.open();
    while stream.epoch() == 0 {
        stream.read_more().unwrap();
    }
    assert_eq!((stream.counts().leaked, stream.counts().documents), (2, 28));
    let report = bench.prepare();
    assert_eq!((report.train.documents, report.validation.documents), (0, 2), "only what is held out is prepared");
    let mut stream = bench.open();
    bench.rewrite(&lines(31));
    assert!(stream.next_block().unwrap_err().to_string().contains("the file changed while it was read"));
    assert_ne!(bench.prepare().key, report.key, "another file is other data");
    bench.options.validation = bench.options.train.clone();
    assert!(bench.try_open().err().unwrap().to_string().contains("is given for train and for validation"));
}
