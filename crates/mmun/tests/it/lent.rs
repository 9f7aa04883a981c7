//! A copy of `mmun` whose file has capabilities (`setcap`), run by an ordinary user.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use testkit::{Cap, require};

use crate::support::{Public, dropin, kind, parse, text, within};

const NOBODY: u32 = 65534;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Does the same as `setcap CAPABILITIES+ep FILE`: writes the attribute of capability.h, revision
/// 2.
fn setcap(file: &Path, capabilities: &[u32]) -> bool {
    const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
    let permitted = |word: u32| -> u32 {
        let of_word = capabilities.iter().filter(|number| **number / 32 == word);
        of_word.map(|number| 1 << (number % 32)).sum()
    };
    let words = [REVISION_2_EFFECTIVE, permitted(0), 0, permitted(1), 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let file = CString::new(file.as_os_str().as_bytes()).unwrap();
    // SAFETY: two live strings that end in a zero byte, and a pointer to `bytes.len()` bytes.
    let result = unsafe {
        libc::setxattr(
            file.as_ptr(),
            c"security.capability".as_ptr(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
        )
    };
    result == 0
}

/// Runs a command as a user without rights.
fn as_nobody(command: &mut Command) -> Output {
    let command = command.uid(NOBODY).gid(NOBODY).current_dir("/");
    command.output().unwrap()
}

/// A copy with `capabilities`. `None` if the test cannot run here: without root or ptrace, or if
/// file capabilities have no effect (a `nosuid` mount, a smaller bounding set).
fn lending(capabilities: &[u32]) -> Option<Public> {
    if !require(Cap::Root) || !require(Cap::Ptrace) {
        return None;
    }
    let copy = Public::new();
    let cat = copy.folder().join("cat");
    testkit::copy_program(Path::new("/bin/cat"), &cat, 0o755);
    let is_set = setcap(&cat, capabilities) && setcap(&copy.mmun(), capabilities);
    let mut command = Command::new(&cat);
    command
        .arg("/proc/self/status")
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    let output = command.output();
    let has_any = output
        .as_ref()
        .is_ok_and(|output| !rights(text(&output.stdout)).is_empty());
    if !is_set || !has_any {
        let why = without_effect(copy.folder(), capabilities);
        let why = why.unwrap_or_else(|| panic!("a file's capabilities have no effect: {output:?}"));
        println!("SKIP: a file's capabilities have no effect: {why}");
        return None;
    }
    Some(copy)
}

/// Why a file in `folder` lends no capability; `None` if no reason is known.
fn without_effect(folder: &Path, capabilities: &[u32]) -> Option<String> {
    const CAP_SETFCAP: u32 = 31;
    let flags = rustix::fs::statvfs(folder).unwrap().f_flag;
    if flags.contains(rustix::fs::StatVfsMountFlags::NOSUID) {
        return Some(format!("{} is mounted nosuid", folder.display()));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().last())
    };
    if value("NoNewPrivs:") != Some("0") {
        return Some("no_new_privs is set".to_owned());
    }
    let bounding = u64::from_str_radix(value("CapBnd:")?, 16).unwrap();
    let mut wanted = capabilities.iter().chain([&CAP_SETFCAP]);
    if let Some(number) = wanted.find(|number| bounding >> **number & 1 == 0) {
        return Some(format!("capability {number} is not in the bounding set"));
    }
    // A file system without such attributes, or the root of a user namespace.
    let is_set = setcap(&folder.join("cat"), capabilities);
    (!is_set).then(|| io::Error::last_os_error().to_string())
}

/// The lines of `/proc/self/status` with the capabilities of a process, without empty sets.
fn rights(status: &str) -> Vec<&str> {
    let own = ["CapInh", "CapPrm", "CapEff", "CapAmb"];
    let lines = status
        .lines()
        .filter(|line| own.iter().any(|name| line.starts_with(name)));
    lines
        .filter(|line| !line.ends_with("0000000000000000"))
        .collect()
}

/// The count of named functions in the deepest stack.
fn deepest(copy: &Public) -> usize {
    let path = copy.folder().join("trace.json");
    let mut command = Command::new(copy.mmun());
    command
        .args(["trace", "--json", "-k", "-o"])
        .arg(&path)
        .args(["--", "cat", "/proc/self/status"]);
    let output = within("mmun trace", move || as_nobody(&mut command));
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), ""),
        "the program is traced"
    );
    assert_eq!(rights(text(&output.stdout)), [""; 0], "it has no rights");
    let records = parse(&fs::read_to_string(&path).unwrap());
    fs::remove_file(path).unwrap();
    let frames = records.iter().filter(|record| kind(record) == "stack");
    let named = frames.map(|record| {
        let frames = record["frames"].as_array().unwrap();
        frames.iter().filter(|frame| frame["named"] == true).count()
    });
    named.max().unwrap()
}

#[test]
fn trace_works_as_without_capabilities_and_may_do_no_more() {
    let sets: [&[u32]; 2] = [&[CAP_BPF, CAP_PERFMON], &[CAP_SYS_PTRACE]];
    for capabilities in sets {
        let Some(copy) = lending(capabilities) else {
            return;
        };
        assert_eq!(deepest(&copy), deepest(&Public::new()), "{capabilities:?}");
        // A process of root. It ends soon, in case `mmun` should trace it after all.
        let mut root = Command::new("sleep").arg("20").spawn().unwrap();
        let mut command = Command::new(copy.mmun());
        command.args(["trace", "-o", "/dev/null", "-p", &root.id().to_string()]);
        let output = within("mmun trace -p", move || as_nobody(&mut command));
        root.kill().unwrap();
        root.wait().unwrap();
        assert_eq!(output.status.code(), Some(125), "{capabilities:?}");
        assert!(
            text(&output.stderr).contains("Operation not permitted"),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_program_under_run_gets_no_capabilities() {
    let Some(copy) = lending(&[CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE]) else {
        return;
    };
    let library = copy.folder().join("libmmun_dropin.so");
    testkit::copy_program(&dropin(), &library, 0o755);
    for option in ["--source=hook", "--no-report"] {
        let mut command = Command::new(copy.mmun());
        command.args(["run", option, "--", "cat", "/proc/self/status"]);
        let output = within("mmun run", move || as_nobody(&mut command));
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(rights(text(&output.stdout)), [""; 0], "{option}");
    }
}

#[test]
fn doctor_and_coverage_use_the_capabilities_and_can_still_trace() {
    let Some(copy) = lending(&[CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE]) else {
        return;
    };
    let mut command = Command::new(copy.mmun());
    command.args(["doctor", "--json"]);
    let output = within("mmun doctor", move || as_nobody(&mut command));
    let rows = parse(text(&output.stdout));
    assert_eq!(rows[3]["usable"], true, "{}", rows[3]);
    assert!(
        !rows[3]["features"].to_string().contains("no-pagemap"),
        "{}",
        rows[3]
    );
    let missing = rows[0]["missing"].to_string();
    assert!(!missing.contains("CAP_BPF"), "{missing}");
    if require(Cap::Userfaultfd) {
        assert_eq!(rows[2]["usable"], true, "{}", rows[2]);
    }
}
