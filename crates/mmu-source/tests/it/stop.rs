//! What a callback can read of a task that is stopped at a call, and the mappings that calls make.

use std::convert::Infallible;
use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Subscription, Subsystem};
use mmu_source::process::{
    Command, ExitStatus, Observer, Options, Task, TaskEvent, Tracer, current,
};
use testkit::{Cap, require};

use crate::log::tracee;

/// Returns the line in `maps` of the mapping of `pid` that contains `address`.
fn line_of(pid: i32, address: u64) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the task lives");
    let holds = |line: &&str| {
        let (start, end) = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'))
            .expect("a range");
        let hex = |text| u64::from_str_radix(text, 16).expect("a number");
        hex(start) <= address && address < hex(end)
    };
    maps.lines()
        .find(holds)
        .unwrap_or_else(|| panic!("{address:#x} is not mapped:\n{maps}"))
        .to_owned()
}

/// `syscall`.
#[cfg(target_arch = "x86_64")]
const INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// `svc #0`.
#[cfg(target_arch = "aarch64")]
const INSTRUCTION: [u8; 4] = [0x01, 0x00, 0x00, 0xd4];

struct Probe;
static SEEN: AtomicU32 = AtomicU32::new(0);

impl Notifier for Probe {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        let current = current().expect("a callback runs on behalf of a task");
        let registers = current.registers().expect("it stands before its call");
        assert!(!registers.is_32bit);
        let code = line_of(current.task.pid, registers.ip);
        assert!(code.contains(" r-xp "), "{code}");
        let stack = line_of(current.task.pid, registers.sp);
        assert!(stack.contains("[stack]"), "{stack}");
        let (mut call, mut word) = (INSTRUCTION, [0; 8]);
        call.fill(0);
        assert_eq!(
            current.read_memory(registers.ip - call.len() as u64, &mut call),
            call.len()
        );
        assert_eq!(
            call, INSTRUCTION,
            "the instruction that it stands behind makes calls"
        );
        assert_eq!(current.read_memory(registers.sp, &mut word), 8);
        assert_eq!(current.read_memory(0, &mut word), 0);
        SEEN.fetch_add(1, Relaxed);
    }
}

struct Watcher {
    probes: Subsystem<Probe, Infallible>,
    mapped: Vec<(&'static str, String)>,
}

impl Observer for Watcher {
    type Held = Subscription<Probe>;

    fn enter(&mut self, _: Task, mm: &MmWithUser) -> Self::Held {
        self.probes.get(mm).expect("it is alive")
    }

    fn leave(&mut self, _: Task, _: Self::Held) {}

    fn event(&mut self, event: &TaskEvent<'_>) {
        if let TaskEvent::Mapped { task, range, .. } = event {
            let cause = current().expect("it is told on behalf of a task").cause;
            line_of(task.pid, range.start().get());
            self.mapped
                .push((cause, line_of(task.pid, range.last().get())));
        }
    }
}

fn watch(births: bool, command: Command) -> Watcher {
    let mut options = Options::default();
    options.births = births;
    let watcher = Watcher {
        probes: Subsystem::new(|_| Ok(Probe)),
        mapped: Vec::new(),
    };
    let mut tracer = Tracer::new(options, watcher).expect("this machine can");
    tracer
        .spawn(
            command.stdout(
                File::options()
                    .write(true)
                    .open("/dev/null")
                    .expect("/dev/null"),
            ),
        )
        .expect("it can be run");
    tracer.run(&AtomicBool::new(false)).expect("it is traced");
    assert_eq!(tracer.exit_status(), Some(ExitStatus::Code(0)));
    tracer.detach().0
}

#[test]
fn a_task_that_stands_at_a_call_can_be_asked_where_it_is() {
    if !require(Cap::Ptrace) {
        return;
    }
    assert_eq!(watch(false, Command::new("ls")).mapped, []);
    assert!(SEEN.load(Relaxed) > 5);
}

#[test]
fn births_are_reported_when_they_are_mapped() {
    if !require(Cap::Ptrace) {
        return;
    }
    // The case uses `brk` itself, because not every allocator does.
    let mapped = watch(true, tracee(&["break"])).mapped;
    let has = |cause: &str, what: &str| {
        mapped
            .iter()
            .any(|(by, line)| *by == cause && line.contains(what))
    };
    assert!(has("mmap", "libc.so"), "{mapped:?}");
    assert!(has("brk", "[heap]"), "{mapped:?}");
}
