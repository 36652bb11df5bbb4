//! Cleaning: each step is switched on by itself, and counts the rows that it touched.
//!
//! Steps that change text work on every text of a row for itself, in the order of [`Step`]; what is said by tools and
//! calls is left alone. Then the row as a whole is kept or removed, for a [`Reason`].
mod mojibake;
mod steps;

use crate::{CleanOptions, Error, Message, Result, Row, RowKind, Turns};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use whatlang::Lang;

/// A step that changes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The licence of Project Gutenberg.
    Gutenberg,
    /// UTF-8 read as Windows-1252.
    Mojibake,
    /// Tags and entities.
    Html,
    /// Control characters.
    ControlCharacters,
    /// Normal form C.
    UnicodeNfc,
    /// Blanks.
    Whitespace,
    /// E-mail addresses.
    MaskEmails,
    /// Telephone numbers.
    MaskPhones,
}

/// Why a row was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It belongs to the licence of Project Gutenberg.
    Gutenberg,
    /// Nothing was left of it.
    Empty,
    /// Fewer characters than `min_chars`.
    TooShort,
    /// More characters than `max_chars`.
    TooLong,
    /// It repeats itself.
    Repetitive,
    /// Another language.
    Language,
    /// It says what an earlier row says.
    Duplicate,
    /// It nearly says what an earlier row says.
    NearDuplicate,
    /// It says what a held-out row says.
    Leak,
    /// It nearly says what a held-out row says.
    NearLeak,
    /// There are more rows of its value than `balance = "undersample"` draws.
    Balance,
}

impl Step {
    /// What it did, in words that follow a number of rows.
    pub fn words(self) -> &'static str {
        match self {
            Self::Gutenberg => "without the licence of Project Gutenberg",
            Self::Mojibake => "with misread characters repaired",
            Self::Html => "with HTML taken out",
            Self::ControlCharacters => "with control characters taken out",
            Self::UnicodeNfc => "in normal form C",
            Self::Whitespace => "with single blanks",
            Self::MaskEmails => "with e-mail addresses masked",
            Self::MaskPhones => "with telephone numbers masked",
        }
    }
}

impl Reason {
    /// The reason, in words that follow a number of rows.
    pub fn words(self) -> &'static str {
        match self {
            Self::Gutenberg => "of the licence of Project Gutenberg",
            Self::Empty => "of which nothing was left",
            Self::TooShort => "shorter than clean.min_chars",
            Self::TooLong => "longer than clean.max_chars",
            Self::Repetitive => "that repeat themselves",
            Self::Language => "in other languages",
            Self::Duplicate => "that say what an earlier row says",
            Self::NearDuplicate => "that nearly say what an earlier row says",
            Self::Leak => "to train on that are held out too",
            Self::NearLeak => "to train on that are nearly held out too",
            Self::Balance => "of values that are more common than the rest",
        }
    }
}

/// What cleaning did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanReport {
    /// Rows that each step changed; steps that changed none are not listed.
    pub changed: BTreeMap<Step, usize>,
    /// Rows that were removed.
    pub removed: BTreeMap<Reason, usize>,
    /// Whether rows were compared with each other: not where nothing is held out and duplicates may stay.
    pub compared: bool,
    /// Rows that say what an earlier row of their split says, and stay since `duplicates` is `keep`.
    pub kept_duplicates: usize,
}

/// Where the text of Project Gutenberg begins or ends, in a file that is read in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Start,
    End,
}

/// [`CleanOptions`] made ready.
#[derive(Debug)]
pub(crate) struct Cleaner {
    options: CleanOptions,
    steps: Vec<(Step, steps::Change)>,
    languages: HashSet<Lang>,
}

