//! One cache: the notifier that the core calls, and the work of hits, misses and ends of leases.

use crate::error::Refusal;
use crate::freshness::{Armed, Freshness};
use crate::index::{Index, Look};
use crate::options::reported;
use crate::raw::handles::Handles;
use crate::raw::held::Held;
use crate::raw::region::Status;
use crate::state::{Chain, State};
use crate::sync::{AtWork, Condvar, Mutex, MutexGuard, is_locking, lock, try_lock};
use crate::{Error, Options, Registrar, Stats};
use mmu_notifier::{InvalidateRange, Mm, Notifier, VaRange, WouldBlock};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// The data of one registration.
pub(crate) struct Registered<R: Registrar> {
    pub(crate) handle: R::Handle,
    pub(crate) armed: Option<Armed>,
}

/// The notifier of a cache.
pub(crate) struct Cache<R: Registrar> {
    pub(crate) index: Index,
    pub(crate) handles: Handles<Registered<R>>,
    pub(crate) state: Mutex<State>,
    /// Waiters are notified when a registration is complete or undone, and when a place becomes
    /// free.
    pub(crate) ended: Condvar,
    pub(crate) registrar: Arc<R>,
    pub(crate) options: Options,
    pub(crate) freshness: Freshness,
    in_callbacks: bool,
}

