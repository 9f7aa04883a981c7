//! A counter on which threads can sleep until it changes.
//!
//! The waiter reads the counter, checks whether its condition holds, and sleeps only if the counter
//! has not changed. The thread that makes the condition true increments the counter afterwards.
//! That thread enters the kernel only if another thread sleeps or is about to.

use crate::sync::{AtomicU32, Ordering, fence, mutant};

pub(crate) struct Event {
    count: AtomicU32,
    sleepers: AtomicU32,
    #[cfg(mmun_loom)]
    kernel: model::Kernel,
}

impl Event {
    #[cfg(not(mmun_loom))]
    pub(crate) const fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
        }
    }

    #[cfg(mmun_loom)]
    pub(crate) fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
            kernel: model::Kernel::default(),
        }
    }

    pub(crate) fn now(&self) -> u32 {
        // ORDER(srcu-event): Acquire: a waiter that sees an increment also sees everything that
        // happened before the increment. Partner: `advance`.
        self.count.load(Ordering::Acquire)
    }

    /// Sleeps until the count differs from `seen`. May return early.
    pub(crate) fn wait(&self, seen: u32) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        // ORDER(srcu-sleep): the increment of `sleepers` comes before the comparison of the count.
        // Partner: the fence in `advance`, between the increment of the count and the load of
        // `sleepers`. If the increment of `sleepers` comes first, that load sees the sleeper. If
        // the increment of the count comes first, the comparison sees the new count, and this
        // thread does not sleep. Model: loom `a_wake_up_is_not_lost`.
        if !mutant("no_fence_before_sleep") {
            fence(Ordering::SeqCst);
        }
        self.sleep(seen);
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self) {
        // ORDER(srcu-event): Release; partner in `now`.
        self.count.fetch_add(1, Ordering::Release);
        // ORDER(srcu-sleep): partner: the fence in `wait`.
        if !mutant("no_fence_before_wake") {
            fence(Ordering::SeqCst);
        }
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    /// Whether a thread sleeps, or is about to.
    #[cfg(not(mmun_loom))]
    pub(super) fn has_sleepers(&self) -> bool {
        self.sleepers.load(Ordering::Relaxed) != 0
    }

    /// Clears the count of sleepers, which exist only in the parent of a fork.
    #[cfg(not(mmun_loom))]
    pub(super) fn after_fork(&self) {
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.sleepers.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(not(mmun_loom))]
impl Event {
    /// Like `wait`, but sleeps at most `nanoseconds`.
    pub(super) fn wait_at_most(&self, seen: u32, nanoseconds: i64) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        // ORDER(srcu-sleep): as in `wait`.
        fence(Ordering::SeqCst);
        let limit = libc::timespec {
            tv_sec: 0,
            tv_nsec: nanoseconds,
        };
        futex_wait_until(&self.count, seen, Some(&limit));
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    fn sleep(&self, seen: u32) {
        futex_wait(&self.count, seen);
    }

    #[cold]
    fn wake(&self) {
        futex_wake(&self.count, i32::MAX);
    }
}

/// Sleeps while `word` is `seen`. May return early.
#[cfg(not(mmun_loom))]
pub(super) fn futex_wait(word: &AtomicU32, seen: u32) {
    futex_wait_until(word, seen, None);
}

#[cfg(not(mmun_loom))]
fn futex_wait_until(word: &AtomicU32, seen: u32, limit: Option<&libc::timespec>) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let limit = limit.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `FUTEX_WAIT` needs an aligned word that stays mapped during the call, as a reference
    // guarantees, and a null or valid timeout.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, seen, limit) };
}

#[cfg(not(mmun_loom))]
pub(super) fn futex_wake(word: &AtomicU32, threads: i32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: `FUTEX_WAKE` uses the address only as a key.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, threads) };
}

/// The kernel's side of a futex, for models: it compares and queues in one step.
#[cfg(mmun_loom)]
mod model {
    use super::{Event, Ordering};
    use loom::sync::{Condvar, Mutex};

    #[derive(Default)]
    pub(super) struct Kernel {
        bucket: Mutex<()>,
        queue: Condvar,
    }

    impl Event {
        pub(super) fn sleep(&self, seen: u32) {
            let bucket = self.kernel.bucket.lock().expect("models do not poison");
            if self.count.load(Ordering::Relaxed) == seen {
                drop(
                    self.kernel
                        .queue
                        .wait(bucket)
                        .expect("models do not poison"),
                );
            }
        }

        pub(super) fn wake(&self) {
            let _bucket = self.kernel.bucket.lock().expect("models do not poison");
            self.kernel.queue.notify_all();
        }
    }
}
