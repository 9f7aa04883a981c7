//! `mmun report`: makes a report of a recorded trace.

mod bands;
mod lane;
mod lives;
mod page;
mod pending;
mod totals;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;

pub(crate) use self::pending::{Pending, Product};
use crate::args::{ReportArgs, ReportFormat};
use crate::outcome::{self, Outcome};
use crate::output::{FileId, STDOUT, is_standard, open_or_make, replace};
use crate::recording::{Recording, input_name};
use crate::summary::{Sources, Summary, Wanted};
use crate::{complain, formats, reason, written};

/// The exit status if the report could not be made.
const FAILED: Outcome = Outcome::Exit(2);

pub(crate) fn main(args: &ReportArgs) -> Outcome {
    let output = args.output.as_deref().filter(|path| !is_standard(path));
    let read = match is_standard(&args.trace) {
        true => FileId::of_stream(io::stdin()),
        false => FileId::of_path(&args.trace),
    };
    let written_to = match output {
        Some(path) => FileId::of_path(path),
        None => FileId::of_stream(io::stdout()),
    };
    if read.is_some() && read == written_to {
        complain(&format!(
            "report on {}: it is the trace; {} must be another file",
            output.map_or(STDOUT.into(), |path| path.display().to_string()),
            output.map_or(STDOUT, |_| "-o"),
        ));
        return FAILED;
    }
    let recording = match Recording::open(&args.trace) {
        Ok(recording) => recording,
        Err(error) => {
            complain(&format!("read on {}: {error}", input_name(&args.trace)));
            return FAILED;
        }
    };
    if recording.is_cut {
        complain(&format!(
            "{}: its last line is cut, and left out",
            input_name(&args.trace)
        ));
    }
    let text = match args.format() {
        ReportFormat::Summary => summary(
            &recording,
            args.summary.wanted(true).expect("it is always wanted"),
        ),
        ReportFormat::Perfetto if output.is_none() && io::stdout().is_terminal() => {
            complain("report on standard output: a perfetto trace is no text; name a file with -o");
            return FAILED;
        }
        ReportFormat::Perfetto => formats::perfetto(&recording),
        ReportFormat::Chrome => formats::chrome(&recording),
        ReportFormat::Html => page::make(&recording),
    };
    match output {
        None => match written(io::stdout().write_all(&text)) {
            outcome::FAILED => FAILED,
            outcome => outcome,
        },
        Some(path) => match write(path, &text) {
            Ok(()) => Outcome::Exit(0),
            Err(error) => {
                complain(&format!("write on {}: {}", path.display(), reason(&error)));
                FAILED
            }
        },
    }
}

/// Writes to a file that may exist.
fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let (mut file, _) = open_or_make(path)?;
    replace(&mut file, text)
}

/// The tables that `mmun trace --summary` writes.
fn summary(recording: &Recording, wanted: Wanted) -> Vec<u8> {
    let mut summary = Summary::new(wanted);
    for changed in &recording.changes {
        summary.add(&changed.change, recording.names.text(changed.comm));
    }
    let mut out = Vec::new();
    summary.write_text(
        &mut out,
        &Sources {
            names: Some(&recording.names),
            stacks: &recording.stacks,
            has_places: !recording.stacks.is_empty(),
        },
    );
    out
}
