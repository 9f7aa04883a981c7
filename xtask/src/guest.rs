//! `cargo xtask guest`: the tests in a machine that has what hosts lack, under several kernels.
//!
//! QEMU emulates the machine in software: virtualisation inside it, two nodes of memory, swap
//! space, merging of equal pages, a network card that does RDMA. Its kernel is one of Debian's. Its
//! root folder is the host's, read-only, below an overlay in memory: every program, library and
//! test binary stands where it stands on the host, so nothing has to be packed.
//!
//! Cargo decides what runs: it is given a runner that notes the command line instead of running it
//! ([`record`]). What was noted runs in one boot ([`agent`]). Whether a test can run there is said
//! by the test (`testkit::require`), not here.

pub(crate) mod agent;
mod archive;
mod kernel;
mod machine;
pub(crate) mod record;
mod table;

use kernel::{Kernel, SERIES};
use machine::{Machine, Outcome};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use std::{fs, io, process, thread};

/// The name of this program's copy in the folder of a run.
const AGENT: &str = "agent";
/// How many machines run at once. Each emulates two processors.
const ABREAST: usize = 2;

const USAGE: &str = "usage: cargo xtask guest [--kernel 5.10|6.1|6.12|6.18|newest|all]... [--shell] [--limit SECONDS] [--check] [--table] \
    [-- ARGUMENTS OF CARGO TEST]";

/// What runs if nothing else is asked for: a label, which is a column of the table, and the
/// arguments of Cargo. `docs/kernels.md` says what is left out, and why.
const STANDARD: &[(&str, &str)] = &[
    // Each test of the broker loads programs in several processes, and the emulated kernel takes
    // long to verify them.
    ("kernel source", "test -p mmu-source --lib --test it -- kernel --skip broker"),
    ("kernel cache", "test -p regcache --test it -- kernel uring"),
    ("coverage", "test -p mmun --test it -- coverage::the_kernel_misses_nothing"),
    ("RDMA", "test -p regcache-rdma --features verbs --test it -- --skip torture --skip a_peer_that_is_killed"),
    ("stress kernel", "run -p stress -- kernel --seconds 5"),
    ("trace", "test -p mmu-source --test it -- again:: calls:: death::"),
];

/// A program, or a file if it has a folder, and the package of Debian that it comes in.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("python3", "python3"),
    ("rdma", "iproute2"),
    ("mkfs.ext4", "e2fsprogs"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("setpriv", "util-linux"),
    // What the tests of `regcache-rdma` are built with, and run with.
    ("cmake", "cmake"),
    ("/usr/lib/llvm-*/lib/libclang.so", "libclang-dev"),
    ("/etc/libibverbs.d/rxe.driver", "ibverbs-providers"),
];

/// What the command line asks for.
struct Options {
    kernels: Vec<&'static str>,
    shell: bool,
    limit: Duration,
    /// Only whether the host has what is needed.
    check: bool,
    table: bool,
    tests: Vec<String>,
}

pub(crate) fn run(root: &Path, arguments: &[&str]) -> ExitCode {
    match try_run(root, arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("guest: {error}");
            ExitCode::from(2)
        }
    }
}

