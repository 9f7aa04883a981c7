//! The address space of this process.

use crate::fork::{keep, marks, space};
use mmu_notifier::MmWithUser;
use std::sync::atomic::Ordering;

/// Returns the address space of this process: the one that the sources of this process (`kernel`,
/// `uffd`, hooks) feed.
///
/// It is made on first use and never exits. The child of a fork has an address space of its own:
/// the first use there makes a fresh one, which has no subscribers, as the kernel does.
/// Subscriptions that the child has inherited belong to its parent's address space and hear nothing
/// any more. A child of `vfork` shares its parent's.
///
/// # What a callback must not do
/// A callback on this address space may run in the middle of `malloc` or `free`, with the
/// allocator's locks held. So it must not allocate, free, print, or lock what is held elsewhere
/// while allocating: [`Notifier`](mmu_notifier::Notifier) has the rule, `examples/own_process.rs`
/// is a complete program that keeps it, and [`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc)
/// finds a mistake at the first call.
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

/// Returns the address space of this process if it has been made. Never allocates.
///
/// If it has not, there are no subscribers. (A source must still make sure that it is made before
/// the first change that has to be told: a client may subscribe while the change is under way.)
#[inline]
pub fn current_if_made() -> Option<&'static MmWithUser> {
    // ORDER(source-space): Acquire, for the content. Partner: the store in `make`.
    space(marks().space.load(Ordering::Acquire))
}

#[cold]
fn make() -> &'static MmWithUser {
    // Under a lock, so that no second one is made in vain: it could not be dropped here, where the
    // caller must not wait.
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
