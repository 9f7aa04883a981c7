//! The tables of a summary: their names, their order and their format.

use std::cmp::Reverse;
use std::io::Write as _;
use std::str::FromStr;

use super::{Row, Wanted};
use crate::text::{put_bytes, put_time};

/// The key by which a table sums up changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Event,
    Where,
    What,
    Task,
    Cause,
}

const ALL: [By; 5] = [By::Event, By::Where, By::What, By::Task, By::Cause];

impl By {
    pub(crate) fn name(self) -> &'static str {
        match self {
            By::Event => "event",
            By::Where => "where",
            By::What => "what",
            By::Task => "task",
            By::Cause => "cause",
        }
    }

    fn title(self) -> &'static str {
        if self == By::What {
            "what lay there"
        } else {
            self.name()
        }
    }
}

/// A set of tables, in the order of [`ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tables(u8);

impl Tables {
    pub(crate) const DEFAULT: &str = "event,where,what";

    pub(crate) fn has(self, by: By) -> bool {
        self.0 & (1 << by as u8) != 0
    }

    pub(crate) fn list(self) -> impl Iterator<Item = By> {
        ALL.into_iter().filter(move |by| self.has(*by))
    }
}

impl FromStr for Tables {
    type Err = String;

    fn from_str(text: &str) -> Result<Tables, String> {
        let mut set = 0;
        for name in text.split(',') {
            let by = ALL.into_iter().find(|by| by.name() == name);
            let names = ALL.map(By::name).join(", ");
            set |= 1
                << by.ok_or_else(|| format!("unknown table {name:?}; the tables are {names}"))?
                    as u8;
        }
        Ok(Tables(set))
    }
}

/// The key by which a table is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sort {
    /// Time in the calls
    Time,
    /// Bytes in memory
    Resident,
    /// Bytes of address range
    Range,
    /// Number of calls
    Calls,
}

impl Sort {
    pub(crate) fn key(self, row: &Row) -> u64 {
        match self {
            Sort::Time => row.time,
            Sort::Resident => row.resident,
            Sort::Range => row.bytes,
            Sort::Calls => row.calls,
        }
    }

    /// Sorts rows by this key, then by time and calls, the largest first; equal rows by their
    /// labels.
    pub(crate) fn apply(self, mut rows: Vec<(String, Row)>) -> Vec<(String, Row)> {
        rows.sort_by(|(a, a_row), (b, b_row)| {
            let key = |row: &Row| {
                (
                    Reverse(self.key(row)),
                    Reverse(row.time),
                    Reverse(row.calls),
                )
            };
            key(a_row).cmp(&key(b_row)).then_with(|| a.cmp(b))
        });
        rows
    }
}

/// Writes one table.
pub(super) fn write(
    out: &mut Vec<u8>,
    by: By,
    rows: &[(String, Row)],
    total: &Row,
    wanted: &Wanted,
) {
    // Writing to memory cannot fail.
    let _ = match by {
        By::Event => events(out, rows, total),
        _ => shares(out, by, rows, wanted),
    };
}

fn events(out: &mut Vec<u8>, rows: &[(String, Row)], total: &Row) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<15}{:>8}{:>11}{:>11}{:>10}{:>10}",
        "event", "calls", "range", "resident", "time", "longest"
    )?;
    let total = (rows.len() != 1).then(|| ("total".to_owned(), *total));
    for (name, row) in rows.iter().chain(&total) {
        let Row {
            calls,
            bytes,
            time: ns,
            longest,
            errors,
            cut,
            ..
        } = row;
        let columns = [size(*bytes), known_size(row.known_resident())];
        write!(
            out,
            "{name:<15}{calls:>8}{:>11}{:>11}{:>10}{:>10}",
            columns[0],
            columns[1],
            time(*ns),
            time(*longest)
        )?;
        for (count, what) in [(errors, "failed"), (cut, "cut short")] {
            if *count > 0 {
                write!(out, "  {count} {what}")?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

fn shares(
    out: &mut Vec<u8>,
    by: By,
    rows: &[(String, Row)],
    wanted: &Wanted,
) -> std::io::Result<()> {
    let Wanted { sort, top, .. } = *wanted;
    let bytes = if sort == Sort::Range {
        "range"
    } else {
        "resident"
    };
    writeln!(
        out,
        "{:>10}{:>5}{:>8}{bytes:>11}  {}",
        "time",
        "%",
        "calls",
        by.title()
    )?;
    let mut whole = Row::default();
    rows.iter().for_each(|(_, row)| whole.merge(row));
    let whole = sort.key(&whole).max(1);
    for (label, row) in rows.iter().take(top) {
        let percent = (u128::from(sort.key(row)) * 100 + u128::from(whole) / 2) / u128::from(whole);
        let bytes = if sort == Sort::Range {
            Some(row.bytes)
        } else {
            row.known_resident()
        };
        let label = printable(label);
        writeln!(
            out,
            "{:>10}{percent:>5}{:>8}{:>11}  {label}",
            time(row.time),
            row.calls,
            known_size(bytes)
        )?;
    }
    if let Some(more @ 1..) = rows.len().checked_sub(top) {
        writeln!(out, "{:>34}  {more} more", "")?;
    }
    Ok(())
}

/// Replaces control characters, which could move the cursor.
pub(crate) fn printable(label: &str) -> String {
    label
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

pub(crate) fn time(ns: u64) -> String {
    text(|out| put_time(out, ns))
}

pub(crate) fn size(bytes: u64) -> String {
    text(|out| put_bytes(out, bytes))
}

/// A size, or `?`.
pub(crate) fn known_size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), size)
}

fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = Vec::new();
    write(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named_or_refused() {
        let tables: Tables = "task,event".parse().unwrap();
        assert_eq!(tables.list().collect::<Vec<_>>(), [By::Event, By::Task]);
        assert!(
            "where,bogus"
                .parse::<Tables>()
                .unwrap_err()
                .contains("cause")
        );
        assert!("".parse::<Tables>().is_err());
        assert!(Tables::DEFAULT.parse::<Tables>().is_ok());
    }

    #[test]
    fn a_label_cannot_move_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
