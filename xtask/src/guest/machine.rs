//! The emulated machine: its command line, its output, and the ways in which it ends.

use super::agent::{self, MARK};
use super::arch::{Arch, Folders};
use super::archive;
use super::kernel::Kernel;
use super::packages::output;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The time limit of a boot. Also the time that a command gets beyond its own limit before the
/// machine counts as hung. On an idle host a boot takes four seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// How many of the console's last lines are printed when the machine dies or hangs.
const LAST_LINES: usize = 40;

/// The outcome of a step.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    /// The agent's report of the command's end. Empty if the machine ended before.
    end: String,
    /// Whether the time of `--within` was over before the agent reported an end.
    late: bool,
    passed: u32,
    failed: u32,
    skipped: u32,
    seconds: f64,
    /// Seconds of the host's CPU time: on a busy host they say more than the elapsed time.
    of_processors: f64,
}

impl Outcome {
    pub(crate) fn passed(&self) -> bool {
        self.end == "passed" || self.is_skipped()
    }

    /// Whether the step counts as skipped: time ran out before its end, and until then none of its
    /// tests failed.
    fn is_skipped(&self) -> bool {
        self.late && self.failed == 0
    }

    pub(crate) fn verdict(&self) -> &'static str {
        match (self.passed(), self.is_skipped()) {
            (_, true) => "SKIP",
            (true, false) => "ok",
            (false, false) => "FAILED",
        }
    }

    /// Returns the cell of the table: the counts of tests, and a note if time ran out. If it did
    /// not, but a command failed without a failed test, the note says how that command ended.
    /// Without counts and note, the cell says that the commands passed.
    pub(crate) fn cell(outcomes: &[&Self]) -> String {
        let sum =
            |count: fn(&Self) -> u32| outcomes.iter().map(|outcome| count(outcome)).sum::<u32>();
        let (failed, skipped) = (sum(|o| o.failed), sum(|o| o.skipped));
        // libtest counts skipped tests as passed. Other commands print no counts.
        let passed = sum(|o| o.passed).saturating_sub(skipped);
        let mut words = Vec::new();
        if passed + failed != 0 {
            words.push(format!("{passed} passed"));
        }
        if failed != 0 {
            words.push(format!("{failed} failed"));
        }
        if skipped != 0 {
            words.push(format!("{skipped} skipped"));
        }
        let lost = outcomes
            .iter()
            .find(|outcome| !outcome.passed() && outcome.failed == 0);
        match lost {
            _ if outcomes.iter().any(|outcome| outcome.late) => {
                words.push("the time for all was over (--within)".into());
            }
            Some(outcome) if outcome.end.is_empty() => words.push("kernel died".into()),
            Some(outcome) => words.push(outcome.end.clone()),
            None if words.is_empty() => words.push("passed".into()),
            None => {}
        }
        words.join(", ")
    }

    /// Updates the counts from a line of a command's output.
    fn read(&mut self, line: &str) {
        if line.starts_with("SKIP ") {
            self.skipped += 1;
        } else if line.starts_with("test ") && line.ends_with(" ... FAILED") {
            self.failed += 1;
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |name: &str| -> u32 {
                let words: Vec<&str> = counts
                    .split([' ', ';', '.'])
                    .filter(|word| !word.is_empty())
                    .collect();
                words
                    .windows(2)
                    .find(|pair| pair[1] == name)
                    .and_then(|pair| pair[0].parse().ok())
                    .unwrap_or(0)
            };
            self.passed += count("passed");
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = Self::cell(&[self]);
        write!(
            f,
            "{cell} ({:.1} s, {:.1} s of processors)",
            self.seconds, self.of_processors
        )
    }
}

/// The accelerator that executes the machine's instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Emulation,
}

impl Accelerator {
    /// Returns KVM only if the host's KVM supports nesting, because the guest needs `/dev/kvm` as
    /// well.
    fn for_machine(arch: &Arch) -> Self {
        if arch.foreign.is_some() {
            return Self::Emulation;
        }
        let nests = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            let answer = fs::read_to_string(format!("/sys/module/{module}/parameters/nested"));
            answer.is_ok_and(|answer| ["Y", "1"].contains(&answer.trim()))
        });
        let opens = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if nests && opens {
            Self::Kvm
        } else {
            Self::Emulation
        }
    }
}

