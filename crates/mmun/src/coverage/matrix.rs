//! The result: a row for each operation, a column for each source.

use std::io::{self, Write};

use super::operation::Operation;
use super::report::{Report, Seen};
use super::runner::Place;
use crate::source::Source;
use crate::style::{Mark, Style};

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text(Style),
    /// One JSON object a line.
    Json,
}

/// Takes reports in any order, and writes the rows in the order of the table, each as soon as
/// possible.
#[derive(Debug)]
pub(crate) struct Matrix {
    operations: Vec<&'static Operation>,
    sources: Vec<Source>,
    /// One report for each operation and source.
    reports: Vec<Vec<Option<Report>>>,
    /// The row and the column of each cell that is run, by the index of its place. The reports of
    /// unusable sources are entered at the start.
    places: Vec<(usize, usize)>,
    form: Form,
    /// How many rows are written already.
    written: usize,
}

const NAME: usize = 44;
const COLUMN: usize = 9;

impl Matrix {
    pub(crate) fn new(
        operations: Vec<&'static Operation>,
        sources: Vec<Source>,
        usable: &[Source],
        form: Form,
    ) -> Matrix {
        let blank = |source: &Source| (!usable.contains(source)).then(|| Report::unavailable(""));
        let row: Vec<Option<Report>> = sources.iter().map(blank).collect();
        let reports = vec![row.clone(); operations.len()];
        let columns = (0..sources.len()).filter(|column| row[*column].is_none());
        let places = (0..operations.len())
            .flat_map(|row| columns.clone().map(move |column| (row, column)))
            .collect();
        Matrix {
            operations,
            sources,
            reports,
            places,
            form,
            written: 0,
        }
    }

    /// The cells to run.
    pub(crate) fn places(&self) -> Vec<Place> {
        self.places
            .iter()
            .map(|(row, column)| (self.operations[*row], self.sources[*column]))
            .collect()
    }

    /// Enters the report of the place with this index.
    pub(crate) fn enter(&mut self, index: usize, report: Report) {
        let (row, column) = self.places[index];
        self.reports[row][column] = Some(report);
    }

    /// Writes the headings.
    pub(crate) fn begin(&self, out: &mut impl Write) -> io::Result<()> {
        let Form::Text(style) = self.form else {
            return Ok(());
        };
        let mut line = format!("{:NAME$}{:COLUMN$}", "operation", "changed");
        self.sources
            .iter()
            .for_each(|source| line.push_str(&format!("{:COLUMN$}", source.name())));
        writeln!(out, "{}", style.paint(Mark::Bold, line.trim_end()))
    }

