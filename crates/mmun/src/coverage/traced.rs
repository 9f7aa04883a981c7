//! One operation under the source `process`: this process traces a child that makes the change.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Registration, Va};
use mmu_source::process::{Command, Observer, Options, Pid, Task, Tracer};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{pread, pwrite};

use super::cell;
use super::operation::{Operation, Prepared, Unavailable};
use super::page::{Judge, Page, State};
use super::report::{Report, Seen};

/// The offset in `board` at which the tracee writes the page's address, and the page's state before
/// the change. Nothing is there until the tracee writes it; the reader then gets the address 0.
const PLAN: u64 = 0;
/// The offset at which the tracee writes its report.
const REPORT: u64 = 4096;

/// How many times at most to run an operation that seems to be reported too late.
const TRIES: usize = 3;

/// Traces a child that runs `operation`.
///
/// After the tracee has read the state of the page and before its call, the kernel may move the
/// page by itself, to make room for a huge page. Then the state differs although the call has not
/// begun. Such a move is rare, but a late source is late every time. So the operation is
/// repeated.
pub(crate) fn run(operation: &'static Operation) -> Report {
    let run =
        || try_run(operation).unwrap_or_else(|Unavailable(reason)| Report::unavailable(reason));
    let mut report = run();
    for _ in 1..TRIES {
        if report.seen != Seen::After {
            break;
        }
        report = run();
    }
    report
}

fn try_run(operation: &'static Operation) -> Result<Report, Unavailable> {
    let board = memfd_create("coverage-board", MemfdFlags::CLOEXEC)?;
    let explained = |error: mmu_source::Error| Unavailable(crate::explain(&error));
    let seen = Arc::new(OnceLock::new());
    let looker = Looker {
        board: board.try_clone()?,
        judge: operation.judge,
        root: None,
        seen: Arc::clone(&seen),
    };
    let mut tracer = Tracer::new(Options::default(), looker).map_err(explained)?;
    let program = std::env::current_exe()?;
    let command = Command::new(program)
        .args(["coverage-tracee", operation.name])
        .stdin(board.try_clone()?);
    tracer.spawn(command).map_err(explained)?;
    tracer.run(&AtomicBool::new(false)).map_err(explained)?;
    let mut line = [0; 1024];
    let length = pread(&board, &mut line, REPORT)?;
    let line = String::from_utf8_lossy(&line[..length]);
    let Some(mut report) = Report::from_line(&line) else {
        return Ok(Report::broken(format!(
            "the traced program ended early: {:?}",
            tracer.exit_status()
        )));
    };
    if report.seen != Seen::NotAvailable {
        report.seen = seen.get().copied().unwrap_or(Seen::Missed);
    }
    Ok(report)
}

/// The tracee: makes the change, and writes its report for the tracer to standard input.
pub(crate) fn tracee(operation: &Operation) {
    let report =
        try_tracee(operation).unwrap_or_else(|Unavailable(reason)| Report::unavailable(reason));
    // If this fails, the tracer finds no report, and reports that the traced program ended early.
    let _ = pwrite(std::io::stdin(), report.to_line().as_bytes(), REPORT);
}

fn try_tracee(operation: &Operation) -> Result<Report, Unavailable> {
    let Prepared {
        watched, change, ..
    } = (operation.prepare)()?;
    let page = cell::open(operation, watched)?;
    let shows_frames = page.shows_frames();
    let before = page.state()?;
    let State([a, b]) = before;
    let plan: Vec<u8> = [watched as u64, a, b]
        .into_iter()
        .flat_map(u64::to_ne_bytes)
        .collect();
    pwrite(std::io::stdin(), &plan, PLAN)?;
    change()?;
    let changed = page.state()? != before;
    if !changed && !shows_frames {
        return Err("only root is shown whether the frame changed".into());
    }
    Ok(Report::told(Seen::Missed, changed))
}

/// Subscribes to the address spaces of the spawned process, not to those of its children.
struct Looker {
    board: OwnedFd,
    judge: Judge,
    root: Option<Pid>,
    seen: Arc<OnceLock<Seen>>,
}

impl Observer for Looker {
    type Held = Option<Registration<Witness>>;

    fn enter(&mut self, task: Task, mm: &MmWithUser) -> Self::Held {
        let root = *self.root.get_or_insert(task.pid);
        if (task.pid, task.tid) != (root, root) {
            return None;
        }
        let board = self.board.try_clone().ok()?;
        let witness = Witness {
            board,
            judge: self.judge,
            pid: root,
            seen: Arc::clone(&self.seen),
        };
        // The first task of an address space enters it before any range is invalidated there,
        // so this succeeds.
        Registration::new(mm, witness).ok()
    }

    fn leave(&mut self, _: Task, held: Self::Held) {
        if let Some(registration) = held {
            registration.put();
        }
    }
}

/// Reads the state of the tracee's page, once the tracee has written the page's address.
struct Witness {
    board: OwnedFd,
    judge: Judge,
    pid: Pid,
    seen: Arc<OnceLock<Seen>>,
}

impl Notifier for Witness {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let mut plan = [[0; 8]; 3];
        if pread(&self.board, plan.as_flattened_mut(), PLAN).is_err() {
            return;
        }
        let [address, a, b] = plan.map(u64::from_ne_bytes);
        if address != 0 && range.range().contains(Va::new(address)) {
            let now = Page::open(self.pid, address as usize, self.judge).map(|page| page.state());
            let unchanged = matches!(now, Ok(Ok(now)) if now == State([a, b]));
            // Only the first callback counts, because a real subscriber would have dropped its
            // entry then.
            let _ = self
                .seen
                .set(if unchanged { Seen::Before } else { Seen::After });
        }
    }
}