/// The description of a machine.
pub(crate) struct Machine<'a> {
    /// The prefix of each printed line, because two machines may run at once.
    pub(crate) prefix: String,
    pub(crate) arch: &'static Arch,
    /// The folders for a machine of another kind than the host.
    pub(crate) folders: Option<&'a Folders>,
    pub(crate) root: &'a Path,
    pub(crate) store: &'a Path,
    /// The folder of the recorded commands.
    pub(crate) plan: &'a Path,
    /// A scratch folder for this machine.
    pub(crate) scratch: PathBuf,
    pub(crate) kernel: Kernel,
    pub(crate) limit: Duration,
    /// The time at which the machine is ended, even if commands are left.
    pub(crate) until: Option<Instant>,
}

impl Machine<'_> {
    /// Runs a shell in the machine.
    pub(crate) fn shell(&self) -> Result<(), String> {
        println!("guest: 'exit' turns the machine off, Ctrl-A X ends it at once");
        let mut command = self.command(0, true, Accelerator::for_machine(self.arch))?;
        self.line(&mut command, ",mux=on,signal=off");
        let status = command
            .status()
            .map_err(|error| format!("{}: {error}", self.arch.emulator))?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the machine ended with {status}"))
        }
    }

    /// Runs the recorded commands, and prints their output as it comes.
    pub(crate) fn run(&self, labels: &[String]) -> Result<Vec<Outcome>, String> {
        let mut outcomes = vec![Outcome::default(); labels.len()];
        let mut accelerator = Accelerator::for_machine(self.arch);
        let mut first = 0;
        let mut retries = 2;
        while let Some(lost) = self.boot(first, accelerator, &mut outcomes)? {
            if self.is_late() {
                let left = outcomes.iter_mut().filter(|outcome| outcome.end.is_empty());
                left.for_each(|outcome| outcome.late = true);
                break;
            }
            self.say(&format!("guest: {lost}; the last lines of its console:"));
            let console = fs::read(self.console()).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            let lines: Vec<&str> = console.lines().collect();
            lines[lines.len().saturating_sub(LAST_LINES)..]
                .iter()
                .for_each(|line| self.say(&format!("  {line}")));
            first = outcomes
                .iter()
                .position(|outcome| outcome.end.is_empty())
                .unwrap_or(0);
            // With several threads, QEMU can execute a breakpoint that the kernel has already
            // removed from its code.
            let is_emulators = console.contains("Oops: int3") || console.contains("int3: 0000");
            let why = match accelerator {
                Accelerator::Kvm if first == 0 => {
                    "this host's KVM may be unable to run it: once more, emulated"
                }
                Accelerator::Emulation if is_emulators && retries > 0 => {
                    "that is a fault of the emulator's (int3 of patched code): once more"
                }
                _ => break,
            };
            retries -= 1;
            accelerator = Accelerator::Emulation;
            outcomes[first] = Outcome::default();
            self.say(&format!("guest: {why}, from {}", labels[first]));
        }
        Ok(outcomes)
    }

    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }

    /// Prints a line with one `println!`, so that the lines of two machines do not mix.
    fn say(&self, line: &str) {
        println!("{}{line}", self.prefix);
    }

    /// Boots once, and runs the commands from index `first` on. Returns the reason if the machine
    /// does not reach the end of the plan.
    fn boot(
        &self,
        first: usize,
        accelerator: Accelerator,
        outcomes: &mut [Outcome],
    ) -> Result<Option<String>, String> {
        let mut command = self.command(first, false, accelerator)?;
        self.line(&mut command, "");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| format!("{}: {error}", self.arch.emulator))?;
        let lines = lines(&mut child);
        let mut running: Option<(usize, Instant, f64)> = None;
        let mut is_list = false;
        let mut deadline = Instant::now() + PATIENCE;
        let lost = loop {
            let end = self.until.map_or(deadline, |until| until.min(deadline));
            let left = end.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => break Some("the guest hangs"),
                Err(RecvTimeoutError::Disconnected) => break Some("the guest's kernel died"),
            };
            let Some(message) = line.strip_prefix(MARK) else {
                if let Some((number, ..)) = running {
                    outcomes[number].read(&line);
                }
                // Skip the empty line before each line of the agent, and libtest's list of passed
                // tests.
                is_list = line == "successes:" || is_list && line.starts_with("    ");
                if running.is_some() && !line.is_empty() && !is_list {
                    self.say(&line);
                }
                continue;
            };
            let mut words = message.splitn(3, ' ');
            let (word, number) = (
                words.next(),
                words.next().and_then(|number| number.parse::<usize>().ok()),
            );
            match (word, number.filter(|number| *number < outcomes.len())) {
                (Some("begin"), Some(number)) => {
                    running = Some((number, Instant::now(), processor_time(&child)));
                    deadline = Instant::now() + self.limit + PATIENCE;
                }
                (Some("end"), Some(number)) => {
                    outcomes[number].end = words.next().unwrap_or_default().to_owned();
                    if let Some((_, begin, used)) = running.take() {
                        outcomes[number].seconds = begin.elapsed().as_secs_f64();
                        outcomes[number].of_processors = processor_time(&child) - used;
                    }
                }
                (Some("over"), _) => break None,
                _ => {}
            }
        };
        // It is no error if the machine has ended already.
        let _ = child.kill();
        let _ = child.wait();
        Ok(lost.map(str::to_owned))
    }

    fn console(&self) -> PathBuf {
        self.scratch.join("console.log")
    }

    /// Returns the command that runs the machine, without the arguments for the line to the host.
    fn command(
        &self,
        first: usize,
        shell: bool,
        accelerator: Accelerator,
    ) -> Result<Command, String> {
        fs::create_dir_all(&self.scratch)
            .map_err(|error| format!("{}: {error}", self.scratch.display()))?;
        let initial = self.scratch.join("initial.cpio");
        let write = |path: &Path, bytes: &[u8]| {
            fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
        };
        write(
            &initial,
            &archive::make(&self.kernel, self.folders, &self.environment(first, shell))?,
        )?;
        let disks = disks(self.store)?;
        let megabytes = self.kernel.series.megabytes;
        let half = megabytes / 2;
        // With this option of `setpriv`, the machine ends when this program ends, even if this
        // program is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", self.arch.emulator]);
        command.args((self.arch.board)(accelerator)).args([
            "-smp",
            "2",
            "-m",
            &megabytes.to_string(),
        ]);
        for node in 0..2 {
            command.args([
                "-object",
                &format!("memory-backend-ram,id=m{node},size={half}M"),
            ]);
            command.args(["-numa", &format!("node,memdev=m{node},cpus={node}")]);
        }
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&initial);
        let parameters = format!(
            "{} panic=-1 quiet mmun.guest default_hugepagesz=2M hugepages=16 transparent_hugepage=always numa_balancing=enable",
            self.arch.parameters
        );
        command.args(["-append", &parameters]);
        command.args([
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]);
        for disk in disks {
            let disk = disk.display().to_string().replace(',', ",,");
            command.args([
                "-drive",
                &format!("if=virtio,format=raw,snapshot=on,cache=unsafe,file={disk}"),
            ]);
        }
        command.args(["-serial", &format!("file:{}", self.console().display())]);
        Ok(command)
    }

    /// Adds the arguments for the line to the host.
    fn line(&self, command: &mut Command, to: &str) {
        let (line, _) = self.arch.line;
        command
            .args(["-chardev", &format!("stdio,id=line{to}")])
            .args(line);
    }

    /// Returns a script that sets the variables for the scripts in the guest.
    fn environment(&self, first: usize, shell: bool) -> String {
        let limit = self.limit.as_secs().to_string();
        let variables = [
            ("WORKSPACE", self.root.display().to_string()),
            (
                "SETUP",
                self.root
                    .join("xtask/src/guest/setup.sh")
                    .display()
                    .to_string(),
            ),
            ("MODULES", self.kernel.modules.display().to_string()),
            ("AGENT", self.plan.join(super::INSIDE).display().to_string()),
            ("LINE", self.arch.line.1.to_owned()),
            (
                "ROOT",
                self.folders
                    .map(|folders| folders.root.display().to_string())
                    .unwrap_or_default(),
            ),
            ("RUN", self.plan.display().to_string()),
            ("SHELL_WANTED", if shell { "yes" } else { "" }.to_owned()),
            (agent::LACKS, self.kernel.series.lacks.to_owned()),
            (agent::FIRST, first.to_string()),
            (agent::LIMIT, limit),
        ];
        let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
        variables
            .iter()
            .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
            .collect()
    }
}