fn try_run(root: &Path, arguments: &[&str]) -> Result<bool, String> {
    let options = parse(arguments)?;
    check_host()?;
    let store = root.join("target/guest");
    if options.check {
        return options.kernels.iter().try_for_each(|series| Kernel::get(&store, series).map(drop)).map(|()| true);
    }
    let plan = own_folder(&store).map_err(|error| format!("{}: {error}", store.display()))?;
    let _removed = Removed(plan.clone());
    let steps = if options.shell { Vec::new() } else { note_all(root, &plan, &options)? };
    if steps.is_empty() && !options.shell {
        return Err("Cargo had nothing to run".into());
    }
    let mut machines = Vec::new();
    for series in &options.kernels {
        let kernel = Kernel::get(&store, series)?;
        println!("== Linux {} ({series})", kernel.version);
        let prefix = if options.kernels.len() > 1 { format!("{series}: ") } else { String::new() };
        let (scratch, limit) = (plan.join(series), options.limit);
        machines.push((series, Machine { prefix, root, store: &store, plan: &plan, scratch, kernel, limit }));
    }
    if options.shell {
        return machines.iter().try_for_each(|(_, machine)| machine.shell()).map(|()| true);
    }
    let left = Mutex::new(machines.iter());
    let (sender, ended) = channel();
    thread::scope(|scope| {
        for _ in 0..ABREAST.min(machines.len()) {
            let (sender, left, steps) = (sender.clone(), &left, &steps);
            scope.spawn(move || {
                loop {
                    let next = left.lock().expect("no thread panics with it held").next();
                    let Some((series, machine)) = next else { return };
                    let begin = Instant::now();
                    let results = machine.run(steps);
                    // After an error of another guest the receiver is gone.
                    if sender.send((*series, machine, begin.elapsed(), results)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut passed = true;
        for (series, machine, took, results) in ended {
            let results = results?;
            println!("== Linux {} ({series}), {:.0} s", machine.kernel.version, took.as_secs_f64());
            for (step, outcome) in steps.iter().zip(&results) {
                println!("{} {step}: {outcome}", if outcome.passed() { "ok" } else { "FAILED" });
            }
            passed &= results.iter().all(Outcome::passed);
            if options.table {
                table::enter(root, series, &machine.kernel.version, &steps, &results)?;
            }
        }
        Ok(passed)
    })
}

/// Makes the folder of this run, and removes those of runs that were killed.
fn own_folder(store: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(store)?;
    for entry in fs::read_dir(store)? {
        let entry = entry?;
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix("run-"));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    let folder = store.join(format!("run-{}", process::id()));
    // A process of the same number may have left one.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder)?;
    // A build may replace this program while the guests run.
    fs::copy(std::env::current_exe()?, folder.join(AGENT))?;
    Ok(folder)
}

fn parse(arguments: &[&str]) -> Result<Options, String> {
    let mut options = Options {
        kernels: Vec::new(),
        shell: false,
        limit: Duration::from_secs(240),
        check: false,
        table: false,
        tests: Vec::new(),
    };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match *word {
            "--kernel" => match words.next().copied() {
                Some("all") => options.kernels.extend(SERIES.iter().map(|series| series.name)),
                Some(name) => {
                    let series = SERIES.iter().find(|series| series.name == name);
                    options.kernels.push(series.ok_or_else(|| format!("no kernel {name}; {USAGE}"))?.name);
                }
                None => return Err(USAGE.into()),
            },
            "--shell" => options.shell = true,
            "--check" => options.check = true,
            "--table" => options.table = true,
            "--limit" => {
                let seconds = words.next().and_then(|word| word.parse().ok());
                options.limit = Duration::from_secs(seconds.ok_or(USAGE)?);
            }
            "--" => options.tests = words.by_ref().map(|word| (*word).to_owned()).collect(),
            _ => return Err(format!("unknown argument {word}; {USAGE}")),
        }
    }
    if options.kernels.is_empty() {
        options.kernels.push("6.12");
    }
    if options.table && !options.tests.is_empty() {
        return Err("--table is made by the standard tests: leave the others out".into());
    }
    Ok(options)
}

/// Says what is missing, and how to get it, in one line.
fn check_host() -> Result<(), String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err("the guests are x86-64 machines, and so must the host be: they use its programs".into());
    }
    let folders = search_path();
    let is_there = |name: &str| match name.split_once("/llvm-*/") {
        Some((folder, rest)) => fs::read_dir(folder).is_ok_and(|mut all| all.any(|entry| is_of_llvm(entry, rest))),
        // An absolute path replaces the folder that it is joined to.
        None => folders.split(':').any(|folder| Path::new(folder).join(name).is_file()),
    };
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("packages are missing; try 'apt-get install --no-install-recommends {}'", missing.join(" ")))
}

/// Whether a folder is a version of LLVM that has the file.
fn is_of_llvm(entry: io::Result<fs::DirEntry>, file: &str) -> bool {
    entry
        .is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("llvm-") && entry.path().join(file).exists())
}

/// Has Cargo build the tests and note what it would run. Returns the label of each command.
fn note_all(root: &Path, plan: &Path, options: &Options) -> Result<Vec<String>, String> {
    let mut steps = Vec::new();
    if options.tests.is_empty() {
        for (label, words) in STANDARD {
            note(root, plan, label, &words.split(' ').collect::<Vec<_>>(), &mut steps)?;
        }
    } else {
        let words: Vec<&str> = ["test"].into_iter().chain(options.tests.iter().map(String::as_str)).collect();
        note(root, plan, &options.tests.join(" "), &words, &mut steps)?;
    }
    Ok(steps)
}

fn note(root: &Path, plan: &Path, label: &str, words: &[&str], steps: &mut Vec<String>) -> Result<(), String> {
    let runner = format!("target.x86_64-unknown-linux-gnu.runner=[{:?}, \"guest-record\"]", plan.join(AGENT));
    // A test that is skipped passes, and says so where libtest hides it.
    let shown: &[&str] = match words {
        ["test", rest @ ..] if rest.contains(&"--") => &["--show-output"],
        ["test", ..] => &["--", "--show-output"],
        _ => &[],
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["--config", &runner])
        .args(words)
        .args(shown)
        .env(record::PLAN, plan)
        .current_dir(root)
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if !status.success() {
        return Err(format!("cargo {} failed", words.join(" ")));
    }
    steps.resize(record::count(plan), label.to_owned());
    Ok(())
}

/// The folders of programs, those for administrators included.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A folder that goes with this value.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // What stays behind is scratch of this run's own name.
        let _ = fs::remove_dir_all(&self.0);
    }
}
