//! `mmun coverage`: every operation is measured, and the state of the page confirms every answer.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use testkit::{Cap, require};

use crate::support::{Public, parse, text, within};

/// An ordinary user.
const NOBODY: u32 = 65534;

fn mmun(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmun"));
    command.args(args).env_remove("NO_COLOR");
    command
}

fn run(args: &[&str]) -> Output {
    let mut command = mmun(args);
    within("mmun coverage", move || command.output().unwrap())
}

/// The rows of one source, each checked for its form.
fn rows(source: &str) -> (Output, Vec<Value>) {
    let output = run(&["coverage", "--json", "--source", source]);
    let rows = parse(text(&output.stdout));
    for row in &rows {
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["v", "operation", "source", "changed", "seen"]);
        assert_eq!(
            (&row["v"], &row["source"]),
            (&Value::from(1), &Value::from(source))
        );
        assert!(
            ["before", "after", "missed", "n/a"].contains(&row["seen"].as_str().unwrap()),
            "{row}"
        );
        assert!(row["changed"].is_boolean(), "{row}");
        assert!(row["seen"] != "n/a" || row["changed"] == false, "{row}");
    }
    (output, rows)
}

fn seen<'a>(rows: &'a [Value], operation: &str) -> &'a str {
    let row = rows
        .iter()
        .find(|row| row["operation"] == operation)
        .unwrap_or_else(|| panic!("no {operation}"));
    row["seen"].as_str().unwrap()
}

/// The operations that changed a translation and were reported at this time.
fn told<'a>(rows: &'a [Value], when: &str) -> Vec<&'a str> {
    let is_told = |row: &&Value| row["changed"] == true && row["seen"] == when;
    rows.iter()
        .filter(is_told)
        .map(|row| row["operation"].as_str().unwrap())
        .collect()
}

#[test]
fn process_reports_every_memory_call_before_it_and_no_other_change() {
    if !require(Cap::Ptrace) || !require(Cap::SeccompTrace) {
        return;
    }
    let (output, rows) = rows("process");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(rows.len() >= 40, "{} operations", rows.len());
    assert_eq!(told(&rows, "after"), [""; 0]);
    for operation in [
        "munmap (libc)",
        "munmap (part)",
        "munmap (raw instruction)",
        "munmap (syscall(2))",
        "mremap (move)",
        "mremap (over a live mapping)",
        "mremap (DONTUNMAP)",
        "mremap (shrink)",
        "mmap (MAP_FIXED over live memory)",
        "brk (shrink)",
        "sbrk (shrink)",
        "malloc_trim (top)",
        "malloc_trim (hole)",
        "free (large block)",
        "realloc (by mremap)",
        "madvise (DONTNEED)",
        "shmdt",
        "shmat (SHM_REMAP)",
        "mprotect",
        "fork (shares the page)",
        "thread exit (stack freed)",
        "dlclose",
    ] {
        assert_eq!(seen(&rows, operation), "before", "{operation}");
    }
    for operation in [
        "ftruncate (own)",
        "fallocate (PUNCH_HOLE, another process)",
        "write to a private file mapping",
    ] {
        assert_eq!(seen(&rows, operation), "missed", "{operation}");
    }
}

#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn hook_reports_calls_through_libc_before_they_happen() {
    let (output, rows) = rows("hook");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(told(&rows, "before").len() >= 22, "{rows:?}");
    assert_eq!(told(&rows, "after"), [""; 0]);
    for operation in [
        "brk (shrink)",
        "sbrk (shrink)",
        "mremap (over a live mapping)",
        "munmap (syscall(2))",
        "dlclose",
    ] {
        assert_eq!(seen(&rows, operation), "before", "{operation}");
    }
    // The hook cannot see these changes: a matrix in which it sees them would be wrong.
    for operation in [
        "munmap (raw instruction)",
        "ftruncate (own)",
        "write to a private file mapping",
    ] {
        assert_eq!(seen(&rows, operation), "missed", "{operation}");
    }
}

