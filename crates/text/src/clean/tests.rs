use super::*;
use proptest::prelude::*;

fn row(kind: RowKind) -> Row {
    Row { kind, file: "d.jsonl".into(), line: 1 }
}

fn cleaner(change: impl FnOnce(&mut CleanOptions)) -> Cleaner {
    let mut options = CleanOptions::default();
    change(&mut options);
    Cleaner::new(&options).unwrap()
}

#[test]
fn gutenbergs_licence_is_cut() {
    let text = "The Project Gutenberg eBook\n\n*** START OF THE PROJECT GUTENBERG EBOOK ALICE ***\n\nAlice was\n\n\
                *** END OF THE PROJECT GUTENBERG EBOOK ALICE ***\nlicence";
    assert_eq!(steps::gutenberg(text).as_deref(), Some("Alice was"));
    assert_eq!(steps::gutenberg("***START OF THIS PROJECT GUTENBERG EBOOK X***\nText").as_deref(), Some("Text"));
    assert_eq!(steps::gutenberg("Text\nEnd of Project Gutenberg's Alice").as_deref(), Some("Text"));
    assert_eq!(steps::gutenberg("He read of Project Gutenberg.\n*** START ***"), None);
}

#[test]
fn html_becomes_text_and_code_stays() {
    let html = |text: &str| steps::html(text);
    assert_eq!(html("<p>One &amp; <b class=\"x\">two</b><br/>three</p>").as_deref(), Some("\nOne & two\nthree\n"));
    assert_eq!(html("a<!-- b -->c<script>d<e</script>f").as_deref(), Some("acf"));
    assert_eq!(html("it&#39;s &eacute;&nbsp;&unknown;").as_deref(), Some("it's é\u{a0}&unknown;"));
    for text in ["if (a <b && c> d)", "Vec<u8>", "x < y", "R&D", "plain", "<|im_start|>"] {
        assert_eq!(html(text), None, "{text}");
    }
}

#[test]
fn characters_that_show_nothing_go() {
    let control = |text: &str| steps::control_characters(text);
    assert_eq!(control("a\u{0}b\u{feff}c\u{200b}\r\nd\re\u{2028}f").as_deref(), Some("abc\nd\ne\nf"));
    assert_eq!(control("tab\tand\nline, 👩\u{200d}👧"), None);
    assert_eq!(steps::unicode_nfc("e\u{301}a").as_deref(), Some("éa"));
    assert_eq!(steps::unicode_nfc("éa"), None);
}

#[test]
fn blanks_are_made_single() {
    let blanks = |text: &str| steps::whitespace(text);
    assert_eq!(blanks("a  b\u{a0}\tc  \n\n\n\n  if x:\n").as_deref(), Some("a b c\n\n  if x:\n"));
    assert_eq!(blanks("  4").as_deref(), Some(" 4"));
    assert_eq!(blanks("a\r\nb").as_deref(), Some("a\nb"));
    assert_eq!(blanks(" \n\n\n ").as_deref(), Some("\n\n"));
    for text in [" 4", "a\n\nb\n", "", "a", "Q:\n"] {
        assert_eq!(blanks(text), None, "{text:?}");
    }
}

#[test]
fn addresses_and_numbers_are_masked() {
    let masked = |text: &str| steps::mask_emails(text);
    assert_eq!(masked("Mail Jo.Do+x@mail.example.co.uk!").as_deref(), Some("Mail [EMAIL]!"));
    assert_eq!(masked("user@localhost, @handle, a @ b"), None);
    for number in [
        "+49 30 1234567",
        "+1 (555) 123-4567",
        "0049 171 1234567",
        "(555) 123-4567",
        "555-123-4567",
        "030 / 123456",
        "089 1234567",
    ] {
        assert_eq!(steps::mask_phones(&format!("Call {number}.")).as_deref(), Some("Call [PHONE]."), "{number}");
    }
    for text in
        ["in 2024-05-17", "1,000,000 people", "3.14159265", "10.0.0.1", "ISBN 9780306406157", "12:30", "0.5 100"]
    {
        assert_eq!(steps::mask_phones(text), None, "{text}");
    }
}

