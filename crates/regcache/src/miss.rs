//! The slow path of a request that found no region.
//!
//! Before the registrar is called, the region gets its place and is put on the list of
//! registrations in progress. An invalidation of the region that begins afterwards marks the
//! region. If an invalidation is already running, the region is marked at once, because the memory
//! may change after the registrar has looked at it. After the registrar has returned, a marked
//! region does not enter the look-up: the region is deregistered, and the request tries again. If
//! that happens too often, or the invalidation is still running, the caller gets a lease of a
//! region that no look-up finds, as if the request had come just before the invalidation.

use crate::cache::{Cache, Registered};
use crate::error::Refusal;
use crate::lease::Lease;
use crate::options::{size, within};
use crate::raw::held::Held;
use crate::raw::table::Table;
use crate::state::{State, Target};
use crate::sync::{AtWork, MutexGuard, is_locking, wait};
use crate::{Cause, Error, Registrar};
use mmu_notifier::VaRange;

/// How often a request tries again because an invalidation overlapped its registration.
const TRIES: u32 = 8;

/// A lease, or the reason why there is none.
type Outcome<'a, R> = Result<Held<'a>, Refusal<<R as Registrar>::Error>>;

/// The history of one request.
#[derive(Debug, Default)]
struct Past {
    collisions: u32,
    /// If the registrar reached its limit: how many regions were evicted for it.
    evicted: Option<u64>,
    /// Whether to register the request alone, without its neighbours.
    alone: bool,
    /// Whether this request has already checked that its thread may sleep.
    may_sleep: bool,
    /// Whether this thread has other work on the cache in progress. Then it must not sleep until
    /// that work is done.
    is_nested: bool,
}

/// Undoes the registration if the kernel source cannot arm the range, or if the registrar panics.
struct Open<'a, R: Registrar> {
    cache: &'a Cache<R>,
    region: u32,
}

impl<R: Registrar> Drop for Open<'_, R> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        state.finish(self.region);
        state.free(&self.cache.index, self.region);
        state.counts.failed += 1;
        self.cache.wake(state);
    }
}

