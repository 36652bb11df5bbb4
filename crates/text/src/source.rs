//! Which files a list of paths, folders and patterns means.
use crate::{Error, Result};
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

/// The endings of files with rows.
const ENDINGS: [&str; 3] = ["txt", "jsonl", "json"];

/// The files that `places` name, each once, in the order given: a file stands for itself, a folder for every `.txt` and
/// `.jsonl` file below it (sorted; names that begin with a dot are left out), anything with `*`, `?` or `[` for the
/// files that match (sorted).
///
/// # Errors
/// A place that does not exist, holds no data, or is a file of another kind.
pub fn files(places: &[String]) -> Result<Vec<PathBuf>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for place in places {
        let path = Path::new(place);
        let group = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                let mut group = Vec::new();
                walk(path, &mut group)?;
                if group.is_empty() {
                    return Err(Error::Input(format!("{place}: no .txt or .jsonl file in this folder")));
                }
                group
            }
            Ok(_) => vec![path.to_owned()],
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && place.contains(['*', '?', '[']) => {
                matching(place)?
            }
            Err(error) => return Err(Error::io("cannot read", path, error)),
        };
        for file in group {
            let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
            if !ENDINGS.contains(&ending.as_str()) {
                return Err(Error::Input(format!(
                    "{}: unknown kind of data; known are .txt (plain text), .jsonl and .json (one JSON row a line, or one \
                     list of rows)",
                    file.display()
                )));
            }
            let identity = fs::canonicalize(&file).map_err(|e| Error::io("cannot read", &file, e))?;
            if seen.insert(identity) {
                found.push(file);
            }
        }
    }
    Ok(found)
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
        } else if path.extension().is_some_and(|ending| ending == "txt" || ending == "jsonl") && path.is_file() {
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
        for name in ["b.txt", "a.jsonl", "notes.md", "config.json", "sub/c.txt", "sub/.hidden/d.txt"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        folder
    }

    fn names(folder: &Path, places: &[&str]) -> Result<Vec<String>> {
        let places: Vec<String> = places.iter().map(|p| folder.join(p).display().to_string()).collect();
        let strip = |path: PathBuf| path.strip_prefix(folder).unwrap().display().to_string();
        Ok(files(&places)?.into_iter().map(strip).collect())
    }

    #[test]
    fn folders_patterns_and_files_are_found_once() {
        let folder = tree();
        assert_eq!(names(folder.path(), &[""]).unwrap(), ["a.jsonl", "b.txt", "sub/c.txt"]);
        assert_eq!(names(folder.path(), &["sub/c.txt", "*.txt", "**/*.txt"]).unwrap()[..2], ["sub/c.txt", "b.txt"]);
        assert_eq!(names(folder.path(), &["config.json"]).unwrap(), ["config.json"]);
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
        assert!(text("empty").contains("no .txt or .jsonl file"));
    }
}
