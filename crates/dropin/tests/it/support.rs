//! Building C programs and running them with the library preloaded.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use testkit::{Cap, require, within};

/// The library that Cargo has built for these tests, which is beside them. The library in the
/// parent folder may be older.
pub(crate) fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let library = own.parent().unwrap().join("libmmun_dropin.so");
    assert!(
        library.exists(),
        "{} was built with the tests",
        library.display()
    );
    library
}

/// A library that one of Debian's packages has installed.
pub(crate) fn installed(name: &str) -> PathBuf {
    let folder = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    Path::new(&folder).join(name)
}

/// A program of `tests/it/programs`, built by `compiler` with `flags`. `None`, with the reason
/// printed, if the compiler is not installed.
pub(crate) fn build(
    compiler: &'static str,
    source: &str,
    variant: &str,
    flags: &[&str],
) -> Option<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if !require(Cap::Program(compiler)) {
        return None;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/programs")
        .join(source);
    let name = format!(
        "{}-{compiler}-{variant}-{}",
        source.file_stem().unwrap().to_string_lossy(),
        std::process::id()
    );
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if program.exists() {
        return Some(program);
    }
    let mut command = Command::new(compiler);
    // Links with the installed libraries; the program may run with those of LD_LIBRARY_PATH.
    command.env_remove("LD_LIBRARY_PATH");
    command
        .args([
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-function",
            "-pthread",
            "-o",
        ])
        .arg(&program)
        .arg(&source)
        .args(flags);
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(program)
}

/// A command that runs `program` with the library preloaded.
pub(crate) fn preloaded(program: impl AsRef<std::ffi::OsStr>, source: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("LD_PRELOAD", library())
        .env("MMUN", source)
        .env("MMUN_REPORT", "-");
    command
}

/// Runs a command, with the time limit of [`within`].
pub(crate) fn output(mut command: Command) -> Output {
    within("the command", move || command.output().unwrap())
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `once.c`, with a stand-in for a library.
pub(crate) struct Once {
    library: &'static str,
    program: PathBuf,
    stand_in: PathBuf,
}

impl Once {
    /// `library` is `ucx` or `libfabric`. `None`, with the reason printed, if there is no compiler.
    pub(crate) fn built(library: &'static str) -> Option<Once> {
        let program = build("gcc", "once.c", "once", &["-ldl"])?;
        let shared = build("gcc", "stand_in.c", "shared", &["-shared", "-fPIC"])?;
        // The drop-in finds a library by the beginning of its file's name. Each caller has a file
        // of its own, because a loaded file must not change.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = match library {
            "ucx" => "libucs",
            library => library,
        };
        let name = format!("{name}.so.{}-once-{count}", std::process::id());
        let stand_in = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::copy(shared, &stand_in).unwrap();
        Some(Once {
            library,
            program,
            stand_in,
        })
    }

    pub(crate) fn run(&self, how: &[&str], set: impl FnOnce(&mut Command)) -> Output {
        let mut command = Command::new(&self.program);
        command.arg(self.library).arg(&self.stand_in).args(how);
        command.env("LD_PRELOAD", library());
        for own in ["MMUN", "MMUN_REPORT", "MMUN_STRICT"] {
            command.env_remove(own);
        }
        set(&mut command);
        output(command)
    }
}

impl Drop for Once {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.stand_in);
    }
}
