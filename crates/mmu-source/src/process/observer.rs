//! What a tracer tells its user.

use mmu_notifier::{Mm, MmWithUser, VaRange};

use super::kinds::{ExitStatus, Task};

/// Is told which task is in which address space, and keeps something for each while it is there.
///
/// The tracer calls it in the thread that drives the tracer, with the task in question stopped and
/// [`super::current`] set.
pub trait Observer {
    /// What one task holds while it is in an address space, usually a
    /// [`mmu_notifier::Subscription`].
    type Held;

    /// A task appears in `mm`, or has just entered it by `execve`. It has not run there yet.
    ///
    /// Brackets of other tasks of `mm` can be open: sharing a notifier that exists is fine here,
    /// registering a further one may answer that it would deadlock.
    fn enter(&mut self, task: Task, mm: &MmWithUser) -> Self::Held;

    /// A task ends, or leaves its address space for the one its `execve` made, or is let go of.
    ///
    /// Every bracket the task had open is closed by then. If it was the last one, `release` runs
    /// next.
    fn leave(&mut self, task: Task, held: Self::Held);

    /// Something happened to a task.
    fn event(&mut self, event: &TaskEvent<'_>) {
        let _ = event;
    }
}

/// What happened to a task, besides invalidations.
#[derive(Debug)]
#[non_exhaustive]
pub enum TaskEvent<'a> {
    /// An address space was first seen, because `task` was spawned, attached to, forked or ran
    /// `execve`.
    MmNew {
        /// Its first task.
        task: Task,
        /// The address space.
        mm: &'a Mm,
    },
    /// A task made another one. Reported after [`TaskEvent::MmNew`] and before the child enters.
    Fork {
        /// The parent.
        task: Task,
        /// The child: of the same process if it is a thread.
        child: Task,
        /// The parent's address space.
        mm: &'a Mm,
        /// The child's: the same one for threads and `vfork`.
        child_mm: &'a Mm,
    },
    /// A task has run `execve` and is in a new address space. Reported after it left the old one.
    Exec {
        /// The task, under the identifier it has now: that of the process.
        task: Task,
        /// The new address space.
        mm: &'a Mm,
        /// The one it left.
        old_mm: &'a Mm,
    },
    /// A task has ended. Reported after it left its address space.
    Exit {
        /// The task.
        task: Task,
        /// The address space it was in.
        mm: &'a Mm,
        /// How it ended.
        status: ExitStatus,
    },
    /// A call has made or grown a mapping, and the task stands at its end. Only with
    /// [`super::Options::births`].
    ///
    /// [`super::current`] says which call it was.
    Mapped {
        /// The task.
        task: Task,
        /// The address space.
        mm: &'a Mm,
        /// What is mapped now. Of the heap, all of it.
        range: VaRange,
    },
    /// The tracing of a task has ended and the task lives on. Reported after it left its address
    /// space. If it was the last there that was traced, its `release` has run, although the address
    /// space lives on as well.
    Detach {
        /// The task.
        task: Task,
        /// The address space it is in.
        mm: &'a Mm,
    },
    /// A task made a system call under an ABI this source cannot read. If that call changed the
    /// address space, it was missed.
    UnknownAbi {
        /// The task.
        task: Task,
        /// The `AUDIT_ARCH_*` value of the call.
        arch: u32,
        /// The number of the call.
        number: u64,
    },
}
