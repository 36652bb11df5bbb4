//! The modules of a crate, what their names stand for, and the file that defines what a path names.

use crate::{Result, read};
use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree, Visibility};

/// Which file takes what from which other file of its crate.
pub(super) type Arrows = BTreeMap<(PathBuf, PathBuf), BTreeSet<String>>;

/// A path as written, one element per segment.
type Segments = Vec<String>;

/// How many imports a name may come through: more is a loop of imports.
const MAX_IMPORTS: usize = 16;

/// All modules of a crate; the first is its root.
#[derive(Default)]
pub(super) struct Names {
    modules: Vec<Module>,
}

#[derive(Default)]
struct Module {
    file: PathBuf,
    parent: usize,
    names: HashMap<String, Vec<Name>>,
    /// Modules all of whose names it imports.
    globs: Vec<Segments>,
    /// Every path that its code names.
    used: Vec<Segments>,
}

enum Name {
    Module(usize),
    Item,
    Import(Segments),
}

/// What a path leads to.
#[derive(Clone, Copy, PartialEq)]
enum Target<'a> {
    Module(usize),
    /// An item of this module.
    Item(usize, &'a str),
}

impl Names {
    /// Reads the library in `folder`, or the program where there is no library.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let root = ["lib.rs", "main.rs"].map(|name| folder.join(name)).into_iter().find(|path| path.is_file());
        let root = root.ok_or_else(|| format!("no lib.rs or main.rs in {}", folder.display()))?;
        let mut names = Self::default();
        names.read_file(root, folder, 0)?;
        Ok(names)
    }

    /// Adds the module that is the whole of `file`, its children being in `folder`. Returns its number.
    fn read_file(&mut self, file: PathBuf, folder: &Path, parent: usize) -> Result<usize> {
        let parsed = syn::parse_file(&read(&file)?).map_err(|e| format!("{}: {e}", file.display()))?;
        self.add(parsed.items, file, folder, parent)
    }

    fn add(&mut self, items: Vec<Item>, file: PathBuf, folder: &Path, parent: usize) -> Result<usize> {
        let number = self.modules.len();
        self.modules.push(Module { file: file.clone(), parent, ..Module::default() });
        for item in items {
            let Item::Mod(child) = item else {
                self.modules[number].visit_item(&item);
                continue;
            };
            if is_for_tests(&child.attrs) {
                continue;
            }
            let name = child.ident.to_string();
            let folder = folder.join(&name);
            let child = match child.content {
                Some((_, items)) => self.add(items, file.clone(), &folder, number)?,
                None => {
                    let flat = folder.with_extension("rs");
                    let path = if flat.is_file() { flat } else { folder.join("mod.rs") };
                    self.read_file(path, &folder, number)?
                }
            };
            self.modules[number].names.entry(name).or_default().push(Name::Module(child));
        }
        Ok(number)
    }

    /// Who takes what from whom; `with_parents` adds what modules take from those that they are in.
    pub(super) fn arrows(&self, with_parents: bool) -> Arrows {
        let mut arrows = Arrows::new();
        for (number, module) in self.modules.iter().enumerate() {
            for path in &module.used {
                for target in self.resolve(number, path, MAX_IMPORTS) {
                    let Target::Item(owner, name) = target else { continue };
                    let to = &self.modules[owner].file;
                    if *to != module.file && (with_parents || !self.is_below(number, to)) {
                        let names = arrows.entry((module.file.clone(), to.clone())).or_default();
                        names.insert(name.to_owned());
                    }
                }
            }
        }
        arrows
    }

    /// Whether `file` holds one of the modules that module `number` is in.
    fn is_below(&self, mut number: usize, file: &Path) -> bool {
        while number != 0 {
            number = self.modules[number].parent;
            if self.modules[number].file == file {
                return true;
            }
        }
        false
    }

    /// What `path` names in module `number`; nothing where it leads out of the crate.
    fn resolve<'a>(&'a self, number: usize, path: &'a [String], imports: usize) -> Vec<Target<'a>> {
        let Some((first, rest)) = path.split_first() else { return Vec::new() };
        let mut found = match first.as_str() {
            "crate" => vec![Target::Module(0)],
            "self" => vec![Target::Module(number)],
            "super" => vec![Target::Module(self.modules[number].parent)],
            name => self.look_up(number, name, imports),
        };
        for name in rest {
            // A module and a function may share their name: what has something in it is the module.
            if found.iter().any(|target| matches!(target, Target::Module(_))) {
                found.retain(|target| matches!(target, Target::Module(_)));
            }
            let inside = |target| match target {
                Target::Module(number) if name == "super" => vec![Target::Module(self.modules[number].parent)],
                Target::Module(number) if name == "self" => vec![Target::Module(number)],
                Target::Module(number) => match self.look_up(number, name, imports) {
                    // Written by a macro, therefore not seen; or an import from another crate, which is no arrow.
                    found if found.is_empty() && !self.modules[number].names.contains_key(name) => {
                        vec![Target::Item(number, name)]
                    }
                    found => found,
                },
                // A variant, a function or a constant of the type.
                item => vec![item],
            };
            found = found.into_iter().flat_map(inside).collect();
        }
        found
    }

    /// What `name` stands for inside a module.
    fn look_up<'a>(&'a self, number: usize, name: &'a str, imports: usize) -> Vec<Target<'a>> {
        let module = &self.modules[number];
        let Some(imports) = imports.checked_sub(1) else { return Vec::new() };
        let Some(meanings) = module.names.get(name) else {
            let globs = module.globs.iter().flat_map(|path| self.resolve(number, path, imports));
            let inside = |target| match target {
                Target::Module(other) if other != number => self.look_up(other, name, imports),
                _ => Vec::new(),
            };
            return globs.flat_map(inside).collect();
        };
        let of = |meaning: &'a Name| match meaning {
            Name::Module(child) => vec![Target::Module(*child)],
            Name::Item => vec![Target::Item(number, name)],
            Name::Import(path) => self.resolve(number, path, imports),
        };
        meanings.iter().flat_map(of).collect()
    }
}

