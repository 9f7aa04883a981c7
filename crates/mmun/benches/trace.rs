//! The cost of tracing, compared with `strace` and with no tracing.
//!
//! `cargo bench -p mmun --bench trace [-- PAIRS [ROUNDS [WORD]]]`, WORD selects the rows that
//! contain it. Each pair runs both sides in turn. The bench prints the medians, the median of the
//! pairs' ratios and their spread.

use std::fs;
use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const STRACE: &[&str] = &[
    "strace",
    "-f",
    "--seccomp-bpf",
    "-e",
    "trace=%memory",
    "-o",
    "/dev/null",
];
const MMUN: &[&str] = &[env!("CARGO_BIN_EXE_mmun"), "trace", "-o", "/dev/null"];
const MMUN_JSON: &[&str] = &[
    env!("CARGO_BIN_EXE_mmun"),
    "trace",
    "--json",
    "-o",
    "/dev/null",
];

const STRACE_K: &[&str] = &[
    "strace",
    "-k",
    "-f",
    "--seccomp-bpf",
    "-e",
    "trace=%memory",
    "-o",
    "/dev/null",
];
const MMUN_K: &[&str] = &[env!("CARGO_BIN_EXE_mmun"), "trace", "-k", "-o", "/dev/null"];
/// All details of a call, without births.
const MMUN_ALL: &[&str] = &[
    env!("CARGO_BIN_EXE_mmun"),
    "trace",
    "-k",
    "--summary=event,where,what,task,cause",
    "-o",
    "/dev/null",
];

/// 400 forks, and 100 executed shells.
const SHELL: &[&str] = &[
    "sh",
    "-c",
    "i=0; while [ $i -lt 100 ]; do (:); (:); (:); (:); sh -c :; i=$((i+1)); done",
];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    match args.next().as_deref() {
        Some("rounds") => rounds(
            args.next()
                .expect("the number of rounds")
                .parse()
                .expect("a number"),
        ),
        Some("quiet") => quiet(),
        pairs => {
            let pairs = pairs.map_or(7, |number| number.parse().expect("the number of pairs"));
            compare(
                pairs,
                &args.next().unwrap_or_else(|| "200000".into()),
                &args.next().unwrap_or_default(),
            );
        }
    }
}

fn compare(pairs: usize, rounds: &str, word: &str) {
    let this = std::env::current_exe().expect("the path of this program");
    let this = this.to_str().expect("a path in UTF-8");
    let source = std::env::temp_dir().join(format!("mmun-bench-{}.c", std::process::id()));
    fs::write(&source, c_file()).expect("a temporary file");
    let compile = [
        "gcc",
        "-O2",
        "-c",
        "-o",
        "/dev/null",
        source.to_str().expect("a path in UTF-8"),
    ];
    println!(
        "{:<44}{:>10}{:>10}{:>8}{:>16}{:>7}",
        "workload", "ours", "other", "ratio", "spread", "bar"
    );
    let line = source.with_extension("line.c");
    fs::write(&line, "int main(void) { return 0; }\n").expect("a temporary file");
    let small = [
        "gcc",
        "-O2",
        "-c",
        "-o",
        "/dev/null",
        line.to_str().expect("a path in UTF-8"),
    ];
    let rounds = [this, "rounds", rounds];
    let quiet = [this, "quiet"];
    for (name, ours, other, program, bar) in [
        (
            "map+touch+unmap, text / strace",
            MMUN,
            STRACE,
            &rounds[..],
            0.8,
        ),
        (
            "map+touch+unmap, json / strace",
            MMUN_JSON,
            STRACE,
            &rounds,
            0.8,
        ),
        ("gcc -O2 -c, text / strace", MMUN, STRACE, &compile, 0.9),
        // The bound for a tracer that costs nothing, because a compiler computes and makes few
        // memory calls.
        ("gcc -O2 -c, bare / strace", &[], STRACE, &compile, f64::NAN),
        (
            "gcc -O2 -c of a line, text / strace",
            MMUN,
            STRACE,
            &small,
            0.9,
        ),
        (
            "gcc -O2 -c of a line, bare / strace",
            &[],
            STRACE,
            &small,
            f64::NAN,
        ),
        (
            "forks and execs of sh, text / strace",
            MMUN,
            STRACE,
            SHELL,
            1.0,
        ),
        (
            "map+touch+unmap, -k / strace -k",
            MMUN_K,
            STRACE_K,
            &rounds,
            0.02,
        ),
        (
            "start and end, text / strace",
            MMUN,
            STRACE,
            &["true"],
            f64::NAN,
        ),
        ("no memory calls, text / bare", MMUN, &[], &quiet, 1.02),
        (
            "no memory calls, strace / bare",
            STRACE,
            &[],
            &quiet,
            f64::NAN,
        ),
    ] {
        if name.contains(word) {
            row(name, pairs, ours, other, program, bar);
        }
    }
    let name = "map+touch+unmap, -k --summary / text, each";
    if name.contains(word) {
        added(name, pairs, [MMUN_ALL, MMUN], &rounds, 8.0);
    }
    // If this fails, a temporary file stays.
    let _ = fs::remove_file(source);
    let _ = fs::remove_file(line);
}

