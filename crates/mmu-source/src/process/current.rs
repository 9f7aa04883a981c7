//! What the source is working on in this thread.

use std::cell::Cell;

use super::kinds::{Registers, Task};

/// On whose behalf a callback runs, as the kernel's `current`.
#[doc(alias = "current")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Current {
    /// The task that made the call. The address space it acts on may be another's
    /// (`process_madvise`).
    pub task: Task,
    /// The system call, `"exit"` or `"detach"`. While a bracket opens or closes it is the call that
    /// was made: `"clone"` where libc's `fork` makes that one. A new task that the source has seen
    /// no call for is told as the kernel reports it: `"fork"`, `"vfork"` or `"clone"`.
    pub cause: &'static str,
    /// The raw return value (`-errno` on failure) while the call's brackets close. `None`
    /// otherwise, and if the task died in the call or was let go of.
    pub result: Option<i64>,
}

impl Current {
    /// Reads the registers of the task, which is stopped while the source is working on it.
    ///
    /// `None` if the task has died meanwhile, or has been let go of, and in a thread other than the
    /// tracer's.
    ///
    /// # Source
    /// ptrace(2), `PTRACE_GETREGS`.
    pub fn registers(&self) -> Option<Registers> {
        super::sys::registers(self.task.tid)
    }

    /// Reads the task's memory at `address`, and returns how many bytes could be read.
    ///
    /// Memory that is not mapped ends the read. A task that has died has no memory: 0.
    ///
    /// # Source
    /// process_vm_readv(2); `PTRACE_PEEKDATA` where that is refused.
    pub fn read_memory(&self, address: u64, buffer: &mut [u8]) -> usize {
        super::sys::read_memory(self.task.tid, address, buffer).unwrap_or(0)
    }
}

thread_local! {
    static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
}

/// Returns what the source is working on in this thread.
///
/// It is set while the source runs callbacks (`invalidate_range_start`, `invalidate_range_end`,
/// `release`) and methods of the observer, and `None` at any other time, in the thread that frees
/// notifiers for one.
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
        Scope {
            before: CURRENT.replace(Some(Current {
                task,
                cause,
                result,
            })),
        }
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
        assert_eq!(
            current(),
            Some(Current {
                task,
                cause: "exit",
                result: None
            })
        );
        drop(outer);
        assert_eq!(current(), None);
    }
}
