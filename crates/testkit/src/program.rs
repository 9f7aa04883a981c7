//! Files that a test executes or loads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Copies a program, with these permissions. A child process makes the copy. If this process wrote
/// the copy, another thread could fork meanwhile, and its child would inherit the descriptor that
/// is open for writing. Executing the copy would then fail with `ETXTBSY`.
///
/// # Panics
/// If the copy fails.
pub fn copy_program(from: &Path, to: &Path, mode: u32) {
    let mut install = Command::new("install");
    let status = install
        .arg(format!("--mode={mode:o}"))
        .args([from, to])
        .status();
    assert!(
        status.expect("install is there").success(),
        "install {}",
        to.display()
    );
}

/// Writes a script, or another file that every user may execute. A child process makes the file, as
/// for [`copy_program`].
///
/// # Panics
/// If writing fails.
pub fn write_program(text: &str, to: &Path) {
    let draft = to.with_extension("draft");
    fs::write(&draft, text).expect("a file");
    copy_program(&draft, to, 0o755);
    fs::remove_file(&draft).expect("it was just written");
}

/// Returns the shared library that the example `name` of `package` is, and builds it if necessary:
/// `cargo test --test NAME` alone builds no examples. It has the profile of this test program,
/// unless it must be optimised.
///
/// # Panics
/// If there is no such library.
#[must_use]
pub fn example_library(package: &str, name: &str, is_optimised: bool) -> PathBuf {
    let program = env::current_exe().expect("this program has a name");
    let folder = program.ancestors().nth(2);
    let mut folder = folder.expect("it lies in target/PROFILE/deps").to_owned();
    if is_optimised {
        folder.set_file_name("release");
    }
    // On a machine without Cargo, the library was built beforehand.
    if Path::new(env!("CARGO")).exists() {
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--package", package, "--example", name])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .arg("--target-dir")
            .arg(folder.parent().expect("target"));
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success());
    }
    let library = folder.join(format!("examples/lib{name}.so"));
    assert!(library.exists(), "{}", library.display());
    library
}
