//! Merges the reports of all processes.
//!
//! Each process has written a file: a line `mmun: process PID[ rank N]: PROGRAM`, then lines of two
//! spaces, a name in ten columns, and a value. A line without a name continues the previous line.
//! `libmmun_dropin.so` writes the file for people; this module reads the few values for a table.

use std::fmt::Write;
use std::fs;
use std::path::Path;

/// The width of a name.
const NAME: usize = 10;

/// The line of a process that has begun to use a library and has not written its report.
const SILENT: &str = "  no report: ";

/// The line of a process that `MMUN_STRICT=1` has refused; the process has said why.
const REFUSED: &str = "  strict    refused: ";

/// The line of a process in which a library is loaded of which the drop-in has seen no call.
const UNSEEN: &str = "  unseen    ";

/// The report of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Report {
    process: String,
    rank: String,
    program: String,
    lines: Vec<(String, String)>,
    text: String,
    kind: Kind,
}

/// What the report of a process says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    /// The process used a library.
    #[default]
    Told,
    /// The process wrote no report, or only a part of it.
    Silent,
    Refused,
    Unseen,
}

/// Merges the reports in `folder` into one text.
pub(super) fn merged(folder: &Path) -> String {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut reports: Vec<Report> = files
        .filter_map(|file| {
            let text = fs::read_to_string(file.path()).ok()?;
            // The name begins with the pid.
            let name = file.file_name().to_string_lossy().into_owned();
            Some(Report::read(
                name.split('-').next().unwrap_or_default(),
                &text,
            ))
        })
        .collect();
    let number = |word: &str| word.parse::<u64>().unwrap_or(u64::MAX);
    reports.sort_by_key(|report| (number(&report.rank), number(&report.process)));
    joined(reports)
}

fn joined(reports: Vec<Report>) -> String {
    let is_empty = reports.is_empty();
    let of = |kind| {
        let reports = reports.iter().filter(move |report| report.kind == kind);
        reports.cloned().collect::<Vec<Report>>()
    };
    let text = match of(Kind::Told).as_slice() {
        [] if is_empty => "mmun: no use of UCX or libfabric came through the drop-in\n".to_owned(),
        [] => String::new(),
        [one] => one.text.clone(),
        many => table(many),
    };
    let silent = listed(&of(Kind::Silent), |processes| {
        format!(
            "no report of {processes} that used UCX or libfabric: killed, ended by _exit, replaced by execve, or no room for it (TMPDIR)"
        )
    });
    let refused = listed(&of(Kind::Refused), |processes| {
        format!("refused as not protected (--strict): {processes}")
    });
    let unseen = listed(&of(Kind::Unseen), |processes| {
        format!(
            "{processes} loaded UCX or libfabric, and no call came through the drop-in: unused, or bound past it (RTLD_DEEPBIND, static)"
        )
    });
    text + &silent + &refused + &unseen
}

/// A line about some processes, and a line with the name of each.
fn listed(reports: &[Report], line: impl Fn(&str) -> String) -> String {
    let mut text = match reports.len() {
        0 => return String::new(),
        1 => format!("mmun: {}\n", line("1 process")),
        count => format!("mmun: {}\n", line(&format!("{count} processes"))),
    };
    for Report {
        process,
        rank,
        program,
        ..
    } in reports
    {
        let rank = match rank.as_str() {
            "-" => String::new(),
            rank => format!(" rank {rank}"),
        };
        let _ = writeln!(text, "  process {process}{rank}: {program}");
    }
    text
}

