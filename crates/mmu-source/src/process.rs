//! Other processes, through ptrace and a seccomp filter.
//!
//! A [`Tracer`] runs processes or attaches to them. The tracer gives each address space a
//! [`mmu_notifier::MmWithUser`], and opens an invalidation bracket on it around each system call
//! that may change a translation. The start callbacks run while the task is stopped before the
//! call. The end callbacks run after the call, even if it fails. The tracer tells its [`Observer`]
//! which task is in which address space.
//!
//! By default, processes that the tracer spawns carry a seccomp filter, so they stop only at memory
//! calls. Processes that it attaches to stop at every system call. `docs/sources.md` says what this
//! source sees and what it misses.
//!
//! # Threads
//! ptrace binds a tracee to one thread of the tracer. So only the thread that made a tracer may
//! drive it. That thread must have no other children, because the tracer would reap their exit
//! status.
//!
//! # Examples
//! ```
//! use std::sync::atomic::AtomicBool;
//! use mmu_notifier::MmWithUser;
//! use mmu_source::process::{Command, ExitStatus, Observer, Options, Task, Tracer};
//!
//! struct Tasks(u32);
//! impl Observer for Tasks {
//!     type Held = ();
//!     fn enter(&mut self, _: Task, _: &MmWithUser) { self.0 += 1 }
//!     fn leave(&mut self, _: Task, (): ()) { self.0 -= 1 }
//! }
//!
//! let mut tracer = Tracer::new(Options::default(), Tasks(0))?;
//! tracer.spawn(Command::new("true"))?;
//! tracer.run(&AtomicBool::new(false))?;
//! assert_eq!(tracer.exit_status(), Some(ExitStatus::Code(0)));
//! assert_eq!(tracer.observer().0, 0);
//! # Ok::<(), mmu_source::Error>(())
//! ```

mod abi;
mod births;
mod command;
mod copied;
mod current;
mod decode;
mod filter;
mod huge_page;
mod kinds;
mod observer;
mod proc;
mod space;
mod sys;
mod task;
mod tracer;

use crate::maps;

pub use crate::Error;
pub use crate::procfs::proc_is_foreign;
pub use command::Command;
pub use current::{Current, current};
pub use kinds::{ExitStatus, Pid, Registers, Task};
pub use observer::{Observer, TaskEvent};
pub use tracer::{Done, Keeper, Options, Tracer};
