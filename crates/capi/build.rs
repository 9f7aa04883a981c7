//! Sets the soname of the shared library and the version of its symbols.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// The major version of the binary interface.
const ABI: &str = "0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");
    let is_linux = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    if !is_linux {
        return;
    }
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmmun.so.{ABI}");
    // `dlclose` must leave the library loaded: the reclaimer's thread runs code of the library, and
    // the hook's patches jump to it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    if let Some(wrapper) = wrapper() {
        println!("cargo:rustc-cdylib-link-arg=-wrapper");
        println!("cargo:rustc-cdylib-link-arg={wrapper}");
    }
}

/// Writes a wrapper of the linker that gives the symbols their version, and returns its path. Only
/// gcc has the option `-wrapper`, so other compilers get `None`.
///
/// rustc passes the linker a version script with an anonymous version, and a linker accepts no
/// other version beside an anonymous one. So the wrapper gives the version in that script a name.
fn wrapper() -> Option<String> {
    let linker = env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".into());
    let about = Command::new(linker).arg("--version").output().ok()?;
    if !String::from_utf8_lossy(&about.stdout).contains("Free Software Foundation") {
        println!("cargo:warning=the linker is not gcc: the symbols of libmmun.so get no versions");
        return None;
    }
    let path = Path::new(&env::var_os("OUT_DIR")?).join("with_versions");
    let script = format!(
        "#!/bin/sh\n\
         for argument; do\n\
         \tcase $argument in\n\
         \t--version-script=*) sed -i '1s/^{{/MMUN_{ABI} {{/' \"${{argument#--version-script=}}\" || exit ;;\n\
         \tesac\n\
         done\n\
         exec \"$@\"\n"
    );
    fs::write(&path, script).ok()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).ok()?;
    }
    Some(path.to_str()?.to_owned())
}
