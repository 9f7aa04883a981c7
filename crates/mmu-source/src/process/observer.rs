//! How a tracer reports to its user.

use mmu_notifier::{Mm, MmWithUser, VaRange};

use super::kinds::{ExitStatus, Task};

/// Learns which task is in which address space, and gives the tracer a value to keep while the task
/// is there.
///
/// The tracer calls an observer on the thread that drives the tracer. Meanwhile the task in
/// question is stopped or has ended, and [`super::current`] is set. There are two exceptions: a
/// task that the tracer attaches to may still run during [`enter`](Self::enter), and a task that
/// the tracer detaches from may run during [`leave`](Self::leave).
pub trait Observer {
    /// What one task holds while it is in an address space, usually a
    /// [`mmu_notifier::Subscription`].
    type Held;

    /// A task has appeared in `mm`, or has just entered it by `execve`. Unless the tracer has
    /// attached to the task, the task has not run there yet.
    ///
    /// Other tasks of `mm` may have open brackets. So this method may subscribe to a notifier that
    /// is registered already, but registering another one may fail because it would deadlock.
    fn enter(&mut self, task: Task, mm: &MmWithUser) -> Self::Held;

    /// A task ends, leaves its address space by `execve`, or is detached.
    ///
    /// All brackets of the task are closed by then. If the task was the last one in the address
    /// space, the address space exits next: `release` runs for each notifier that is registered
    /// then. `release` does not run for a notifier whose last [`mmu_notifier::Subscription`] was
    /// put in this method.
    fn leave(&mut self, task: Task, held: Self::Held);

    /// Reports that a task was made, changed its address space, ended, or made a call worth
    /// reporting.
    fn event(&mut self, event: &TaskEvent<'_>) {
        let _ = event;
    }
}

/// What happened to a task, apart from invalidations.
#[derive(Debug)]
#[non_exhaustive]
pub enum TaskEvent<'a> {
    /// The tracer sees an address space for the first time, because it spawned `task` or attached
    /// to `task`, because `task` was made by a fork, or because `task` has run `execve`.
    #[non_exhaustive]
    MmNew {
        /// The first task of the address space.
        task: Task,
        /// The address space.
        mm: &'a Mm,
        /// The task that forked `task`, if the tracer knows it. The address space is then a copy of
        /// the parent's, as far as the tracer knows, and the parent is stopped.
        parent: Option<Task>,
    },
    /// A task has made a child. Reported after the [`TaskEvent::MmNew`] of the child, if there is
    /// one, and before the child enters. If the tracer learned of the child in another way first,
    /// the child has entered already.
    #[non_exhaustive]
    Fork {
        /// The parent.
        task: Task,
        /// The child. If it is a thread, it belongs to the same process.
        child: Task,
        /// The parent's address space.
        mm: &'a Mm,
        /// The child's address space. Threads and `vfork` children share the parent's.
        child_mm: &'a Mm,
    },
    /// A task has run `execve` and is in a new address space. Reported after the task has left the
    /// old one.
    #[non_exhaustive]
    Exec {
        /// The task, under its new identifier, which is that of the process.
        task: Task,
        /// The new address space.
        mm: &'a Mm,
        /// The address space that the task left.
        old_mm: &'a Mm,
    },
    /// A task has ended. Reported after the task has left its address space.
    #[non_exhaustive]
    Exit {
        /// The task.
        task: Task,
        /// The address space that the task was in.
        mm: &'a Mm,
        /// How it ended.
        status: ExitStatus,
    },
    /// A call has made or grown a mapping, and the task is stopped at the end of the call. Reported
    /// only with [`super::Options::births`].
    ///
    /// [`super::current`] gives the call.
    #[non_exhaustive]
    Mapped {
        /// The task.
        task: Task,
        /// The address space.
        mm: &'a Mm,
        /// The new mapping. For the heap, the whole heap.
        range: VaRange,
    },
    /// The tracer has detached from a task, which lives on. Reported after the task has left its
    /// address space. If the tracer traces no other task there, `release` has run, although the
    /// address space itself lives on.
    #[non_exhaustive]
    Detach {
        /// The task.
        task: Task,
        /// The address space that the task is in.
        mm: &'a Mm,
    },
    /// A task is making a system call in an ABI that this source does not know. If the call changes
    /// the address space, the source misses the change.
    #[non_exhaustive]
    UnknownAbi {
        /// The task.
        task: Task,
        /// The `AUDIT_ARCH_*` value of the call.
        arch: u32,
        /// The number of the call.
        number: u64,
    },
}
