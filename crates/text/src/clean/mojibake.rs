//! UTF-8 that was read as Windows-1252 and written as UTF-8 again, once or several times.
use encoding_rs::WINDOWS_1252;
use std::sync::LazyLock;

/// The characters that Windows-1252 has for the bytes from 0x80.
static HIGH: LazyLock<Vec<char>> = LazyLock::new(|| {
    let bytes: Vec<u8> = (0x80..=0xff).collect();
    WINDOWS_1252.decode_without_bom_handling(&bytes).0.chars().collect()
});

fn byte(character: char) -> Option<u8> {
    if character.is_ascii() {
        return None;
    }
    HIGH.iter().position(|known| *known == character).map(|index| 0x80 + index as u8)
}

/// The text with runs of such characters decoded; `None` when there are none.
///
/// A run is decoded only when all of it is UTF-8, and either begins as Latin letters, punctuation or emoji do in UTF-8,
/// or has at least three characters of another script: what people write seldom looks like that.
pub(super) fn repair(text: &str) -> Option<String> {
    let mut repaired = once(text)?;
    // What was misread several times is wrapped as often.
    for _ in 0..3 {
        match once(&repaired) {
            Some(again) => repaired = again,
            None => break,
        }
    }
    Some(repaired)
}

fn once(text: &str) -> Option<String> {
    if !text.chars().any(|character| matches!(byte(character), Some(0xc2..=0xf4))) {
        return None;
    }
    let (mut out, mut run, mut bytes) = (String::with_capacity(text.len()), String::new(), Vec::new());
    let mut changed = false;
    let mut flush = |run: &mut String, bytes: &mut Vec<u8>, out: &mut String| {
        match std::str::from_utf8(bytes) {
            Ok(decoded) if is_plausible(bytes, decoded) => {
                out.push_str(decoded);
                changed = true;
            }
            _ => out.push_str(run),
        }
        run.clear();
        bytes.clear();
    };
    for character in text.chars() {
        match byte(character) {
            Some(byte) => {
                run.push(character);
                bytes.push(byte);
            }
            None => {
                flush(&mut run, &mut bytes, &mut out);
                out.push(character);
            }
        }
    }
    flush(&mut run, &mut bytes, &mut out);
    changed.then_some(out)
}

fn is_plausible(bytes: &[u8], decoded: &str) -> bool {
    match bytes {
        [0xc2 | 0xc3 | 0xe2 | 0xf0, ..] => true,
        [_, ..] => decoded.chars().count() >= 3,
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn misread(text: &str) -> String {
        WINDOWS_1252.decode_without_bom_handling(text.as_bytes()).0.into_owned()
    }

    #[test]
    fn misread_text_is_repaired_and_other_text_is_left_alone() {
        for text in ["café", "“quotes” – and … dashes", "Привет, мир", "🙂 ok", "naïve Zürich", "50 €"]
        {
            assert_eq!(repair(&misread(text)).as_deref(), Some(text), "{}", misread(text));
            assert_eq!(repair(&misread(&misread(text))).as_deref(), Some(text));
            assert_eq!(repair(text), None, "{text}");
        }
        for text in ["« ÉTÉ »", "«É»", "plain", "", "Ünïcödé", "ÄÖÜ", "Ã", "£5 – §3"] {
            assert_eq!(repair(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_found_in_text_of_other_characters(text in "[a-zA-Z0-9 .,!\u{400}-\u{4ff}\u{4e00}-\u{4eff}]{0,40}") {
            prop_assert_eq!(repair(&text), None);
        }
    }
}
