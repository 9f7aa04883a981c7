//! Cargo's runner: records each command line, so that the guest can run it. The command line of a
//! doc test is not recorded.
//!
//! A note is a file whose name is the command's index. Its fields are the working folder, the count
//! of environment variables, the variables, and the words of the command line. A zero byte ends
//! each field.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The variable that names the folder of the notes.
pub(crate) const PLAN: &str = "MMUN_GUEST_PLAN";

/// Records a command line, unless it is that of a doc test.
pub(crate) fn run(command: &[OsString]) -> ExitCode {
    match std::env::var_os(PLAN)
        .ok_or_else(|| io::Error::other("no folder for notes"))
        .and_then(|plan| {
            let plan = PathBuf::from(plan);
            if command
                .first()
                .is_some_and(|program| program.to_string_lossy().contains("rustdoctest"))
            {
                // rustdoc removes the example's program before the guest starts.
                println!("an example of the documentation does not run in the guest");
                return Ok(());
            }
            fs::write(plan.join(count(&plan).to_string()), note(command)?)
        }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-record: {error}");
            ExitCode::from(2)
        }
    }
}

fn note(command: &[OsString]) -> io::Result<Vec<u8>> {
    let variables: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(name, _)| name != PLAN)
        .collect();
    let mut note = Vec::new();
    let mut field = |bytes: &[u8]| {
        note.extend_from_slice(bytes);
        note.push(0);
    };
    field(std::env::current_dir()?.as_os_str().as_bytes());
    field(variables.len().to_string().as_bytes());
    for (name, value) in variables {
        field(&[name.as_bytes(), b"=", value.as_bytes()].concat());
    }
    command.iter().for_each(|word| field(word.as_bytes()));
    Ok(note)
}

/// Returns how many notes there are.
pub(crate) fn count(plan: &Path) -> usize {
    (0..)
        .find(|number| !plan.join(number.to_string()).exists())
        .expect("a folder is finite")
}

/// Returns the command of a note, or `None` if the note cannot be read.
pub(crate) fn read(plan: &Path, number: usize) -> Option<Command> {
    let note = fs::read(plan.join(number.to_string())).ok()?;
    let mut fields = note
        .split(|byte| *byte == 0)
        .map(|field| OsString::from_vec(field.to_vec()));
    let folder = fields.next()?;
    let variables: usize = fields.next()?.to_str()?.parse().ok()?;
    let variables: Vec<OsString> = fields.by_ref().take(variables).collect();
    // The last field also ends with a zero byte, so the last piece is empty.
    let mut words: Vec<OsString> = fields.collect();
    words.pop();
    let mut words = words.into_iter();
    let mut command = Command::new(words.next()?);
    command.args(words).current_dir(folder).env_clear();
    for variable in variables {
        let bytes = variable.as_bytes();
        let split = bytes.iter().position(|byte| *byte == b'=')?;
        command.env(
            OsString::from_vec(bytes[..split].to_vec()),
            OsString::from_vec(bytes[split + 1..].to_vec()),
        );
    }
    Some(command)
}
