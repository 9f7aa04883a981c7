//! `mmun coverage --library`: which changes leave a registration of UCX's or libfabric's cache
//! stale, as shipped and with the drop-in.
//!
//! Each operation runs once in each column, in a separate process. The process registers the page
//! through the library's real cache and changes the translation. If no memory is mapped at the
//! address any more, the process maps a new page there. Then the process looks the registration up
//! again and lets the kernel write through that registration. If the bytes do not arrive in the
//! page, the registration was stale: a device would have corrupted data without an error.

mod cache;
mod cell;
mod libfabric;
mod loader;
mod ring;
mod ucx;
mod verbs;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub(crate) use cell::run as cell;

use super::operation::Operation;
use super::report::{Report, Seen};
use super::{FAILED, FOUND, ops, runner};
use crate::args::LibraryCellArgs;
use crate::library::Library;
use crate::outcome::Outcome;
use crate::source::Source;
use crate::style::{Mark, Style};
use crate::{complain, doctor, dropin};

/// A column: the library alone, or with the drop-in and the named sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Shipped,
    Hook,
    Both,
}

impl Column {
    const ALL: [Column; 3] = [Column::Shipped, Column::Hook, Column::Both];

    fn name(self) -> &'static str {
        match self {
            Column::Shipped => "shipped",
            Column::Hook => "hook",
            Column::Both => "both",
        }
    }

    /// Why the column does not work here; `None` if it does.
    fn lack(self) -> Option<String> {
        let sources: &[Source] = match self {
            Column::Shipped => &[],
            Column::Hook => &[Source::Hook],
            Column::Both => &[Source::Hook, Source::Kernel],
        };
        let lack = |source: &Source| doctor::usable(*source).err().map(|lack| (*source, lack));
        sources.iter().find_map(lack).map(|(source, lack)| {
            format!("{} cannot be used here: {}", source.name(), lack.to_line())
        })
    }

    fn prepare(self, command: &mut Command, library: &Path) {
        // The children must not inherit the drop-in or its settings from this process.
        for name in ["LD_PRELOAD", "MMUN", "MMUN_STRICT", "MMUN_REPORT"] {
            command.env_remove(name);
        }
        if self != Column::Shipped {
            command.env("LD_PRELOAD", library).env("MMUN", self.name());
        }
    }
}

pub(crate) fn main(library: Library, wait: u64, json: bool) -> Outcome {
    let dropin = match dropin::library() {
        Ok(file) => file,
        Err(reason) => {
            complain(&reason);
            return FAILED;
        }
    };
    let operations: Vec<&'static Operation> = ops::all().collect();
    let lacks = Column::ALL.map(Column::lack);
    lacks.iter().flatten().for_each(|line| complain(line));
    let columns: Vec<usize> = (0..Column::ALL.len())
        .filter(|column| lacks[*column].is_none())
        .collect();
    let places: Vec<(usize, usize)> = (0..operations.len())
        .flat_map(|row| columns.iter().map(move |column| (row, *column)))
        .collect();
    let blank = || Some(Report::unavailable(""));
    let row = lacks
        .each_ref()
        .map(|lack| lack.as_ref().and_then(|_| blank()));
    let mut table = Table {
        library,
        operations: &operations,
        reports: vec![row; operations.len()],
        written: 0,
        json,
    };
    let command = |index: usize| {
        let (row, column) = places[index];
        let mut command = Command::new(std::env::current_exe()?);
        command.args([
            "coverage-library-cell",
            library.name(),
            operations[row].name,
            &wait.to_string(),
        ]);
        Column::ALL[column].prepare(&mut command, &dropin);
        Ok(command)
    };
    let mut written = table.begin(&mut io::stdout());
    runner::run_commands(places.len(), command, |index, report| {
        let (row, column) = places[index];
        table.reports[row][column] = Some(report);
        if written.is_ok() {
            written = table.write(&mut io::stdout());
        }
        if written.is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    written = written.and_then(|()| table.end(&mut io::stdout()));
    if let Err(error) = written {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Outcome::Exit(0);
        }
        complain(&format!(
            "write on standard output: {}",
            crate::reason(&error)
        ));
        return FAILED;
    }
    table.complaints().iter().for_each(|line| complain(line));
    match (table.is_broken(), table.is_stale_with_dropin()) {
        (true, _) => FAILED,
        (false, true) => FOUND,
        (false, false) => Outcome::Exit(0),
    }
}

/// Runs the cell that the arguments of this child name.
pub(crate) fn cell_of(args: &LibraryCellArgs) -> Report {
    match ops::named(&args.operation) {
        None => Report::broken("there is no such operation"),
        Some(operation) => cell(operation, args.library, Duration::from_micros(args.wait)),
    }
}

struct Table<'a> {
    library: Library,
    operations: &'a [&'static Operation],
    reports: Vec<[Option<Report>; 3]>,
    written: usize,
    json: bool,
}

