//! Writes the table of `docs/kernels.md`: which tests pass under which kernel.

use super::arch::{ALL, Arch};
use super::machine::Outcome;
use std::fs;
use std::path::Path;

/// The line before the table. The text around the table is written by hand.
const BEGIN: &str = "<!-- written by cargo xtask guest --table -->\n";
const END: &str = "<!-- end -->\n";

/// Writes the row of one kernel, and keeps the other rows. The cells of tests that did not run stay
/// if the row is of the same version, so a row can be made of several runs.
pub(crate) fn enter(
    root: &Path,
    arch: &Arch,
    series: &str,
    version: &str,
    labels: &[String],
    results: &[Outcome],
) -> Result<(), String> {
    let path = root.join("docs/kernels.md");
    let failed = |error| format!("{}: {error}", path.display());
    let text = fs::read_to_string(&path).map_err(failed)?;
    let series = &arch.row(series);
    let old = old_cells(&text, series, version);
    let cells: Vec<String> = labels_of_all()
        .iter()
        .enumerate()
        .map(|(column, label)| {
            let of_label = labels.iter().zip(results).filter(|(step, _)| step == label);
            let outcomes: Vec<_> = of_label.map(|(_, outcome)| outcome).collect();
            if outcomes.is_empty() {
                let old = old.get(column).copied();
                old.unwrap_or("not run").to_owned()
            } else {
                Outcome::cell(&outcomes)
            }
        })
        .collect();
    let row = format!("| {series} | {version} | {} |\n", cells.join(" | "));
    let text = with_row(&text, series, &row)
        .ok_or_else(|| format!("{} has no table of the rig's", path.display()))?;
    fs::write(&path, text).map_err(failed)
}

/// The cells of a row without the first two. Empty if the table has no row of this version.
fn old_cells<'a>(text: &'a str, series: &str, version: &str) -> Vec<&'a str> {
    let begin = format!("| {series} | {version} | ");
    let row = text.lines().find_map(|line| line.strip_prefix(&begin));
    row.map(|row| row.trim_end_matches(" |").split(" | ").collect())
        .unwrap_or_default()
}

fn with_row(text: &str, series: &str, row: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (table, after) = rest.split_once(END)?;
    let key = |row: &str| {
        row.strip_prefix("| ")
            .and_then(|row| row.split(" |").next())
            .unwrap_or_default()
            .to_owned()
    };
    let mut rows: Vec<String> = table
        .lines()
        .skip(2)
        .map(|line| format!("{line}\n"))
        .collect();
    rows.retain(|line| key(line) != series);
    rows.push(row.to_owned());
    let known: Vec<String> = ALL
        .iter()
        .flat_map(|arch| arch.series.iter().map(|series| arch.row(series.name)))
        .collect();
    rows.sort_by_key(|row| known.iter().position(|name| *name == key(row)));
    let labels = labels_of_all();
    // Fill rows that were written when the table had fewer columns.
    for row in &mut rows {
        let cells = row.matches(" | ").count() + 1;
        let missing = " not run |".repeat((labels.len() + 2).saturating_sub(cells));
        row.insert_str(row.len() - 1, &missing);
    }
    let head = format!(
        "| kernel | version | {} |\n|{}\n",
        labels.join(" | "),
        " --- |".repeat(labels.len() + 2)
    );
    Some(format!(
        "{before}{BEGIN}{head}{}{END}{after}",
        rows.concat()
    ))
}

/// Returns the columns: the labels of the commands of all kinds of machines, each once.
fn labels_of_all() -> Vec<&'static str> {
    let mut labels = Vec::new();
    let columns = |arch: &&'static Arch| arch.standard.iter().chain(arch.more);
    for (label, _) in ALL.iter().flat_map(columns) {
        if !labels.contains(label) {
            labels.push(label);
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_of_the_same_version_are_found() {
        let text = "| 6.12 | 6.12.1 | 3 passed | not run |\n";
        assert_eq!(old_cells(text, "6.12", "6.12.1"), ["3 passed", "not run"]);
        assert!(old_cells(text, "6.12", "6.12.2").is_empty());
        assert!(old_cells(text, "6.1", "6.12.1").is_empty());
    }

    #[test]
    fn a_row_replaces_the_old_row_and_kernels_are_in_order() {
        let empty = format!("above\n{BEGIN}{END}below\n");
        let text = with_row(&empty, "6.12", "| 6.12 | a |\n").unwrap();
        let text = with_row(&text, "6.1", "| 6.1 | b |\n").unwrap();
        let text = with_row(&text, "6.12", "| 6.12 | c |\n").unwrap();
        let rows: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("| 6"))
            .collect();
        assert_eq!(rows.len(), 2);
        assert!(rows[0].starts_with("| 6.1 | b |") && rows[1].starts_with("| 6.12 | c |"));
        // Each row has as many cells as the head.
        let cells = |row: &str| row.matches('|').count();
        let head = text
            .lines()
            .find(|line| line.starts_with("| kernel"))
            .unwrap();
        assert_eq!([cells(rows[0]), cells(rows[1])], [cells(head); 2]);
        assert!(text.starts_with("above\n") && text.ends_with("below\n"));
    }
}
