//! `mmun`: shows what a program does to its address space.
//!
//! Arguments become a plan, the plan is run; what a library user would want is in `mmu-notifier` and `mmu-source`.
#![deny(unsafe_code)]

mod args;
mod digits;
mod events;
mod front;
mod json;
mod names;
mod observer;
mod outcome;
mod output;
mod record;
mod recorder;
mod summary;
mod sys;
mod text;
mod trace;

use std::io::{self, Write};

use args::{Command, Instead};
use outcome::{FAILED, Outcome};

fn main() {
    let outcome = match args::parse(std::env::args_os()) {
        Ok(cli) => match cli.command {
            Command::Trace(args) => trace::main(args),
            Command::Man => print(|out| args::man(out)),
            Command::Completions { shell } => print(|out| {
                args::completions(shell, out);
                Ok(())
            }),
        },
        Err(Instead::Help(text)) => written(text.print()),
        Err(Instead::Refuse(line)) => {
            complain(&line);
            FAILED
        }
    };
    outcome.end()
}

/// Writes to standard output, without a word if nobody reads it.
fn print(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Outcome {
    let mut text = Vec::new();
    written(write(&mut text).and_then(|()| io::stdout().write_all(&text)))
}

fn written(result: io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Exit(0),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Outcome::Exit(0),
        Err(error) => {
            complain(&format!("write on standard output: {error}"));
            FAILED
        }
    }
}

/// One line on standard error; if that is closed there is nobody to tell.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "mmun: {line}");
}
