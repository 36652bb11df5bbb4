//! How large the project is, and the limits on the length of a file and the width of a comment.

use crate::{Result, limits::MAX_WIDE_COMMENTS, read};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file above this is hard to read in one go and must be divided.
const MAX_LINES: usize = 800;

/// Columns of a comment. Code is broken by rustfmt, which leaves comments alone.
const MAX_COLUMNS: usize = 120;

/// Prints the sizes; fails when a file is too long, or more comments are too wide than are allowed.
pub(crate) fn report(root: &Path) -> Result<()> {
    let sizes = measure(root)?;
    for (name, files, lines) in &sizes.crates {
        println!("{name:<16} {files:>4} files {lines:>7} lines");
    }
    let total: usize = sizes.crates.iter().map(|(_, _, lines)| lines).sum();
    println!("{:<16} {:>10} {total:>7} lines", "all", "");
    println!("crates of others in the binary and its build scripts: {}", dependencies(root)?);
    let binary = target_directory(root)?.join("release").join(format!("tunesmith{}", std::env::consts::EXE_SUFFIX));
    match std::fs::metadata(&binary) {
        Ok(metadata) => println!("release binary: {:.1} MB", metadata.len() as f64 / 1e6),
        Err(_) => println!("release binary: not built"),
    }
    let num_wide: usize = sizes.wide_comments.iter().map(|(_, num)| num).sum();
    println!("comments wider than {MAX_COLUMNS} columns: {num_wide}, {MAX_WIDE_COMMENTS} allowed");
    if !sizes.too_long.is_empty() {
        return Err(format!("above {MAX_LINES} lines, divide by subject: {}", sizes.too_long.join(", ")));
    }
    if num_wide > MAX_WIDE_COMMENTS {
        let files: Vec<String> = sizes.wide_comments.iter().map(|(file, num)| format!("{file} ({num})")).collect();
        return Err(format!("comments wider than {MAX_COLUMNS} columns, break them: {}", files.join(", ")));
    }
    Ok(())
}

/// What the sources come to.
struct Sizes {
    /// Name, files and lines of each crate.
    crates: Vec<(String, usize, usize)>,
    /// Files above the limit.
    too_long: Vec<String>,
    /// Files with comments that are too wide, and how many.
    wide_comments: Vec<(String, usize)>,
}

fn measure(root: &Path) -> Result<Sizes> {
    let mut sizes = Sizes { crates: Vec::new(), too_long: Vec::new(), wide_comments: Vec::new() };
    for krate in crates(root)? {
        let files = sources(&krate)?;
        let mut lines = 0;
        for file in &files {
            let text = read(file)?;
            let count = text.lines().count();
            lines += count;
            if count > MAX_LINES {
                sizes.too_long.push(format!("{} ({count} lines)", relative(file, root)));
            }
            match text.lines().filter(|line| is_wide_comment(line)).count() {
                0 => {}
                wide => sizes.wide_comments.push((relative(file, root), wide)),
            }
        }
        sizes.crates.push((relative(&krate, root), files.len(), lines));
    }
    Ok(sizes)
}

fn is_wide_comment(line: &str) -> bool {
    line.trim_start().starts_with("//") && line.chars().count() > MAX_COLUMNS
}

pub(crate) fn relative(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

/// The folders of the workspace's crates.
pub(crate) fn crates(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = entries(&root.join("crates"))?.into_iter().filter(|p| p.is_dir()).collect();
    found.push(root.join("xtask"));
    Ok(found)
}

/// Every Rust and CUDA file below `folder`, sorted.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            found.extend(sources(&path)?);
        } else if path.extension().is_some_and(|ending| ["rs", "cu", "cuh", "h"].iter().any(|known| ending == *known)) {
            found.push(path);
        }
    }
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = |e: std::io::Error| format!("cannot read {}: {e}", folder.display());
    let entries = std::fs::read_dir(folder).map_err(cannot)?;
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>().map_err(cannot)?;
    paths.sort();
    Ok(paths)
}

/// Number of crates that are not ours in the tree of the binary on this platform, build scripts' included.
fn dependencies(root: &Path) -> Result<usize> {
    let tree = cargo(root, &["tree", "--package", "tunesmith", "--edges", "normal,build", "--prefix", "none"])?;
    let names: BTreeSet<&str> = tree
        .lines()
        .filter(|line| !line.starts_with("tunesmith") && !line.trim().is_empty())
        .map(|line| line.trim_end_matches(" (*)"))
        .collect();
    Ok(names.len())
}

/// Where cargo builds to.
pub(crate) fn target_directory(root: &Path) -> Result<PathBuf> {
    let json = cargo(root, &["metadata", "--no-deps", "--format-version", "1"])?;
    let metadata: serde_json::Value = serde_json::from_str(&json).map_err(|e| format!("cargo metadata: {e}"))?;
    let folder = metadata["target_directory"].as_str().ok_or("cargo metadata names no target_directory")?;
    Ok(PathBuf::from(folder))
}

fn cargo(root: &Path, args: &[&str]) -> Result<String> {
    // The cargo that runs this task, where it says which one that is.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let done = Command::new(cargo).args(args).current_dir(root).output();
    let done = done.map_err(|e| format!("cannot run cargo {}: {e}", args[0]))?;
    if !done.status.success() {
        return Err(format!("cargo {}: {}", args[0], String::from_utf8_lossy(&done.stderr).trim_end()));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_is_too_long() {
        let sizes = measure(&crate::root()).unwrap();
        assert_eq!(sizes.too_long, Vec::<String>::new());
    }

    #[test]
    fn comments_have_a_width() {
        let line = |start: &str, num: usize| format!("{start}{}", "é".repeat(num - start.len()));
        assert!(is_wide_comment(&line("    /// ", MAX_COLUMNS + 1)));
        assert!(!is_wide_comment(&line("    // ", MAX_COLUMNS)));
        assert!(!is_wide_comment(&line("    let x = ", MAX_COLUMNS + 1)));
    }

    #[test]
    fn a_file_that_is_too_long_is_named() {
        let folder = tempfile::tempdir().unwrap();
        crate::write(&folder.path().join("crates/a/src/lib.rs"), "\n".repeat(MAX_LINES + 1)).unwrap();
        crate::write(&folder.path().join("crates/a/src/b.rs"), "\n".repeat(MAX_LINES)).unwrap();
        crate::write(&folder.path().join("xtask/src/main.rs"), "fn main() {}\n").unwrap();
        let sizes = measure(folder.path()).unwrap();
        assert_eq!(sizes.crates, [("crates/a".into(), 2, 2 * MAX_LINES + 1), ("xtask".into(), 1, 1)]);
        assert_eq!(sizes.too_long, ["crates/a/src/lib.rs (801 lines)"]);
    }
}
