//! Building C programs and running them with the library preloaded.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

/// The library that Cargo has built for these tests.
pub(crate) fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let folder = own.parent().unwrap();
    let library = [folder.join("../libmmun_dropin.so"), folder.join("libmmun_dropin.so")];
    library.iter().find(|place| place.exists()).expect("it was built with the tests").canonicalize().unwrap()
}

/// A program of `tests/it/programs`, built by `compiler` with `flags`. `None`, with the reason printed, if
/// that is not installed.
pub(crate) fn build(compiler: &str, source: &str, flags: &[&str]) -> Option<PathBuf> {
    if !testkit::has_optional_program(compiler) {
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/programs").join(source);
    let name = format!("{}-{compiler}-{}", source.file_stem().unwrap().display(), std::process::id());
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut command = Command::new(compiler);
    command.args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]).arg(&program).arg(&source).args(flags);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(program)
}

/// `program` with the library in it.
pub(crate) fn preloaded(program: impl AsRef<std::ffi::OsStr>, source: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", library()).env("MMUN", source).env("MMUN_REPORT", "-");
    command
}

/// Runs it to its end, or kills it and fails after two minutes.
pub(crate) fn output(mut command: Command) -> Output {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(command.output()));
    receiver.recv_timeout(Duration::from_secs(120)).expect("it hangs").unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
