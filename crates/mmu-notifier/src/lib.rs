//! MMU notifiers for userspace, with the kernel's own lifetime scheme.
//!
//! Some code keeps a second copy of an address space's translations: a registration cache, a shadow
//! page table, a DMA map, a software TLB. Such code must drop an address *before* the memory behind
//! it moves. In this crate such code is a [`Notifier`]. [`get`](Subsystem::get) of a [`Subsystem`]
//! makes at most one notifier per address space, and returns a counted reference to it. The last
//! [`put`](Subscription::put) unlinks the notifier. A grace period later no callback can run in it,
//! and it is freed. Code that changes the address space does so inside a bracket,
//! [`Mm::invalidate`].
//!
//! ```
//! # use mmu_notifier::lockdep::CheckedAlloc;
//! # #[global_allocator]
//! # static ALLOC: CheckedAlloc = CheckedAlloc::new();
//! use mmu_notifier::{Event, InvalidateRange, MmWithUser, Notifier, SoftTlb, Subsystem, Va, VaRange};
//! use std::sync::Mutex;
//!
//! /// A shadow page table: page to frame number, in memory of a fixed size, since a callback may not allocate or free.
//! struct Shadow(Mutex<SoftTlb<u64>>);
//!
//! impl Notifier for Shadow {
//!     fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
//!         self.0.lock().unwrap().zap(range.range());
//!     }
//! }
//!
//! static SHADOW: Subsystem<Shadow> = Subsystem::new(|_mm| Ok(Shadow(Mutex::new(SoftTlb::new(1024)))));
//!
//! let mm = MmWithUser::new();
//! let shadow = SHADOW.get(&mm)?;
//! shadow.0.lock().unwrap().insert(Va::new(0x7000), 42);
//!
//! let bracket = mm.invalidate(VaRange::covering(Va::new(0x7000), 0x1000)?, Event::Unmap);
//! assert!(shadow.0.lock().unwrap().is_empty(), "it let go before the memory moves");
//! drop(bracket); // The memory has moved; the end callbacks have run.
//!
//! shadow.put();
//! SHADOW.synchronize()?; // The notifier has been freed.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The parts
//! * [`Mm`] is a handle of an address space, [`MmWithUser`] one of an address space that is alive.
//!   Dropping the last `MmWithUser` is exit: it runs every subscriber's
//!   [`release`](Notifier::release).
//! * [`Subsystem`], [`Subscription`]: get and put. [`Registration`]: for a notifier that one owner
//!   registers and takes back.
//! * [`IntervalNotifier`]: for many ranges, each with its own state. [`InvalidateSeq`]: for one
//!   shadow with many faults, such as a virtual machine's page tables. Both refuse to install the
//!   result of a look-up that was made before a change.
//! * [`Mm::invalidate`], [`Mm::try_invalidate`], [`Mm::with_invalidation`]: brackets, for event
//!   sources.
//! * [`Subsystem::synchronize`]: waits for the frees.
//! * [`SoftTlb`]: a table of translations that a callback can empty, because its size is fixed.
//! * [`lockdep`]: reports lock-order inversions, and callbacks that allocate, in debug builds.
//!
//! # A subscriber's life
//! 1. `get` lists the notifier and waits until every bracket that does not call it has ended.
//! 2. Each bracket calls `invalidate_range_start`, the memory changes, and `invalidate_range_end`
//!    follows.
//! 3. The last `put` delists the notifier. A bracket that is already open may still be in a
//!    callback.
//! 4. A grace period later no callback can be in the notifier, and the background thread drops it.
//!    This is a *deferred free*.
//! 5. If the address space ends first, exit calls `release`, delists the notifier, and waits for
//!    its callbacks. The notifier itself lives until its last `put`.
//!
//! # What a subscriber can rely on
//! * No bracket is missed: after `get` has returned, every bracket that is open or opens later
//!   calls the notifier.
//! * No end comes without its start. An accepted start lacks its end only if the notifier was
//!   delisted in between: it was put or unregistered, or its address space ended.
//! * No callback runs in a freed notifier, and `release` has returned before exit returns.
//! * A call that would wait for its own thread returns [`WouldDeadlock`]. A call that cannot return
//!   an error skips the wait, as its documentation says.
//!
//! # What a callback must not do
//! A callback must not allocate, free or print, and must not take a lock whose holders do, because
//! the callback may run in the middle of `free`. [`Notifier`] has the rule in full.
//!
//! # What a wait waits for
//! A registrar is a call that makes or registers a notifier, or inserts the first interval of an
//! address space. A registrar, `unregister` and exit wait for every bracket that is open when they
//! begin. They also wait for some brackets that open later, in two cases. If another grace period
//! of the address space is under way (another registrar's, or one for a subscription that was put),
//! they wait for brackets that open before that grace period ends. If a thread was preempted while
//! it opened a bracket, they may wait for that bracket. The calls wait for no later bracket, so a
//! stream of brackets delays no caller for ever.
//!
//! # What a thread must not do
//! Two threads must not do the following at the same time. One thread subscribes to address space B
//! (or unregisters from B) inside a bracket of A. The other thread does so with A, inside a bracket
//! of B. Each would wait for the other's bracket for ever. This crate cannot detect the deadlock,
//! because neither wait holds a lock.
//!
//! A thread must not wait while it holds a lock that a callback takes, because the wait may be for
//! that callback. [`lockdep`] detects such a wait.
//!
//! # In the child of a fork
//! The parent's address spaces have no subscribers in the child ([`Mm::is_inherited`]); the child
//! makes address spaces of its own. So it is in a child made by `_Fork` or a raw `clone`, which run
//! no fork handlers. A [`Subsystem`] works in parent and child. The child neither
//! waits for the parent's queued frees nor runs them. The lock around an interval's state or a
//! shadow is a plain lock: if a thread of the parent held it at the fork, it stays locked in the
//! child.

#![deny(unsafe_code)]

mod error;
#[expect(unsafe_code, reason = "nodes in memory that their users own")]
mod interval;
mod invalidate_seq;
pub mod lockdep;
mod mm;
mod pending;
mod range;
#[expect(unsafe_code, reason = "its users give the memory")]
pub mod raw;
mod registration;
mod soft_tlb;
mod subscription;
mod subsystem;
mod sync;

pub use error::{GetError, Overflow};
pub use interval::{
    Finish, InsertError, IntervalNotifier, IntervalOps, ReadSeq, RemoveError, Retry,
};
pub use invalidate_seq::{InstallError, InvalidateSeq, ShadowOps, Snapshot};
pub use mm::{
    Blocking, Bracket, Event, Exit, InvalidateRange, Mm, MmWithUser, MmapWriteGuard, Notifier,
    OwnedBracket, Owner, Secondary, SecondaryTlb, WouldBlock,
};
pub use range::{InvalidRange, PAGE_SIZE, Va, VaRange};
pub use registration::{RegisterError, Registration, UnregisterError};
pub use soft_tlb::SoftTlb;
pub use srcu::WouldDeadlock;
// For the crates that build on this one: they keep per-thread words in the same way.
#[doc(hidden)]
pub use srcu::{mutant, thread_word};
#[cfg(not(mmun_loom))]
#[doc(hidden)]
pub use srcu::{thread_number, thread_numbers};
pub use subscription::Subscription;
pub use subsystem::Subsystem;

/// The example of the crate's README must run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