impl Cleaner {
    /// # Errors
    /// A value out of range, or a language that is not known.
    pub(crate) fn new(options: &CleanOptions) -> Result<Self> {
        let range = |name: &str, value: f64, least: f64| match (least..=1.0).contains(&value) {
            true => Ok(()),
            false => Err(Error::Input(format!("clean.{name} is {value}; it must be at least {least} and at most 1"))),
        };
        range("max_repetition", options.max_repetition, 0.0)?;
        range("near_threshold", options.near_threshold, 0.6)?;
        if options.max_chars > 0 && options.max_chars < options.min_chars {
            return Err(Error::Input(format!(
                "clean.max_chars is {}, less than clean.min_chars = {}; no row would be left",
                options.max_chars, options.min_chars
            )));
        }
        let switches: [(bool, Step, steps::Change); 8] = [
            (options.gutenberg, Step::Gutenberg, steps::gutenberg),
            (options.mojibake, Step::Mojibake, mojibake::repair),
            (options.html, Step::Html, steps::html),
            (options.control_characters, Step::ControlCharacters, steps::control_characters),
            (options.unicode_nfc, Step::UnicodeNfc, steps::unicode_nfc),
            (options.whitespace, Step::Whitespace, steps::whitespace),
            (options.mask_emails, Step::MaskEmails, steps::mask_emails),
            (options.mask_phones, Step::MaskPhones, steps::mask_phones),
        ];
        Ok(Self {
            options: options.clone(),
            steps: switches.into_iter().filter(|(on, ..)| *on).map(|(_, step, change)| (step, change)).collect(),
            languages: options.languages.iter().map(|name| language(name)).collect::<Result<_>>()?,
        })
    }

    /// Cleans the texts of `row`; the steps that changed any.
    pub(crate) fn clean(&self, row: &mut Row) -> Vec<Step> {
        let mut changed = Vec::new();
        for (step, change) in &self.steps {
            let mut any = false;
            for_each_text(&mut row.kind, &mut |text| {
                if let Some(new) = change(text) {
                    *text = new;
                    any = true;
                }
            });
            if any {
                changed.push(*step);
            }
        }
        changed
    }

    /// Why a row that says `text` does not stay, by itself.
    pub(crate) fn unwanted(&self, text: &str) -> Option<Reason> {
        let options = &self.options;
        if options.min_chars > 0 || options.max_chars > 0 {
            let chars = text.chars().count();
            if chars < options.min_chars {
                return Some(Reason::TooShort);
            }
            if options.max_chars > 0 && chars > options.max_chars {
                return Some(Reason::TooLong);
            }
        }
        if text.trim().is_empty() && !self.steps.is_empty() {
            return Some(Reason::Empty);
        }
        if options.max_repetition < 1.0 && steps::repetition(text) > options.max_repetition {
            return Some(Reason::Repetitive);
        }
        if !self.languages.is_empty()
            && let Some(found) = whatlang::detect(text)
            && found.is_reliable()
            && !self.languages.contains(&found.lang())
        {
            return Some(Reason::Language);
        }
        None
    }

    /// Whether the text of a row is needed to say what becomes of it.
    pub(crate) fn looks_at_text(&self) -> bool {
        !self.steps.is_empty() || self.judges_text()
    }

    /// Whether a row of a text file says that the text of Project Gutenberg begins after it, or ends with it.
    pub(crate) fn gutenberg_mark(&self, text: &str) -> Option<Mark> {
        self.options.gutenberg.then(|| steps::gutenberg_mark(text)).flatten()
    }

    /// Whether [`Self::unwanted`] looks at the text at all.
    fn judges_text(&self) -> bool {
        let options = &self.options;
        options.min_chars > 0 || options.max_chars > 0 || options.max_repetition < 1.0 || !self.languages.is_empty()
    }
}

/// A language by its code of two or three letters.
fn language(name: &str) -> Result<Lang> {
    let code = name.to_lowercase();
    let short = TWO_LETTERS.iter().find(|(two, _)| *two == code).map_or(&code[..], |(_, three)| three);
    Lang::from_code(short).ok_or_else(|| {
        let known: Vec<_> = Lang::all().iter().map(|lang| lang.code()).collect();
        Error::Input(format!(
            "clean.languages has {name:?}; known are {} (and their two-letter codes)",
            known.join(", ")
        ))
    })
}

