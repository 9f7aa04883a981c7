//! `cargo xtask guest`: runs tests in a virtual machine with features that hosts often lack, under
//! several kernels.
//!
//! QEMU runs the machine: with KVM if the host's KVM supports nesting, otherwise in software. The
//! machine has KVM, two NUMA nodes, swap space, merging of equal pages, and a network card that
//! does RDMA. Its kernel is one of Debian's. Its root folder is the host's, read-only, below an
//! overlay in memory. So every program, library and test binary has the same path as on the host,
//! and nothing has to be packed. A machine of another kind than the host always runs in software,
//! with a root folder of its own ([`foreign`]).
//!
//! Cargo decides which commands run: Cargo's runner records each command line instead of running it
//! ([`record`]), except those of doc tests. In the guest, [`agent`] runs the recorded commands. All
//! of them run in one boot, unless the machine has to be started again. Each test itself decides
//! whether it can run there (`testkit::require`).

pub(crate) mod agent;
mod arch;
mod archive;
mod foreign;
mod kernel;
mod machine;
mod packages;
pub(crate) mod record;
mod table;

use arch::{Arch, Folders};
use kernel::Kernel;
use machine::{Machine, Outcome};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use std::{fs, io, process, thread};

/// The name of this program's copy in the folder of a run.
const AGENT: &str = "agent";
/// The name of the copy that runs in the machine. It is built for the machine's kind of processor.
const INSIDE: &str = "agent-inside";
/// How many machines run at once. Each has two processors.
const ABREAST: usize = 2;

/// The folders over which a machine mounts its own.
const HIDDEN: [&str; 5] = ["/dev", "/proc", "/run", "/sys", "/tmp"];

const USAGE: &str = "usage: cargo xtask guest [--arch x86_64|aarch64] [--kernel 5.10|6.1|6.12|6.12-16k|6.18|7.0-64k|newest|newest-16k|all]... [--shell] [--limit SECONDS] [--within SECONDS] [--check [--if VARIABLE] [--kept]] [--table] [--only LABEL]... \
    [-- ARGUMENTS OF CARGO TEST]";

/// The programs that the host needs for every kind of machine, each with its Debian package.
const NEEDED: &[(&str, &str)] = &[
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("setpriv", "util-linux"),
];

