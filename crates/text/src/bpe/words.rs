//! How models cut a text into words before they merge anything. Each scanner does what one regular expression does, as
//! Oniguruma understands it; words cover the text without a gap.
use super::classes::{self, Class, LETTER, NUMBER, OTHER, SPACE};

/// How a text is cut: first at digits, then into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) digits: Digits,
    pub(super) words: Words,
}

/// What becomes of digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Digits {
    /// Nothing.
    Joined,
    /// Each of 0 to 9 stands alone.
    EachAscii,
    /// Each character of Unicode's categories of numbers, as Rust has them, stands alone.
    Each,
    /// Runs of them stand alone.
    Runs,
}

/// What a word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// Everything between two digits.
    Whole,
    /// [`GPT2`].
    Gpt2,
    /// [`LLAMA3`] and [`QWEN2`]: at most this many digits in a word.
    Llama3 {
        /// 3 or 1.
        digits: usize,
    },
}

/// The expression of [`Words::Gpt2`], which is also what the step `ByteLevel` uses.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// [`Words::Llama3`] with three digits.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// [`Words::Llama3`] with one digit.
pub(super) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Calls `word` with the start and end of every word of `text`.
pub(super) fn for_each(text: &str, rule: Rule, mut word: impl FnMut(usize, usize)) {
    let is_digit: fn(char) -> bool = match rule.digits {
        Digits::Joined => return cut(text, 0, rule.words, &mut word),
        Digits::EachAscii => |c| c.is_ascii_digit(),
        Digits::Each | Digits::Runs => char::is_numeric,
    };
    let bytes = text.as_bytes();
    let (mut start, mut at) = (0, 0);
    while at < bytes.len() {
        let (digit, length) = match bytes[at] {
            byte if byte < 0x80 => (byte.is_ascii_digit(), 1),
            _ => {
                let character = classes::char_at(text, at);
                (is_digit(character), character.len_utf8())
            }
        };
        if !digit {
            at += length;
            continue;
        }
        cut(&text[start..at], start, rule.words, &mut word);
        let first = at;
        at += length;
        while rule.digits == Digits::Runs && text[at..].starts_with(char::is_numeric) {
            at += classes::char_at(text, at).len_utf8();
        }
        cut(&text[first..at], first, rule.words, &mut word);
        start = at;
    }
    cut(&text[start..], start, rule.words, &mut word);
}

/// Words of a part of the text that begins at `offset` of it.
fn cut(text: &str, offset: usize, words: Words, word: &mut impl FnMut(usize, usize)) {
    let mut part = |start: usize, end: usize| word(offset + start, offset + end);
    match words {
        Words::Whole if text.is_empty() => {}
        Words::Whole => part(0, text.len()),
        Words::Gpt2 => gpt2(text, &mut part),
        Words::Llama3 { digits } => llama3(text, digits, &mut part),
    }
}

/// The end of the run of characters of `class` that goes on at `at`.
fn run(text: &str, mut at: usize, class: Class) -> usize {
    while at < text.len() {
        let (found, length) = classes::at(text, at);
        if found != class {
            break;
        }
        at += length;
    }
    at
}

/// A run of white space from `start`: where it ends, where its last character begins, and where its last line end ends
/// (or `start`).
fn blanks(text: &str, start: usize) -> (usize, usize, usize) {
    let (mut at, mut last, mut line) = (start, start, start);
    while at < text.len() {
        let (found, length) = classes::at(text, at);
        if found != SPACE {
            break;
        }
        last = at;
        at += length;
        if matches!(text.as_bytes()[last], b'\r' | b'\n') {
            line = at;
        }
    }
    (at, last, line)
}

fn gpt2(text: &str, word: &mut impl FnMut(usize, usize)) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let (mut class, mut length) = classes::at(text, at);
        if bytes[at] == b'\'' {
            let ending = match bytes.get(at + 1..) {
                Some([b's' | b't' | b'm' | b'd', ..]) => 2,
                Some([b'r', b'e', ..] | [b'v', b'e', ..] | [b'l', b'l', ..]) => 3,
                _ => 0,
            };
            if ending > 0 {
                at += ending;
                word(start, at);
                continue;
            }
        }
        if bytes[at] == b' ' && at + 1 < bytes.len() {
            let (next, next_length) = classes::at(text, at + 1);
            if next != SPACE {
                (class, length) = (next, 1 + next_length);
            }
        }
        at = match class {
            SPACE => {
                let (end, last, _) = blanks(text, at);
                // The last blank before a word belongs to it, or stands alone.
                if end == bytes.len() || last == start { end } else { last }
            }
            class => run(text, at + length, class),
        };
        word(start, at);
    }
}

fn llama3(text: &str, digits: usize, word: &mut impl FnMut(usize, usize)) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let (class, length) = classes::at(text, at);
        let byte = bytes[at];
        if byte == b'\'' {
            let ending = match bytes.get(at + 1..) {
                Some([b's' | b't' | b'm' | b'd' | b'S' | b'T' | b'M' | b'D', ..]) => 2,
                // The long s is an s in another case.
                Some([0xc5, 0xbf, ..]) => 3,
                Some([b'r' | b'R' | b'v' | b'V', b'e' | b'E', ..] | [b'l' | b'L', b'l' | b'L', ..]) => 3,
                _ => 0,
            };
            if ending > 0 {
                at += ending;
                word(start, at);
                continue;
            }
        }
        if class == LETTER {
            at = run(text, at + length, LETTER);
            word(start, at);
            continue;
        }
        if class == NUMBER {
            at += length;
            for _ in 1..digits {
                match at < bytes.len() && classes::at(text, at).0 == NUMBER {
                    true => at += classes::at(text, at).1,
                    false => break,
                }
            }
            word(start, at);
            continue;
        }
        let after = at + length;
        let next = if after < bytes.len() { Some(classes::at(text, after)) } else { None };
        if let Some((LETTER, next_length)) = next
            && !matches!(byte, b'\r' | b'\n')
        {
            at = run(text, after + next_length, LETTER);
            word(start, at);
            continue;
        }
        at = match (class, next) {
            (OTHER, _) => lines(bytes, run(text, after, OTHER)),
            (_, Some((OTHER, next_length))) if byte == b' ' => lines(bytes, run(text, after + next_length, OTHER)),
            _ => {
                let (end, last, line) = blanks(text, at);
                match line > start {
                    true => line,
                    false if end == bytes.len() || last == start => end,
                    false => last,
                }
            }
        };
        word(start, at);
    }
}

/// The end of the line ends that go on at `at`.
fn lines(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}
