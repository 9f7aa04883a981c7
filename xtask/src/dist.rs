//! `cargo xtask dist`: makes one archive with the files of a distribution's package, in Debian's
//! layout. Then it unpacks the archive in an empty folder and tries it there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Debian's folder for libraries on x86-64.
const LIB: &str = "usr/lib/x86_64-linux-gnu";

pub(crate) fn run(root: &Path) -> ExitCode {
    match make(root).and_then(|archive| attempt(root, &archive)) {
        Ok(archive) => {
            println!("{}", archive.display());
            ExitCode::SUCCESS
        }
        Err(complaint) => {
            eprintln!("dist: {complaint}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the program and the libraries, lays the files out, packs them, and returns the path of
/// the archive.
fn make(root: &Path) -> Result<PathBuf, String> {
    let packages = ["-p", "mmun", "-p", "mmun-capi", "-p", "mmun-dropin"];
    succeed(
        Command::new("cargo")
            .args(["build", "--release", "--locked"])
            .args(packages)
            .current_dir(root),
    )?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let (built, place) = (target.join("release"), target.join("dist"));
    let staged = place.join("root");
    if staged.exists() {
        fs::remove_dir_all(&staged).map_err(|error| format!("{}: {error}", staged.display()))?;
    }
    install(&built.join("mmun"), &staged.join("usr/bin/mmun"), "755")?;
    install(
        &built.join("libmmun.so"),
        &staged.join(LIB).join("libmmun.so.0"),
        "644",
    )?;
    install(
        &built.join("libmmun.a"),
        &staged.join(LIB).join("libmmun.a"),
        "644",
    )?;
    std::os::unix::fs::symlink("libmmun.so.0", staged.join(LIB).join("libmmun.so"))
        .map_err(|error| format!("libmmun.so: {error}"))?;
    // `mmun run` looks for the library in this folder. The linker does not, because no program may
    // link to the library.
    install(
        &built.join("libmmun_dropin.so"),
        &staged.join("usr/lib/mmun/libmmun_dropin.so"),
        "644",
    )?;
    for header in ["mmun.h", "mmun.hpp", "mmu_notifier.h"] {
        install(
            &root.join("crates/capi/include/mmun").join(header),
            &staged.join("usr/include/mmun").join(header),
            "644",
        )?;
    }
    for unit in ["mmun-broker.service", "mmun-broker.socket"] {
        install(
            &root.join("dist").join(unit),
            &staged.join("usr/lib/systemd/system").join(unit),
            "644",
        )?;
    }
    for text in [
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "docs/adopt.md",
        "docs/sources.md",
    ] {
        let name = text.rsplit('/').next().unwrap_or(text);
        install(
            &root.join(text),
            &staged.join("usr/share/doc/mmun").join(name),
            "644",
        )?;
    }
    write(
        &staged.join(LIB).join("pkgconfig/mmun.pc"),
        pkg_config().as_bytes(),
    )?;
    let program = staged.join("usr/bin/mmun");
    let pages = staged.join("usr/share/man/man1");
    fs::create_dir_all(&pages).map_err(|error| format!("{}: {error}", pages.display()))?;
    succeed(Command::new(&program).arg("man").arg(&pages))?;
    for (shell, file) in [
        ("bash", "bash-completion/completions/mmun"),
        ("zsh", "zsh/vendor-completions/_mmun"),
        ("fish", "fish/vendor_completions.d/mmun.fish"),
    ] {
        let said = Command::new(&program).args(["completions", shell]).output();
        let said = said.map_err(|error| format!("mmun completions: {error}"))?;
        write(&staged.join("usr/share").join(file), &said.stdout)?;
    }
    let archive = place.join(format!(
        "mmun-{}-x86_64-linux-gnu.tar.gz",
        env!("CARGO_PKG_VERSION")
    ));
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "-czf"])
        .arg(&archive)
        .arg("-C")
        .arg(&staged)
        .arg("usr");
    succeed(&mut tar)?;
    Ok(archive)
}

fn pkg_config() -> String {
    format!(
        "prefix=/usr\nlibdir=/{LIB}\nincludedir=${{prefix}}/include\n\nName: mmun\n\
         Description: MMU notifiers for userspace, from C\nVersion: {}\n\
         Cflags: -I${{includedir}}\nLibs: -L${{libdir}} -lmmun\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// Unpacks the archive in an empty folder and tries the files. It runs `mmun`, checks that `mmun
/// run` loads the library of the archive, and compiles and runs a C program that uses `libmmun`. It
/// checks that two of the man pages and the completions of zsh lie where `man` and zsh look for
/// them.
fn attempt(root: &Path, archive: &Path) -> Result<PathBuf, String> {
    let empty = std::env::temp_dir().join(format!("dist-{}", std::process::id()));
    fs::create_dir_all(&empty).map_err(|error| format!("{}: {error}", empty.display()))?;
    let outcome = use_it(root, archive, &empty);
    fs::remove_dir_all(&empty).map_err(|error| format!("{}: {error}", empty.display()))?;
    outcome.map(|()| archive.to_path_buf())
}

fn use_it(root: &Path, archive: &Path, empty: &Path) -> Result<(), String> {
    succeed(
        Command::new("tar")
            .arg("-xzf")
            .arg(archive)
            .arg("-C")
            .arg(empty),
    )?;
    let program = empty.join("usr/bin/mmun");
    succeed(Command::new(&program).env_clear().arg("--version"))?;
    // Checks that `mmun run` uses the library from the archive.
    let mapped = Command::new(&program)
        .env_clear()
        .args(["run", "--", "/bin/cat", "/proc/self/maps"])
        .output();
    let mapped = mapped.map_err(|error| format!("mmun run: {error}"))?;
    let library = fs::canonicalize(empty.join("usr/lib/mmun/libmmun_dropin.so"));
    let library = library
        .map_err(|error| format!("libmmun_dropin.so: {error}"))?
        .display()
        .to_string();
    if !mapped.status.success() || !String::from_utf8_lossy(&mapped.stdout).contains(&library) {
        let why = String::from_utf8_lossy(&mapped.stderr).into_owned();
        return Err(format!("`mmun run` does not load {library}: {why}"));
    }
    let flags = Command::new("pkg-config")
        .args(["--cflags", "--libs", "mmun"])
        .env("PKG_CONFIG_LIBDIR", empty.join(LIB).join("pkgconfig"))
        .env("PKG_CONFIG_SYSROOT_DIR", empty)
        .output()
        .map_err(|error| format!("pkg-config: {error}"))?;
    let flags = String::from_utf8_lossy(&flags.stdout).into_owned();
    let compiled = empty.join("two_devices");
    let mut cc = Command::new("cc");
    cc.arg(root.join("crates/capi/examples/two_devices.c"))
        .args(flags.split_whitespace())
        .arg("-pthread");
    succeed(cc.arg("-o").arg(&compiled))?;
    succeed(Command::new(&compiled).env("LD_LIBRARY_PATH", empty.join(LIB)))?;
    for file in [
        "usr/share/man/man1/mmun.1",
        "usr/share/man/man1/mmun-broker.1",
        "usr/share/zsh/vendor-completions/_mmun",
    ] {
        if fs::read(empty.join(file)).map_or(0, |text| text.len()) == 0 {
            return Err(format!("{file} is missing or empty"));
        }
    }
    Ok(())
}

fn install(from: &Path, to: &Path, mode: &str) -> Result<(), String> {
    succeed(
        Command::new("install")
            .args(["-D", "-m", mode])
            .arg(from)
            .arg(to),
    )
}

fn write(path: &Path, content: &[u8]) -> Result<(), String> {
    let folder = path.parent().expect("a file lies in a folder");
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, content))
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command
        .status()
        .map_err(|error| format!("{command:?}: {error}"))?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| format!("{command:?}: {status}"))
}
