//! Links the unwinder in.
//!
//! The library is loaded into every program below `mmun run`, shells and launchers included.
//! Loading `libgcc_s.so.1` as well would double what it adds to the start of each: 0.1 ms.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is_gnu = env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|value| value == "gnu");
    if !is_gnu {
        return;
    }
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    // A linker script by the name that std asks for: the static half of the same library.
    fs::write(folder.join("libgcc_s.so"), "INPUT(-lgcc_eh -lgcc)\n").expect("a folder to write to");
    println!("cargo:rustc-link-search=native={}", folder.display());
    // A program that uses neither library calls none of ours: its symbols need not be looked up.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,lazy");
}