impl<R: Registrar> Cache<R> {
    #[cold]
    pub(crate) fn miss(&self, range: VaRange) -> Outcome<'_, R> {
        let at_work = AtWork::mark(self);
        let mut past = Past {
            is_nested: at_work.is_nested(),
            ..Past::default()
        };
        loop {
            if is_locking() {
                return Err(Refusal::WouldDeadlock);
            }
            if self.index.page.is_inherited() {
                return Err(Refusal::Forked);
            }
            if let Some(result) = self.try_once(range, &mut past) {
                return result;
            }
        }
    }

    /// Makes one attempt. Returns `None` if the request must start again.
    fn try_once(&self, range: VaRange, past: &mut Past) -> Option<Outcome<'_, R>> {
        let (index, options) = (&self.index, &self.options);
        let mut state = self.lock();
        if state.closed {
            return Some(Err(Refusal::Exited));
        }
        let (merged, replaces) = match state.target(index, options, range) {
            Target::Found(region) => {
                state.counts.hits += 1;
                return Some(Ok(index.lease_locked(region)));
            }
            Target::New { range, replaces } => (range, replaces),
        };
        if state.has_to_wait(index, options.merge, range) {
            return self.sleep(state, past);
        }
        if !within(size(range), options.max_bytes) {
            return Some(Err(Refusal::TooLarge));
        }
        let target = if past.alone || !within(size(merged), options.max_bytes) {
            range
        } else {
            merged
        };
        if !state.has_room(options, size(target)) {
            let mut chain = state.harvest(index);
            let mut evicted = 0;
            if chain.is_empty() {
                evicted = state.evict(index, options, size(target));
                chain = state.harvest(index);
            }
            if evicted == 0 && chain.is_empty() {
                if target != range {
                    past.alone = true;
                    return None;
                }
                if state.reaping != 0 || state.is_registering() {
                    // Another thread is about to free places, or to complete a region that can be
                    // evicted.
                    return self.sleep(state, past);
                }
                return Some(Err(Refusal::Full));
            }
            drop(state);
            self.reap(chain);
            return None;
        }
        if !state.has_table(index) {
            if past.is_nested {
                // Perhaps the interrupted code of this thread is allocating such a table.
                return Some(Err(Refusal::WouldDeadlock));
            }
            let log2 = index
                .page
                .tables()
                .newest()
                .map_or(0, |table| table.log2() + 1);
            drop(state);
            self.grow(log2);
            return None;
        }
        let region = state.begin(index, target)?;
        state.counts.misses += u64::from(past.collisions == 0);
        drop(state);
        let open = Open {
            cache: self,
            region,
        };
        // The region is on the list of registrations in progress, so every change that begins from
        // now on marks it.
        let armed = match self.freshness.arm(target) {
            Ok(armed) => armed,
            Err(error) => return Some(Err(error.into())),
        };
        let result = self
            .registrar
            .register(target)
            .map_err(|error| (self.registrar.cause(&error), error));
        // The registrar did not panic, so `registered` or `refused` ends the registration.
        std::mem::forget(open);
        match result {
            Ok(handle) => self.registered(region, Registered { handle, armed }, replaces, past),
            Err((cause, error)) => self.refused(region, range, target, cause, error, past),
        }
    }

    /// Makes the table larger, without the lock, because this allocates.
    fn grow(&self, log2: u32) {
        let table = Table::new(log2);
        let state = self.lock();
        let newest = self.index.page.tables().newest();
        if !state.closed && newest.is_none_or(|newest| newest.log2() < table.log2()) {
            self.index.page.install(table);
        }
    }

    #[expect(unsafe_code, reason = "the one place where a handle comes in")]
    fn registered(
        &self,
        region: u32,
        registered: Registered<R>,
        replaces: bool,
        past: &mut Past,
    ) -> Option<Outcome<'_, R>> {
        // SAFETY: the region must belong to this request and have no lease. This request took the
        // region's place, and the region was never live.
        unsafe { self.handles.put(region, registered) };
        // `settle` runs the callbacks of all changes so far, which mark the region if a change of
        // its range began after the range was armed. A change after `settle` is counted, and no
        // look-up trusts the region until the callbacks of that change have run.
        let settled = self.freshness.settle();
        let mut state = self.lock();
        state.counts.registered += 1;
        let may_be_found = state.finish(region) && settled.is_ok();
        if may_be_found && state.has_table(&self.index) {
            let lease = Lease::new(self, self.index.lease_locked(region));
            state.publish(&self.index, region, replaces);
            let chain = state.harvest(&self.index);
            self.wake(state);
            // If `reap` panics, the lease ends.
            self.reap(chain);
            return Some(Ok(lease.into_held()));
        }
        state.counts.collisions += u64::from(!may_be_found);
        past.collisions += 1;
        if !state.closed
            && settled.is_ok()
            && (past.collisions > TRIES || state.is_invalidating(self.index.region(region).range()))
        {
            let held = self.index.lease_locked(region);
            state.keep_for_lease(region);
            self.wake(state);
            return Some(Ok(held));
        }
        let chain = state.chain_of(region);
        self.wake(state);
        self.reap(chain);
        settled.err().map(|error| Err(error.into()))
    }

    fn refused(
        &self,
        region: u32,
        range: VaRange,
        target: VaRange,
        cause: Cause,
        error: R::Error,
        past: &mut Past,
    ) -> Option<Outcome<'_, R>> {
        let mut state = self.lock();
        state.finish(region);
        state.free(&self.index, region);
        state.counts.failed += 1;
        if cause == Cause::Limit && past.evicted.is_none() {
            // Evict more than is needed, because other requests will follow.
            let wanted = size(target).max(state.live_bytes / 8);
            let evicted = state.evict_bytes(&self.index, wanted);
            past.evicted = Some(evicted);
            past.alone = true;
            let chain = state.harvest(&self.index);
            let helps = evicted != 0 || !chain.is_empty() || target != range;
            self.wake(state);
            self.reap(chain);
            if helps {
                return None;
            }
            return Some(Err(Error::LimitReached {
                range,
                evicted,
                source: error,
            }
            .into()));
        }
        self.wake(state);
        // The registrar may have refused only the merged neighbours, so try the request alone.
        if target != range && !past.alone {
            past.alone = true;
            return None;
        }
        Some(Err(Refusal::from(match cause {
            Cause::Limit => Error::LimitReached {
                range,
                evicted: past.evicted.unwrap_or(0),
                source: error,
            },
            Cause::NotMapped => Error::NotMapped {
                range,
                source: error,
            },
            Cause::Other => Error::Registrar {
                range: target,
                source: error,
            },
        })))
    }

    /// Sleeps until a registration has been completed or undone, or a place has become free. Then
    /// the request tries again.
    fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        past: &mut Past,
    ) -> Option<Outcome<'a, R>> {
        if !past.may_sleep {
            drop(state);
            past.may_sleep = true;
            return self
                .freshness
                .may_sleep()
                .err()
                .map(|error| Err(error.into()));
        }
        if past.is_nested {
            return Some(Err(Refusal::WouldDeadlock));
        }
        state.waiters += 1;
        state.counts.waits += 1;
        let mut state = wait(&self.ended, state);
        state.waiters -= 1;
        None
    }

    /// Releases the lock, and wakes sleeping threads.
    pub(crate) fn wake(&self, state: MutexGuard<'_, State>) {
        let waiters = state.waiters;
        drop(state);
        if waiters != 0 {
            self.ended.notify_all();
        }
    }
}
