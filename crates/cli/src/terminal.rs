//! Progress bars and tables. Bars go to standard error and hide themselves where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

fn styled(template: &str, what: &str, len: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style.progress_chars("━╸ ")).with_message(what.to_owned())
}

/// A bar over bytes.
pub(crate) fn bytes_bar(what: &str) -> ProgressBar {
    styled("{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}", what, 0)
}

/// A bar over things that are counted.
pub(crate) fn count_bar(what: &str, len: u64) -> ProgressBar {
    styled("{msg} {bar:30} {human_pos}/{human_len} {eta}", what, len)
}

/// The bar of a training run: steps, time left, and what the last step showed.
pub(crate) fn training_bar(len: u64) -> ProgressBar {
    styled("{bar:20} {human_pos}/{human_len} {elapsed}<{eta} {msg}", "", len)
}

/// Bytes in a unit that suits them.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}

/// A number with thousands separated.
pub(crate) fn count(n: u64) -> String {
    indicatif::HumanCount(n).to_string()
}

/// Rows in columns: the first left-aligned, the others right-aligned.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
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
