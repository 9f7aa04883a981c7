//! The address space of this process.

use crate::Error;
use crate::fork::{keep, mapped, marks, space, try_marks};
use mmu_notifier::MmWithUser;
use std::sync::atomic::Ordering;

/// Returns the address space of this process, on which its sources (`kernel`, `uffd`, `hook`) open
/// their brackets.
///
/// The address space is made on first use and never exits. As in the kernel, the child of a fork
/// has an address space of its own: the first use in the child makes one without subscribers.
/// Subscriptions that the child inherits belong to the parent's address space and receive no
/// callbacks in the child. A `vfork` child shares the address space of its parent.
///
/// # What a callback must not do
/// A callback on this address space may run in the middle of `malloc` or `free`, while the thread
/// holds the allocator's locks. So it must not allocate, free or print, and must not take a lock
/// whose holder may allocate. [`Notifier`](mmu_notifier::Notifier) states the rule,
/// `examples/own_process.rs` is a complete program that follows it, and
/// [`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc) detects a violation at the first call.
///
/// # Blocking
/// The first use allocates, and waits while another thread makes the address space. Later uses do
/// not block.
/// # Panics
/// If the first use finds no memory for a page. Start a source before: it returns an error instead.
/// # Examples
/// ```
/// let mm = mmu_source::current();
/// assert_eq!(mm.id(), mmu_source::current().id());
/// ```
#[must_use]
pub fn current() -> MmWithUser {
    current_ref().clone()
}

/// Returns the address space of this process by reference: it lives as long as the process.
///
/// # Blocking
/// As [`current`].
/// # Panics
/// As [`current`].
pub fn current_ref() -> &'static MmWithUser {
    current_if_made().unwrap_or_else(make)
}

/// Returns the address space of this process if it has been made. Never allocates.
///
/// Before it has been made, there are no subscribers. A source must still make the address space
/// before the first change that the source has to report, because a client may subscribe while the
/// change is under way.
#[inline]
pub fn current_if_made() -> Option<&'static MmWithUser> {
    // ORDER(source-space): Acquire, for the content. Partner: the store in `make`.
    space(mapped()?.space.load(Ordering::Acquire))
}

/// Maps the memory without which [`current`] panics.
///
/// # Errors
/// [`Error::Kernel`] if there is no memory, or if the limit of mappings is reached.
#[doc(hidden)]
pub fn prepare() -> Result<(), Error> {
    try_marks().map(drop)
}

#[cold]
fn make() -> &'static MmWithUser {
    // The lock ensures that only one address space is made. A second one would have to be dropped
    // here, and that drop may wait, which the caller must not do.
    marks().make.with(|| {
        current_if_made().unwrap_or_else(|| {
            let made = keep(MmWithUser::new());
            // ORDER(source-space): Release for the content. Partner: the load in `current_if_made`.
            marks().space.store(made, Ordering::Release);
            space(made).expect("a pointer from a box is not null")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_get_the_same_one() {
        let ids: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| current().id())).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        assert!(ids.iter().all(|id| *id == current_ref().id()), "{ids:?}");
    }
}
