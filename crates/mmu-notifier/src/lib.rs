//! MMU notifiers for userspace, with the kernel's own lifetime scheme.
//!
//! Code that keeps a second copy of an address space's translations (a registration cache, a shadow page table, a DMA map,
//! a software TLB) must let go of an address *before* the memory behind it moves. Here such code is a [`Notifier`]. Its
//! [`Subsystem`] hands out its one notifier for an address space with [`get`](Subsystem::get), shared by reference count;
//! the last [`put`](Subscription::put) unlinks it, and it is freed after a grace period, when no callback can still run in
//! it. Whoever changes the address space does so inside a bracket, [`Mm::invalidate`].
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
//! * [`Mm`] is a handle of an address space, [`MmWithUser`] one of an address space that is alive. Dropping the last
//!   `MmWithUser` is exit: every subscriber's [`release`](Notifier::release) runs.
//! * [`Subsystem`], [`Subscription`]: get and put. [`Registration`]: for a notifier that one owner registers and takes back.
//! * [`IntervalNotifier`]: for many ranges, each with its own state; [`InvalidateSeq`]: for one shadow with many faults, such as a
//!   virtual machine's page tables. Both refuse to install what was looked up before a change.
//! * [`Mm::invalidate`], [`Mm::try_invalidate`], [`Mm::with_invalidation`]: brackets, for event sources.
//! * [`Subsystem::synchronize`]: waits for the frees.
//! * [`SoftTlb`]: a table of translations that a callback can empty, for it never allocates.
//! * [`lockdep`]: finds lock-order trouble, and callbacks that allocate, in debug builds.
//!
//! # What a subscriber can rely on
//! * No bracket is missed: when `get` has returned, each bracket that is open or opens later calls the notifier.
//! * No end without its start; a start without its end only if the notifier was delisted in between: put, unregistered, or
//!   its address space ended.
//! * No callback runs in a freed notifier, and `release` has returned before exit goes on.
//! * What would wait for itself returns [`WouldDeadlock`].
//!
//! # What a callback must not do
//! Allocate, free, print, or take a lock whose holders do: it may run in the middle of `free`. [`Notifier`] has the rule in full.
//!
//! # What a wait waits for
//! A registrar, `unregister` and exit wait for every bracket that is open when they begin. If another
//! grace period of the address space is under way then (another registrar's, or one for a
//! subscription that was put), they also wait for brackets that open before that one ends. So they
//! do for a bracket whose thread was preempted in the middle of opening it. They wait for no later
//! bracket: a stream of brackets holds no caller up for ever.
//!
//! # What a thread must not do
//! Wait for another address space's brackets, by subscribing to it or unregistering from it, inside a bracket of this one, if
//! another thread does the same the other way round; no lock tells the two. Wait for anything while it holds a lock that
//! a callback takes: [`lockdep`] finds that.
//!
//! # In the child of a fork
//! The parent's address spaces have no subscribers there ([`Mm::is_inherited`]); the child makes its own. A [`Subsystem`] can be
//! used in both: what the parent has queued to be freed is not waited for in the child, and not freed. The lock around an
//! interval's state or a shadow is a plain lock, which a thread of the parent may have held.

#![deny(unsafe_code)]

mod context;
mod error;
mod event;
#[expect(unsafe_code, reason = "nodes that their users own, in a tree that is walked without a lock")]
mod interval;
mod invalidate_seq;
pub mod lockdep;
mod mm;
mod notifier;
#[expect(unsafe_code, reason = "a guard beside what it borrows from")]
mod owned_guard;
mod range;
#[expect(unsafe_code, reason = "its users give the memory")]
pub mod raw;
mod registration;
mod secondary;
mod soft_tlb;
mod subscription;
#[expect(unsafe_code, reason = "the one list that is read under SRCU")]
mod subscriptions;
mod subsystem;
mod sync;

pub use error::{GetError, Overflow, RegisterError, UnregisterError, WouldDeadlock};
pub use event::{Blocking, Event, Exit, InvalidateRange, Owner, WouldBlock};
pub use interval::{Finish, InsertError, IntervalNotifier, IntervalOps, ReadSeq, RemoveError, Retry};
pub use invalidate_seq::{InstallError, InvalidateSeq, ShadowOps, Snapshot};
pub use mm::{Bracket, Mm, MmWithUser, MmapWriteGuard, OwnedBracket};
pub use notifier::Notifier;
pub use range::{InvalidRange, PAGE_SIZE, Va, VaRange};
pub use registration::Registration;
pub use secondary::{Secondary, SecondaryTlb};
pub use soft_tlb::SoftTlb;
pub use subscription::Subscription;
pub use subsystem::Subsystem;

/// The example of the crate's README must run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