#[test]
fn uffd_reports_the_events_of_the_kernel_before_the_change_only_by_chance() {
    if !require(Cap::Userfaultfd) || !require(Cap::Root) {
        return;
    }
    let (output, rows) = rows("uffd");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for operation in [
        "munmap (raw instruction)",
        "mremap (move)",
        "madvise (DONTNEED)",
        "io_uring (MADVISE, DONTNEED)",
    ] {
        assert!(
            ["before", "after"].contains(&seen(&rows, operation)),
            "{operation}"
        );
    }
    for operation in [
        "shmdt",
        "mprotect",
        "write after fork",
        "ftruncate (another process)",
    ] {
        assert_eq!(seen(&rows, operation), "missed", "{operation}");
    }
}

#[test]
fn an_unavailable_cell_has_its_reason_on_standard_error() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (output, rows) = rows("process");
    let complaints = text(&output.stderr);
    for row in rows.iter().filter(|row| row["seen"] == "n/a") {
        let begin = format!("mmun: {}", row["operation"].as_str().unwrap());
        let line = complaints.lines().find(|line| line.starts_with(&begin));
        assert!(
            line.is_some_and(|line| line.len() > begin.len() + 5),
            "{begin}: {complaints}"
        );
    }
}

#[test]
fn the_matrix_has_a_row_for_each_operation_and_totals_and_no_colour() {
    if !require(Cap::Ptrace) {
        return;
    }
    let output = run(&["coverage", "--source", "process"]);
    let matrix = text(&output.stdout);
    let (rows, totals) = matrix.split_once("\n\n").unwrap();
    assert!(
        rows.starts_with("operation") && rows.lines().next().unwrap().ends_with("process"),
        "{rows}"
    );
    assert!(
        rows.contains("\nmunmap (libc)                               yes      before\n"),
        "{rows}"
    );
    let changed = rows.lines().filter(|row| row.contains(" yes ")).count();
    assert!(
        totals.starts_with(&format!("process  {changed} changed: ")),
        "{totals}"
    );
    assert!(!matrix.contains('\x1b') && !rows.lines().any(|row| row.ends_with(' ')));
}

#[test]
fn a_terminal_gets_colour_unless_told_not_to() {
    if !require(Cap::Program("python3")) || !require(Cap::Ptrace) {
        return;
    }
    let script = "import pty, sys; pty.spawn([sys.argv[1], 'coverage', '--source', 'process'])";
    let run = |no_color: &'static str| {
        within("the terminal", move || {
            let mut command = Command::new("python3");
            command
                .args(["-c", script, env!("CARGO_BIN_EXE_mmun")])
                .stdin(Stdio::null())
                .env("TERM", "xterm");
            text(&command.env("NO_COLOR", no_color).output().unwrap().stdout).to_owned()
        })
    };
    assert!(run("").contains("\x1b[32mbefore"));
    let plain = run("1");
    assert!(!plain.contains('\x1b') && plain.contains("munmap (libc)"));
}

