//! Files that a test executes.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Copies a program, with these permissions. Another process does it: while this one had the copy
/// open for writing, a child that another thread forks would have it open too, and the one that
/// then executed the copy would be refused with `ETXTBSY`.
///
/// # Panics
/// If it cannot be copied.
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

/// Writes a script, or what is to be taken for a program, that every user may execute: as
/// [`copy_program`] does.
///
/// # Panics
/// If it cannot be written.
pub fn write_program(text: &str, to: &Path) {
    let draft = to.with_extension("draft");
    fs::write(&draft, text).expect("a file");
    copy_program(&draft, to, 0o755);
    fs::remove_file(&draft).expect("it was just written");
}
