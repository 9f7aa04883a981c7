//! The project's own chores: `cargo xtask tidy` checks what rustc does not, `cargo xtask ci` is the whole gate,
//! and `cargo xtask packages` tests each crate as it will be published.

mod ci;
mod packages;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy::run(&root()),
        ["ci"] => ci::run(&root()),
        ["packages"] => packages::run(&root()),
        _ => {
            eprintln!("usage: cargo xtask {{tidy | ci | packages}}");
            ExitCode::from(2)
        }
    }
}

/// The workspace's folder: the parent of this crate's.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate lies in its workspace").to_path_buf()
}