/// Returns the CPU time that a process has used, in seconds, or 0 if the time cannot be read.
fn processor_time(child: &Child) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    // The process's name, in parentheses, may contain any character. So the fields are counted from
    // the last parenthesis: the 12th and 13th are the user and the system time, in hundredths of a
    // second.
    let fields = status.rsplit(')').next().unwrap_or_default();
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks: f64 = times.filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    ticks / 100.0
}

/// Returns the lines of the machine's output. A thread reads them, so that the receiver can wait
/// with a time limit.
fn lines(child: &mut Child) -> Receiver<String> {
    let output = BufReader::new(child.stdout.take().expect("it is piped"));
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Returns the paths of two disk images: one with a file system and one for swap space, which the
/// guest formats, because the format depends on its page size. Makes them if they do not exist. The
/// machine's writes go to temporary files, not to the images.
fn disks(store: &Path) -> Result<[PathBuf; 2], String> {
    let failed = |error| format!("{}: {error}", store.display());
    let lock = File::create(store.join("disks.lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let make = |name: &str, megabytes: u64, format: Option<&[&str]>| {
        let (path, unfinished) = (store.join(name), store.join(format!("{name}.part")));
        if !path.exists() {
            File::create(&unfinished)
                .and_then(|file| file.set_len(megabytes << 20))
                .map_err(failed)?;
            if let Some(words) = format {
                let mut program = Command::new(words[0]);
                output(
                    program
                        .env("PATH", super::search_path())
                        .args(&words[1..])
                        .arg(&unfinished),
                )?;
            }
            fs::rename(&unfinished, &path).map_err(failed)?;
        }
        Ok::<_, String>(path)
    };
    Ok([
        make("disk.img", 1024, Some(&["mkfs.ext4", "-q", "-F"]))?,
        make("swap.img", 512, None)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_of_libtest_is_counted_and_skips_are_not_passes() {
        let mut outcome = Outcome {
            end: "passed".into(),
            ..Outcome::default()
        };
        for line in [
            "SKIP a: no",
            "test result: ok. 12 passed; 0 failed; 0 ignored",
            "test result: ok. 3 passed; 0 failed;",
        ] {
            outcome.read(line);
        }
        assert_eq!(Outcome::cell(&[&outcome]), "14 passed, 1 skipped");
        outcome.end = "it exited with status 101".into();
        outcome.read("test one ... FAILED");
        outcome.read("test two ... FAILED");
        outcome.read("test result: FAILED. 1 passed; 2 failed; 0 ignored");
        assert_eq!(Outcome::cell(&[&outcome]), "15 passed, 2 failed, 1 skipped");
        assert_eq!(Outcome::cell(&[&Outcome::default()]), "kernel died");
        let mut slow = Outcome {
            late: true,
            ..Outcome::default()
        };
        assert_eq!((slow.verdict(), slow.passed()), ("SKIP", true));
        slow.read("test three ... FAILED");
        assert_eq!((slow.verdict(), slow.passed()), ("FAILED", false));
        let mut program = Outcome {
            end: "passed".into(),
            ..Outcome::default()
        };
        program.read("SKIP main: no");
        assert_eq!(
            Outcome::cell(&[&program]),
            "1 skipped",
            "the program is no test"
        );
    }
}