impl Report {
    /// Parses a report. `number` is the pid from the file's name, because on a full disk the file
    /// is empty.
    fn read(number: &str, text: &str) -> Report {
        let mut report = Report {
            text: text.to_owned(),
            ..Report::default()
        };
        let (head, lines) = text.split_once('\n').unwrap_or((text, ""));
        // A report without a final newline was cut, because the disk was full.
        report.kind = if lines.is_empty() || !text.ends_with('\n') || lines.starts_with(SILENT) {
            Kind::Silent
        } else if lines.starts_with(REFUSED) {
            Kind::Refused
        } else if lines.lines().all(|line| line.starts_with(UNSEEN)) {
            Kind::Unseen
        } else {
            Kind::Told
        };
        let head = head.strip_prefix("mmun: process ").unwrap_or(head);
        let (who, program) = head.split_once(": ").unwrap_or((number, "?"));
        let (process, rank) = who.split_once(" rank ").unwrap_or((who, "-"));
        (report.process, report.rank, report.program) =
            (process.to_owned(), rank.to_owned(), program.to_owned());
        for line in lines.lines().filter_map(|line| line.strip_prefix("  ")) {
            let (name, value) = line.split_at_checked(NAME).unwrap_or((line, ""));
            let name = match (name.trim(), report.lines.last()) {
                ("", Some((before, _))) => before.clone(),
                (name, _) => name.to_owned(),
            };
            report.lines.push((name, value.to_owned()));
        }
        report
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.lines
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// `yes`, `no`, or `-` if the report has no line for this library or source.
    fn whether(&self, name: &str) -> &'static str {
        match self.value(name) {
            None => "-",
            Some(value) if value.starts_with("not ") => "no",
            Some(_) => "yes",
        }
    }

    /// The word before `word` in a line; the first word if `word` is `None` or missing; `-` if the
    /// report has no such line.
    fn count(&self, name: &str, word: Option<&str>) -> String {
        let Some(value) = self.value(name) else {
            return "-".to_owned();
        };
        let words: Vec<&str> = value
            .split([' ', ','])
            .filter(|word| !word.is_empty())
            .collect();
        let at = match word {
            None => 0,
            Some(word) => words
                .iter()
                .position(|known| *known == word)
                .and_then(|at| at.checked_sub(1))
                .unwrap_or(0),
        };
        words
            .get(at)
            .map_or("-".to_owned(), |word| (*word).to_owned())
    }
}

fn table(reports: &[Report]) -> String {
    let mut text = format!("mmun: {} processes used UCX or libfabric\n", reports.len());
    let names = [
        "process",
        "rank",
        "libfabric",
        "UCX",
        "hook",
        "kernel",
        "watched",
        "hits",
        "refused",
        "reported",
        "program",
    ];
    let mut rows: Vec<Vec<String>> = vec![names.iter().map(|name| (*name).to_owned()).collect()];
    for report in reports {
        rows.push(vec![
            report.process.clone(),
            report.rank.clone(),
            report.whether("libfabric").to_owned(),
            report.whether("UCX").to_owned(),
            report.whether("hook").to_owned(),
            report.whether("kernel").to_owned(),
            report.count("watched", None),
            report.count("hits", None),
            report.count("hits", Some("refused")),
            report.count("reported", None),
            report.program.clone(),
        ]);
    }
    let widths: Vec<usize> = (0..names.len())
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    for row in &rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(
            text,
            "  {}",
            cells.collect::<Vec<_>>().join("  ").trim_end()
        );
    }
    // Lines that are not in the table. Each is written once, with the processes that have it.
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    for report in reports {
        for (name, value) in report
            .lines
            .iter()
            .filter(|(name, value)| is_worth_a_line(name, value))
        {
            let line = format!("{name}: {value}");
            match said.iter_mut().find(|(known, _)| *known == line) {
                Some((_, who)) => who.push(&report.process),
                None => said.push((line, vec![&report.process])),
            }
        }
    }
    for (line, who) in said {
        let who = if who.len() == reports.len() {
            "all".to_owned()
        } else {
            who.join(", ")
        };
        let _ = writeln!(text, "  {who}: {line}");
    }
    text
}