const NAME: usize = 44;
const COLUMN: usize = 9;

fn word(report: &Report) -> (&'static str, Mark) {
    match (report.seen, report.changed) {
        (Seen::NotAvailable, _) => ("n/a", Mark::Dim),
        (Seen::Missed, _) => ("stale", Mark::Bad),
        (_, true) => ("right", Mark::Good),
        (_, false) => ("right", Mark::Dim),
    }
}

impl Table<'_> {
    fn begin(&self, out: &mut impl Write) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        let mut line = format!("{:NAME$}{:COLUMN$}", "operation", "changed");
        Column::ALL
            .iter()
            .for_each(|column| line.push_str(&format!("{:COLUMN$}", column.name())));
        writeln!(
            out,
            "{}",
            Style::of_stdout().paint(Mark::Bold, line.trim_end())
        )
    }

    /// Writes the rows that are complete and not yet written.
    fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        while let Some(row) = self.reports.get(self.written) {
            let Some(row) = row
                .iter()
                .map(Option::as_ref)
                .collect::<Option<Vec<&Report>>>()
            else {
                break;
            };
            let name = self.operations[self.written].name;
            self.written += 1;
            if self.json {
                for (report, column) in row.iter().zip(Column::ALL) {
                    writeln!(
                        out,
                        "{{\"v\":1,\"library\":\"{}\",\"operation\":\"{name}\",\"column\":\"{}\",\"changed\":{},\"transfer\":\"{}\"}}",
                        self.library.name(),
                        column.name(),
                        report.changed,
                        word(report).0
                    )?;
                }
                continue;
            }
            let style = Style::of_stdout();
            let changed = if row.iter().any(|report| report.changed) {
                "yes"
            } else {
                "no"
            };
            write!(out, "{name:NAME$}{changed:COLUMN$}")?;
            let words: Vec<String> = row
                .iter()
                .map(|report| {
                    let (word, mark) = word(report);
                    style.paint(mark, format!("{word:COLUMN$}"))
                })
                .collect();
            writeln!(out, "{}", words.concat().trim_end())?;
        }
        Ok(())
    }

    fn end(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.write(out)?;
        if self.json {
            return out.flush();
        }
        writeln!(out)?;
        for (index, column) in Column::ALL.iter().enumerate() {
            let reports: Vec<&Report> = self
                .reports
                .iter()
                .filter_map(|row| row[index].as_ref())
                .collect();
            let count = |f: fn(&&&Report) -> bool| reports.iter().filter(f).count();
            let name = Style::of_stdout().paint(Mark::Bold, format!("{:COLUMN$}", column.name()));
            // A column of nothing but `n/a` must not read as "0 stale".
            if reports
                .iter()
                .all(|report| report.seen == Seen::NotAvailable)
            {
                writeln!(
                    out,
                    "{name}not available here: mmun doctor says what its sources lack"
                )?;
                continue;
            }
            writeln!(
                out,
                "{name}{} operations, {} changed: {} stale, {} n/a",
                reports.len(),
                count(|report| report.changed),
                count(|report| report.seen == Seen::Missed),
                count(|report| report.seen == Seen::NotAvailable)
            )?;
        }
        out.flush()
    }

    /// The reasons in the cells, each with the first operation that has the reason and the count of
    /// the others. A reason of more than half of the operations stands without them.
    fn complaints(&self) -> Vec<String> {
        let mut reasons: Vec<(&str, &str, usize)> = Vec::new();
        for (row, operation) in self.reports.iter().zip(self.operations) {
            let mut own: Vec<&str> = row
                .iter()
                .flatten()
                .map(|report| report.reason.as_str())
                .filter(|reason| !reason.is_empty())
                .collect();
            own.dedup();
            for reason in own {
                match reasons.iter_mut().find(|known| known.1 == reason) {
                    Some(known) => known.2 += 1,
                    None => reasons.push((operation.name, reason, 1)),
                }
            }
        }
        let line = |(operation, reason, count): (&str, &str, usize)| match count {
            1 => format!("{operation}: {reason}"),
            _ if count * 2 > self.reports.len() => reason.to_owned(),
            _ => format!("{operation} and {} more: {reason}", count - 1),
        };
        reasons.into_iter().map(line).collect()
    }

    fn is_broken(&self) -> bool {
        let mut all = self.reports.iter().flatten().flatten();
        let nothing = self
            .reports
            .iter()
            .flatten()
            .flatten()
            .all(|report| report.seen == Seen::NotAvailable);
        nothing || all.any(|report| report.broken)
    }

    /// Whether a registration was stale in the column `both`.
    fn is_stale_with_dropin(&self) -> bool {
        self.reports
            .iter()
            .filter_map(|row| row[2].as_ref())
            .any(|report| report.seen == Seen::Missed)
    }
}
