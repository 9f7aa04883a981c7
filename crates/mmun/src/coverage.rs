//! `mmun coverage`: measures which source sees which change.
//!
//! Every operation runs under every source that works here, each time in a new child. The child
//! makes memory and touches it, arms the source, subscribes, and changes the translation. The
//! subscriber reads the state of the page in its callback.

mod armed;
mod cell;
mod files;
mod library;
mod matrix;
mod operation;
mod ops;
mod other;
mod page;
mod region;
mod report;
mod runner;
mod traced;
mod witness;

use std::io::{self, Write};
use std::ops::ControlFlow;

use crate::args::{CellArgs, CoverageArgs, LibraryCellArgs, TraceeArgs};
use crate::outcome::Outcome;
use crate::source::Source;
use crate::style::Style;
use crate::{complain, doctor, sys};

use matrix::Matrix;
use operation::Operation;
use report::Report;

/// A source missed a change that it claims to see, or reported the change too late.
const FOUND: Outcome = Outcome::Exit(1);
/// A child died or hung, nothing could be measured, or the output could not be written.
const FAILED: Outcome = Outcome::Exit(2);

pub(crate) fn main(args: CoverageArgs) -> Outcome {
    if let Err(error) = std::fs::metadata("/proc/self/pagemap") {
        complain(&format!(
            "open on /proc/self/pagemap: {}; mount /proc, which shows the state of each page",
            crate::reason(&error)
        ));
        return FAILED;
    }
    if let Some(library) = args.library {
        return library::main(library, args.wait, args.json);
    }
    let sources: Vec<Source> = Source::ALL
        .into_iter()
        .filter(|source| args.sources.is_empty() || args.sources.contains(source))
        .collect();
    let mut usable = Vec::new();
    for source in &sources {
        match doctor::usable(*source) {
            Ok(()) => usable.push(*source),
            Err(lack) => complain(&format!(
                "{} cannot be used here: {}",
                source.name(),
                lack.to_line()
            )),
        }
    }
    let operations: Vec<&'static Operation> = ops::all().collect();
    let form = if args.json {
        matrix::Form::Json
    } else {
        matrix::Form::Text(Style::of_stdout())
    };
    let mut matrix = Matrix::new(operations, sources, &usable, form);
    let mut written = matrix.begin(&mut io::stdout());
    runner::run(&matrix.places(), |index, report| {
        matrix.enter(index, report);
        if written.is_ok() {
            written = matrix.write(&mut io::stdout());
        }
        if written.is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    if written.is_ok() {
        written = matrix
            .end(&mut io::stdout())
            .and_then(|()| io::stdout().flush());
    }
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
    matrix.reasons().iter().for_each(|line| complain(line));
    match (
        usable.is_empty() || matrix.is_broken(),
        matrix.faults().is_empty(),
    ) {
        (true, _) => FAILED,
        (false, true) => Outcome::Exit(0),
        (false, false) => {
            matrix.faults().iter().for_each(|line| complain(line));
            FOUND
        }
    }
}

/// Runs in a child: one operation under one source.
pub(crate) fn cell(args: &CellArgs) -> Outcome {
    // This process must not outlive its parent.
    sys::die_with(rustix::process::getppid());
    let report = match (ops::named(&args.operation), args.source) {
        (None, _) => Report::broken("there is no such operation"),
        (Some(operation), Source::Process) => traced::run(operation),
        (Some(operation), source) => cell::run(operation, source),
    };
    let written = rustix::io::write(io::stdout(), report.to_line().as_bytes());
    // Exit without destructors, because the operation may have broken the state that they use.
    sys::exit_now(i32::from(written.is_err()))
}

/// Runs in a child: one operation under a library's cache.
pub(crate) fn library_cell(args: &LibraryCellArgs) -> Outcome {
    sys::die_with(rustix::process::getppid());
    let report = library::cell_of(args);
    let written = rustix::io::write(io::stdout(), report.to_line().as_bytes());
    sys::exit_now(i32::from(written.is_err()))
}

/// Runs in the child of a cell, while the cell traces the child.
pub(crate) fn tracee(args: &TraceeArgs) -> Outcome {
    if let Some(operation) = ops::named(&args.operation) {
        traced::tracee(operation);
    }
    sys::exit_now(0)
}
