//! The project's own chores:
//! * `cargo xtask tidy` checks rules that rustc does not check.
//! * `cargo xtask ci` runs the whole gate: all checks that a change must pass.
//! * `cargo xtask dist` makes and tries a distribution's package.
//! * `cargo xtask features` tests crates with no feature and with each feature alone.
//! * `cargo xtask packages` tests each crate as it will be published.
//! * `cargo xtask guest` runs tests under other kernels.
//! * `cargo xtask surroundings` runs tests with another loader cache and allocator, and in a pid
//!   namespace.
//! * `cargo xtask mutants` puts known faults into the code and checks that a test finds each.

mod ci;
mod dist;
mod features;
mod guest;
mod mutants;
mod packages;
mod surroundings;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    // These arguments are a recorded command line, which need not be UTF-8.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "guest-record")
    {
        return guest::record::run(&std::env::args_os().skip(2).collect::<Vec<_>>());
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy::run(&root()),
        ["ci"] => ci::run(&root()),
        ["surroundings"] => surroundings::run(&root()),
        ["surroundings", "--probe"] => surroundings::probe(),
        ["dist"] => dist::run(&root()),
        ["features"] => features::run(&root()),
        ["mutants", ref names @ ..] => mutants::run(&root(), names),
        ["packages"] => packages::run(&root()),
        ["guest", ref arguments @ ..] => guest::run(&root(), arguments),
        ["guest-agent", plan] => guest::agent::run(Path::new(plan)),
        _ => {
            eprintln!(
                "usage: cargo xtask {{tidy | ci | dist | features | packages | guest | surroundings | mutants}}"
            );
            ExitCode::from(2)
        }
    }
}

/// The workspace's folder: the parent of this crate's.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a crate lies in its workspace")
        .to_path_buf()
}