    /// Writes the rows that are complete and not yet written.
    pub(crate) fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        while let Some(row) = self.reports.get(self.written) {
            let Some(row) = row
                .iter()
                .map(Option::as_ref)
                .collect::<Option<Vec<&Report>>>()
            else {
                break;
            };
            let text = match self.form {
                Form::Text(style) => as_text(self.operations[self.written], &row, style),
                Form::Json => as_json(self.operations[self.written], &row, &self.sources),
            };
            out.write_all(text.as_bytes())?;
            self.written += 1;
        }
        Ok(())
    }

    /// Writes the remaining rows. As text, also writes for each source how many operations changed
    /// a translation, when it saw them, and how many operations were unavailable.
    pub(crate) fn end(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.write(out)?;
        let Form::Text(style) = self.form else {
            return Ok(());
        };
        writeln!(out)?;
        for (column, source) in self.sources.iter().enumerate() {
            let reports = self.reports.iter().filter_map(|row| row[column].as_ref());
            let count = |seen| {
                let counts = |report: &&Report| {
                    report.seen == seen && (report.changed || seen == Seen::NotAvailable)
                };
                reports.clone().filter(counts).count()
            };
            let told: Vec<String> = Seen::ALL
                .iter()
                .map(|seen| format!("{} {}", count(*seen), seen.name()))
                .collect();
            let changed = reports.clone().filter(|report| report.changed).count();
            let name = style.paint(Mark::Bold, format!("{:COLUMN$}", source.name()));
            writeln!(out, "{name}{changed} changed: {}", told.join(", "))?;
        }
        Ok(())
    }

    /// One line for each change that a source claims to see, and missed or reported too late.
    /// `uffd` may report a change late.
    pub(crate) fn faults(&self) -> Vec<String> {
        let fault = |(operation, source, report): (&Operation, Source, &Report)| {
            let late = report.seen == Seen::After && source != Source::Uffd;
            let is_fault = report.changed
                && operation.is_claimed_by(source)
                && (late || report.seen == Seen::Missed);
            is_fault.then(|| match late {
                true => format!("{} told of {} after it", source.name(), operation.name),
                false => format!("{} missed {}", source.name(), operation.name),
            })
        };
        self.cells().filter_map(fault).collect()
    }

    /// The reasons for unavailable cells: one line for each operation and reason. If all operations
    /// of a source have the same reason, one line for the source.
    pub(crate) fn reasons(&self) -> Vec<String> {
        let common: Vec<Option<&str>> = (0..self.sources.len())
            .map(|column| self.common_reason(column))
            .collect();
        let mut lines: Vec<String> = Vec::new();
        for (source, reason) in self.sources.iter().zip(&common) {
            lines.extend(reason.map(|reason| format!("{}: {reason}", source.name())));
        }
        let is_said = |source: Source| {
            let column = self.sources.iter().position(|known| *known == source);
            column.is_some_and(|column| common[column].is_some())
        };
        for (operation, source, report) in self
            .cells()
            .filter(|(_, source, report)| !report.reason.is_empty() && !is_said(*source))
        {
            let everywhere = self
                .cells()
                .filter(|cell| cell.0.name == operation.name)
                .filter(|cell| {
                    cell.2.reason == report.reason
                        || cell.2.reason.is_empty() && cell.2.seen == Seen::NotAvailable
                });
            let line = match everywhere.count() == self.sources.len() {
                true => format!("{}: {}", operation.name, report.reason),
                false => format!(
                    "{} under {}: {}",
                    operation.name,
                    source.name(),
                    report.reason
                ),
            };
            if lines.last() != Some(&line) {
                lines.push(line);
            }
        }
        lines
    }

    /// The reason that all reports of a source have in common, if there are several reports.
    fn common_reason(&self, column: usize) -> Option<&str> {
        let mut reasons = self.reports.iter().map(|row| {
            let report = row[column].as_ref()?;
            Some(report.reason.as_str()).filter(|reason| !reason.is_empty())
        });
        let first = reasons.next()??;
        (self.reports.len() > 1 && reasons.all(|reason| reason == Some(first))).then_some(first)
    }

    /// Whether a child hung, died, or could not run its cell.
    pub(crate) fn is_broken(&self) -> bool {
        self.cells().any(|(_, _, report)| report.broken)
    }

    fn cells(&self) -> impl Iterator<Item = (&'static Operation, Source, &Report)> {
        let cells = |(operation, row): (&&'static Operation, _)| {
            let row: &Vec<Option<Report>> = row;
            let operation = *operation;
            row.iter()
                .zip(&self.sources)
                .filter_map(move |(report, source)| Some((operation, *source, report.as_ref()?)))
        };
        self.operations.iter().zip(&self.reports).flat_map(cells)
    }
}

fn as_text(operation: &Operation, row: &[&Report], style: Style) -> String {
    let available = row.iter().any(|report| report.seen != Seen::NotAvailable);
    let changed = match (available, row.iter().any(|report| report.changed)) {
        (false, _) => "-",
        (true, true) => "yes",
        (true, false) => "no",
    };
    let mut line = format!("{:NAME$}{changed:COLUMN$}", operation.name);
    for (index, report) in row.iter().enumerate() {
        let mark = match report.seen {
            Seen::Before => Mark::Good,
            Seen::After => Mark::Fair,
            Seen::Missed if report.changed => Mark::Bad,
            Seen::Missed | Seen::NotAvailable => Mark::Dim,
        };
        let gap = if index + 1 < row.len() {
            COLUMN - report.seen.name().len()
        } else {
            0
        };
        line.push_str(&style.paint(mark, report.seen.name()));
        line.extend(std::iter::repeat_n(' ', gap));
    }
    line.push('\n');
    line
}

/// Formats a row as JSON. Names need no escapes; a test of the table checks that.
fn as_json(operation: &Operation, row: &[&Report], sources: &[Source]) -> String {
    let object = |(report, source): (&&Report, &Source)| {
        format!(
            "{{\"v\":1,\"operation\":\"{}\",\"source\":\"{}\",\"changed\":{},\"seen\":\"{}\"}}\n",
            operation.name,
            source.name(),
            report.changed,
            report.seen.name()
        )
    };
    row.iter().zip(sources).map(object).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_a_whole_source_is_written_once() {
        let operations: Vec<&'static Operation> = super::super::ops::all().take(3).collect();
        let name = operations[1].name;
        let sources = vec![Source::Hook, Source::Process];
        let mut matrix = Matrix::new(operations, sources.clone(), &sources, Form::Json);
        let places: Vec<Place> = matrix.places();
        for (index, (operation, source)) in places.into_iter().enumerate() {
            let report = match source {
                Source::Hook => Report::unavailable("/proc is not there"),
                _ if operation.name == name => Report::unavailable("no swap"),
                _ => Report::told(Seen::Before, true),
            };
            matrix.enter(index, report);
        }
        assert_eq!(
            matrix.reasons(),
            [
                "hook: /proc is not there".to_owned(),
                format!("{name} under process: no swap")
            ]
        );
    }
}
