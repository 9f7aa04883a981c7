//! Tests the promises of `mmun.h` from C, over each source.

use crate::support::{STRICT, compile, libraries, root, scratch, sources, succeed};
use std::process::Command;
use testkit::{Cap, has_optional_program, require};

const FLAGS: &[&str] = &["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror"];

fn run(name: &str, flags: &[&str], source: &str, wrapper: &[&str]) {
    let Some(program) = compile(
        name,
        "gcc",
        &[FLAGS, flags].concat(),
        &sources("tests/c/mmun"),
    ) else {
        return;
    };
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    let output = succeed(command.arg(source));
    let passed = output
        .lines()
        .filter(|line| line.starts_with("ok "))
        .count();
    assert_eq!(passed, 19, "{output}");
}

#[test]
fn over_brackets_of_the_program() {
    run("mmun-own", &[], "own", &[]);
}

#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn over_the_hook() {
    run("mmun-hook", &[], "hook", &[]);
}

#[test]
fn over_the_kernel() {
    if require(Cap::Kvm) && require(Cap::Bpf) {
        run("mmun-kernel", &[], "kernel", &[]);
        #[cfg(all(
            any(target_arch = "x86_64", target_arch = "aarch64"),
            target_env = "gnu"
        ))]
        run("mmun-both", &[], "both", &[]);
    }
}

#[test]
fn under_the_address_sanitizer() {
    run(
        "mmun-asan",
        &[
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover",
            "-fno-sanitize=alignment",
        ],
        "own",
        &[],
    );
}

#[test]
fn under_valgrind() {
    if has_optional_program("valgrind") {
        let valgrind = [
            "valgrind",
            "-q",
            "--fair-sched=yes",
            "--error-exitcode=9",
            "--leak-check=no",
        ];
        run("mmun-valgrind", &[], "own", &valgrind);
    }
}

/// Tests the additions of `mmun.hpp`.
#[test]
fn handles_of_cpp_under_the_address_sanitizer() {
    let flags = [
        &["-std=c++11", "-g", "-fsanitize=address,undefined"],
        STRICT,
    ]
    .concat();
    let sources = [root().join("tests/cpp/handles.cpp")];
    if let Some(program) = compile("handles", "g++", &flags, &sources) {
        succeed(&mut Command::new(program));
    }
}

/// `mmun.h` allows `mmun_watch_valid` in a signal handler.
#[test]
fn a_signal_handler_may_ask_a_watch() {
    let Some(program) = compile("signals", "gcc", FLAGS, &sources("tests/c/signals")) else {
        return;
    };
    let asked = |source: &str| {
        let output = succeed(Command::new(&program).args([source, "100"]));
        assert_eq!(output, "ok 100 signals\n", "{source}");
    };
    asked("own");
    #[cfg(all(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_env = "gnu"
    ))]
    asked("hook");
    if require(Cap::Kvm) && require(Cap::Bpf) {
        asked("kernel");
    }
}

/// Runs for a second; `threads/tsan.sh` runs it for a minute under the thread sanitizer.
#[test]
fn thirty_two_threads() {
    let Some(program) = compile("threads", "gcc", FLAGS, &sources("tests/c/threads")) else {
        return;
    };
    assert!(succeed(Command::new(program).arg("1000")).ends_with("ok\n"));
}

/// A program can have two copies of the library: its own, and that of a plugin or of a preloaded
/// library.
#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn a_second_copy_of_the_hook_says_why_it_is_refused() {
    if !require(Cap::Program("python3")) {
        return;
    }
    const TWICE: &str = "
import ctypes, sys
class Options(ctypes.Structure):
    _fields_ = [('size', ctypes.c_size_t), ('sources', ctypes.c_uint32), ('required', ctypes.c_uint32)]
hook = Options(16, 1, 1)
for name in sys.argv[1:]:
    library, handle = ctypes.CDLL(name), ctypes.c_void_p()
    library.mmun_last_error.restype = ctypes.c_char_p
    code = library.mmun_open(ctypes.byref(hook), ctypes.byref(handle))
    print(code, library.mmun_last_error().decode() if code else '')
";
    let first = libraries().join("libmmun.so");
    let second = scratch("copy").join(format!("libmmun-{}.so", std::process::id()));
    std::fs::copy(&first, &second).unwrap();
    let mut python = Command::new("python3");
    // Room for the static TLS of both copies.
    python.env("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=8192");
    let said = succeed(python.args(["-c", TWICE]).args([&first, &second]));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0].trim(), "0", "{said}");
    std::fs::remove_file(second).unwrap();
    assert!(
        lines[1].starts_with("-95 ") && lines[1].contains("another copy of this library"),
        "{said}"
    );
}
