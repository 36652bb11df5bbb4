//! Numbers and tables as people read them.

use std::fmt::Display;

/// 1234567 as `1,234,567`.
pub fn grouped(number: impl Display) -> String {
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

/// Rows in columns: the first left-aligned, the others right-aligned.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cells = || std::iter::once(header.iter().map(|s| s.to_string()).collect()).chain(rows.iter().cloned());
    let mut widths = vec![0; header.len()];
    for row in cells() {
        for (width, cell) in widths.iter_mut().zip(&row as &Vec<String>) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in cells() {
        let padded = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, width))| if i == 0 { format!("{cell:width$}") } else { format!("{cell:>width$}") });
        let line = padded.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["long".into(), "100".into()]];
        assert_eq!(table(&["name", "n"], &rows), "name    n\na       1\nlong  100\n");
    }
}
