//! The steps that change one text, and the measure of repetition. Each returns the new text, or `None` when nothing
//! changes.
use super::Mark;
use regex::Regex;
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::LazyLock,
};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The new text, if it differs.
pub(super) type Change = fn(&str) -> Option<String>;

fn changed(old: &str, new: String) -> Option<String> {
    (new != old).then_some(new)
}

#[allow(clippy::unwrap_used, reason = "the patterns are constants, compiled in the tests")]
fn pattern(text: &str) -> Regex {
    Regex::new(text).unwrap()
}

static GUTENBERG_START: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"(?im)^.{0,3}\*\*\* ?START OF TH(E|IS) PROJECT GUTENBERG[^\n]*\n?"));
static GUTENBERG_END: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"(?im)^(.{0,3}\*\*\* ?END OF TH(E|IS) PROJECT GUTENBERG|End of (the )?Project Gutenberg's? )[^\n]*")
});

/// What stands between the marks that Project Gutenberg puts around a text, where either of them is there.
pub(super) fn gutenberg(text: &str) -> Option<String> {
    let start = GUTENBERG_START.find(text).map_or(0, |mark| mark.end());
    let end = GUTENBERG_END.find_at(text, start).map_or(text.len(), |mark| mark.start());
    if (start, end) == (0, text.len()) { None } else { Some(text[start..end].trim().to_owned()) }
}

/// Which of the marks a part of such a text holds, if it does not hold both.
pub(super) fn gutenberg_mark(text: &str) -> Option<Mark> {
    match (GUTENBERG_START.is_match(text), GUTENBERG_END.is_match(text)) {
        (true, false) => Some(Mark::Start),
        (false, true) => Some(Mark::End),
        _ => None,
    }
}

/// Names of elements, so that `a <b && c` stays what it is.
const TAGS: &str = "a|abbr|article|aside|b|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|figure|figcaption|\
                    font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|meta|nav|\
                    noscript|ol|option|p|pre|q|s|section|select|small|span|strike|strong|sub|sup|table|tbody|td|\
                    textarea|tfoot|th|thead|title|tr|tt|u|ul|video";
/// Elements that stand in a line of their own.
const BLOCKS: &str =
    "article|aside|blockquote|br|dd|div|dl|dt|figure|footer|form|h[1-6]|header|hr|li|ol|p|pre|section|table|tr|ul";

static HTML_HIDDEN: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"(?is)<!--.*?-->|<script\b[^>]*>.*?</script\s*>|<style\b[^>]*>.*?</style\s*>|<!doctype\b[^>]*>")
});
static HTML_BLOCK: LazyLock<Regex> = LazyLock::new(|| tag(BLOCKS));
static HTML_TAG: LazyLock<Regex> = LazyLock::new(|| tag(TAGS));

fn tag(names: &str) -> Regex {
    let attributes = r#"(\s+[a-z_:@][-a-z0-9_:.]*(\s*=\s*("[^"]*"|'[^']*'|[^\s"'=<>`]+))?)*"#;
    pattern(&format!(r"(?i)</?({names}){attributes}\s*/?>"))
}

pub(super) fn html(text: &str) -> Option<String> {
    if !text.contains(['<', '&']) {
        return None;
    }
    let without = HTML_HIDDEN.replace_all(text, "");
    // A line end for a block, unless one is there.
    let without = HTML_BLOCK.replace_all(&without, "\n");
    let without = HTML_TAG.replace_all(&without, "");
    changed(text, html_escape::decode_html_entities(&without).into_owned())
}

