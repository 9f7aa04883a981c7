//! Files that a test executes.

use std::fs;
use std::path::Path;
use std::process::Command;

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