fn is_worth_a_line(name: &str, value: &str) -> bool {
    let is_number = matches!(name, "watched" | "hits" | "reported" | "start");
    let is_plain =
        value.starts_with("in use") && !value.contains("overwritten") || value == "protected";
    !is_number && !is_plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "mmun: process 7 rank 1: ./a: b\n  libfabric protected\n  hook      in use, 17 places of libc patched\n  \
        kernel    not in use: /dev/kvm is not there\n            without it, changes are missed\n  \
        watched   12 registrations, 3 still registered\n  hits      100 checked, 4 refused as stale; 2 removed before a hit\n  \
        refused   0x1000-0x2000: unmap of 0x1000..0x2000, 4 hits\n";

    #[test]
    fn a_report_is_read() {
        let report = Report::read("7", ONE);
        assert_eq!(
            (
                report.process.as_str(),
                report.rank.as_str(),
                report.program.as_str()
            ),
            ("7", "1", "./a: b")
        );
        assert_eq!(
            (
                report.whether("hook"),
                report.whether("kernel"),
                report.whether("UCX")
            ),
            ("yes", "no", "-")
        );
        assert_eq!(
            (
                report.count("hits", None),
                report.count("hits", Some("refused"))
            ),
            ("100".into(), "4".into())
        );
        assert_eq!(report.count("watched", None), "12");
        assert_eq!(
            report.lines[3].0, "kernel",
            "a line without a name continues"
        );
    }

    #[test]
    fn a_table_has_common_lines_once() {
        let two = [
            Report::read("7", ONE),
            Report::read("9", &ONE.replace("process 7 rank 1", "process 9 rank 2")),
        ];
        let text = table(&two);
        assert_eq!(text.matches("/dev/kvm is not there").count(), 1, "{text}");
        assert!(text.contains("all: kernel: not in use"), "{text}");
        assert!(text.contains("all: refused: 0x1000-0x2000"), "{text}");
        assert!(text.lines().nth(2).unwrap().contains("100"), "{text}");
    }

    #[test]
    fn processes_without_a_report_are_listed_separately() {
        let silent = |process: u32| {
            let text = format!(
                "mmun: process {process} rank 0: ./a\n  no report: it did not return from main or call exit\n"
            );
            Report::read("3", &text)
        };
        let text = joined(vec![silent(3), silent(4)]);
        assert_eq!(
            text,
            "mmun: no report of 2 processes that used UCX or libfabric: killed, ended by _exit, replaced by execve, or no room for it (TMPDIR)\n  \
             process 3 rank 0: ./a\n  process 4 rank 0: ./a\n"
        );
        let text = joined(vec![Report::read("7", ONE), silent(3)]);
        assert!(text.starts_with(ONE), "{text}");
        assert!(text.contains("mmun: no report of 1 process that"), "{text}");
        let text = joined(vec![
            Report::read("7", ONE),
            silent(3),
            Report::read("7", ONE),
        ]);
        assert!(text.starts_with("mmun: 2 processes used"), "{text}");
        assert!(!text.contains("::"), "{text}");
        // A full disk: the file exists but is empty.
        let text = joined(vec![Report::read("12", "")]);
        assert!(text.ends_with("(TMPDIR)\n  process 12: ?\n"), "{text}");
    }

    #[test]
    fn refused_and_unseen_processes_have_lines_of_their_own() {
        let of = |line: &str| Report::read("3", &format!("mmun: process 3: ./a\n{line}\n"));
        let text = joined(vec![
            of("  strict    refused: kernel"),
            of("  unseen    libucs is loaded"),
        ]);
        assert_eq!(
            text,
            "mmun: refused as not protected (--strict): 1 process\n  process 3: ./a\n\
             mmun: 1 process loaded UCX or libfabric, and no call came through the drop-in: unused, or bound past it (RTLD_DEEPBIND, static)\n  process 3: ./a\n"
        );
        assert_eq!(
            joined(Vec::new()),
            "mmun: no use of UCX or libfabric came through the drop-in\n"
        );
    }

    #[test]
    fn malformed_reports_cause_no_panic() {
        for text in [
            "",
            "\n\n",
            "mmun: process",
            "x\n  \n  é\n",
            "mmun: process 1 rank : \n  hits      \n",
        ] {
            let _ = table(&[Report::read("1", text), Report::read("1", text)]);
        }
    }
}
