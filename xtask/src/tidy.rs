//! `cargo xtask tidy`: checks rules that the compiler does not check. They are about file sizes,
//! widths of comments, which crate may use which, circles of modules, syntax that the oldest
//! compiler lacks, and pairs of ordering comments. Each scenario of the contract must have a test,
//! and the text that each mutant replaces must exist.

mod chains;
mod circles;

use cargo_metadata::MetadataCommand;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The maximum length of a source file, in lines.
const MAX_LINES: usize = 600;
/// The maximum width of prose in a comment, in characters: rustfmt does not wrap comments.
const MAX_COLUMNS: usize = 100;

/// Members of the workspace that are not published and may use every crate.
const TOOLS: &[&str] = &["bench", "stress", "testkit", "xtask"];

/// The ids of the contract's scenarios: a letter, and for each section the first and the last
/// number.
const SCENARIOS: &[(char, &[(u32, u32)])] = &[
    (
        's',
        &[(1, 17), (20, 36), (40, 53), (60, 70), (80, 90), (100, 106)],
    ),
    ('b', &[(1, 34), (40, 48)]),
];

pub(crate) fn run(root: &Path) -> ExitCode {
    let sources = sources(root);
    let mut complaints = Vec::new();
    sizes(&sources, &mut complaints);
    widths(&sources, &mut complaints);
    edges(root, &mut complaints);
    circles::check(&sources, &mut complaints);
    chains::check(&sources, &mut complaints);
    orders(root, &sources, &mut complaints);
    scenarios(root, &sources, &mut complaints);
    crate::mutants::tidy(root, &mut complaints);
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    if complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Returns every Rust source of the workspace with its text. The fuzz targets are not in the
/// workspace.
fn sources(root: &Path) -> Vec<(PathBuf, String)> {
    let mut folders: Vec<PathBuf> = ["crates", "bench", "stress", "xtask"]
        .map(|name| root.join(name))
        .to_vec();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
        for path in entries.map(|entry| entry.expect("a readable folder entry").path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                found.push((
                    path.strip_prefix(root)
                        .expect("it lies below the root")
                        .to_path_buf(),
                    text,
                ));
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
            complaints.push(format!(
                "{} has {lines} lines, more than {MAX_LINES}: split it",
                path.display()
            ));
        }
    }
}

/// Checks the width of prose in comments. Tables and code in comments may be wider.
fn widths(sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    for (path, text) in sources {
        let mut is_code = false;
        for (number, line) in (1..).zip(text.lines()) {
            let Some(comment) = line.trim_start().strip_prefix("//") else {
                // If an example depends on a feature, its fence is in an attribute.
                is_code = line.contains("doc = \"```");
                continue;
            };
            let comment = comment.trim_start_matches(['/', '!']).trim_start();
            if comment.starts_with("```") {
                is_code = !is_code;
            }
            if line.chars().count() > MAX_COLUMNS && !is_code && !comment.starts_with('|') {
                let place = path.display();
                complaints.push(format!(
                    "{place}:{number}: a comment of more than {MAX_COLUMNS} characters: wrap it"
                ));
            }
        }
    }
}

/// Reads the code map of ARCHITECTURE.md: each crate's folder, with the folders of the crates that
/// it uses.
fn code_map(root: &Path) -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `crates/")?.split(" | ");
        let name = cells.next()?.trim_matches('`').to_owned();
        let used = cells.next()?.split('`').skip(1).step_by(2);
        Some((name, used.map(str::to_owned).collect()))
    };
    text.lines().filter_map(row).collect()
}

/// Checks that each crate uses exactly the crates that its row of the code map lists, and that
/// these crates have rows above that row. A crate's tests may use `testkit` and every crate that
/// has a row above. The [`TOOLS`] are not checked.
fn edges(root: &Path, complaints: &mut Vec<String>) {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata answers for this workspace");
    let map = code_map(root);
    for package in metadata.packages {
        let folder = package.manifest_path.parent().expect("it is in a folder");
        let name = folder.file_name().unwrap_or_default();
        if TOOLS.contains(&name) {
            continue;
        }
        let Some(row) = map.iter().position(|(folder, _)| folder == name) else {
            complaints.push(format!("{name} is not in the code map of ARCHITECTURE.md"));
            continue;
        };
        let mut used = BTreeSet::new();
        for dependency in package.dependencies {
            let Some(other) = dependency.path.as_ref().and_then(|path| path.file_name()) else {
                continue;
            };
            let for_tests = dependency.kind == cargo_metadata::DependencyKind::Development;
            let stands_above = map[..row].iter().any(|(folder, _)| folder == other);
            let is_testkit = for_tests && other == "testkit";
            if !(stands_above || is_testkit) {
                complaints.push(format!(
                    "{name} must not use {other}, which does not stand above it in the code map"
                ));
            }
            if !for_tests {
                used.insert(other.to_owned());
            }
        }
        if used != map[row].1 {
            complaints.push(format!(
                "ARCHITECTURE.md says that {name} uses {:?}, its manifest {used:?}",
                map[row].1
            ));
        }
    }
}

