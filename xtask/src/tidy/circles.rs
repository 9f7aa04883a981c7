//! Rejects circles of modules: neighbours in one folder may use each other in one direction only.
//!
//! A module and everything below it form one room: `mm.rs` and `mm/exit.rs` are one room. The check
//! makes a graph for each folder. The nodes of the graph are the rooms in that folder. A child may
//! use its parent, and a parent its child. Tests are ignored.

mod uses;

pub(super) use uses::is_for_tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use syn::visit::Visit;
use uses::{Uses, exports, resolve};

/// The path of a module in its crate. The path of the root is empty.
type Module = Vec<String>;

pub(super) fn check(sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    let mut crates: BTreeMap<String, Vec<(Module, syn::File)>> = BTreeMap::new();
    for (path, text) in sources {
        let Some((name, module)) = place(path) else {
            continue;
        };
        let file =
            syn::parse_file(text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        crates.entry(name).or_default().push((module, file));
    }
    for (name, files) in &crates {
        let graphs = graphs(files);
        for circle in graphs
            .iter()
            .flat_map(|(folder, graph)| circles_of(folder, graph))
        {
            let steps: Vec<String> = circle.iter().map(Step::to_string).collect();
            complaints.push(format!(
                "{name} has a circle of modules: {}",
                steps.join(", ")
            ));
        }
    }
}

/// Returns the crate and the module of a source file. Returns `None` if the file does not belong to
/// a library or program of `crates`, or if it is for tests.
fn place(path: &Path) -> Option<(String, Module)> {
    let mut parts: Vec<String> = path
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if parts.len() < 4
        || parts[0] != "crates"
        || parts[2] != "src"
        || parts.contains(&"tests".into())
    {
        return None;
    }
    let mut module = parts.split_off(3);
    if matches!(module[0].as_str(), "lib" | "main") {
        module.clear();
    }
    Some((parts.swap_remove(1), module))
}

/// One use of a neighbour: `from` names an item of `to`.
struct Step {
    from: String,
    to: String,
    item: String,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} uses {} ({})", self.from, self.to, self.item)
    }
}

/// The graph of one folder: for each room, the rooms that it uses, each with one used item as the
/// evidence.
type Graph = BTreeMap<String, BTreeMap<String, String>>;

/// Returns the graph of each folder of one crate.
fn graphs(files: &[(Module, syn::File)]) -> BTreeMap<Module, Graph> {
    let modules: BTreeSet<Module> = files.iter().map(|(module, _)| module.clone()).collect();
    let exports: BTreeMap<Module, BTreeMap<String, Module>> = files
        .iter()
        .map(|(module, file)| (module.clone(), exports(module, file)))
        .collect();
    let mut graphs: BTreeMap<Module, Graph> = BTreeMap::new();
    for (module, file) in files {
        let mut uses = Uses {
            module,
            inside: Vec::new(),
            found: Vec::new(),
        };
        uses.visit_file(file);
        for path in uses.found {
            let target = resolve(&path, &modules, &exports);
            let shared = module
                .iter()
                .zip(&target)
                .take_while(|(mine, theirs)| mine == theirs)
                .count();
            if shared < module.len() && shared < target.len() {
                let graph = graphs.entry(module[..shared].to_vec()).or_default();
                let item = path.join("::");
                graph
                    .entry(module[shared].clone())
                    .or_default()
                    .entry(target[shared].clone())
                    .or_insert(item);
            }
        }
    }
    graphs
}

/// The prefix of the names of a folder's rooms.
fn prefix(folder: &[String]) -> String {
    folder.iter().map(|part| format!("{part}/")).collect()
}

/// Returns circles of one folder. The rooms are tried in the order of their names. For a room that
/// is in no circle found before, the circle is the shortest way from the room back to itself.
fn circles_of(folder: &[String], graph: &Graph) -> Vec<Vec<Step>> {
    let mut found = Vec::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for start in graph.keys() {
        if seen.contains(start.as_str()) {
            continue;
        }
        let Some(rooms) = way(graph, start, start) else {
            continue;
        };
        seen.extend(&rooms);
        let full = |room: &str| prefix(folder) + room;
        let step = |pair: &[&str]| Step {
            from: full(pair[0]),
            to: full(pair[1]),
            item: graph[pair[0]][pair[1]].clone(),
        };
        found.push(rooms.windows(2).map(step).collect());
    }
    found
}

/// Returns the shortest way from `start` to `end`, both included, of at least one step.
fn way<'a>(graph: &'a Graph, start: &'a str, end: &str) -> Option<Vec<&'a str>> {
    let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(room) = queue.pop_front() {
        for next in graph.get(room).into_iter().flat_map(BTreeMap::keys) {
            if !came_from.contains_key(next.as_str()) {
                came_from.insert(next, room);
                queue.push_back(next);
            }
        }
    }
    let mut rooms = vec![came_from.get_key_value(end).map(|(end, _)| *end)?];
    loop {
        let before = came_from[rooms[rooms.len() - 1]];
        rooms.push(before);
        if before == start {
            rooms.reverse();
            return Some(rooms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIRCLE: [(&str, &str); 5] = [
        ("lib", "mod a; mod b; mod c; pub use c::Third;"),
        (
            "a",
            "use crate::b::Second; #[cfg(test)] mod tests { use crate::c::Third; }",
        ),
        ("b", "mod deep; pub(crate) struct Second;"),
        (
            "b/deep",
            "fn f() -> super::super::c::Third { crate::Third }",
        ),
        ("c", "use crate::a::First;"),
    ];

    fn complaints(files: &[(&str, &str)]) -> Vec<String> {
        let path = |file: &str| PathBuf::from(format!("crates/made/src/{file}.rs"));
        let sources: Vec<_> = files
            .iter()
            .map(|(file, text)| (path(file), (*text).to_owned()))
            .collect();
        let mut complaints = Vec::new();
        check(&sources, &mut complaints);
        complaints
    }

    #[test]
    fn a_circle_is_reported_step_by_step() {
        let all = complaints(&CIRCLE);
        let steps = "a uses b (b::Second), b uses c (c::Third), c uses a (a::First)";
        assert_eq!(all, [format!("made has a circle of modules: {steps}")]);
    }

    #[test]
    fn in_an_inline_module_super_is_the_file() {
        let mut circle = CIRCLE;
        circle[4].1 = "mod inner { use super::super::a::First; }";
        assert_eq!(complaints(&circle).len(), 1);
        circle[4].1 = "pub(crate) struct Third; mod inner { use super::Third; }";
        assert_eq!(complaints(&circle), [""; 0]);
    }

    #[test]
    fn without_one_of_its_uses_there_is_no_circle() {
        for left_out in [1, 3, 4] {
            let mut files = CIRCLE;
            files[left_out].1 = "";
            assert_eq!(complaints(&files), [""; 0], "without {}", files[left_out].0);
        }
    }

    #[test]
    fn a_use_through_a_re_export_counts_for_the_module_that_has_the_item() {
        let files = [
            ("lib", "mod a; mod c; pub use c::Third;"),
            ("a", "use crate::Third;"),
            ("c", "use crate::a;"),
        ];
        assert_eq!(complaints(&files).len(), 1);
    }
}