impl<R: Registrar> Cache<R> {
    pub(crate) fn new(registrar: Arc<R>, options: Options) -> io::Result<Self> {
        Ok(Self {
            index: Index::new(options.max_regions)?,
            handles: Handles::new(options.max_regions as usize)?,
            state: Mutex::new(State::new(options.max_regions)?),
            ended: Condvar::new(),
            in_callbacks: registrar.deregisters_in_callbacks(),
            registrar,
            freshness: Freshness::new(options.kernel.clone()),
            options,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The slow path of a request. `wrong` is a lease of a dead or unsuitable region, if the fast
    /// path took one; this function ends it. The result fits into two registers, so that the fast
    /// path needs no memory for it.
    #[cold]
    #[inline(never)]
    pub(crate) fn find_or_register(
        &self,
        range: VaRange,
        wrong: Option<Held<'_>>,
    ) -> Result<Held<'_>, Refusal<R::Error>> {
        if let Some(held) = &wrong {
            self.end(held);
        }
        // If `quick` has searched all levels, a second look-up without the lock would only repeat
        // its result, and `miss` searches again under the lock.
        if wrong.is_some() || !self.freshness.is_current() || !self.index.quick_sees_all() {
            self.freshness.settle()?;
            match self.index.look_up(range) {
                Look::Hit(held) => return Ok(held),
                Look::Dead(region) => self.ended_dead(region),
                Look::Miss => {}
            }
        }
        self.miss(range)
    }

    /// Builds the error of a request for `range`. Out of line, so that a hit does not pay for it.
    #[cold]
    #[inline(never)]
    pub(crate) fn error(&self, refusal: Refusal<R::Error>, range: VaRange) -> Error<R::Error> {
        match refusal {
            Refusal::WouldDeadlock => Error::WouldDeadlock,
            #[cfg(feature = "kernel")]
            Refusal::InCallback => Error::Source {
                source: mmu_source::Error::InCallback { source: "kernel" },
            },
            Refusal::Forked => Error::Forked,
            Refusal::Exited => Error::Exited,
            Refusal::TooLarge => Error::TooLarge {
                range,
                limit: self.options.max_bytes,
            },
            Refusal::Full => {
                let state = self.lock();
                Error::Full {
                    range,
                    regions: state.regions,
                    bytes: reported(state.bytes),
                }
            }
            Refusal::Other(error) => *error,
        }
    }

    /// Ends a lease.
    #[inline(always)]
    pub(crate) fn end(&self, held: &Held<'_>) {
        if let Some(region) = self.index.end(held) {
            self.ended_dead(region);
        }
    }

    /// Ends a lease. The next scan of the slots decides whether the lease was the region's last.
    pub(crate) fn end_later(&self, held: &Held<'_>) {
        if self.index.end(held).is_some() {
            self.index.leave_unasked();
        }
    }

    /// Deregisters a dead region if the lease that has just ended was its last.
    #[cold]
    #[inline(never)]
    fn ended_dead(&self, region: u32) {
        if self.index.page.is_inherited() {
            return;
        }
        if is_locking() {
            // The caller is a signal handler, and the interrupted code may hold the lock. A later
            // scan, perhaps one by the interrupted code, finds out whether this was the last lease.
            return self.index.leave_unasked();
        }
        let _at_work = AtWork::mark(self);
        let chain = self.lock().lease_ended(&self.index, region);
        self.reap(chain);
    }

    /// Deregisters the regions of a chain and frees their places.
    ///
    /// # Panics
    /// If the registrar panics. The panic continues after all regions of the chain have been
    /// deregistered, so it costs only the region that caused it.
    pub(crate) fn reap(&self, mut chain: Chain) {
        if chain.is_empty() {
            return;
        }
        let mut first_panic = None;
        let mut next = self.lock().next_of(&mut chain);
        while let Some(region) = next {
            let result = catch_unwind(AssertUnwindSafe(|| self.deregister(region)));
            let mut state = self.lock();
            state.reaped(&self.index, region);
            next = state.next_of(&mut chain);
            self.wake(state);
            match result {
                Err(panic) if first_panic.is_none() => first_panic = Some(panic),
                // Leak the second panic's value, because its drop could panic too. The panic hook
                // has reported that panic.
                Err(panic) => std::mem::forget(panic),
                Ok(()) => {}
            }
        }
        if let Some(panic) = first_panic {
            resume_unwind(panic);
        }
    }

    /// Deregisters a region in the state `Reaping`, then stops counting changes of its range.
    pub(crate) fn deregister(&self, region: u32) {
        let Registered { handle, armed } = self.take(region);
        self.registrar.deregister(handle);
        drop(armed);
    }

    /// Takes the handle of a region in the state `Reaping`.
    #[expect(unsafe_code, reason = "the one place where a handle leaves")]
    pub(crate) fn take(&self, region: u32) -> Registered<R> {
        // SAFETY: the region must be registered, must have no lease now or later, and its handle
        // must be taken once. The region became `Reaping` under the lock, after a scan had found no
        // lease. Only the owner of its chain ends that state.
        unsafe { self.handles.take(region) }
    }

    pub(crate) fn reap_killed(&self) {
        if self.index.page.is_inherited() {
            return;
        }
        let _at_work = AtWork::mark(self);
        let chain = self.lock().harvest(&self.index);
        self.reap(chain);
    }

    pub(crate) fn flush(&self) -> u64 {
        if self.index.page.is_inherited() {
            return 0;
        }
        let _at_work = AtWork::mark(self);
        let (flushed, chain) = {
            let mut state = self.lock();
            let flushed = state.kill_all(&self.index);
            state.counts.flushed += flushed;
            (flushed, state.harvest(&self.index))
        };
        self.reap(chain);
        flushed
    }

    pub(crate) fn stats(&self) -> Stats {
        if self.index.page.is_inherited() {
            // A thread that does not exist in the child may have held the lock.
            return Stats::default();
        }
        let hits = self.index.hits();
        let state = self.lock();
        let counts = state.counts;
        Stats {
            hits: hits + counts.hits,
            misses: counts.misses,
            waits: counts.waits,
            registered: counts.registered,
            deregistered: counts.deregistered,
            failed: counts.failed,
            invalidated: counts.invalidated,
            replaced: counts.replaced,
            evicted: counts.evicted,
            flushed: counts.flushed,
            collisions: counts.collisions,
            lost: self.freshness.lost(),
            regions: state.regions.into(),
            bytes: reported(state.bytes),
            live_regions: state.live_regions.into(),
            live_bytes: reported(state.live_bytes),
        }
    }

    fn start(&self, range: VaRange) {
        let _at_work = AtWork::mark(self);
        let mut state = self.lock();
        state.invalidate_start(&self.index, range);
        let chain = if self.in_callbacks {
            state.harvest(&self.index)
        } else {
            Chain::default()
        };
        drop(state);
        self.reap(chain);
    }
}

impl<R: Registrar> Notifier for Cache<R> {
    fn release(&self, _mm: &Mm) {
        if self.index.page.is_inherited() {
            return;
        }
        let _at_work = AtWork::mark(self);
        let chain = {
            let mut state = self.lock();
            state.closed = true;
            state.invalidate(&self.index, VaRange::ALL);
            self.index.page.close();
            state.harvest(&self.index)
        };
        self.reap(chain);
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if !self.index.page.is_inherited() {
            self.start(range.range());
        }
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        if !self.index.page.is_inherited() {
            let mut state = try_lock(&self.state).ok_or(WouldBlock)?;
            // Regions without a lease are deregistered later, because the registrar may sleep.
            state.invalidate_start(&self.index, range.range());
        }
        Ok(())
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        if !self.index.page.is_inherited() {
            self.lock().invalidate_end(range.range());
        }
    }
}

impl<R: Registrar> Drop for Cache<R> {
    /// Deregisters all remaining regions except those with a forgotten lease: the owner of such a
    /// lease may still be using the region.
    fn drop(&mut self) {
        if self.index.page.is_inherited() {
            return;
        }
        self.flush();
        let left = self
            .lock()
            .used()
            .filter(|(_, status)| *status == Status::Leased)
            .count();
        // Regions with a forgotten lease keep their handles, which are leaked.
        debug_assert!(left == 0 || !cfg!(mmun_loom), "no model forgets a lease");
    }
}

#[cfg(all(test, feature = "kernel", not(mmun_loom)))]
mod tests {
    use super::*;
    use crate::Counting;
    use crate::lease::Lease;
    use mmu_notifier::{Registration, Va};
    use mmu_source::kernel::Kernel;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// A signal handler may interrupt its thread while the thread holds the lock of the cache.
    #[test]
    fn no_callback_runs_in_a_thread_that_holds_the_lock() {
        let kernel = match Kernel::rehearse(1 << 16) {
            Ok(kernel) => kernel,
            Err(error) => return println!("SKIP: {error}"),
        };
        let (done, result) = channel();
        // In a thread, because a callback would wait for ever for the lock.
        std::thread::spawn(move || {
            let range = VaRange::covering(Va::new(0x7000_0000), 4096).unwrap();
            let options = Options::new().kernel(Arc::clone(&kernel));
            let cache = Cache::new(Arc::new(Counting::default()), options).unwrap();
            let cache = Registration::new(&mmu_source::current(), cache).unwrap();
            let lease = Lease::new(&cache, cache.find_or_register(range, None).unwrap());
            let change = || kernel.inject(0x7000_0000, 0x7000_1000).unwrap();
            let lock = cache.lock();
            assert!(lease.is_current(), "there is no callback to run");
            // No other thread can complete the callback of this change before the lock is free.
            change();
            let refused = cache.find_or_register(range, None);
            assert!(matches!(refused, Err(Refusal::WouldDeadlock)));
            assert!(!lease.is_current(), "it cannot know");
            drop(lock);
            let again = Lease::new(&cache, cache.find_or_register(range, None).unwrap());
            done.send((lease.is_current(), again.is_current())).unwrap();
        });
        let current = result.recv_timeout(Duration::from_secs(120));
        assert_eq!(current, Ok((false, true)));
    }
}
