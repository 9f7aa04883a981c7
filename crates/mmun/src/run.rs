//! `mmun run`: runs a program with the drop-in preloaded, and merges the reports of its processes.

mod destination;
mod reports;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, WaitStatus};

use self::destination::Destination;
use crate::args::{CoverageArgs, RunArgs, Watch};
use crate::dropin::library;
use crate::outcome::{FAILED, NOT_EXECUTABLE, NOT_FOUND, Outcome};
use crate::output::must_not_be_used;
use crate::source::Source;
use crate::sys::{self, Relay};
use crate::who::shown;
use crate::{complain, coverage, reason};

pub(crate) fn main(args: &RunArgs) -> Outcome {
    let source = args.source.or_else(inherited);
    let is_set_strict =
        is_set("MMUN_STRICT") && std::env::var_os("MMUN_STRICT") != Some("0".into());
    let is_strict = args.strict || is_set_strict;
    if is_strict && source == Some(Watch::Off) {
        complain(
            "--strict (MMUN_STRICT) and --source off (MMUN) exclude each other: off protects no process",
        );
        return FAILED;
    }
    // Without this option the parser refuses a command line that names no program.
    let Some((program, words)) = args.program.split_first() else {
        complain(
            "--check runs a program after the check: name it, as in 'mmun run --check -- ./app'; \
            'mmun coverage' checks alone",
        );
        return FAILED;
    };
    if let Some(path) = &args.output {
        if let Err(line) = must_not_be_used("run", ("-o", path), &args.program) {
            complain(&line);
            return FAILED;
        }
    }
    let library = match library() {
        Ok(library) => library,
        Err(reason) => {
            complain(&reason);
            return FAILED;
        }
    };
    if args.check {
        check(source.unwrap_or(Watch::Auto));
    }
    let mut command = Command::new(program);
    command.args(words);
    sys::inherit_sigpipe(&mut command);
    command.env("LD_PRELOAD", preload(&library));
    // The environment variables keep their values unless an option overrides them.
    if let Some(source) = args.source {
        let name = source.to_possible_value().expect("no value is hidden");
        command.env("MMUN", name.get_name());
    }
    if args.strict {
        command.env("MMUN_STRICT", "1");
    }
    if args.no_report {
        command.env_remove("MMUN_REPORT");
    }
    let reports_elsewhere = args.output.is_none() && is_set("MMUN_REPORT");
    if args.no_report || reports_elsewhere {
        return refused(program, &command.exec());
    }
    let report = match Destination::open(args.output.as_deref()) {
        Ok(report) => report,
        Err(line) => {
            complain(&line);
            return FAILED;
        }
    };
    // From here on this process must outlive the program, to merge the reports and to remove
    // temporary files.
    sys::keep_signals();
    let folder = match folder() {
        Ok(folder) => folder,
        Err(error) => {
            let temporary = std::env::temp_dir();
            let why = format!("mkdir in {}: {}", temporary.display(), reason(&error));
            report.discard();
            // If the user has requested a report, refuse to run without one.
            if args.output.is_some() {
                complain(&format!(
                    "{why}; TMPDIR must name a folder that can be written"
                ));
                return FAILED;
            }
            complain(&format!(
                "no report: {why}; TMPDIR must name a folder that can be written"
            ));
            command.env_remove("MMUN_REPORT");
            sys::release_signals();
            return refused(program, &command.exec());
        }
    };
    command.env("MMUN_REPORT", with_slash(&folder));
    let outcome = match sys::start_under_relay(command) {
        Ok(program) => wait(&program),
        Err(error) => {
            let _ = fs::remove_dir_all(&folder);
            report.discard();
            return refused(program, &error);
        }
    };
    let text = match source {
        Some(Watch::Off) => {
            "mmun: the source is off: no process was protected or observed\n".into()
        }
        _ => reports::merged(&folder),
    };
    let _ = fs::remove_dir_all(&folder);
    match report.write(&text) {
        Ok(()) => outcome,
        Err(line) => {
            complain(&line);
            // A failure of the program takes precedence over that of the report.
            match outcome {
                Outcome::Exit(0) => FAILED,
                outcome => outcome,
            }
        }
    }
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

/// The value of `MMUN`; the drop-in reports unknown values.
fn inherited() -> Option<Watch> {
    let value = std::env::var("MMUN").ok()?;
    <Watch as ValueEnum>::from_str(&value, false).ok()
}

/// Waits until the program has ended. If the program stops and a shell waits for that, this process
/// stops as well.
fn wait(program: &Relay) -> Outcome {
    let number = program.0.id() as i32;
    let pid = Pid::from_raw(number).expect("a child's pid is positive");
    let stopped_or_ended = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
    loop {
        match rustix::process::waitid(WaitId::Pid(pid), stopped_or_ended) {
            Ok(Some(status)) if status.stopped() => {
                // Consumes the stop but not the end: a program that has ended meanwhile keeps its
                // pid until the next iteration.
                let stop = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
                let _ = rustix::process::waitid(WaitId::Pid(pid), stop);
                // The program may run again already: a SIGCONT to its group has continued this
                // process as well.
                if sys::is_foreground_job() && is_stopped(number) {
                    sys::stop();
                }
            }
            Ok(Some(_)) => {
                sys::end_relay();
                let status = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                let outcome = status.ok().flatten().and_then(|(_, status)| ended(status));
                return outcome.unwrap_or(FAILED);
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                complain(&format!(
                    "wait on the program: {}",
                    reason(&io::Error::from(error))
                ));
                return FAILED;
            }
        }
    }
}

fn ended(status: WaitStatus) -> Option<Outcome> {
    let code = status.exit_status().map(Outcome::Exit);
    code.or_else(|| status.terminating_signal().map(Outcome::Signal))
}

/// Whether the process is stopped, according to `/proc`.
fn is_stopped(pid: i32) -> bool {
    let stat = shown(pid, "stat").and_then(|file| fs::read_to_string(file).ok());
    let stat = stat.unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with(['T', 't']))
}

