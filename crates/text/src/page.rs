//! HTML pages that people look at: templates with one style sheet. A page loads nothing, runs no script, follows the
//! reader's light or dark theme, and reads on a phone and on paper.
use crate::{Error, Result};
use minijinja::{Environment, Output, State, UndefinedBehavior, Value, value::Serde};
use serde::Serialize;
use std::fmt::Write as _;

/// Renders `template`, which extends `base.html` and may import `parts.html` (see `page/`). Text in `values` is
/// escaped.
///
/// # Errors
/// A template that is wrong, or asks for what `values` has not.
pub fn render(template: &str, values: impl Serialize) -> Result<String> {
    let failed = |error: minijinja::Error| Error::Failure(format!("a page does not render: {error:#}"));
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
    environment.set_formatter(write_escaped);
    environment.add_filter("grouped", grouped);
    environment.add_filter("visible", |text: String| visible(&text));
    environment.add_function("percent", percent);
    environment.add_global("style", include_str!("page/style.css"));
    environment.add_global("version", env!("CARGO_PKG_VERSION"));
    environment.add_template("base.html", include_str!("page/base.html")).map_err(failed)?;
    environment.add_template("parts.html", include_str!("page/parts.html")).map_err(failed)?;
    environment.add_template("page.html", template).map_err(failed)?;
    let page = environment.get_template("page.html").map_err(failed)?;
    page.render(Value::from(Serde(values))).map_err(failed)
}

fn write_escaped(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) if value.is_safe() => out.write_str(text)?,
        Some(text) => out.write_str(&escape(text))?,
        None => write!(out, "{value}")?,
    }
    Ok(())
}

/// `text` with the five characters escaped that mean something in HTML, in text and in quoted attributes alike.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// `text` with line ends, tabs and control characters made visible.
fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => shown.push_str("↵\n"),
            '\t' => shown.push_str("⇥\t"),
            // The pictures of control characters.
            '\0'..='\u{1f}' => shown.push(char::from_u32(0x2400 + character as u32).unwrap_or('\u{fffd}')),
            '\u{7f}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                let _ = write!(shown, "⟨U+{:04X}⟩", character as u32);
            }
            _ => shown.push(character),
        }
    }
    shown
}

/// 1234567 as `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in percent, with a digit after the point where that says something.
fn percent(part: usize, whole: usize) -> String {
    if whole == 0 {
        return "–".into();
    }
    let share = 100.0 * part as f64 / whole as f64;
    match share {
        0.0 => "0 %".into(),
        _ if part == whole => "100 %".into(),
        ..0.1 => "< 0.1 %".into(),
        99.9.. => "> 99.9 %".into(),
        _ => format!("{share:.1} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_is_made_safe_and_visible() {
        assert_eq!(escape("<a href=\"x\">&'</a>"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;&lt;/a&gt;");
        assert_eq!(escape("&gt;"), "&amp;gt;");
        assert_eq!(visible("a\n\t\u{0}\u{85}\u{202e}é"), "a↵\n⇥\t\u{2400}⟨U+0085⟩⟨U+202E⟩é");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(grouped)[..]);
        assert_eq!(percent(1, 3), "33.3 %");
        let shares =
            [(0, 5), (1, 100_000), (99_999, 100_000), (5, 5), (1, 0)].map(|(part, whole)| percent(part, whole));
        assert_eq!(shares, ["0 %", "< 0.1 %", "> 99.9 %", "100 %", "–"]);
    }

    #[test]
    fn a_page_stands_alone_and_text_stays_text() {
        let template = "{% extends 'base.html' %}{% block main %}{% import 'parts.html' as parts %}\
            {{ parts.table(['a', 'b'], [[text, 1000|grouped]]) }}{{ markup|safe }}{% endblock %}";
        let page = render(template, json!({"title": "<T>", "text": "</td>&'", "markup": "<svg/>"})).unwrap();
        assert!(page.starts_with("<!doctype html>") && page.contains("<title>&lt;T&gt;</title>"), "{page}");
        assert!(page.contains("<th scope=\"row\">&lt;/td&gt;&amp;&#39;</th><td class=\"number\">1,000</td>"), "{page}");
        assert!(
            page.contains("<svg/>") && page.contains("color-scheme:light dark") && !page.contains("class=\"soft\"")
        );
        let error = render("{{ absent.part }}", json!({})).unwrap_err().to_string();
        assert!(error.contains("does not render"), "{error}");
    }
}