fn row(name: &str, pairs: usize, ours: &[&str], other: &[&str], program: &[&str], bar: f64) {
    let mut measured: Vec<(Duration, Duration)> = (0..pairs)
        .map(|_| (run(ours, program), run(other, program)))
        .collect();
    let mut ratios: Vec<f64> = measured
        .iter()
        .map(|(a, b)| a.as_secs_f64() / b.as_secs_f64())
        .collect();
    ratios.sort_by(f64::total_cmp);
    measured.sort();
    let ours = measured[pairs / 2].0;
    measured.sort_by_key(|(_, other)| *other);
    let other = measured[pairs / 2].1;
    let (low, median, high) = (ratios[0], ratios[pairs / 2], ratios[pairs - 1]);
    println!(
        "{name:<44}{:>8.0}ms{:>8.0}ms{median:>8.3}{:>16}{bar:>7}",
        ours.as_secs_f64() * 1e3,
        other.as_secs_f64() * 1e3,
        format!("{low:.3}..{high:.3}"),
    );
}

/// The additional cost of an event. The cost of starting and ending, measured without events, is
/// subtracted.
fn added(name: &str, pairs: usize, [ours, other]: [&[&str]; 2], program: &[&str; 3], bar: f64) {
    let none = [program[0], program[1], "0"];
    let events: f64 = program[2].parse().expect("the number of rounds");
    let each = |tracer: &[&str]| {
        (run(tracer, program).as_secs_f64() - run(tracer, &none).as_secs_f64()) / events * 1e6
    };
    let mut measured: Vec<(f64, f64)> = (0..pairs).map(|_| (each(ours), each(other))).collect();
    let mut differences: Vec<f64> = measured.iter().map(|(ours, other)| ours - other).collect();
    differences.sort_by(f64::total_cmp);
    measured.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let ours = measured[pairs / 2].0;
    measured.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let other = measured[pairs / 2].1;
    let (low, median, high) = (
        differences[0],
        differences[pairs / 2],
        differences[pairs - 1],
    );
    println!(
        "{name:<44}{ours:>8.1}us{other:>8.1}us{median:>+8.1}{:>16}{bar:>7}",
        format!("{low:+.1}..{high:+.1}")
    );
}

fn run(tracer: &[&str], program: &[&str]) -> Duration {
    let words = [tracer, program].concat();
    let begin = Instant::now();
    let status = Command::new(words[0])
        .args(&words[1..])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let time = begin.elapsed();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{words:?}: {status:?}"
    );
    time
}

fn rounds(count: u32) {
    for _ in 0..count {
        // SAFETY: a fresh private mapping at an address the kernel chooses touches nothing that
        // exists.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page was mapped writable just now.
        unsafe { page.cast::<u8>().write_volatile(1) };
        // SAFETY: the page was mapped just now, and no reference points into it.
        unsafe { libc::munmap(page, 4096) };
    }
}

/// Computes, and makes system calls that are not memory calls.
fn quiet() {
    let mut hash = 1u64;
    for round in 0..4_000_000u64 {
        for step in 0..100 {
            hash =
                black_box(hash.rotate_left(5) ^ (round + step)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        if round % 8 == 0 {
            // SAFETY: `getppid` has no preconditions.
            hash ^= unsafe { libc::getppid() } as u64;
        }
    }
    black_box(hash);
}

/// A C file, so large that the compiler's heap grows and shrinks.
fn c_file() -> String {
    let mut text = String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n");
    for n in 0..300 {
        text += &format!(
            "int f{n}(int *v, int n) {{ int s = {n}; for (int i = 0; i < n; i++) {{ s += v[i] * {n}; if (s & {}) s ^= i << 3;\n\
             else if (v[i] > {n}) s -= strlen(\"f{n}\"); }} printf(\"%d\\n\", s); return s; }}\n",
            n % 31 + 1
        );
    }
    text
}