/// ISO 639-1 codes of the languages that `whatlang` tells apart, with their ISO 639-3 codes.
const TWO_LETTERS: [(&str, &str); 62] = [
    ("af", "afr"),
    ("am", "amh"),
    ("ar", "ara"),
    ("az", "aze"),
    ("be", "bel"),
    ("bg", "bul"),
    ("bn", "ben"),
    ("ca", "cat"),
    ("cs", "ces"),
    ("da", "dan"),
    ("de", "deu"),
    ("el", "ell"),
    ("en", "eng"),
    ("eo", "epo"),
    ("es", "spa"),
    ("et", "est"),
    ("fa", "pes"),
    ("fi", "fin"),
    ("fr", "fra"),
    ("gu", "guj"),
    ("he", "heb"),
    ("hi", "hin"),
    ("hr", "hrv"),
    ("hu", "hun"),
    ("hy", "hye"),
    ("id", "ind"),
    ("it", "ita"),
    ("ja", "jpn"),
    ("jv", "jav"),
    ("ka", "kat"),
    ("km", "khm"),
    ("kn", "kan"),
    ("ko", "kor"),
    ("la", "lat"),
    ("lt", "lit"),
    ("lv", "lav"),
    ("mk", "mkd"),
    ("ml", "mal"),
    ("mr", "mar"),
    ("my", "mya"),
    ("ne", "nep"),
    ("nl", "nld"),
    ("no", "nob"),
    ("pa", "pan"),
    ("pl", "pol"),
    ("pt", "por"),
    ("ro", "ron"),
    ("ru", "rus"),
    ("si", "sin"),
    ("sk", "slk"),
    ("sl", "slv"),
    ("sn", "sna"),
    ("sr", "srp"),
    ("sv", "swe"),
    ("ta", "tam"),
    ("te", "tel"),
    ("th", "tha"),
    ("tr", "tur"),
    ("uk", "ukr"),
    ("ur", "urd"),
    ("vi", "vie"),
    ("zh", "cmn"),
];

/// Calls `change` on every text of a row.
/// Every text of a row.
pub(crate) fn for_each_text(kind: &mut RowKind, change: &mut dyn FnMut(&mut String)) {
    let messages = |messages: &mut Vec<Message>, change: &mut dyn FnMut(&mut String)| {
        messages.iter_mut().for_each(|message| change(&mut message.content));
    };
    let turns = |said: &mut Turns, change: &mut dyn FnMut(&mut String)| match said {
        Turns::Text(text) => change(text),
        Turns::Messages(said) => messages(said, change),
    };
    match kind {
        RowKind::Text(text) => change(text),
        RowKind::PromptCompletion { prompt, completion } => {
            change(prompt);
            change(completion);
        }
        RowKind::Messages { messages: said, .. } => messages(said, change),
        RowKind::Preference { prompt, chosen, rejected, .. } => {
            [prompt, chosen, rejected].into_iter().for_each(|said| turns(said, change));
        }
        RowKind::Judged { prompt, completion, .. } => {
            [prompt, completion].into_iter().for_each(|said| turns(said, change));
        }
        RowKind::Labelled { text, .. } => turns(text, change),
    }
}

/// All texts of a row, one after the other.
pub(crate) fn whole_text(kind: &RowKind) -> String {
    let mut parts: Vec<&str> = Vec::new();
    fn turns<'a>(said: &'a Turns, parts: &mut Vec<&'a str>) {
        match said {
            Turns::Text(text) => parts.push(text),
            Turns::Messages(said) => parts.extend(said.iter().map(|message| &message.content[..])),
        }
    }
    match kind {
        RowKind::Text(text) => parts.push(text),
        RowKind::PromptCompletion { prompt, completion } => parts.extend([&prompt[..], completion]),
        RowKind::Messages { messages, .. } => parts.extend(messages.iter().map(|message| &message.content[..])),
        RowKind::Preference { prompt, chosen, rejected, .. } => {
            [prompt, chosen, rejected].into_iter().for_each(|said| turns(said, &mut parts));
        }
        RowKind::Judged { prompt, completion, .. } => {
            [prompt, completion].into_iter().for_each(|said| turns(said, &mut parts));
        }
        RowKind::Labelled { text, .. } => turns(text, &mut parts),
    }
    parts.join("\n")
}

#[cfg(test)]
mod tests;