#[test]
fn a_row_is_cleaned_in_all_its_texts_and_each_step_is_named_once() {
    let cleaner = cleaner(|o| (o.mojibake, o.whitespace, o.mask_emails) = (true, true, true));
    let messages = vec![Message::new("user", "cafÃ©  x"), Message::new("assistant", "ThÃ©")];
    let mut chat = row(RowKind::Messages { messages, trained_from: 0, tools: None });
    assert_eq!(cleaner.clean(&mut chat), [Step::Mojibake, Step::Whitespace]);
    assert_eq!(whole_text(&chat.kind), "café x\nThé");
    assert!(cleaner.clean(&mut chat).is_empty());
    let turns = |text: &str| Turns::Text(text.into());
    let kind = RowKind::Preference { prompt: turns("a@b.de"), chosen: turns("c"), rejected: turns("d"), tools: None };
    let mut pair = row(kind);
    assert_eq!(cleaner.clean(&mut pair), [Step::MaskEmails]);
    assert_eq!(whole_text(&pair.kind), "[EMAIL]\nc\nd");
}

#[test]
fn rows_are_removed_for_a_reason() {
    let english = "The quick brown fox jumps over the lazy dog while the sun is shining on the old barn.";
    let german =
        "Der schnelle braune Fuchs springt über den faulen Hund, während die Sonne auf die alte Scheune scheint.";
    let languages = cleaner(|o| o.languages = vec!["en".into()]);
    assert_eq!((languages.unwanted(english), languages.unwanted(german)), (None, Some(Reason::Language)));
    assert_eq!(languages.unwanted("ok"), None, "too short to tell");
    let lengths = cleaner(|o| (o.min_chars, o.max_chars) = (2, 4));
    let judged = ["ä", "äö", "äöüß", "äöüßx"].map(|text| lengths.unwanted(text));
    assert_eq!(judged, [Some(Reason::TooShort), None, None, Some(Reason::TooLong)]);
    let repetition = cleaner(|o| o.max_repetition = 0.3);
    assert_eq!(repetition.unwanted(&"one two three four five six ".repeat(10)), Some(Reason::Repetitive));
    assert_eq!(repetition.unwanted(&format!("{english} {german}")), None);
    assert!(cleaner(|o| o.html = true).looks_at_text() && !cleaner(|_| ()).looks_at_text());
    assert_eq!(cleaner(|o| o.html = true).unwanted(" \n"), Some(Reason::Empty));
}

#[test]
fn options_out_of_range_are_named() {
    let text = |change: fn(&mut CleanOptions)| {
        let mut options = CleanOptions::default();
        change(&mut options);
        Cleaner::new(&options).unwrap_err().to_string()
    };
    assert!(text(|o| o.max_repetition = 1.5).contains("clean.max_repetition is 1.5"));
    assert!(text(|o| o.near_threshold = 0.1).contains("at least 0.6"));
    assert!(text(|o| (o.min_chars, o.max_chars) = (9, 3)).contains("no row would be left"));
    assert!(text(|o| o.languages = vec!["klingon".into()]).contains("\"klingon\""));
    for (two, three) in TWO_LETTERS {
        assert!(Lang::from_code(three).is_some(), "{two}: {three}");
    }
}

proptest! {
    #[test]
    fn cleaning_twice_changes_nothing_more(text in "\\PC{0,30}[ \n\t\r]{0,3}\\PC{0,30}") {
        for step in [steps::control_characters, steps::unicode_nfc, steps::whitespace, steps::mask_emails] {
            let once = step(&text).unwrap_or_else(|| text.clone());
            prop_assert_eq!(step(&once), None, "{:?}", once);
        }
    }
}