/// The options of the command line.
struct Options {
    arch: &'static Arch,
    kernels: Vec<&'static str>,
    shell: bool,
    limit: Duration,
    /// The time limit of the whole run, builds included. Commands that have not ended by then count
    /// as skipped, unless one of their tests has failed.
    within: Option<Duration>,
    /// Only check that the host has the needed packages, and download the kernels and the packages
    /// for the machine.
    check: bool,
    /// Download nothing large: only a machine whose packages are there counts.
    kept: bool,
    table: bool,
    /// The labels of the standard tests to run. Empty: all.
    only: Vec<String>,
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
    let begin = Instant::now();
    let options = parse(arguments)?;
    check_host(options.arch)?;
    if let Some(folder) = HIDDEN.iter().find(|folder| root.starts_with(folder)) {
        return Err(format!(
            "this checkout is in {folder}, over which the machine mounts its own folder: move the checkout, or clone it elsewhere"
        ));
    }
    let store = root.join("target/guest");
    if options.kept && options.arch.foreign.is_some() && !foreign::is_kept(&store, options.arch) {
        return Err(format!(
            "the packages (2.3 GB) are not in {}; 'cargo xtask guest --arch {} --check' fetches them",
            store.join(options.arch.name).display(),
            options.arch.name
        ));
    }
    if options.check {
        let kernels = options.kernels.iter();
        kernels
            .map(|series| Kernel::get(&store, options.arch, series))
            .try_for_each(|kernel| kernel.map(drop))?;
        return folders(&store, options.arch).map(|_| true);
    }
    let folders = folders(&store, options.arch)?;
    let plan = own_folder(&store).map_err(|error| format!("{}: {error}", store.display()))?;
    let _removed = Removed(plan.clone());
    let steps = if options.shell {
        Vec::new()
    } else {
        note_all(root, &plan, folders.as_ref(), &options)?
    };
    if steps.is_empty() && !options.shell {
        return Err("Cargo had nothing to run".into());
    }
    let mut machines = Vec::new();
    for series in &options.kernels {
        let kernel = Kernel::get(&store, options.arch, series)?;
        println!("== Linux {} ({series})", kernel.version);
        let prefix = if options.kernels.len() > 1 {
            format!("{series}: ")
        } else {
            String::new()
        };
        let (scratch, limit) = (plan.join(series), options.limit);
        let until = options.within.map(|within| begin + within);
        let (arch, folders) = (options.arch, folders.as_ref());
        machines.push((
            series,
            Machine {
                prefix,
                arch,
                folders,
                root,
                store: &store,
                plan: &plan,
                scratch,
                kernel,
                limit,
                until,
            },
        ));
    }
    if options.shell {
        return machines
            .iter()
            .try_for_each(|(_, machine)| machine.shell())
            .map(|()| true);
    }
    let left = Mutex::new(machines.iter());
    let (sender, ended) = channel();
    thread::scope(|scope| {
        for _ in 0..ABREAST.min(machines.len()) {
            let (sender, left, steps) = (sender.clone(), &left, &steps);
            scope.spawn(move || {
                loop {
                    let next = left.lock().expect("no thread panics with it held").next();
                    let Some((series, machine)) = next else {
                        return;
                    };
                    let begin = Instant::now();
                    let results = machine.run(steps);
                    // If another guest has failed with an error, the receiver is gone.
                    if sender
                        .send((*series, machine, begin.elapsed(), results))
                        .is_err()
                    {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut passed = true;
        for (series, machine, took, results) in ended {
            let results = results?;
            println!(
                "== Linux {} ({series}), {:.0} s",
                machine.kernel.version,
                took.as_secs_f64()
            );
            for (step, outcome) in steps.iter().zip(&results) {
                println!("{} {step}: {outcome}", outcome.verdict());
            }
            passed &= results.iter().all(Outcome::passed);
            if options.table {
                table::enter(
                    root,
                    options.arch,
                    series,
                    &machine.kernel.version,
                    &steps,
                    &results,
                )?;
            }
        }
        Ok(passed)
    })
}

/// Makes the folder of this run, and removes the folders of runs that were killed.
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
    // An earlier process with the same pid may have left a folder.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder)?;
    // Cargo runs this copy as its runner, because a build may replace the program itself.
    fs::copy(std::env::current_exe()?, folder.join(AGENT))?;
    Ok(folder)
}

fn parse(arguments: &[&str]) -> Result<Options, String> {
    let mut options = Options {
        arch: arch::ALL[0],
        kernels: Vec::new(),
        shell: false,
        limit: Duration::from_secs(240),
        within: None,
        check: false,
        kept: false,
        table: false,
        only: Vec::new(),
        tests: Vec::new(),
    };
    let mut words = arguments.iter();
    let mut kernels = Vec::new();
    while let Some(word) = words.next() {
        match *word {
            "--arch" => {
                let named = |arch: &&&Arch| Some(arch.name) == words.clone().next().copied();
                options.arch = arch::ALL.iter().find(named).ok_or(USAGE)?;
                words.next();
            }
            "--kernel" => kernels.push(*words.next().ok_or(USAGE)?),
            "--shell" => options.shell = true,
            "--check" => options.check = true,
            "--kept" => options.kept = true,
            "--if" => {
                let variable = words.next().ok_or(USAGE)?;
                if std::env::var_os(variable).is_none_or(|value| value.is_empty()) {
                    return Err(format!("it runs on request only: {variable}=1"));
                }
            }
            "--table" => options.table = true,
            "--only" => options.only.push((*words.next().ok_or(USAGE)?).to_owned()),
            "--limit" | "--within" => {
                let seconds = words.next().and_then(|word| word.parse().ok());
                let time = Duration::from_secs(seconds.ok_or(USAGE)?);
                if *word == "--limit" {
                    options.limit = time;
                } else {
                    options.within = Some(time);
                }
            }
            "--" => options.tests = words.by_ref().map(|word| (*word).to_owned()).collect(),
            _ => return Err(format!("unknown argument {word}; {USAGE}")),
        }
    }
    for name in kernels {
        match options.arch.series(name) {
            Some(series) => options.kernels.push(series.name),
            None if name == "all" => options
                .kernels
                .extend(options.arch.series.iter().map(|series| series.name)),
            None => {
                return Err(format!(
                    "no kernel {name} for {}; {USAGE}",
                    options.arch.name
                ));
            }
        }
    }
    if options.kernels.is_empty() {
        options.kernels.push(options.arch.default);
    }
    if options.table && !options.tests.is_empty() {
        return Err("--table is made by the standard tests: leave the others out".into());
    }
    let mut labels = options.arch.standard.iter().chain(options.arch.more);
    if let Some(label) = options
        .only
        .iter()
        .find(|only| labels.clone().all(|(label, _)| label != only))
    {
        let known: Vec<&str> = labels.by_ref().map(|(label, _)| *label).collect();
        return Err(format!(
            "no tests have the label {label}; known are: {}",
            known.join(", ")
        ));
    }
    if options.table && options.within.is_some() {
        return Err("--table has no cell for a test that was skipped: leave --within out".into());
    }
    Ok(options)
}

/// Checks that the host has the needed programs. The error is one line that names the missing
/// packages and how to install them.
fn check_host(arch: &Arch) -> Result<(), String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(
            "the host must be x86-64: some guests use its programs, others a compiler for it"
                .into(),
        );
    }
    let folders = search_path();
    let is_there = |name: &str| match name.split_once("/llvm-*/") {
        Some((folder, rest)) => {
            fs::read_dir(folder).is_ok_and(|mut all| all.any(|entry| is_of_llvm(entry, rest)))
        }
        // An absolute path replaces the folder that it is joined to.
        None => folders
            .split(':')
            .any(|folder| Path::new(folder).join(name).is_file()),
    };
    let missing: Vec<&str> = NEEDED
        .iter()
        .chain(arch.needed)
        .filter(|(program, _)| !is_there(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "packages are missing; try 'apt-get install --no-install-recommends {}'",
        missing.join(" ")
    ))
}

/// Whether a folder is a version of LLVM that has the file.
fn is_of_llvm(entry: io::Result<fs::DirEntry>, file: &str) -> bool {
    entry.is_ok_and(|entry| {
        entry.file_name().to_string_lossy().starts_with("llvm-") && entry.path().join(file).exists()
    })
}

/// Lets Cargo build the tests and record the commands that it would run. Returns the label of each
/// command.
fn note_all(
    root: &Path,
    plan: &Path,
    folders: Option<&Folders>,
    options: &Options,
) -> Result<Vec<String>, String> {
    let mut steps = Vec::new();
    let build = Build {
        root,
        plan,
        arch: options.arch,
        folders,
    };
    build.agent()?;
    if options.tests.is_empty() {
        let more = if options.table || !options.only.is_empty() {
            options.arch.more
        } else {
            &[]
        };
        let is_wanted = |(label, _): &&(&str, &str)| {
            options.only.is_empty() || options.only.iter().any(|only| only == label)
        };
        let all = options.arch.standard.iter().chain(more);
        for (label, words) in all.filter(is_wanted) {
            build.note(label, &words.split(' ').collect::<Vec<_>>(), &mut steps)?;
        }
    } else {
        let words: Vec<&str> = ["test"]
            .into_iter()
            .chain(options.tests.iter().map(String::as_str))
            .collect();
        build.note(&options.tests.join(" "), &words, &mut steps)?;
    }
    Ok(steps)
}

/// Returns the folders with tools and files for a machine of another kind than the host, or `None`
/// for a machine of the host's kind.
fn folders(store: &Path, arch: &Arch) -> Result<Option<Folders>, String> {
    arch.foreign
        .map(|foreign| foreign::get(store, arch, foreign))
        .transpose()
}

/// A build with Cargo for a machine.
struct Build<'a> {
    root: &'a Path,
    plan: &'a Path,
    arch: &'static Arch,
    folders: Option<&'a Folders>,
}

impl Build<'_> {
    fn cargo(&self) -> Command {
        if let Some(folders) = self.folders {
            return foreign::cargo(self.root, folders, self.arch);
        }
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(self.root);
        command
    }

