//! Links the unwinder statically.
//!
//! `mmun run` loads the library into every program that it starts, shells and launchers included.
//! The library adds 0.1 ms to the start of each program; loading `libgcc_s.so.1` as well would
//! double that.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is_gnu = env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|value| value == "gnu");
    if !is_gnu {
        return;
    }
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    // std links `libgcc_s.so`: this linker script of that name links the static library instead.
    fs::write(folder.join("libgcc_s.so"), "INPUT(-lgcc_eh -lgcc)\n").expect("a folder to write to");
    println!("cargo:rustc-link-search=native={}", folder.display());
    // A program that uses neither library calls no function of this one, so lazy binding saves the
    // symbol look-ups.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,lazy");
}
