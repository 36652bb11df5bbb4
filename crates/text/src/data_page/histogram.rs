//! Rows by their length, as a picture.
use crate::{
    page::grouped,
    prepare::{LengthClass, Lengths},
};
use std::fmt::Write as _;

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
    let density = |class: &LengthClass| {
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
