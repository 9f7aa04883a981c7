//! Finds the paths by which a module's source uses its own crate.

use super::Module;
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, UseTree};

/// Returns the module that defines the item of `path`: the deepest module of the path, after the
/// re-exports are followed.
pub(super) fn resolve(
    path: &[String],
    modules: &BTreeSet<Module>,
    exports: &BTreeMap<Module, BTreeMap<String, Module>>,
) -> Module {
    let mut path = path.to_vec();
    // A chain of re-exports ends after a few steps. The limit is for globs, which could form a
    // circle.
    for _ in 0..8 {
        let depth = (0..=path.len())
            .rev()
            .find(|depth| modules.contains(&path[..*depth]))
            .unwrap_or(0);
        let target = path
            .get(depth)
            .and_then(|name| exports.get(&path[..depth])?.get(name));
        let Some(target) = target else {
            return path[..depth].to_vec();
        };
        path = [target, &path[depth + 1..]].concat();
    }
    path
}

/// Returns the names that a module imports, with their paths from the crate's root.
pub(super) fn exports(module: &Module, file: &syn::File) -> BTreeMap<String, Module> {
    let mut found = BTreeMap::new();
    for item in &file.items {
        if let Item::Use(item) = item {
            let mut paths = Vec::new();
            flatten(&item.tree, &mut Vec::new(), &mut paths);
            for (path, name) in paths {
                // A path that does not begin with `crate`, `self` or `super` names an item in this
                // module, such as a child module, or another crate. Another crate is taken for an
                // item of this module. Then a path through that name leads to this module, as it
                // should.
                let absolute = absolute(module, &path)
                    .unwrap_or_else(|| [module.clone(), path.clone()].concat());
                if absolute != [&module[..], std::slice::from_ref(&name)].concat() {
                    found.insert(name, absolute);
                }
            }
        }
    }
    found
}

/// Adds the paths of a use tree to `found`, each with the name that the import defines.
fn flatten(tree: &UseTree, prefix: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            flatten(&path.tree, prefix, found);
            prefix.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            found.push((prefix.clone(), prefix.last().cloned().unwrap_or_default()));
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            found.push(([&prefix[..], std::slice::from_ref(&name)].concat(), name));
        }
        UseTree::Rename(rename) => {
            let path = [&prefix[..], &[rename.ident.to_string()]].concat();
            found.push((path, rename.rename.to_string()));
        }
        UseTree::Glob(_) => found.push((prefix.clone(), "*".into())),
        UseTree::Group(group) => group
            .items
            .iter()
            .for_each(|tree| flatten(tree, prefix, found)),
    }
}

/// Turns a path that begins with `crate`, `self` or `super` into a path from the crate's root.
/// Returns `None` for another path.
fn absolute(module: &[String], path: &[String]) -> Option<Module> {
    let mut base = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.to_vec(),
        _ => return None,
    };
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        match first.as_str() {
            "crate" | "self" => {}
            "super" => drop(base.pop()),
            _ => break,
        }
        rest = after;
    }
    Some([&base[..], rest].concat())
}

/// Collects the paths of one file that begin with `crate`, `self` or `super`, except those in
/// inline modules for tests.
pub(super) struct Uses<'a> {
    pub(super) module: &'a Module,
    /// The inline modules of the file that enclose the current item, outermost first.
    pub(super) inside: Vec<String>,
    pub(super) found: Vec<Module>,
}

impl Uses<'_> {
    fn absolute(&self, path: &[String]) -> Option<Module> {
        absolute(&[&self.module[..], &self.inside].concat(), path)
    }
}

impl Visit<'_> for Uses<'_> {
    fn visit_item(&mut self, item: &Item) {
        match item {
            Item::Mod(module) if module.attrs.iter().any(is_for_tests) => {}
            Item::Mod(module) => {
                self.inside.push(module.ident.to_string());
                visit::visit_item(self, item);
                self.inside.pop();
            }
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        let mut paths = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut paths);
        for (path, _) in paths {
            self.found.extend(self.absolute(&path));
        }
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let segments: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        if segments.len() > 1 {
            self.found.extend(self.absolute(&segments));
        }
        visit::visit_path(self, path);
    }
}

pub(in super::super) fn is_for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && matches!(&attribute.meta, syn::Meta::List(list) if is_test(&list.tokens.to_string()))
}

/// Tells whether the condition of a `cfg` is `test`, or an `all(...)` whose first part is `test`.
fn is_test(condition: &str) -> bool {
    condition == "test" || condition.starts_with("all (test ,")
}