/// Control characters (category Cc), and marks that show nothing and mean nothing: byte order mark, zero-width space,
/// word joiner, soft hyphen. Joiners of emoji and of scripts that need them stay. Line and paragraph separators, form
/// feeds and vertical tabs become line ends.
pub(super) fn control_characters(text: &str) -> Option<String> {
    let replacement = |character: char| match character {
        '\n' | '\t' => Some(character),
        '\r' => Some('\r'),
        '\u{2028}' | '\u{2029}' | '\u{b}' | '\u{c}' | '\u{85}' => Some('\n'),
        '\u{feff}' | '\u{200b}' | '\u{2060}' | '\u{ad}' => None,
        other if other.is_control() => None,
        other => Some(other),
    };
    if text.chars().all(|character| replacement(character) == Some(character)) && !text.contains('\r') {
        return None;
    }
    let new: String = text.replace("\r\n", "\n").replace('\r', "\n").chars().filter_map(replacement).collect();
    changed(text, new)
}

pub(super) fn unicode_nfc(text: &str) -> Option<String> {
    if text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes {
        return None;
    }
    changed(text, text.nfc().collect())
}

/// One blank between words, none at the end of a line, at most one empty line; indentation stays. What stands at either
/// end of the text is shortened in the same way but not taken away: a completion may begin with a blank.
pub(super) fn whitespace(text: &str) -> Option<String> {
    let lined = text.replace("\r\n", "\n");
    let core = lined.trim();
    if core.is_empty() {
        return changed(text, ends(&lined).into());
    }
    let start = core.as_ptr().addr() - lined.as_ptr().addr();
    let mut out = String::with_capacity(text.len());
    out.push_str(ends(&lined[..start]));
    let mut empty = 0;
    for (index, line) in core.split('\n').map(str::trim_end).enumerate() {
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if index > 0 {
            out.push_str(if empty > 0 { "\n\n" } else { "\n" });
        }
        empty = 0;
        let indent = line.len() - line.trim_start().len();
        out.push_str(&line[..indent]);
        for (number, word) in line.split_whitespace().enumerate() {
            if number > 0 {
                out.push(' ');
            }
            out.push_str(word);
        }
    }
    out.push_str(ends(&lined[start + core.len()..]));
    changed(text, out)
}

/// What is left of blanks at the beginning or end of a text.
fn ends(blanks: &str) -> &'static str {
    match blanks.bytes().filter(|&byte| byte == b'\n').count() {
        0 if blanks.is_empty() => "",
        0 => " ",
        1 => "\n",
        _ => "\n\n",
    }
}

static EMAIL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"(?i)\b[a-z0-9][a-z0-9._%+-]*@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,24}\b"));

pub(super) fn mask_emails(text: &str) -> Option<String> {
    if !text.contains('@') {
        return None;
    }
    changed(text, EMAIL.replace_all(text, "[EMAIL]").into_owned())
}

/// With a country's prefix; three, three and four digits; or with a leading zero and a separator.
static PHONE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"(?:\+|\b00)[1-9][0-9]{0,2}(?:[ ./-]?\(?[0-9]{1,5}\)?){2,5}\b|(?:\([0-9]{3}\) ?|\b[0-9]{3}[ .-])[0-9]{3}[ .-][0-9]{4}\b|\b0[1-9][0-9]{1,4}(?: ?[/-] ?| )[0-9]{3,5}(?:[ -]?[0-9]{2,4}){0,2}\b",
    )
});

pub(super) fn mask_phones(text: &str) -> Option<String> {
    if !text.bytes().any(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let is_number = |found: &str| (7..=15).contains(&found.bytes().filter(u8::is_ascii_digit).count());
    let new = PHONE.replace_all(text, |found: &regex::Captures<'_>| match &found[0] {
        found if is_number(found) => "[PHONE]".to_owned(),
        found => found.to_owned(),
    });
    changed(text, new.into_owned())
}

/// Share of the runs of five words that stood before in the same text; 0 for a text of fewer than 20 words.
pub(super) fn repetition(text: &str) -> f64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() < 20 {
        return 0.0;
    }
    let mut seen = HashSet::new();
    let runs = words.windows(5);
    let number = runs.len();
    let new = runs
        .filter(|run| {
            let mut hasher = DefaultHasher::new();
            run.hash(&mut hasher);
            seen.insert(hasher.finish())
        })
        .count();
    (number - new) as f64 / number as f64
}
