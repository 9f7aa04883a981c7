//! Real programs with the hook, and the kernel source if it works, preloaded. Output and exit
//! status must be the same as without the library.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::{env, fs};
use testkit::{Cap, has_optional_program, require};

/// Returns the library to preload.
pub(crate) fn library(is_optimised: bool) -> &'static Path {
    static LIBRARIES: [OnceLock<PathBuf>; 2] = [const { OnceLock::new() }; 2];
    LIBRARIES[usize::from(is_optimised)]
        .get_or_init(|| testkit::example_library("mmu-source", "preload", is_optimised))
}

/// A test's scratch directory. It is removed on drop.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("mmun-hook-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder for the test");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a shell script with and without the library. Each run has an empty directory of its own.
/// `$DATA` is a directory that both runs share.
#[track_caller]
fn same_with_and_without(name: &str, script: &str) {
    let scratch = Scratch::new(name);
    let report = scratch.0.join("report");
    let run = |folder: &str, preload: bool| -> Output {
        let folder = scratch.0.join(folder);
        fs::create_dir_all(&folder).expect("a folder for the run");
        let mut command = Command::new("timeout");
        // The limit is for hangs; even a slow machine finishes long before it.
        command
            .args(["-k", "5", "600", "sh", "-c", script])
            .current_dir(&folder);
        command
            .env("DATA", &scratch.0)
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_GLOBAL", "/dev/null");
        if preload {
            command
                .env("LD_PRELOAD", library(false))
                .env("MMUN_PRELOAD_REPORT", &report);
        }
        command.output().expect("timeout and sh run")
    };
    let without = run("without", false);
    let with = run("with", true);
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes)
            .chars()
            .take(2000)
            .collect::<String>()
    };
    assert_eq!(
        (with.status, text(&with.stderr)),
        (without.status, text(&without.stderr)),
        "{name}"
    );
    assert!(
        without.status.success(),
        "{name}: {}",
        text(&without.stderr)
    );
    assert!(
        with.stdout == without.stdout,
        "{name}: {}\n{}",
        text(&with.stdout),
        text(&without.stdout)
    );
    let report = fs::read_to_string(&report).expect("the processes have reported");
    let heard = report
        .lines()
        .filter(|line| line.starts_with("brackets ") && !line.starts_with("brackets 0 "))
        .count();
    assert!(heard > 0, "{name}: no bracket in any process:\n{report}");
}

#[test]
fn python_with_a_library_that_is_loaded_late() {
    if !require(Cap::Program("python3")) {
        return;
    }
    let scratch = Scratch::new("late");
    let report = scratch.0.join("report");
    let load = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); data = bytearray(64 << 20); del data; print('loaded')";
    let mut command = Command::new("timeout");
    command
        .args(["600", "python3", "-c", load])
        .arg(library(true));
    command.env("MMUN_PRELOAD_REPORT", &report);
    let output = command.output().expect("timeout and python3 run");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "loaded\n",
        "{output:?}"
    );
    let report = fs::read_to_string(&report).expect("the library has reported");
    assert!(
        report.starts_with("brackets ") && !report.starts_with("brackets 0 "),
        "{report}"
    );
    // The start of the source waits for its threads while the loader's lock is held. If one of
    // these threads took that lock, the start would hang.
    let has_kernel = mmu_source::kernel::probe().is_ok();
    assert!(
        report.ends_with(&format!(" kernel {has_kernel}\n")),
        "{report}"
    );
}

#[test]
fn python() {
    if !require(Cap::Program("python3")) {
        return;
    }
    let script = r#"python3 -c '
import threading, subprocess, mmap, hashlib
def work(n):
    for i in range(20):
        data = bytearray(1 << 20)
        data[0] = n
        pages = mmap.mmap(-1, 1 << 16)
        pages.write(b"x" * 100)
        pages.close()
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(subprocess.run(["sh", "-c", "echo child; exit 3"], capture_output=True))
print(hashlib.sha256(b"a" * (32 << 20)).hexdigest(), sum(x * x for x in range(100000)))
'"#;
    same_with_and_without("python", script);
}

#[test]
fn a_sort_with_threads() {
    if !require(Cap::Program("sort")) {
        return;
    }
    let script = "seq 1 400000 | awk '{ print ($1 * 7919) % 400009, $1 }' > data; \
                  sort --parallel=4 -S 16M -k1,1n data | sha256sum; sort -r data | tail -3";
    same_with_and_without("sort", script);
}

#[test]
fn git_with_its_children() {
    if !require(Cap::Program("git")) {
        return;
    }
    let script = "export GIT_AUTHOR_DATE='2020-01-01 00:00:00 +0000' GIT_COMMITTER_DATE='2020-01-01 00:00:00 +0000' \
                  GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b; \
                  git init -q -b main one && cd one && \
                  for i in 1 2 3; do seq $i 20000 > f$i && git add . && git commit -q -m \"c $i\"; done && \
                  git gc -q && cd .. && git clone -q --no-local one two && cd two && git log --stat -p | sha256sum && git fsck";
    same_with_and_without("git", script);
}

#[test]
fn a_virtual_machine_of_javascript_or_java() {
    let script = "node -e 'let a=[]; for (let i=0;i<3e5;i++) a.push({i}); console.log(a.reduce((s,x)=>s+x.i,0))'";
    if has_optional_program("node") {
        same_with_and_without("node", script);
    }
    if has_optional_program("java") {
        same_with_and_without("java", "java -version 2>/dev/null; echo $?");
    }
}
