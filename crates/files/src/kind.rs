//! What kind of data a file holds, by its name.

use crate::{Error, Result};
use std::path::Path;

/// What a file of rows is written in, told by its ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Plain text.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// One JSON object a line, or one list of objects.
    Json,
    /// Fields separated by commas (or by what the header uses), names in the first line.
    Csv,
    /// Fields separated by tabs, names in the first line.
    Tsv,
    /// Apache Parquet.
    Parquet,
    /// Apache Arrow's IPC format: file or stream.
    Arrow,
}

/// How a file is packed, told by its last ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// `.gz`.
    Gzip,
    /// `.zst`.
    Zstd,
}

/// Endings and kinds, as they are named in messages.
const ENDINGS: [(&str, Kind); 9] = [
    ("txt", Kind::Text),
    ("jsonl", Kind::JsonLines),
    ("ndjson", Kind::JsonLines),
    ("json", Kind::Json),
    ("csv", Kind::Csv),
    ("tsv", Kind::Tsv),
    ("parquet", Kind::Parquet),
    ("arrow", Kind::Arrow),
    ("feather", Kind::Arrow),
];

/// The endings, as messages list them.
pub fn known_endings() -> String {
    ENDINGS.map(|(ending, _)| format!(".{ending}")).join(", ")
}

/// Kind and compression of a file by its name: `data.jsonl.gz` is gzipped JSON lines. Columnar files compress inside, so
/// packed ones are not read.
///
/// # Errors
/// An ending that is not known; the message lists those that are.
pub fn kind(path: &Path) -> Result<(Kind, Compression)> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    let (inner, compression) = match name.rsplit_once('.') {
        Some((inner, "gz")) => (inner, Compression::Gzip),
        Some((inner, "zst")) => (inner, Compression::Zstd),
        _ => (&name[..], Compression::None),
    };
    let ending = inner.rsplit_once('.').map_or("", |(_, ending)| ending);
    let found = ENDINGS.iter().find(|(known, _)| *known == ending).map(|(_, kind)| *kind);
    match (found, compression) {
        (Some(Kind::Parquet | Kind::Arrow), Compression::Gzip | Compression::Zstd) => {
            Err(Error::Input(format!("{}: .{ending} files are not read packed; unpack it first", path.display())))
        }
        (Some(kind), compression) => Ok((kind, compression)),
        (None, _) => {
            let known = known_endings();
            Err(Error::Input(format!(
                "{}: unknown kind of data; known are {known} (see docs/data.md), and all but .parquet, .arrow and .feather \
                 also with .gz or .zst, or in a .zip archive",
                path.display(),
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_from_endings() {
        let of = |name: &str| kind(Path::new(name)).unwrap();
        assert_eq!(of("a/b.TXT"), (Kind::Text, Compression::None));
        assert_eq!(of("b.ndjson.zst"), (Kind::JsonLines, Compression::Zstd));
        assert_eq!(of("b.tsv.gz"), (Kind::Tsv, Compression::Gzip));
        assert_eq!(of("b.feather"), (Kind::Arrow, Compression::None));
        assert!(kind(Path::new("b.parquet.gz")).unwrap_err().to_string().contains("unpack it first"));
        assert!(kind(Path::new("b.gz")).is_err() && kind(Path::new("txt")).is_err());
    }
}
