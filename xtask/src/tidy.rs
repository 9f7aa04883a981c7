//! What the compiler does not check: file sizes, which crate may use which, and the pairs of ordering comments.

use cargo_metadata::MetadataCommand;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The longest a source file may be, in lines.
const MAX_LINES: usize = 600;

/// Who may use whom, published crates only: arrows point down this list.
const LAYERS: &[(&str, &[&str])] = &[
    ("srcu", &[]),
    ("mmu-notifier", &["srcu"]),
    ("mmu-source", &["mmu-notifier"]),
    ("regcache", &["mmu-notifier", "mmu-source"]),
    ("mmun", &["srcu", "mmu-notifier", "mmu-source", "regcache"]),
    ("testkit", &[]),
];

pub(crate) fn run(root: &Path) -> ExitCode {
    let sources = sources(root);
    let mut complaints = Vec::new();
    sizes(&sources, &mut complaints);
    edges(root, &mut complaints);
    orders(root, &sources, &mut complaints);
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Every Rust source of the workspace with its text.
fn sources(root: &Path) -> Vec<(PathBuf, String)> {
    let mut folders: Vec<PathBuf> = ["crates", "bench", "stress", "xtask"].map(|name| root.join(name)).to_vec();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
        for path in entries.map(|entry| entry.expect("a readable folder entry").path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                found.push((path.strip_prefix(root).expect("it lies below the root").to_path_buf(), text));
            }
        }
    }
    found.sort();
    found
}

fn sizes(sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    for (path, text) in sources {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            complaints.push(format!("{} has {lines} lines, more than {MAX_LINES}: split it", path.display()));
        }
    }
}

fn edges(root: &Path, complaints: &mut Vec<String>) {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata answers for this workspace");
    let allowed: BTreeMap<&str, &[&str]> = LAYERS.iter().copied().collect();
    for package in metadata.packages {
        let name = package.name.to_string();
        let Some(allowed) = allowed.get(name.as_str()) else { continue };
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let for_tests = dependency.kind == cargo_metadata::DependencyKind::Development;
            let is_allowed = allowed.contains(&dependency.name.as_str()) || (for_tests && dependency.name == "testkit");
            if !is_allowed {
                complaints.push(format!("{name} must not use {}: see the table of parts", dependency.name));
            }
        }
    }
}

/// Each `ORDER(id)` stands at two places or more, and in the table.
fn orders(root: &Path, sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    let table = fs::read_to_string(root.join("docs/ordering.md")).expect("docs/ordering.md is there");
    let mut sites: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, text) in sources.iter().filter(|(path, _)| !path.starts_with("xtask")) {
        for rest in text.split("ORDER(").skip(1) {
            let ids = rest.split(')').next().expect("split yields one part at least");
            let comment = rest.split("\n\n").next().unwrap_or(rest);
            // One site that pairs with itself, such as an AcqRel exchange, is a pair.
            let worth = if comment.contains("Partner: itself") { 2 } else { 1 };
            for id in ids.split(", ") {
                *sites.entry(id).or_default() += worth;
            }
        }
    }
    for (id, count) in sites {
        if count < 2 {
            complaints.push(format!("ORDER({id}) stands alone: name its partner's place too"));
        }
        if !table.contains(&format!("| {id} |")) {
            complaints.push(format!("ORDER({id}) is missing in docs/ordering.md"));
        }
    }
}