/// Checks that each `ORDER(id)` occurs at two places or more and has a row in `docs/ordering.md`,
/// and that each id with a row there occurs in the sources. One place suffices if its comment says
/// `Partner: itself`.
fn orders(root: &Path, sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    let table =
        fs::read_to_string(root.join("docs/ordering.md")).expect("docs/ordering.md is there");
    let mut sites: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, text) in sources
        .iter()
        .filter(|(path, _)| !path.starts_with("xtask"))
    {
        for rest in text.split("ORDER(").skip(1) {
            let ids = rest
                .split(')')
                .next()
                .expect("split yields one part at least");
            let comment = rest.split("\n\n").next().unwrap_or(rest);
            // A site that pairs with itself, such as an AcqRel exchange, counts as a pair.
            let worth = if comment.contains("Partner: itself") {
                2
            } else {
                1
            };
            for id in ids.split(", ") {
                *sites.entry(id).or_default() += worth;
            }
        }
    }
    for row in table.lines().filter_map(first_cell) {
        let is_id = row.contains('-')
            && row.starts_with(|first: char| first.is_ascii_lowercase())
            && !row.contains(' ');
        if is_id && !sites.contains_key(row) {
            complaints.push(format!(
                "docs/ordering.md has a row {row}, but there is no ORDER({row}) in the sources"
            ));
        }
    }
    for (id, count) in sites {
        if count < 2 {
            complaints.push(format!("ORDER({id}) occurs once: mark its partner as well"));
        }
        if !table.contains(&format!("| {id} |")) {
            complaints.push(format!("ORDER({id}) is missing in docs/ordering.md"));
        }
    }
}

/// Returns the first cell of a table's row.
fn first_cell(line: &str) -> Option<&str> {
    line.strip_prefix('|')?.split('|').next().map(str::trim)
}

/// Checks that each scenario has a test or a row in `docs/lifecycle.md`, which lists the scenarios
/// that types make impossible. The name of such a test begins with the scenario's id, or with
/// several ids, as in `s_48_s_50_`.
fn scenarios(root: &Path, sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    let table =
        fs::read_to_string(root.join("docs/lifecycle.md")).expect("docs/lifecycle.md is there");
    let mut covered = BTreeSet::new();
    for cell in table.lines().filter_map(first_cell) {
        covered.extend(
            cell.split([' ', ','])
                .filter_map(|word| scenario(&word.replacen('-', "_", 1).to_lowercase())),
        );
    }
    for (_, text) in sources
        .iter()
        .filter(|(path, _)| !path.starts_with("xtask"))
    {
        for after in text.split("#[test]").skip(1) {
            let Some((_, name)) = after.split_once("fn ") else {
                continue;
            };
            let mut name = name;
            while let Some(id) = scenario(name) {
                covered.insert(id);
                // Skips the letter, the number and both underscores.
                name = name[2..].split_once('_').map_or("", |(_, rest)| rest);
            }
        }
    }
    for (letter, sections) in SCENARIOS {
        for number in sections.iter().flat_map(|(first, last)| *first..=*last) {
            if !covered.contains(&(*letter, number)) {
                let id = letter.to_ascii_uppercase();
                complaints.push(format!(
                    "{id}-{number:02} has no test `{letter}_{number:02}_...` and no row in docs/lifecycle.md"
                ));
            }
        }
    }
}

/// Returns the scenario whose id is at the beginning of a name.
fn scenario(name: &str) -> Option<(char, u32)> {
    let letter = name
        .chars()
        .next()
        .filter(|letter| matches!(letter, 's' | 'b'))?;
    let digits = name[1..].strip_prefix('_')?;
    let end = digits
        .find(|digit: char| !digit.is_ascii_digit())
        .unwrap_or(digits.len());
    Some((letter, digits[..end].parse().ok()?))
}
