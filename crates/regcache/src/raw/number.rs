//! A small number for every thread that takes leases, which selects the thread's block of slots.
//! The number is the thread's number in `srcu`. After the thread has ended, another thread may
//! claim the number. Claiming a number allocates nothing, because a signal handler or code inside
//! an allocator may claim one.

#[cfg(not(mmun_loom))]
mod imp {
    /// The largest number of threads with a block. Further threads count their leases in the
    /// regions, in shared memory.
    pub(in crate::raw) const MAX: usize = 4096;

    mmu_notifier::thread_word! {
        /// This thread's number, once the thread has claimed one. Before that, `u64::MAX`.
        static MINE: u64 = u64::MAX;
    }

    /// Returns this thread's number. If the thread has none, returns a number beyond [`MAX`].
    #[inline(always)]
    pub(in crate::raw) fn mine() -> usize {
        MINE.get() as usize
    }

    /// Returns one more than the highest number that was ever in use.
    #[inline]
    pub(in crate::raw) fn high() -> usize {
        // A caller that needs the latest value has executed a heavy fence or holds the lock of a
        // cache.
        mmu_notifier::thread_numbers()
    }

    /// Returns this thread's number, and stores it for [`mine`].
    pub(in crate::raw) fn claim() -> usize {
        // ORDER(cache-number): `thread_number` locks the robust mutex of the number, which the
        // kernel released at the end of the former owner. So that owner's writes to the blocks are
        // visible. Partner: the end of that thread.
        let number = mmu_notifier::thread_number();
        MINE.set(number as u64);
        number
    }
}

#[cfg(mmun_loom)]
mod imp {
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use std::cell::Cell;

    /// As many threads as a model has.
    pub(in crate::raw) const MAX: usize = 4;

    loom::lazy_static! { static ref NEXT: AtomicUsize = AtomicUsize::new(0); }
    loom::thread_local! { static MINE: Cell<usize> = Cell::new(MAX); }

    pub(in crate::raw) fn mine() -> usize {
        MINE.with(Cell::get)
    }

    pub(in crate::raw) fn high() -> usize {
        MAX
    }

    pub(in crate::raw) fn claim() -> usize {
        MINE.with(|mine| {
            if mine.get() == MAX {
                mine.set(NEXT.fetch_add(1, Ordering::Relaxed));
            }
            mine.get()
        })
    }
}

pub(super) use imp::{MAX, claim, high, mine};
