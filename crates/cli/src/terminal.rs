//! Progress bars and tables. Bars go to standard error and hide themselves where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};
use tunesmith_files::{Observer, Unit};

fn styled(template: &str, what: &str, len: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style.progress_chars("━╸ ")).with_message(what.to_owned())
}

/// A bar over bytes.
pub(crate) fn bytes_bar(what: &str) -> ProgressBar {
    styled("{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}", what, 0)
}

/// A bar over things that are counted.
pub(crate) fn count_bar(what: &str, len: u64) -> ProgressBar {
    styled("{msg} {bar:30} {human_pos}/{human_len} {eta}", what, len)
}

/// The bar of a training run: steps, time left, and what the last step showed.
pub(crate) fn training_bar(len: u64) -> ProgressBar {
    styled("{bar:20} {human_pos}/{human_len} {elapsed}<{eta} {msg}", "", len)
}

/// Does something with a bar for how far it is.
pub(crate) fn with_bar<T>(work: impl FnOnce(&mut Observer<'_>) -> T) -> T {
    let mut bar: Option<(String, ProgressBar)> = None;
    let done = work(&mut |progress| {
        if bar.as_ref().is_none_or(|(what, _)| what != progress.what) {
            if let Some((_, old)) = bar.take() {
                old.finish_and_clear();
            }
            let new = match progress.unit {
                Unit::Bytes => bytes_bar(progress.what),
                Unit::Items => count_bar(progress.what, 0),
            };
            bar = Some((progress.what.to_owned(), new));
        }
        if let Some((_, bar)) = &bar {
            if let Some(total) = progress.total {
                bar.set_length(total);
            }
            bar.set_position(progress.done);
        }
    });
    if let Some((_, bar)) = bar {
        bar.finish_and_clear();
    }
    done
}
