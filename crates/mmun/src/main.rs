//! `mmun`: shows what a program does to its address space.
//!
//! Code that a library user could need is in `mmu-notifier` and `mmu-source`, not here.
#![deny(unsafe_code)]

mod args;
mod broker;
mod calibrate;
mod capture;
mod change;
mod coverage;
mod diff;
mod digits;
mod doctor;
mod dropin;
mod events;
mod formats;
mod front;
mod intern;
mod json;
mod kind;
mod library;
mod lifecycle;
mod names;
mod observer;
mod outcome;
mod output;
mod program;
mod record;
mod recorder;
mod recording;
mod refusal;
mod report;
mod run;
mod source;
mod stacks;
mod status;
mod style;
mod summary;
mod sys;
mod text;
mod trace;
mod who;

use std::io::{self, Write};

use args::{Command, Instead};
use outcome::{FAILED, Outcome};
use sys::Rights;

fn main() {
    sys::survive_full_files();
    sys::keep_closed_in_programs();
    let parsed = args::parse(std::env::args_os());
    let kept = parsed
        .as_ref()
        .map_or(Rights::None, |cli| rights(&cli.command));
    if let Err(error) = sys::limit(kept) {
        complain(&format!(
            "give up the capabilities of this file: {}; run a copy that has none",
            reason(&error)
        ));
        FAILED.end()
    }
    let outcome = match parsed {
        Ok(cli) => match cli.command {
            Command::Trace(args) => trace::main(args),
            Command::Report(args) => report::main(&args),
            Command::Diff(args) => diff::main(&args),
            Command::Run(args) => run::main(&args),
            Command::Coverage(args) => coverage::main(args),
            Command::Doctor(args) => doctor::main(args),
            Command::Broker(args) => broker::main(args),
            Command::CoverageCell(args) => coverage::cell(&args),
            Command::CoverageLibraryCell(args) => coverage::library_cell(&args),
            Command::CoverageTracee(args) => coverage::tracee(&args),
            Command::IdleCalls { there } => calibrate::idle_calls(there),
            Command::Man { folder: None } => print(|out| args::man(out)),
            Command::Man {
                folder: Some(folder),
            } => match args::man_into(&folder) {
                Ok(()) => Outcome::Exit(0),
                Err((path, error)) => {
                    complain(&format!("write on {}: {}", path.display(), reason(&error)));
                    FAILED
                }
            },
            Command::Completions { shell } => print(|out| {
                args::completions(shell, out);
                Ok(())
            }),
        },
        Err(Instead::Help(text)) => written(text.print()),
        Err(Instead::Usage(text, outcome)) => {
            let _ = text.print();
            outcome
        }
        Err(Instead::Refuse(line, outcome)) => {
            complain(&line);
            outcome
        }
    };
    outcome.end()
}

/// Which capabilities of this program's file a command keeps.
fn rights(command: &Command) -> Rights {
    match command {
        // The cells of a library load files that environment variables name.
        Command::Coverage(args) if args.library.is_some() => Rights::NoneInChildren,
        Command::Coverage(_) | Command::CoverageCell(_) | Command::Doctor(_) => Rights::Keep,
        _ => Rights::None,
    }
}

/// Writes to standard output; a closed pipe is no error.
fn print(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Outcome {
    let mut text = Vec::new();
    written(write(&mut text).and_then(|()| io::stdout().write_all(&text)))
}

fn written(result: io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Exit(0),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Outcome::Exit(0),
        Err(error) => {
            complain(&format!("write on standard output: {}", reason(&error)));
            FAILED
        }
    }
}

/// The text of an error without the redundant `os error` number.
fn reason(error: &dyn std::error::Error) -> String {
    without_number(&error.to_string())
}

fn without_number(text: &str) -> String {
    match text.split_once(" (os error ") {
        Some((before, after)) => format!(
            "{before}{}",
            after.split_once(')').map_or("", |(_, after)| after)
        ),
        None => text.to_owned(),
    }
}

/// Formats an error of a source as one line: the error, its cause, and its remedy.
fn explain(error: &mmu_source::Error) -> String {
    explain_with(error, None)
}

/// Like [`explain`]; `hint`, if given, replaces the error's own hint.
fn explain_with(error: &mmu_source::Error, hint: Option<&str>) -> String {
    let mut line = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        line.push_str(": ");
        line.push_str(&reason(source));
    }
    if let Some(hint) = hint.or(error.hint()) {
        line.push_str("; ");
        line.push_str(hint);
    }
    line
}

/// Writes one line to standard error. If standard error is closed, the line is lost.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "mmun: {line}");
}
