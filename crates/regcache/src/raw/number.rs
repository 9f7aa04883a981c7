//! A small number for every thread that takes leases: its number in `srcu`, which the kernel gives
//! back when the thread ends. A claim allocates nothing, since it may come from a signal handler or
//! from within an allocator.

#[cfg(not(mmun_loom))]
mod imp {
    /// How many threads can have a block. The others count their leases where all can see it.
    pub(in crate::raw) const MAX: usize = 4096;

    mmu_notifier::thread_word! {
        /// This thread's number, once it has asked for a block; the largest word before.
        static MINE: u64 = u64::MAX;
    }

    /// This thread's number, or one beyond [`MAX`].
    #[inline(always)]
    pub(in crate::raw) fn mine() -> usize {
        MINE.get() as usize
    }

    /// One more than the highest number that a thread has.
    #[inline]
    pub(in crate::raw) fn high() -> usize {
        // A caller that needs the current number has executed a heavy fence, or holds the lock of a
        // cache.
        mmu_notifier::thread_numbers()
    }

    /// This thread's number, from now on known to [`mine`].
    pub(in crate::raw) fn claim() -> usize {
        // ORDER(cache-number): The kernel's hand-over is a full fence, for what the number's owner
        // before wrote into its blocks. Partner: the end of that thread.
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
