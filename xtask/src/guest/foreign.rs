//! Builds for a machine of another kind than the host. A folder holds Debian's compiler and the
//! standard library of that kind. The host's Cargo registry and this workspace are mounted into the
//! folder.

use super::arch::{Arch, Folders, Foreign};
use super::packages::{Apt, Distribution, output};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A script that mounts folders of the host below `$TOOLS`, and runs a command with `$TOOLS` as the
/// root folder. The script runs in a mount namespace of its own, so that nothing stays mounted.
const ENTER: &str = r#"set -e
for folder in /proc /dev /tmp "$WORKSPACE" "$CARGO_HOME"; do
    mkdir -p "$TOOLS$folder"
    mount --rbind "$folder" "$TOOLS$folder"
done
exec chroot "$TOOLS" sh -c 'cd "$WORKSPACE" && exec "$@"' sh "$@""#;

/// Returns the folders. Makes a folder that does not exist yet from the mirror's packages.
pub(crate) fn get(store: &Path, arch: &Arch, foreign: &Foreign) -> Result<Folders, String> {
    let folder = store.join(arch.name);
    let failed = |error| format!("{}: {error}", folder.display());
    fs::create_dir_all(&folder).map_err(failed)?;
    let lock = File::create(folder.join("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let made = |name: &str,
                suites: &[&str],
                architectures: &[&str],
                packages: &[&str],
                links: &[(&str, &str)]| {
        let (path, unfinished) = (folder.join(name), folder.join(format!("{name}.part")));
        // A folder of an earlier list is made again.
        let (list, packed) = (folder.join(format!("{name}.packages")), packages.join(" "));
        if !path.exists() || fs::read_to_string(&list).ok().as_ref() != Some(&packed) {
            println!(
                "guest: unpacking {} packages of Debian's and what they need ({name})",
                packages.len()
            );
            let _ = fs::remove_dir_all(&unfinished);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&unfinished).map_err(failed)?;
            let newest: &[&str] = if suites.len() > 1 {
                &["-t", suites[1]]
            } else {
                &[]
            };
            Apt::new(store, Distribution::Debian, suites, architectures)?
                .unpack(&[newest, packages].concat(), &unfinished)?;
            for (link, target) in links {
                std::os::unix::fs::symlink(target, unfinished.join(link)).map_err(failed)?;
            }
            fs::rename(&unfinished, &path).map_err(failed)?;
            fs::write(&list, packed).map_err(failed)?;
        }
        Ok::<PathBuf, String>(path)
    };
    let own = output(Command::new("dpkg").arg("--print-architecture"))?;
    // The backports are added, because the suite's own compiler is too old for this program.
    let tools = made(
        "tools",
        &["trixie", "trixie-backports"],
        &[own.trim(), arch.debian],
        foreign.tools,
        &[],
    )?;
    let root = made(
        "root",
        &["trixie"],
        &[arch.debian],
        foreign.root,
        foreign.links,
    )?;
    Ok(Folders { tools, root })
}

/// Whether the folders are there.
pub(crate) fn is_kept(store: &Path, arch: &Arch) -> bool {
    let folder = store.join(arch.name);
    ["tools", "root"]
        .iter()
        .all(|name| folder.join(name).exists())
}

/// Returns a Cargo command that builds for the machine's kind of processor.
pub(crate) fn cargo(root: &Path, folders: &Folders, arch: &Arch) -> Command {
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map_or_else(|| Path::new(&home).join(".cargo"), PathBuf::from);
    let upper = arch.triple.to_uppercase().replace('-', "_");
    let compiler = |kind: &str| format!("{}-linux-gnu-{kind}", arch.name);
    let mut command = Command::new("unshare");
    command.args([
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        ENTER,
        "sh",
        "cargo",
    ]);
    command
        .env_clear()
        .current_dir(root)
        .env("PATH", "/usr/bin:/usr/sbin:/bin")
        .env("HOME", home);
    command
        .env("WORKSPACE", root)
        .env("TOOLS", &folders.tools)
        .env("CARGO_HOME", cargo_home);
    command
        .env("CARGO_NET_OFFLINE", "true")
        .env("CARGO_BUILD_TARGET", arch.triple);
    command.env(
        "CARGO_TARGET_DIR",
        root.join("target/guest").join(arch.name).join("build"),
    );
    command.env(format!("CARGO_TARGET_{upper}_LINKER"), compiler("gcc"));
    // The packages are unpacked and not installed, so the link `cc` is missing.
    command
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", "gcc")
        .env("CC", "gcc")
        .env("CXX", "g++");
    let suffix = arch.triple.replace('-', "_");
    command
        .env(format!("CC_{suffix}"), compiler("gcc"))
        .env(format!("CXX_{suffix}"), compiler("g++"))
        .env(
            format!("BINDGEN_EXTRA_CLANG_ARGS_{suffix}"),
            format!("-I/usr/{}-linux-gnu/include", arch.name),
        );
    command
}

/// Downloads the sources of all crates, because the build runs Cargo offline.
pub(crate) fn fetch(root: &Path) -> Result<(), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    output(
        Command::new(cargo)
            .args(["fetch", "--locked", "-q"])
            .current_dir(root),
    )
    .map(drop)
}
