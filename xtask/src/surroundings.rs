//! `cargo xtask surroundings`: runs tests once more in other surroundings.
//!
//! * For all of them: a pid namespace, while the leader of the tests' session is outside, as in
//!   many containers. `getsid` returns 0 there, and the same processes have other pids in the outer
//!   `/proc`.
//! * For the tests of the sources: a loader's cache that fills many pages, another allocator, and a
//!   large environment. If a test takes a system call of the loader, of libc or of the allocator
//!   for its own, the test fails here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The size to which a smaller cache of the loader is padded: 16 pages. The loader ignores the
/// padding.
const CACHE_BYTES: usize = 1 << 16;
/// How many variables are added to the environment. `execve` accepts each of them, because a
/// variable may have up to 128 KiB.
const VARIABLES: usize = 8;
const VARIABLE_BYTES: usize = 100_000;

/// The tests, their arguments, and whether they run with the padded cache, the other allocator and
/// the large environment. The modules `inside` and `allocator`, and the tests of callbacks in the
/// middle of `free`, are left out, because they need glibc's own allocator. Of `mmun`, only the
/// listed modules run, which are mostly about processes.
const TESTS: &[(&[&str], &[&str], bool)] = &[
    (&["test", "-p", "mmu-source", "--test", "it"], &[], true),
    (
        &["test", "-p", "mmun", "--test", "it"],
        &[
            "run::",
            "lent::",
            "streams::",
            "hidden::",
            "detach::",
            "doctor::",
        ],
        false,
    ),
    (
        &["test", "-p", "mmu-source", "--test", "hook"],
        &[
            "--skip",
            "inside::",
            "--skip",
            "allocator::",
            "--skip",
            "in_the_middle_of_free",
        ],
        true,
    ),
];

pub(crate) fn run(root: &Path) -> ExitCode {
    match run_all(root) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("surroundings: {error}");
            ExitCode::from(2)
        }
    }
}

fn run_all(root: &Path) -> io::Result<bool> {
    let allocator = allocator()
        .ok_or_else(|| io::Error::other("libjemalloc.so.2 is not installed (libjemalloc2)"))?;
    let cache = root.join("target/ld.so.cache");
    fs::create_dir_all(root.join("target"))?;
    let mut bytes = fs::read("/etc/ld.so.cache")?;
    bytes.resize(bytes.len().max(CACHE_BYTES), 0);
    fs::write(&cache, bytes)?;
    for (arguments, options, other_allocator) in TESTS {
        // Build first, so that no compiler runs with the other allocator.
        if !Command::new("cargo")
            .args(*arguments)
            .arg("--no-run")
            .current_dir(root)
            .status()?
            .success()
        {
            return Ok(false);
        }
        let mut test = Command::new("unshare");
        test.args(["--pid", "--fork", "--mount-proc"]);
        if *other_allocator {
            let mount = "mount --bind \"$0\" /etc/ld.so.cache && exec \"$@\"";
            test.args(["sh", "-c", mount]).arg(&cache);
            test.env("LD_PRELOAD", &allocator);
            test.envs(
                (0..VARIABLES)
                    .map(|number| (format!("MMUN_FILLER_{number}"), "x".repeat(VARIABLE_BYTES))),
            );
        }
        test.arg("cargo")
            .args(*arguments)
            .arg("--")
            .args(*options)
            .current_dir(root);
        if !test.status()?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Checks that this machine can make a pid namespace and has the other allocator.
pub(crate) fn probe() -> ExitCode {
    let mounted = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "true"])
        .output();
    let lacks = match mounted {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    };
    match lacks.or_else(|| {
        allocator()
            .is_none()
            .then(|| "libjemalloc.so.2 is missing (libjemalloc2)".to_owned())
    }) {
        None => ExitCode::SUCCESS,
        Some(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn allocator() -> Option<PathBuf> {
    let folders = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ];
    folders
        .iter()
        .map(|folder| Path::new(folder).join("libjemalloc.so.2"))
        .find(|path| path.is_file())
}
