//! What the source is working on in this thread.

use std::cell::Cell;

/// A process or thread identifier, as the tracer's pid namespace numbers it.
pub type Pid = i32;

/// A task: one thread of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Task {
    /// The process, which is the thread group.
    pub pid: Pid,
    /// The thread.
    pub tid: Pid,
}

/// On whose behalf a callback runs, as the kernel's `current`.
#[doc(alias = "current")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Current {
    /// The task that made the call. The address space it acts on may be another's (`process_madvise`).
    pub task: Task,
    /// The system call, `"exit"` or `"detach"`. While a bracket opens or closes it is the call that was made: `"clone"` where
    /// libc's `fork` makes that one. A new task that the source has seen no call for is told as the kernel reports it: `"fork"`,
    /// `"vfork"` or `"clone"`.
    pub cause: &'static str,
    /// The raw return value (`-errno` on failure) while the call's brackets close. `None` otherwise, and if the task died
    /// in the call or was let go of.
    pub result: Option<i64>,
}

thread_local! {
    static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
}

/// Returns what the source is working on in this thread.
///
/// It is set while the source runs callbacks (`invalidate_range_start`, `invalidate_range_end`, `release`) and methods of
/// the observer, and `None` at any other time, in the thread that frees notifiers for one.
pub fn current() -> Option<Current> {
    CURRENT.get()
}

/// Sets [`current`] while it lives and puts back what was there.
#[derive(Debug)]
pub(super) struct Scope {
    before: Option<Current>,
}

impl Scope {
    pub(super) fn new(task: Task, cause: &'static str, result: Option<i64>) -> Scope {
        Scope { before: CURRENT.replace(Some(Current { task, cause, result })) }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_nests_and_puts_back_what_was_there() {
        let task = Task { pid: 1, tid: 2 };
        let outer = Scope::new(task, "exit", None);
        drop(Scope::new(task, "munmap", Some(0)));
        assert_eq!(current(), Some(Current { task, cause: "exit", result: None }));
        drop(outer);
        assert_eq!(current(), None);
    }
}
