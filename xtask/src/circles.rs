//! Circles: files of one crate that depend on each other in a loop.
//!
//! A file depends on the file that defines what its code names, whichever re-exports the name came through; what only
//! tests use does not count, nor do `mod child;` and `pub use`. Methods need types to be resolved and are not followed.
//!
//! What a module takes from the module that it is in (`super::Plan`) is counted apart: parent and child are one subject
//! in two files, while two subjects in a loop cannot be read, moved or tested one after the other.

mod names;

use crate::{
    Result,
    limits::{MAX_FILES_IN_CIRCLES, MAX_FILES_IN_CIRCLES_WITH_PARENTS},
    size,
};
use names::{Arrows, Names};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Prints every circle with what makes it, those through parents only where they are asked for; fails when more files
/// are in circles than are allowed.
pub(crate) fn check(root: &Path, show_parents: bool) -> Result<()> {
    let mut fails = false;
    for (with_parents, what, allowed) in [
        (true, "with what modules take from those that they are in", MAX_FILES_IN_CIRCLES_WITH_PARENTS),
        (false, "without that", MAX_FILES_IN_CIRCLES),
    ] {
        let (mut num_circles, mut num_files) = (0, 0);
        for krate in size::crates(root)? {
            let arrows = Names::read(&krate.join("src"))?.arrows(with_parents);
            for files in circles(&arrows) {
                num_circles += 1;
                num_files += files.len();
                if show_parents || !with_parents {
                    println!("circle {num_circles}, {} files\n{}", files.len(), describe(&files, &arrows, root));
                }
            }
        }
        println!("{what}: {num_circles} circles, {num_files} files in them, {allowed} allowed");
        fails |= num_files > allowed;
    }
    if fails {
        return Err("files that depend on each other in a loop: move what both need below them".into());
    }
    Ok(())
}

/// The arrows inside a circle, one per line.
fn describe(files: &BTreeSet<&PathBuf>, arrows: &Arrows, root: &Path) -> String {
    let mut text = String::new();
    for ((from, to), names) in arrows {
        if files.contains(from) && files.contains(to) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let (from, to) = (size::relative(from, root), size::relative(to, root));
            let _ = writeln!(text, "    {from} -> {to}: {}", names.join(", "));
        }
    }
    text
}

/// Groups of files each of which reaches every other.
fn circles(arrows: &Arrows) -> Vec<BTreeSet<&PathBuf>> {
    let mut next: BTreeMap<&PathBuf, Vec<&PathBuf>> = BTreeMap::new();
    for (from, to) in arrows.keys() {
        next.entry(from).or_default().push(to);
    }
    let reached = |start| {
        let (mut found, mut open) = (BTreeSet::new(), vec![start]);
        while let Some(file) = open.pop() {
            let unseen = next.get(file).into_iter().flatten().filter(|file| found.insert(**file));
            open.extend(unseen);
        }
        found
    };
    let reached: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> = next.keys().map(|file| (*file, reached(*file))).collect();
    let mut found: Vec<BTreeSet<&PathBuf>> = Vec::new();
    for (file, others) in &reached {
        // A file that reaches itself is in a circle; the first of its files names the others.
        if others.contains(file) && !found.iter().any(|circle| circle.contains(file)) {
            let returns = |other: &&&PathBuf| reached.get(**other).is_some_and(|back| back.contains(file));
            found.push(others.iter().filter(returns).copied().collect());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The circles of a crate made of `files`, each as its arrows.
    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            crate::write(&folder.path().join(name), text).unwrap();
        }
        let arrows = Names::read(folder.path()).unwrap().arrows(true);
        circles(&arrows).iter().map(|files| describe(files, &arrows, folder.path())).collect()
    }

    #[test]
    fn a_reexport_hides_nobody() {
        let lib = "mod a; mod b; pub use a::A; pub use b::B;";
        let circles = found(&[
            ("lib.rs", lib),
            ("a.rs", "use crate::B; pub struct A(B);"),
            ("b.rs", "pub struct B; impl B { fn a(&self) -> Option<crate::A> { None } }"),
        ]);
        assert_eq!(circles, ["    a.rs -> b.rs: B\n    b.rs -> a.rs: A\n"]);
    }

    #[test]
    fn down_only_is_no_circle() {
        let files = [
            ("lib.rs", "pub mod a; mod b; pub use b::B; pub fn f() { a::g() }"),
            ("a.rs", "mod deep; pub use deep::Deep; pub fn g() { deep::h() }"),
            ("a/deep.rs", "use crate::B; pub struct Deep(B); pub fn h() {}"),
            ("b.rs", "pub struct B; #[cfg(test)] mod tests { use crate::a::g; } #[cfg(test)] use crate::f;"),
        ];
        assert_eq!(found(&files), [""; 0]);
    }

    #[test]
    fn a_child_that_needs_its_parent_makes_a_circle() {
        let parent = "mod child; pub struct Plan; pub fn run() { child::go(Plan) }";
        let files = [("main.rs", parent), ("child.rs", "pub fn go(_: super::Plan) {}")];
        assert_eq!(found(&files), ["    child.rs -> main.rs: Plan\n    main.rs -> child.rs: go\n"]);
    }

    #[test]
    fn longer_ways_globs_modules_and_macros_are_followed() {
        let circles = found(&[
            ("lib.rs", "mod a; mod b; mod c; mod both;"),
            ("a.rs", "use crate::b; pub const N: usize = 1; pub fn f() { b::f() }"),
            ("b/mod.rs", "use crate::both::*; pub fn f() { assert_eq!(1, both::g(c::M), \"{}\", 2) }"),
            ("both.rs", "pub use crate::{both, c}; pub fn g(_: u8) { }"),
            ("c.rs", "made! { M } pub fn x() { { use crate::a::N as Other; println!(\"{}\", Other); } }"),
        ]);
        let arrows = ["    a.rs -> b/mod.rs: f\n", "    b/mod.rs -> c.rs: M\n", "    c.rs -> a.rs: N\n"];
        assert_eq!(circles, [arrows.concat()]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        crate::write(&folder.path().join("lib.rs"), "mod gone;").unwrap();
        let error = Names::read(folder.path()).err().unwrap();
        assert!(error.contains("gone"), "{error}");
    }
}
