//! Compiles programs in C and C++ against the library that was built with this test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};
use testkit::{Cap, require};

/// Returns this crate's folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a folder that contains the library under two names: that for the linker, and the soname
/// for the loader.
pub(crate) fn libraries() -> PathBuf {
    let test = env::current_exe().expect("this program has a path");
    let library = test
        .parent()
        .expect("it lies in a folder")
        .join("libmmun.so");
    let folder = scratch("lib");
    for name in ["libmmun.so", "libmmun.so.0"] {
        // Several tests may make the link at once. So make it under a unique name, then rename it.
        let link = folder.join(format!("{name}.{:?}", std::thread::current().id()));
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&library, &link).expect("a link in the scratch folder");
        fs::rename(&link, folder.join(name)).expect("a rename in the scratch folder");
    }
    folder
}

/// Makes the folder `name` below `target/tmp`, if it is not there. Tests that give the same name
/// share the folder, and none removes it.
pub(crate) fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder below target");
    folder
}

/// The flags with which the headers must compile without a warning.
pub(crate) const STRICT: &[&str] = &["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"];

/// Compiles and links a program. If this machine has no such compiler, prints that and returns
/// `None`.
pub(crate) fn compile(
    name: &str,
    compiler: &'static str,
    flags: &[&str],
    sources: &[PathBuf],
) -> Option<PathBuf> {
    if !require(Cap::Program(compiler)) {
        return None;
    }
    let (program, libraries) = (scratch("programs").join(name), libraries());
    let output = Command::new(compiler)
        .args(flags)
        .arg("-I")
        .arg(root().join("include"))
        .args(sources)
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(&libraries)
        .arg(format!("-Wl,-rpath,{}", libraries.display()))
        .args(["-lmmun", "-lpthread"])
        .output()
        .expect("the compiler runs");
    assert!(
        output.status.success(),
        "{name} does not compile:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(program)
}

/// Runs a command that must succeed, and returns what it printed.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let Output {
        status,
        stdout,
        stderr,
    } = output;
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr),
    );
    assert!(
        status.success(),
        "{command:?}: {status}\n{stdout}\n{stderr}"
    );
    stdout.into_owned()
}

/// Returns the C files of a folder.
pub(crate) fn sources(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).expect("the folder is there");
    let paths = entries.map(|entry| entry.expect("a readable entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect()
}
