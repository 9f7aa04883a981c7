//! The address space of this process.

use crate::fork::{marks, space};
use mmu_notifier::MmWithUser;
use std::ptr;
use std::sync::atomic::Ordering;

/// Returns the address space of this process: the one that the sources of this process (`kernel`,
/// `uffd`, hooks) feed.
///
/// It is made on first use and never exits. The child of a fork has an address space of its own: the first use there makes
/// a fresh one, which has no subscribers, as the kernel does. Subscriptions that the child has inherited belong to its
/// parent's address space and hear nothing any more. A child of `vfork` shares its parent's.
///
/// # Blocking
/// No. The first use allocates.
/// # Examples
/// ```
/// let mm = mmu_source::current();
/// assert_eq!(mm.id(), mmu_source::current().id());
/// ```
#[must_use]
pub fn current() -> MmWithUser {
    current_ref().clone()
}

/// Returns the address space of this process, without counting: it lasts as long as the process.
///
/// # Blocking
/// No. The first use allocates.
pub fn current_ref() -> &'static MmWithUser {
    current_if_made().unwrap_or_else(make)
}

/// Returns the address space of this process if anybody has asked for it yet. Never allocates.
///
/// If nobody has, there are no subscribers. (A source must still see to it that it is made before the first change that has
/// to be told: a client may subscribe while the change is under way.)
#[inline]
pub fn current_if_made() -> Option<&'static MmWithUser> {
    // ORDER(source-space): Acquire, for the content. Partner: the exchange in `make`.
    space(marks().space.load(Ordering::Acquire))
}

#[cold]
fn make() -> &'static MmWithUser {
    let made = Box::into_raw(Box::new(MmWithUser::new()));
    // ORDER(source-space): Release for the content, Acquire for that of whoever was first. Partner: itself, and the load in
    // `current_if_made`.
    match marks().space.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => space(made).expect("a box is not null"),
        // Two threads were first. Ours stays unused: dropping it could wait for a reclaimer.
        Err(first) => space(first).expect("the exchange failed because it is not null"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_get_the_same_one() {
        let ids: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| current().id())).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert!(ids.iter().all(|id| *id == current_ref().id()), "{ids:?}");
    }
}
