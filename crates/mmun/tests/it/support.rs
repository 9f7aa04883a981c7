//! Runs the program, and checks the rules of every trace.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

pub(crate) use testkit::within;

use serde_json::Value;

/// A unique path in the directory of the tests.
pub(crate) fn scratch(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Relaxed);
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}-{name}", std::process::id()))
}

/// The drop-in library that Cargo has built for these tests, which is beside them.
pub(crate) fn dropin() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let library = own.parent().unwrap().join("libmmun_dropin.so");
    assert!(
        library.exists(),
        "{} was built with the tests",
        library.display()
    );
    library
}

/// `mmun trace`, with default signal dispositions.
pub(crate) fn trace() -> Command {
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    command.arg("trace");
    command
}

/// A command with default signal dispositions, even if the tests run under `nohup`.
pub(crate) fn by_default(program: &str) -> Command {
    let mut command = Command::new(program);
    let default_signals = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            // SAFETY: every signal has a default disposition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe { command.pre_exec(default_signals) };
    command
}

/// A copy of `mmun` in a folder that every user can enter. The folder of the tests may be
/// accessible to root only.
pub(crate) struct Public(PathBuf);

impl Public {
    pub(crate) fn new() -> Public {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "mmun-public-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let copy = Public(folder);
        testkit::copy_program(Path::new(env!("CARGO_BIN_EXE_mmun")), &copy.mmun(), 0o755);
        copy
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }

    pub(crate) fn mmun(&self) -> PathBuf {
        self.0.join("mmun")
    }
}

impl Drop for Public {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs `sh -c script` under `mmun trace --json` with `options`, and checks the rules of every
/// trace.
pub(crate) fn traced(options: &[&str], script: &str) -> (Output, Vec<Value>) {
    let path = scratch("trace.json");
    let mut command = trace();
    command
        .arg("--json")
        .arg("-o")
        .arg(&path)
        .args(options)
        .args(["--", "sh", "-c", script]);
    let output = within("mmun trace", move || command.output().unwrap());
    let records = take_records(&path);
    check(&records);
    (output, records)
}

/// Reads a trace and removes its file.
pub(crate) fn take_records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    fs::remove_file(path).unwrap();
    parse(&text)
}

pub(crate) fn parse(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

pub(crate) fn kind(record: &Value) -> &str {
    record["kind"].as_str().unwrap()
}

pub(crate) fn of_kind<'a>(records: &'a [Value], name: &'a str) -> impl Iterator<Item = &'a Value> {
    records.iter().filter(move |record| kind(record) == name)
}

/// Checks the rules of every complete trace.
pub(crate) fn check(records: &[Value]) {
    #[derive(Default)]
    struct Space {
        users: i64,
        released: u32,
        freed: u32,
        let_go: bool,
    }
    let mut last_t = 0;
    let mut spaces: HashMap<u64, Space> = HashMap::new();
    let mut held: HashMap<(u64, u64), i64> = HashMap::new();
    let mut open: HashMap<String, i64> = HashMap::new();
    for record in records {
        assert_eq!(record["v"], 1, "{record}");
        let t = record["t"].as_u64().unwrap();
        assert!(t >= last_t, "time went back: {record}");
        last_t = t;
        if matches!(kind(record), "stack" | "summary") {
            continue;
        }
        let (mm, tid) = (
            record["mm"].as_u64().unwrap(),
            record["tid"].as_u64().unwrap(),
        );
        if kind(record) == "mm_new" {
            assert!(
                spaces.insert(mm, Space::default()).is_none(),
                "born twice: {record}"
            );
        }
        let space = spaces
            .get_mut(&mm)
            .unwrap_or_else(|| panic!("not born: {record}"));
        assert!(
            space.freed == 0 || matches!(kind(record), "exit" | "detach"),
            "after free: {record}"
        );
        let change = i64::from(kind(record) == "get") - i64::from(kind(record) == "put");
        match kind(record) {
            "get" | "put" => {
                space.users += change;
                assert_eq!(record["users"], space.users, "{record}");
                let held = held.entry((mm, tid)).or_default();
                *held += change;
                assert!((0..=1).contains(held), "{record}");
            }
            "start" | "end" => {
                let mut key = record.clone();
                // The start has the details from before the call, the end those from after it.
                let only_one = [
                    "result", "comm", "what", "resident", "file", "huge", "swapped", "site", "self",
                ];
                for name in ["t", "kind"].iter().chain(&only_one) {
                    key.as_object_mut().unwrap().shift_remove(*name);
                }
                let count = open.entry(key.to_string()).or_default();
                *count += if kind(record) == "start" { 1 } else { -1 };
                assert!(*count >= 0, "end without start: {record}");
                assert!(space.users > 0, "no subscriber: {record}");
            }
            "mm_release" => space.released += 1,
            "free" => {
                assert_eq!(
                    (space.users, &record["users"]),
                    (0, &Value::from(0)),
                    "{record}"
                );
                space.freed += 1;
            }
            "detach" => space.let_go = true,
            "mm_new" | "map" | "fork" | "exec" | "exit" => {}
            other => panic!("unknown kind {other}"),
        }
    }
    assert!(
        held.values().all(|count| *count == 0),
        "a get without its put"
    );
    assert!(
        open.values().all(|count| *count == 0),
        "a start without its end: {open:?}"
    );
    for (mm, space) in &spaces {
        assert_eq!(
            (space.freed, space.released),
            (1, u32::from(!space.let_go)),
            "mm {mm}"
        );
    }
}

/// A named pipe: opening it waits for the other side.
pub(crate) struct Fifo(pub(crate) PathBuf);

impl Fifo {
    pub(crate) fn new(name: &str) -> Fifo {
        let path = scratch(name);
        let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a live string that ends in a zero byte.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
        Fifo(path)
    }

    pub(crate) fn read(&self) -> String {
        let path = self.0.clone();
        within("reading a fifo", move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        })
    }

    pub(crate) fn write(&self, text: &'static str) {
        let path = self.0.clone();
        within("writing a fifo", move || fs::write(path, text).unwrap());
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        // If the test failed, release the process on the other side. Opening for reading and
        // writing never blocks.
        if thread::panicking() {
            let both = File::options().read(true).write(true).open(&self.0);
            let _ = both.and_then(|mut file| file.write_all(b"the test failed\n"));
        }
        let _ = fs::remove_file(&self.0);
    }
}

pub(crate) fn kill(pid: u32, signal: i32) {
    // SAFETY: `kill` takes any integers.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0, "kill {pid}");
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
