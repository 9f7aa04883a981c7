//! How a program is started.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Read, Write, pipe};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicBool;

use mmu_source::process::{Command, Done, Error, ExitStatus, Options, Tracer};
use testkit::{Cap, require};

use crate::log::{Recorder, trace};

fn tracer() -> Tracer<Recorder> {
    Tracer::new(Options::default(), Recorder::new()).expect("a tracer")
}

/// Runs `command` and returns how it ended.
fn run(command: Command) -> ExitStatus {
    let mut tracer = tracer();
    tracer.spawn(command).expect("it starts");
    assert_eq!(tracer.exit_status(), None);
    tracer.run(&AtomicBool::new(false)).expect("it runs");
    tracer.exit_status().expect("it has ended")
}

#[test]
fn a_program_that_is_not_there_or_not_executable_is_an_error() {
    if !require(Cap::Ptrace) {
        return;
    }
    let refused = |program: &str| match tracer().spawn(Command::new(program)) {
        Err(Error::Exec {
            program: named,
            source,
        }) => {
            assert_eq!(named, program);
            source.kind()
        }
        other => panic!("{program}: {other:?}"),
    };
    assert_eq!(refused("no-such-program"), ErrorKind::NotFound);
    assert_eq!(refused("/no/such/program"), ErrorKind::NotFound);
    assert_eq!(refused(""), ErrorKind::NotFound);
    assert_eq!(refused("/etc"), ErrorKind::PermissionDenied);
    assert_eq!(refused("/etc/passwd"), ErrorKind::PermissionDenied);
    assert_eq!(refused("zero\0byte"), ErrorKind::InvalidInput);
}

#[test]
fn a_folder_that_may_not_be_searched_hides_no_other_and_has_no_program() {
    if !(require(Cap::Ptrace) && require(Cap::Root)) {
        return;
    }
    let folder = std::env::temp_dir().join(format!("unsearchable-{}", std::process::id()));
    fs::create_dir(&folder).expect("a folder");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o000)).expect("its owner may");
    let path = OsString::from(format!("{}:/bin:/usr/bin", folder.display()));
    let is_so = testkit::in_child(|| {
        // SAFETY: takes an integer. From here on, file look-ups have the rights of another user.
        unsafe { libc::setfsuid(65534) };
        // SAFETY: takes integers. It makes this child traceable again.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }, 0);
        let command = |name| Command::new(name).environment([("PATH".into(), path.clone())]);
        let missing = tracer().spawn(command("no-such-program-anywhere"));
        let is_missing = matches!(&missing, Err(Error::Exec { source, .. }) if source.kind() == ErrorKind::NotFound);
        assert!(is_missing, "{missing:?}");
        run(command("true")) == ExitStatus::Code(0)
    });
    fs::remove_dir(&folder).expect("it is empty");
    assert!(is_so);
}

#[test]
fn a_program_that_is_no_program_is_an_error() {
    if !require(Cap::Ptrace) {
        return;
    }
    let path = std::env::temp_dir().join(format!("no-program-{}", std::process::id()));
    testkit::write_program("text\n", &path);
    let refused = tracer().spawn(Command::new(&path));
    fs::remove_file(&path).expect("removed");
    match refused {
        Err(Error::Exec { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENOEXEC)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_working_directory_that_is_not_there_is_an_error() {
    if !require(Cap::Ptrace) {
        return;
    }
    match tracer().spawn(Command::new("true").current_dir("/no/such/place")) {
        Err(Error::Spawn {
            call: "chdir",
            source,
        }) => assert_eq!(source.kind(), ErrorKind::NotFound),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tracer_without_tracees_is_done_at_once() {
    let mut tracer = tracer();
    assert_eq!(
        tracer.run(&AtomicBool::new(false)).expect("nothing to do"),
        Done::AllExited
    );
    assert_eq!(tracer.exit_status(), None);
}

#[test]
fn the_exit_status_is_the_programs() {
    if !require(Cap::Ptrace) {
        return;
    }
    assert_eq!(trace(&["exit", "42"]).status, ExitStatus::Code(42));
    assert_eq!(
        trace(&["segfault"]).status,
        ExitStatus::Signal(libc::SIGSEGV)
    );
}

#[test]
fn streams_directory_and_environment_are_the_programs() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (stdin, mut to) = pipe().expect("a pipe");
    let (mut from, stdout) = pipe().expect("a pipe");
    to.write_all(b"in\n").expect("written");
    drop(to);
    let script = "read line; echo $line $PWD $WORD; echo gone >&2; kill -PIPE $$";
    let path: OsString = std::env::var_os("PATH").expect("a path");
    let command = Command::new("sh")
        .args(["-c", script])
        .stdin(stdin)
        .stderr(stdout.try_clone().expect("a copy"))
        .stdout(stdout)
        .current_dir("/")
        .environment([("PATH".into(), path), ("WORD".into(), "word".into())]);
    assert_eq!(
        run(command),
        ExitStatus::Signal(libc::SIGPIPE),
        "SIGPIPE is not ignored in the child"
    );
    let command = Command::new("sh").args(["-c", "kill -PIPE $$; exit 7"]);
    assert_eq!(run(command.ignore_sigpipe()), ExitStatus::Code(7));
    let mut text = String::new();
    from.read_to_string(&mut text).expect("text");
    assert_eq!(text, "in / word\ngone\n");
}

#[test]
fn one_tracer_serves_several_programs() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mut tracer = tracer();
    tracer.spawn(Command::new("true")).expect("it starts");
    tracer.spawn(Command::new("false")).expect("it starts");
    tracer.run(&AtomicBool::new(false)).expect("both run");
    assert_eq!(
        tracer.exit_status(),
        Some(ExitStatus::Code(1)),
        "of the last one"
    );
    assert!(!tracer.detach().0.finish().is_empty());
}
