//! Numbers as people read them.

pub(super) use tunesmith_text::escape;

/// 1234567 as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    tunesmith_files::table::grouped(number)
}

/// 1234567 as `1.23 M`; below 10,000 in full.
pub(super) fn compact(number: f64) -> String {
    for (limit, unit) in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")] {
        if number >= limit {
            return format!("{} {unit}", significant(number / if unit == "k" { 1e3 } else { limit }, 3));
        }
    }
    if number >= 1.0 { grouped(number.round() as u64) } else { significant(number, 2) }
}

/// Seconds as `42 s`, `3 min 05 s` or `2 h 07 min`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{} h {m:02} min", grouped(h)),
    }
}

/// A number with so many significant digits, without an exponent.
pub(super) fn significant(value: f64, digits: i32) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value.is_finite() { "0".into() } else { "\u{2013}".into() };
    }
    let decimals = digits - 1 - value.abs().log10().floor() as i32;
    format!("{value:.*}", usize::try_from(decimals.clamp(0, 12)).unwrap_or(0)).replace('-', "\u{2212}")
}

/// A number on an axis: short, exact for the round numbers of ticks, `2e-4` where it is small.
pub(super) fn tick(value: f64) -> String {
    let size = value.abs();
    // Ticks are sums of steps: what is left of zero or of a round number is rounding.
    if size < 1e-12 {
        return "0".into();
    }
    let text = if size >= 10_000.0 {
        let (scaled, unit) = if size >= 1e6 { (value / 1e6, "M") } else { (value / 1e3, "k") };
        format!("{}{unit}", trimmed(format!("{scaled:.2}")))
    } else if size >= 0.01 {
        trimmed(format!("{value:.3}"))
    } else {
        let text = format!("{value:.2e}");
        match text.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", trimmed(digits.to_owned())),
            None => text,
        }
    };
    text.replace('-', "\u{2212}")
}

/// Without zeros (and a point) at the end of the decimals.
fn trimmed(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A share as a percentage: `0.36 %`, `12 %`. Only a whole share is `100 %`.
pub(super) fn percent(share: f64) -> String {
    let value = 100.0 * share;
    if (99.0..100.0).contains(&value) {
        return format!("{:.1} %", value.min(99.9));
    }
    if value.abs() >= 10.0 { format!("{value:.0} %") } else { format!("{} %", significant(value, 2)) }
}

/// A change as a percentage with its sign.
pub(super) fn change(from: f64, to: f64) -> String {
    let value = 100.0 * (to / from - 1.0);
    if !value.is_finite() {
        return "\u{2013}".into();
    }
    let sign = if value < 0.0 { "\u{2212}" } else { "+" };
    format!("{sign}{:.1} %", value.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(["1", "999", "1,000", "1,234,567"], [1, 999, 1000, 1234567].map(grouped)[..]);
        assert_eq!(
            ["0", "9,999", "12.3 k", "4.88 M", "135 M"],
            [0.0, 9999.0, 12345.0, 4.884e6, 134.6e6].map(compact)[..]
        );
        assert_eq!(["4 s", "3 min 05 s", "2 h 07 min"], [4.2, 185.0, 7620.0].map(duration)[..]);
        assert_eq!(
            ["2.35", "0.0123", "123", "\u{2212}2.00", "\u{2013}"],
            [2.3471, 0.012345, 123.4, -2.0, f64::NAN].map(|v| significant(v, 3))[..]
        );
        assert_eq!(
            ["0", "2e\u{2212}4", "1.5e\u{2212}4", "0.05", "2.5", "400", "12.5k", "1.2M"],
            [1e-17, 2e-4, 1.5e-4, 0.05, 2.5, 400.0, 12500.0, 1.2e6].map(tick)[..]
        );
        assert_eq!(["3.6 %", "12 %", "99.9 %", "100 %"], [0.036, 0.12, 0.99996, 1.0].map(percent)[..]);
        assert_eq!(change(4.0, 3.0), "\u{2212}25.0 %");
        assert_eq!(change(0.0, 3.0), "\u{2013}");
    }
}
