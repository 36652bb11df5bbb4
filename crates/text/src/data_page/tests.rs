use super::*;
use crate::{CleanOptions, PrepareOptions, Same, fixture::tokenizer, prepare};

/// A page of rows with everything on it that could break out of its place.
fn page(change: impl Fn(&mut PrepareOptions)) -> (String, Report) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("<b>rows&.jsonl");
    let mut text = String::new();
    for i in 0..90 {
        let label = if i % 30 == 0 { "<script>rare" } else { "common" };
        let words = "na ".repeat(i * i % 97);
        text += &format!(
            "{{\"prompt\": \"<img src=x> {words}{i}?\", \"completion\": \"{label}\", \"author\": \"a{}\"}}\n",
            i % 7
        );
    }
    text += &text.lines().take(3).map(|line| format!("{line}\n")).collect::<String>();
    std::fs::write(&data, text).unwrap();
    let mut options = PrepareOptions {
        train: vec![data.display().to_string()],
        validation_fraction: 0.2,
        max_length: 64,
        ..PrepareOptions::default()
    };
    change(&mut options);
    let out = folder.path().join("out");
    let report = prepare(&out, &options, &tokenizer(), None, &mut |_| ()).unwrap();
    write_page(&out, "A \"title\" <here>", &report, &tokenizer()).unwrap();
    (std::fs::read_to_string(out.join(PAGE)).unwrap(), report)
}

#[test]
fn everything_is_on_the_page_and_nothing_breaks_out() {
    let (page, report) = page(|_| ());
    for part in [
        "<h2>Splits</h2>",
        "<h2>Lengths of rows</h2>",
        "<h2>What a shorter max_length costs</h2>",
        "<h2>Labels</h2>",
        "<h2>Duplicates and cleaning</h2>",
        "<h2>Files</h2>",
        "<h2>Rows as they are trained on</h2>",
        "A &quot;title&quot; &lt;here&gt;",
        "64 (chosen)",
        "&lt;script&gt;rare",
        "&lt;</i>",
        "&lt;b&gt;rows&amp;.jsonl",
        "prompt",
        "common",
    ] {
        assert!(page.contains(part), "{part}");
    }
    for never in ["<script", "<img", "http://", "https://", "<b>rows", "NaN", "javascript:", "url("] {
        assert!(!page.contains(never), "{never}");
    }
    // The few completions count as labels, in each split.
    let completions = report.train.completions.as_ref().unwrap();
    assert_eq!(completions.values().sum::<usize>(), report.train.counts.rows);
    assert!(completions["common"] > 10 * completions["<script>rare"]);
    assert!(page.contains("a model learns little of what is rare"));
    assert_eq!(report.train.lengths.rows(), report.train.counts.rows);
    assert!(
        report.train.lengths.beyond(64).0 == report.train.counts.overlong_rows && report.train.counts.overlong_rows > 0
    );
    assert!(page.contains("What was done here") && page.contains("max_length 64"));
    assert!(report.clean.compared);
}

#[test]
fn duplicates_are_found_whether_they_stay_or_go() {
    let (kept, report) = page(|o| o.validation = Vec::new());
    let count = report.clean.kept_duplicates;
    assert_eq!(count, 3);
    assert!(kept.contains("3 rows say what an earlier row of their split says, and stay"), "{kept}");
    let (gone, report) = page(|o| o.clean = CleanOptions { duplicates: Same::Exact, ..CleanOptions::default() });
    assert_eq!(report.clean.kept_duplicates, 0);
    assert_eq!(report.clean.removed[&Reason::Duplicate], count);
    assert!(gone.contains("rows that say what an earlier row says") && gone.contains("removed"));
    let (none, report) = page(|o| o.validation_fraction = 0.0);
    assert!(!report.clean.compared && none.contains("Rows were not compared"));
}

#[test]
fn groups_and_labels_of_a_key_are_shown() {
    let (page, report) = page(|o| o.group_by = Some("author".into()));
    assert!(page.contains("<h2>Groups</h2>") && page.contains("no group is in two splits"));
    let groups = report.train.groups + report.validation.groups;
    assert_eq!(groups, 7);
    assert!(report.train.largest_group >= 12, "{}", report.train.largest_group);
    let (page, report) = self::page(|o| o.stratify_by = Some("author".into()));
    assert!(page.contains("rows by author") && report.train.values.len() == 7);
}
