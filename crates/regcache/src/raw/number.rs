//! A small number for every thread that takes leases, given back when the thread ends.
//!
//! Claiming and giving back are single atomic operations on a bitmap, so a fork at any moment
//! leaves it whole; the numbers of threads that a fork left behind stay taken in the child.

#[cfg(not(mmun_loom))]
mod imp {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    /// How many threads can have a number at a time. The others count their leases where all can
    /// see it.
    pub(in crate::raw) const MAX: usize = 4096;

    const NONE: u32 = u32::MAX;
    const GONE: u32 = u32::MAX - 1;

    static TAKEN: [AtomicU64; MAX / 64] = [const { AtomicU64::new(0) }; MAX / 64];
    /// One more than the highest number ever taken.
    static HIGH: AtomicUsize = AtomicUsize::new(0);

    thread_local! {
        static MINE: Cell<u32> = const { Cell::new(NONE) };
        static GIVE_BACK: GiveBack = const { GiveBack };
    }

    struct GiveBack;

    impl Drop for GiveBack {
        fn drop(&mut self) {
            let mine = MINE.replace(GONE) as usize;
            if mine < MAX {
                // ORDER(cache-number): Release for what this thread wrote into its blocks. Partner:
                // the claim by the next owner.
                TAKEN[mine / 64].fetch_and(!(1 << (mine % 64)), Ordering::Release);
            }
        }
    }

    /// This thread's number; none or an ended thread's is beyond [`MAX`].
    #[inline(always)]
    pub(in crate::raw) fn mine() -> usize {
        MINE.get() as usize
    }

    #[inline]
    pub(in crate::raw) fn high() -> usize {
        // Relaxed: a caller that needs the current number has executed a heavy fence, or holds the
        // lock of a cache.
        HIGH.load(Ordering::Relaxed)
    }

    /// Gives this thread a number if it has none, unless it is ending or too many have one.
    pub(in crate::raw) fn claim() -> Option<usize> {
        match MINE.get() {
            NONE => {}
            GONE => return None,
            mine => return Some(mine as usize),
        }
        // Registers the destructor, which may allocate.
        GIVE_BACK.try_with(|_| ()).ok()?;
        for (at, word) in TAKEN.iter().enumerate() {
            let mut taken = word.load(Ordering::Relaxed);
            while taken != u64::MAX {
                let bit = (!taken).trailing_zeros();
                // ORDER(cache-number): Acquire, partner in the drop of the owner before.
                match word.compare_exchange_weak(taken, taken | 1 << bit, Ordering::Acquire, Ordering::Relaxed) {
                    Ok(_) => {
                        let number = at * 64 + bit as usize;
                        HIGH.fetch_max(number + 1, Ordering::Relaxed);
                        MINE.set(number as u32);
                        return Some(number);
                    }
                    Err(now) => taken = now,
                }
            }
        }
        None
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

    pub(in crate::raw) fn claim() -> Option<usize> {
        MINE.with(|mine| {
            if mine.get() == MAX {
                mine.set(NEXT.fetch_add(1, Ordering::Relaxed));
            }
            Some(mine.get())
        })
    }
}

pub(super) use imp::{MAX, claim, high, mine};