#[test]
fn an_unknown_source_is_refused_in_one_line_that_lists_them() {
    for args in [
        &["--source", "bogus"][..],
        &["--source", ""],
        &["--source", "process", "--source", "Hook"],
    ] {
        let output = run(&[&["coverage"], args].concat());
        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(
            line.starts_with("mmun: ") && line.ends_with('\n') && line.lines().count() == 1,
            "{line:?}"
        );
        assert!(
            line.contains("kernel, hook, uffd, process") && line.contains("mmun coverage --help"),
            "{line}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = mmun(&["coverage", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::with_capacity(64, child.stdout.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert!(first.contains("munmap (libc)"), "{first}");
    let output = within("mmun coverage", move || child.wait_with_output().unwrap());
    assert_eq!(output.status.code(), Some(0));
    assert!(
        !text(&output.stderr).contains("standard output"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn an_ordinary_user_gets_a_matrix_too() {
    if !require(Cap::Root) || !require(Cap::Ptrace) {
        return;
    }
    let copy = Public::new();
    let mut command = Command::new(copy.mmun());
    command
        .args(["coverage", "--json", "--source", "process"])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    let output = within("mmun coverage", move || command.output().unwrap());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let rows = parse(text(&output.stdout));
    assert_eq!(seen(&rows, "munmap (libc)"), "before");
    assert_eq!(
        (
            seen(&rows, "madvise (FREE)"),
            seen(&rows, "madvise (COLLAPSE)")
        ),
        ("n/a", "n/a")
    );
    assert!(told(&rows, "before").len() >= 22, "{rows:?}");
}

#[test]
fn the_kernel_misses_nothing() {
    if !require(Cap::Kvm) || !require(Cap::Bpf) || !require(Cap::Root) {
        return;
    }
    let (output, rows) = rows("kernel");
    assert_eq!(
        (told(&rows, "missed"), told(&rows, "after")),
        (vec![], vec![]),
        "{}",
        text(&output.stderr)
    );
    assert!(told(&rows, "before").len() >= 33);
    if testkit::is_guest() {
        // The guest has every device and right; only its kernel may be too old.
        let complaints = text(&output.stderr);
        for row in rows.iter().filter(|row| row["seen"] == "n/a") {
            let begin = format!(
                "mmun: {}: it needs Linux ",
                row["operation"].as_str().unwrap()
            );
            let since = complaints
                .lines()
                .find_map(|line| line.strip_prefix(&begin));
            assert!(since.is_some_and(is_later), "{row}: {complaints}");
        }
    }
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

/// Whether a version, such as 6.13, is later than that of this kernel.
fn is_later(version: &str) -> bool {
    let numbers = |version: &str| -> Vec<u32> {
        let numbers = version.split(['.', '-', ' ']).take(2);
        numbers.filter_map(|number| number.parse().ok()).collect()
    };
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    numbers(version) > numbers(&own)
}

/// How many transfers of a column were stale, and how many could be made.
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn stale(rows: &[Value], column: &str) -> (usize, usize) {
    let rows = rows.iter().filter(|row| row["column"] == column);
    let count = |word: &str| rows.clone().filter(|row| row["transfer"] == word).count();
    (count("stale"), count("stale") + count("right"))
}

#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn ucx_sends_stale_data_as_shipped_and_none_with_the_drop_in() {
    if require(Cap::Program("ucx_info")) {
        sends_stale_data_as_shipped_and_none_with_the_drop_in("ucx", Cap::Ucx);
    }
}

#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn libfabric_sends_stale_data_as_shipped_and_none_with_the_drop_in() {
    if require(Cap::Program("fi_info")) {
        sends_stale_data_as_shipped_and_none_with_the_drop_in("libfabric", Cap::Libfabric);
    }
}

#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn sends_stale_data_as_shipped_and_none_with_the_drop_in(library: &str, version: Cap) {
    if !require(Cap::IoUring) {
        return;
    }
    let mut command = mmun(&["coverage", "--json", "--library", library]);
    command.env("MMUN_DROPIN", crate::support::dropin());
    let output = within("mmun coverage", move || command.output().unwrap());
    let rows = parse(text(&output.stdout));
    let errors = text(&output.stderr);
    // In a version other than the required one, the cache may be inaccessible.
    let is_refused = errors.contains("the oldest version that can be tested")
        || errors.contains("libfabric's verbs provider: ");
    if is_refused && !require(version) {
        return;
    }
    let (shipped, all) = stale(&rows, "shipped");
    assert!(all >= 36, "{all} operations: {errors}");
    // The control: shows that the transfer detects stale registrations.
    assert!(shipped >= 8, "{shipped} of {all}: {errors}");
    let (hook, all) = stale(&rows, "hook");
    assert!(
        hook <= 13 && hook < shipped && all >= 36,
        "{hook} of {all}: {errors}"
    );
    let (both, all) = stale(&rows, "both");
    if require(Cap::Kvm) && require(Cap::Bpf) {
        assert!(all >= 36, "{all} operations: {errors}");
        assert_eq!(both, 0, "{rows:?} {errors}");
        assert_eq!(output.status.code(), Some(0), "{errors}");
    }
}
