//! Pieces of the page: numbers, tables, bars, a histogram. Whatever is given as text is escaped here, cells of tables are not.
use crate::prepare::Lengths;
use std::{fmt::Write as _, ops::Range};
use tunesmith_files::table::grouped;

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
pub(super) fn visible(text: &str) -> String {
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

/// A share in percent, with a digit after the point where that says something.
pub(super) fn percent(part: usize, whole: usize) -> String {
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

/// A table whose columns after the first hold numbers.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    wide_table(header, rows, 1..header.len())
}

/// A table with numbers in the columns `numbers`.
pub(super) fn wide_table(header: &[&str], rows: &[Vec<String>], numbers: Range<usize>) -> String {
    let class = |column: usize| if numbers.contains(&column) { " class=\"number\"" } else { "" };
    let mut table = String::from("<div class=\"scroll\"><table><thead><tr>");
    for (column, name) in header.iter().enumerate() {
        let _ = write!(table, "<th{}>{name}</th>", class(column));
    }
    table.push_str("</tr></thead><tbody>");
    for row in rows {
        table.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let tag = if column == 0 { "th" } else { "td" };
            let _ = write!(table, "<{tag}{}>{cell}</{tag}>", class(column));
        }
        table.push_str("</tr>");
    }
    table.push_str("</tbody></table></div>\n");
    table
}

/// A horizontal bar of several parts, each with its class, beside `most`, the longest one.
pub(super) fn bar(name: &str, label: &str, parts: &[(usize, &str)], most: usize) -> String {
    let mut bar = format!("<div class=\"bar\"><span class=\"name\">{}</span><span class=\"track\">", escape(name));
    for (size, class) in parts.iter().filter(|(size, _)| *size > 0) {
        let width = 100.0 * *size as f64 / most.max(1) as f64;
        let _ = write!(bar, "<span class=\"{class}\" style=\"width:{width:.2}%\"></span>");
    }
    let _ = writeln!(bar, "</span><span class=\"count\">{label}</span></div>");
    bar
}

/// A bar for each value, with its share of `all`.
pub(super) fn bars(values: &[(&str, usize)], all: usize) -> String {
    let most = values.iter().map(|(_, rows)| *rows).max().unwrap_or(0);
    let one = |(value, rows): &(&str, usize)| {
        let name = if value.trim().is_empty() { format!("{value:?}") } else { visible(value.trim()) };
        bar(&name, &format!("{} ({})", grouped(*rows), percent(*rows, all)), &[(*rows, "first")], most)
    };
    values.iter().map(one).collect()
}

/// Width and height of a histogram, without the room for its axis.
const SIZE: (f64, f64) = (560.0, 150.0);

/// Rows by length, on a logarithmic axis, with a line at `limit`; what is longer stands in another colour.
pub(super) fn histogram(lengths: &Lengths, limit: usize) -> String {
    let (width, height) = SIZE;
    let (Some(first), Some(last)) = (lengths.0.first(), lengths.0.last()) else { return String::new() };
    let log = |tokens: f64| tokens.max(1.0).log2();
    // Whole powers of two at both ends.
    let low = log(first.start() as f64).floor();
    let high = log(last.up_to as f64).ceil().max(low + 1.0);
    let x = |tokens: f64| (log(tokens) - low) / (high - low) * width;
    // Classes differ in width: the area is what counts rows.
    let density = |class: &crate::prepare::LengthClass| {
        let wide = x(class.up_to as f64 + 0.5) - x(class.start() as f64 - 0.5);
        class.rows as f64 / wide.max(0.5)
    };
    let most = lengths.0.iter().map(density).fold(0.0, f64::max);
    let mut svg = format!(
        "<svg viewBox=\"-10 -16 {} {}\" role=\"img\" aria-label=\"Rows by number of tokens\">",
        width + 20.0,
        height + 58.0
    );
    for power in low as u32..=high as u32 {
        let (at, tokens) = (x(f64::from(power).exp2()), 1u64 << power);
        let _ = write!(svg, "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{height}\"/>");
        // Names have room for each power, or for every second or fourth.
        let every = ((high - low) / 9.0).ceil() as u32;
        if (power - low as u32).is_multiple_of(every) {
            // The outermost names stay inside the picture.
            let anchor = match power {
                _ if power == low as u32 => "start",
                _ if power == high as u32 => "end",
                _ => "middle",
            };
            let _ = write!(
                svg,
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                height + 18.0,
                grouped(tokens as usize)
            );
        }
    }
    for class in &lengths.0 {
        let (from, to) = (x(class.start() as f64 - 0.5).max(0.0), x(class.up_to as f64 + 0.5).min(width));
        let tall = (density(class) / most * height).max(1.0);
        let kind = if class.start() > limit { "second" } else { "first" };
        let _ = write!(
            svg,
            "<rect class=\"{kind}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"><title>{} to {} tokens: {} rows</title></rect>",
            height - tall,
            (to - from - 0.6).max(0.8),
            grouped(class.start()),
            grouped(class.up_to),
            grouped(class.rows)
        );
    }
    let _ = write!(svg, "<line class=\"axis\" x1=\"0\" x2=\"{width}\" y1=\"{height}\" y2=\"{height}\"/>");
    let at = x(limit as f64 + 0.5);
    if (0.0..=width).contains(&at) {
        let anchor = if at > width * 0.7 { "end" } else { "start" };
        let beside = if at > width * 0.7 { at - 5.0 } else { at + 5.0 };
        let _ = write!(
            svg,
            "<line class=\"limit\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"-12\" y2=\"{height}\"/>\
             <text class=\"limit\" x=\"{beside:.1}\" y=\"-4\" text-anchor=\"{anchor}\">max_length {}</text>",
            grouped(limit)
        );
    }
    let _ =
        write!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">tokens</text></svg>", width / 2.0, height + 36.0);
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn bars_of_a_histogram_lie_on_its_axis() {
        let mut lengths = Lengths::default();
        [5, 30, 31, 900, 40_000].into_iter().for_each(|n| lengths.add(n));
        let svg = histogram(&lengths, 1024);
        assert_eq!((svg.matches("class=\"first\"").count(), svg.matches("class=\"second\"").count()), (4, 1));
        assert!(svg.contains("max_length 1,024") && svg.contains(">65,536<"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("=\"-0.") && !svg.contains("inf"), "{svg}");
        assert_eq!(histogram(&Lengths::default(), 10), "");
    }
}
