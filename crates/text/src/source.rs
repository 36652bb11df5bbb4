//! Which files a list of paths, folders and patterns means, and what kind of data each is.
mod zipped;

use crate::{Error, Result};
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
pub(crate) use zipped::Member;

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

/// A packed file may grow to [`EXPANSION_FREE`] bytes, and beyond that by this factor: real text stays far below it,
/// and what is made to fill a disk does not.
pub(crate) const EXPANSION: u64 = 500;
pub(crate) const EXPANSION_FREE: u64 = 256 << 20;

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
fn known_endings() -> String {
    ENDINGS.map(|(ending, _)| format!(".{ending}")).join(", ")
}

/// A file of rows: one on the disk, or one inside an archive.
#[derive(Clone, Debug)]
pub struct DataFile {
    path: PathBuf,
    member: Option<Arc<Member>>,
    shown: PathBuf,
}

impl From<PathBuf> for DataFile {
    fn from(path: PathBuf) -> Self {
        Self { shown: path.clone(), path, member: None }
    }
}

impl DataFile {
    /// The file on the disk: an archive that holds it, or itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name for messages; its ending says what it holds.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// The part of the archive that it is.
    pub(crate) fn member(&self) -> Option<&Arc<Member>> {
        self.member.as_ref()
    }
}

/// Kind and compression of a file by its name: `data.jsonl.gz` is gzipped JSON lines. Columnar files compress inside,
/// so packed ones are not read.
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

/// Whether the rows of `file` are numbered as rows; otherwise by the lines they begin at.
pub(crate) fn is_columnar(file: &str) -> bool {
    matches!(kind(Path::new(file)), Ok((Kind::Parquet | Kind::Arrow, _)))
}

/// The files that `places` name, each once, in the order given: a file stands for itself, a folder for every file of
/// data below it (sorted; names that begin with a dot are left out, and `.json` files too where there are others, since
/// they then describe the rest), a `.zip` archive for those inside it, anything with `*`, `?` or `[` for the files that
/// match (sorted). Archives in a folder are left out: often they hold the same again.
///
/// # Errors
/// A place that does not exist, holds no data, holds several splits, or is a file of another kind.
pub fn files(places: &[String]) -> Result<Vec<DataFile>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for place in places {
        let path = Path::new(place);
        let group = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => in_folder(path)?,
            Ok(_) => vec![path.to_owned()],
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && place.contains(['*', '?', '[']) => {
                matching(place)?
            }
            Err(error) => return Err(Error::io("cannot read", path, error)),
        };
        for file in group {
            let is_archive = zipped::is_archive(&file);
            if !is_archive {
                kind(&file)?;
            }
            let identity = fs::canonicalize(&file).map_err(|e| Error::io("cannot read", &file, e))?;
            if !seen.insert(identity) {
                continue;
            }
            match is_archive {
                true => found.extend(zipped::members(&file)?),
                false => found.push(file.into()),
            }
        }
    }
    Ok(found)
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.join("dataset_dict.json").exists() {
        return Err(Error::Input(format!(
            "{0}: this folder holds several splits (dataset_dict.json), which must not be mixed; name them one by one, \
             such as train = [\"{0}/train\"]",
            folder.display()
        )));
    }
    let mut group = Vec::new();
    walk(folder, &mut group)?;
    let described: Vec<_> = group.iter().filter(|file| !matches!(kind(file), Ok((Kind::Json, _)))).cloned().collect();
    if !described.is_empty() {
        group = described;
    }
    if group.is_empty() {
        let known = known_endings();
        return Err(Error::Input(format!("{}: no file of data in this folder ({known})", folder.display())));
    }
    Ok(group)
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let cannot = |error| Error::io("cannot list", folder, error);
    let mut entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(cannot)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // A linked folder is not entered: it could lead back up.
        if entry.file_type().map_err(cannot)?.is_dir() {
            walk(&path, found)?;
        } else if kind(&path).is_ok() && path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

fn matching(pattern: &str) -> Result<Vec<PathBuf>> {
    let paths = glob::glob(pattern).map_err(|e| Error::Input(format!("{pattern}: not a file pattern: {e}")))?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.map_err(|e| {
            let at = e.path().to_owned();
            Error::io("cannot read", &at, e.into())
        })?;
        if path.is_file() {
            found.push(path);
        }
    }
    if found.is_empty() {
        return Err(Error::Input(format!("{pattern}: no file matches this pattern")));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("sub/.hidden")).unwrap();
        for name in ["b.txt", "a.jsonl", "notes.md", "config.json", "sub/c.csv.gz", "sub/.hidden/d.txt"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        folder
    }

    fn names(folder: &Path, places: &[&str]) -> Result<Vec<String>> {
        let places: Vec<String> = places.iter().map(|p| folder.join(p).display().to_string()).collect();
        let strip = |file: DataFile| file.shown().strip_prefix(folder).unwrap().display().to_string();
        Ok(files(&places)?.into_iter().map(strip).collect())
    }

    #[test]
    fn folders_patterns_and_files_are_found_once() {
        let folder = tree();
        assert_eq!(names(folder.path(), &[""]).unwrap(), ["a.jsonl", "b.txt", "sub/c.csv.gz"]);
        assert_eq!(names(folder.path(), &["b.txt", "*.txt", "**/*.gz"]).unwrap(), ["b.txt", "sub/c.csv.gz"]);
        assert_eq!(names(folder.path(), &["config.json"]).unwrap(), ["config.json"]);
        fs::create_dir(folder.path().join("only")).unwrap();
        fs::write(folder.path().join("only/rows.json"), "x").unwrap();
        assert_eq!(names(folder.path(), &["only"]).unwrap(), ["only/rows.json"]);
    }

    #[test]
    fn kinds_follow_from_endings() {
        let of = |name: &str| kind(Path::new(name)).unwrap();
        assert_eq!(of("a/b.TXT"), (Kind::Text, Compression::None));
        assert_eq!(of("b.ndjson.zst"), (Kind::JsonLines, Compression::Zstd));
        assert_eq!(of("b.tsv.gz"), (Kind::Tsv, Compression::Gzip));
        assert_eq!(of("b.feather"), (Kind::Arrow, Compression::None));
        assert!(kind(Path::new("b.parquet.gz")).unwrap_err().to_string().contains("unpack it first"));
        assert!(kind(Path::new("b.gz")).is_err() && kind(Path::new("txt")).is_err());
        assert!(is_columnar("x.parquet") && !is_columnar("x.csv"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tree();
        let text = |place: &str| names(folder.path(), &[place]).unwrap_err().to_string();
        assert!(text("none.txt").contains("none.txt: no such file"));
        assert!(text("*.csv").contains("no file matches"));
        assert!(text("notes.md").contains("unknown kind of data"));
        assert!(text("[").contains("not a file pattern"));
        fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(text("empty").contains("no file of data"));
        fs::write(folder.path().join("sub/dataset_dict.json"), "{}").unwrap();
        assert!(text("sub").contains("holds several splits"));
    }
}
