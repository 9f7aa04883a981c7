//! The task and the call for which this thread runs a callback.

use std::cell::Cell;

use super::kinds::{Registers, Task};

/// The task and the call for which a callback runs, like the kernel's `current`.
#[doc(alias = "current")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Current {
    /// The task that made the call. The call may act on another address space (`process_madvise`).
    pub task: Task,
    /// The name of the system call, or another reason: `"enter"`, `"attach"`, `"exit"`,
    /// `"detach"`, or `"unknown"` for a call in an unknown ABI.
    ///
    /// A fork has the name of the call that the task made, which is `"clone"` if libc implements
    /// `fork` by `clone`. For a new task that shares its parent's memory, or whose parent's call
    /// the tracer has not seen, this is the kernel's event: `"fork"`, `"vfork"` or `"clone"`.
    pub cause: &'static str,
    /// The raw return value (`-errno` on failure), while the brackets of the call close and while
    /// [`TaskEvent::Mapped`](super::TaskEvent::Mapped) is reported. `None` at any other time, and
    /// if the brackets close before the call returns: the task died or was detached, its signal
    /// handler did not return, or the other address space that the call acts on exits.
    pub result: Option<i64>,
}

impl Current {
    /// Reads the registers of the task, which must be stopped.
    ///
    /// Returns `None` if the task runs, has died or was detached, and in any thread other than the
    /// tracer's. A task may run while the tracer attaches to it or detaches from it, and while the
    /// brackets of its call close because the other address space exits.
    ///
    /// # Source
    /// ptrace(2), `PTRACE_GETREGS`.
    pub fn registers(&self) -> Option<Registers> {
        super::sys::registers(self.task.tid)
    }

    /// Reads the task's memory at `address`, and returns how many bytes were read.
    ///
    /// The read ends at the first byte that is not mapped. Returns 0 for a task that has died, and
    /// for memory that the tracer may not read.
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

/// Returns the task and the call for which this thread runs a callback.
///
/// The value is set while the tracer runs callbacks (`invalidate_range_start`,
/// `invalidate_range_end`, `release`) and methods of the observer. The value is `None` at any other
/// time, and in other threads, such as the thread that frees notifiers.
pub fn current() -> Option<Current> {
    CURRENT.get()
}

/// Sets [`current`] as long as this value lives. The drop restores the previous value.
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
    fn a_scope_nests_and_restores_the_previous_value() {
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