impl Module {
    fn define(&mut self, ident: &syn::Ident, meaning: Name) {
        self.names.entry(ident.to_string()).or_default().push(meaning);
    }

    /// Adds what an import below `path` brings.
    fn import(&mut self, tree: &UseTree, mut path: Segments, is_used: bool) {
        let (ident, name) = match tree {
            UseTree::Path(tree) => {
                path.push(tree.ident.to_string());
                return self.import(&tree.tree, path, is_used);
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.import(tree, path.clone(), is_used));
            }
            UseTree::Glob(_) => return self.globs.push(path),
            UseTree::Name(name) if name.ident == "self" => {
                let Some(last) = path.last() else { return };
                let last = syn::Ident::new(last, name.ident.span());
                return self.define(&last, Name::Import(path));
            }
            UseTree::Name(name) => (&name.ident, &name.ident),
            UseTree::Rename(rename) => (&rename.rename, &rename.ident),
        };
        if name != "self" {
            path.push(name.to_string());
        }
        if is_used {
            self.used.push(path.clone());
        }
        self.define(ident, Name::Import(path));
    }

    /// Adds the paths in what a macro is given, which may be anything.
    fn scan(&mut self, tokens: TokenStream) {
        let (mut path, mut before) = (Segments::new(), String::new());
        for token in tokens {
            let text = match &token {
                TokenTree::Group(group) => {
                    self.scan(group.stream());
                    String::new()
                }
                other => other.to_string(),
            };
            if let TokenTree::Ident(_) = token {
                // Fields, methods, lifetimes and a macro's own variables name nothing of a module.
                let is_path = !matches!(before.as_str(), "." | "'" | "$") || text == "crate";
                if before != "::" {
                    self.used.extend(Some(std::mem::take(&mut path)).filter(|path| !path.is_empty()));
                }
                if is_path && (before != "::" || !path.is_empty()) {
                    path.push(text.clone());
                }
            }
            before = if before == ":" && text == ":" { "::".to_owned() } else { text };
        }
        self.used.extend(Some(path).filter(|path| !path.is_empty()));
    }
}

impl<'ast> Visit<'ast> for Module {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attrs, ident) = match item {
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            Item::Impl(item) => (&item.attrs, None),
            Item::Use(item) => (&item.attrs, None),
            Item::Mod(item) => (&item.attrs, None),
            _ => return visit::visit_item(self, item),
        };
        if !is_for_tests(attrs) {
            ident.into_iter().for_each(|ident| self.define(ident, Name::Item));
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        // A re-export is a name for what lies elsewhere; whoever uses the name depends on that.
        let is_used = matches!(item.vis, Visibility::Inherited);
        self.import(&item.tree, Segments::new(), is_used);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.used.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.scan(called.tokens.clone());
        visit::visit_macro(self, called);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.scan(list.tokens.clone());
        }
    }
}

/// Whether something is there in tests only.
fn is_for_tests(attrs: &[Attribute]) -> bool {
    let is_test = |attribute: &Attribute| match &attribute.meta {
        syn::Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        meta => meta.path().is_ident("test"),
    };
    attrs.iter().any(is_test)
}