/// Reports that the program could not be run, and why.
fn refused(program: &OsString, error: &io::Error) -> Outcome {
    // `execve` has these errors only if a limit is reached between the fork and the call.
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM)) {
        complain(&format!(
            "fork: {}; a limit on processes (ulimit -u, pids.max) or memory is reached",
            reason(error)
        ));
        return FAILED;
    }
    let program = Path::new(program);
    let is_there = error.kind() == io::ErrorKind::NotFound
        && program.as_os_str().as_encoded_bytes().contains(&b'/')
        && program.exists();
    complain(&format!(
        "execve on {}: {}{}",
        program.display(),
        reason(error),
        if is_there {
            "; the file is there, its interpreter is not"
        } else {
            ""
        }
    ));
    match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    }
}

/// The value of `LD_PRELOAD`: the library, then the libraries that are preloaded already.
fn preload(library: &Path) -> OsString {
    let mut all = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        all.push(":");
        all.push(others);
    }
    all
}

/// Makes a new directory for the reports, one file for each process.
fn folder() -> io::Result<PathBuf> {
    // Absolute, because the program's processes may have other working directories.
    let base = std::path::absolute(std::env::temp_dir())?;
    for attempt in 0..100_u32 {
        let name = base.join(format!("mmun-run-{}-{attempt}", std::process::id()));
        match fs::create_dir(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|()| name),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn with_slash(folder: &Path) -> OsString {
    let mut name = folder.as_os_str().to_owned();
    name.push("/");
    name
}

/// Prints which source sees each kind of change on this machine.
fn check(watch: Watch) {
    let sources = match watch {
        Watch::Auto | Watch::Both => vec![Source::Kernel, Source::Hook],
        Watch::Kernel => vec![Source::Kernel],
        Watch::Hook => vec![Source::Hook],
        Watch::Off => return,
    };
    coverage::main(CoverageArgs {
        json: false,
        sources,
        library: None,
        wait: 0,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fork_is_not_the_programs_fault() {
        let of = |number| refused(&"./a".into(), &io::Error::from_raw_os_error(number));
        assert_eq!(of(libc::EAGAIN), FAILED);
        assert_eq!(of(libc::ENOMEM), FAILED);
        assert_eq!(of(libc::EACCES), NOT_EXECUTABLE);
        assert_eq!(of(libc::ENOENT), NOT_FOUND);
    }
}