    /// Copies this program to the path at which the machine runs it ([`INSIDE`]). For a machine of
    /// another kind, builds the program first.
    fn agent(&self) -> Result<(), String> {
        let mut built = self.plan.join(AGENT);
        if self.folders.is_some() {
            foreign::fetch(self.root)?;
            run_cargo(self.cargo().args(["build", "-p", "xtask"]))?;
            let folder = self
                .root
                .join("target/guest")
                .join(self.arch.name)
                .join("build");
            built = folder.join(self.arch.triple).join("debug/xtask");
        }
        let copied = fs::copy(&built, self.plan.join(INSIDE));
        copied
            .map(drop)
            .map_err(|error| format!("{}: {error}", built.display()))
    }

    fn note(&self, label: &str, words: &[&str], steps: &mut Vec<String>) -> Result<(), String> {
        let runner = format!(
            "target.{}.runner=[{:?}, \"guest-record\"]",
            self.arch.triple,
            self.plan.join(AGENT)
        );
        // A skipped test passes and prints the reason, which libtest hides without this option.
        let shown: &[&str] = match words {
            ["test", rest @ ..] if rest.contains(&"--") => &["--show-output"],
            ["test", ..] => &["--", "--show-output"],
            _ => &[],
        };
        run_cargo(
            self.cargo()
                .args(["--config", &runner])
                .args(words)
                .args(shown)
                .env(record::PLAN, self.plan),
        )?;
        steps.resize(record::count(self.plan), label.to_owned());
        Ok(())
    }
}

fn run_cargo(command: &mut Command) -> Result<(), String> {
    let status = command
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err("Cargo failed; its errors are above".into())
    }
}

/// Returns a `PATH` that includes the folders of programs for administrators.
fn search_path() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    )
}

/// A folder that is removed when this value is dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // If this fails, only scratch files under this run's own name stay.
        let _ = fs::remove_dir_all(&self.0);
    }
}
