//! The public type of a domain.

#[expect(unsafe_code, reason = "memory that the caller gives")]
mod call_raw;

use crate::WouldDeadlock;
use crate::guard::{self, Guard, Reader, SendGuard};
use crate::raw::handle::Handle;
use crate::raw::slot::Slot;
use crate::raw::state::{State, inbox};
use crate::raw::{callback, current, reclaimer};
use crate::sync::Ordering;
use std::fmt;

/// A domain of sleepable read-copy-update: its updaters wait for its own readers and for no others.
///
/// Make one domain for every object that has readers of its own, because a reader that sleeps for
/// an hour delays only its own domain. A new domain is one word and costs nothing until it is used.
/// A used domain takes a page (4 KiB), which has room for the first 28 threads of the process that
/// use any domain. If further threads use this domain, it takes more pages.
///
/// # Dropping
/// The drop waits until the pending callbacks have run. Inside a callback the drop does not wait:
/// the background thread keeps the state until the last callback has returned. No section can be
/// open, because guards borrow the domain. If a guard was leaked (`mem::forget`), no later grace
/// period of the domain ends. The domain's pending callbacks are then leaked, because a wait for
/// them would hang.
///
/// # Forks
/// The child of a `fork` can use the domains that it inherits. The calling thread's sections stay
/// open in the child. The sections of other threads are over, except those of [`SendGuard`]s: each
/// stays open in the child, whichever thread of the parent held the guard. Queued callbacks run in
/// the child too, once the child calls [`prepare`](Self::prepare), [`call`](Self::call),
/// [`synchronize`](Self::synchronize), [`barrier`](Self::barrier) or
/// [`drain_until_idle`](Self::drain_until_idle), or drops the domain. The callback that was running
/// at the fork does not run again.
///
/// `_Fork` and a raw `clone` system call run no fork handlers. In their child, the first of these
/// calls, the first section of a thread or [`forks`](crate::forks) does what the handler does. The
/// thread that forked must make that call before any other thread of the child uses this crate.
/// Otherwise sections of the parent's threads stay open in the child, and its queued callbacks may
/// not run. Before Linux 4.14 such a child is not noticed.
///
/// # Signals
/// Must not be used in signal handlers: a section of a handler that interrupts `read_lock` could
/// lose its count.
///
/// # Source
/// `struct srcu_struct`, kernel/rcu/srcutree.c. Differs: counters are per thread, one scan of both
/// banks ends a grace period if no section is open, and a call that would deadlock returns an
/// error.
#[doc(alias = "srcu_struct")]
#[doc(alias = "init_srcu_struct")]
pub struct Srcu {
    handle: Handle,
}

/// A grace period that a caller has requested and will check later: see [`Srcu::start_poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "pass it to `Srcu::poll` to learn whether the grace period is over"]
pub struct Cookie {
    want: u64,
    /// The address of the domain's state, to detect a cookie of another domain.
    domain: usize,
}

impl Srcu {
    /// Makes an unused domain. Makes no system call and allocates nothing.
    #[cfg(not(mmun_loom))]
    pub const fn new() -> Self {
        Self {
            handle: Handle::new(),
        }
    }

    /// Makes an unused domain.
    #[cfg(mmun_loom)]
    pub fn new() -> Self {
        Self {
            handle: Handle::new(),
        }
    }

    /// Does at once the work that the first [`call_raw`](Self::call_raw) and
    /// [`read_lock`](Self::read_lock) would do. Makes the domain's page, gives this thread its
    /// counters, and starts the background thread if this process has none.
    ///
    /// If the system gives no thread (`RLIMIT_NPROC`, the `pids.max` of a control group), callbacks
    /// stay queued. The next [`prepare`](Self::prepare) or [`call`](Self::call) tries again, and
    /// [`barrier`](Self::barrier) runs the callbacks of its domain itself.
    pub fn prepare(&self) {
        guard::slot(self.state());
        reclaimer::start();
    }

    /// Begins a read section, which ends when the guard is dropped.
    ///
    /// Costs a few plain instructions: no lock, no atomic read-modify-write, and no fence unless
    /// `membarrier` is missing (see *Limits* of the crate). The first section of a thread in a
    /// domain claims a slot for the thread. The claim never calls the allocator, so that section
    /// may begin inside `malloc`. Sections nest without limit and may sleep.
    ///
    /// # Source
    /// `srcu_read_lock`, include/linux/srcu.h.
    ///
    /// # Examples
    /// ```
    /// let srcu = srcu::Srcu::new();
    /// let section = srcu.read_lock();
    /// // Data that is reachable here stays valid until the end of the section.
    /// section.unlock();
    /// ```
    #[doc(alias = "srcu_read_lock")]
    #[inline]
    pub fn read_lock(&self) -> Guard<'_> {
        let state = self.handle.peek();
        let (state, slot) = match state.table.mine() {
            Some(slot) => (state, slot),
            None => self.first_section(),
        };
        Guard::enter(state, slot)
    }

    /// Returns the slot instead of a guard: a guard would be spilled to the stack on the fast path.
    #[cold]
    fn first_section(&self) -> (&State, &Slot) {
        let state = self.state();
        (state, guard::slot(state))
    }

    /// Whether this thread is inside a section of this domain that it began with `read_lock`, of
    /// the domain or of a [`Reader`].
    #[doc(alias = "srcu_read_lock_held")]
    pub fn read_lock_held(&self) -> bool {
        self.handle
            .peek()
            .table
            .mine()
            .is_some_and(|slot| slot.local.depth() != 0)
    }

    /// Returns a per-thread handle that skips the slot look-up. So a section through the handle
    /// costs less than one through [`read_lock`](Self::read_lock).
    ///
    /// # Examples
    /// ```
    /// let srcu = srcu::Srcu::new();
    /// let reader = srcu.reader();
    /// for _ in 0..1000 {
    ///     let _section = reader.read_lock();
    /// }
    /// ```
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self.state())
    }

    /// Begins a read section that may end on another thread: send the guard there and drop it.
    ///
    /// Slower than [`read_lock`](Self::read_lock), because the beginning and the end each look up
    /// the thread's counters. The section belongs to no thread, so this crate cannot detect a
    /// thread that waits for a grace period while it holds the guard: such a wait hangs.
    ///
    /// # Source
    /// `srcu_down_read` and `srcu_up_read`, include/linux/srcu.h. Differs: the token ends the
    /// section when dropped.
    ///
    /// # Examples
    /// ```
    /// let srcu = srcu::Srcu::new();
    /// std::thread::scope(|scope| {
    ///     let section = srcu.down_read();
    ///     scope.spawn(move || section.up_read());
    /// });
    /// srcu.synchronize().unwrap();
    /// ```
    #[doc(alias = "srcu_down_read")]
    pub fn down_read(&self) -> SendGuard<'_> {
        SendGuard::enter(self.state())
    }

    /// Waits until all sections that began before the call have ended, and sometimes for a bounded
    /// number of later ones.
    ///
    /// Objects that were unlinked before the call can be freed after it. Concurrent callers share
    /// grace periods.
    ///
    /// Sections count in one of two banks. A grace period that finds open sections makes new
    /// sections count in the other bank, and waits for the sections that began before that. If no
    /// grace period is in progress at the call, one begins at once.
    ///
    /// A grace period may be in progress because of another `synchronize`, a [`call`](Self::call)
    /// or a [`start_poll`](Self::start_poll). Then the call waits for the next one, because the
    /// current one may have scanned the readers before the caller's unlinking. The next grace
    /// period begins when the current one has ended, so the call also waits for sections that begin
    /// meanwhile.
    ///
    /// The call also waits for a reader that was preempted in the middle of `read_lock`, after it
    /// had chosen its bank. In no case does a stream of new sections delay the caller for ever.
    /// # Blocking
    /// Spins for a moment, then sleeps until the last of these sections ends.
    /// # Errors
    /// [`WouldDeadlock`] inside a section ([`read_lock_held`](Self::read_lock_held)) or callback of
    /// this domain.
    /// # Source
    /// `synchronize_srcu`, kernel/rcu/srcutree.c. Differs: the kernel hangs where this returns an
    /// error.
    #[doc(alias = "synchronize_srcu")]
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        let state = self.state();
        if self.read_lock_held() || current::runs_callback_of(state) {
            return Err(WouldDeadlock);
        }
        reclaimer::start_if_inherited();
        state.synchronize();
        Ok(())
    }

    /// Like [`synchronize`](Self::synchronize). No grace period is delayed on purpose here, so none
    /// can be expedited.
    ///
    /// # Errors
    /// The errors of `synchronize`.
    #[doc(alias = "synchronize_srcu_expedited")]
    pub fn synchronize_expedited(&self) -> Result<(), WouldDeadlock> {
        self.synchronize()
    }

    /// Requests a grace period without waiting for it. [`poll`](Self::poll) tells when it has
    /// ended.
    ///
    /// May be called inside sections and callbacks. Allocates nothing after
    /// [`prepare`](Self::prepare).
    ///
    /// # Source
    /// `start_poll_synchronize_srcu`, kernel/rcu/srcutree.c.
    /// # Examples
    /// ```
    /// let srcu = srcu::Srcu::new();
    /// let section = srcu.read_lock();
    /// let cookie = srcu.start_poll();
    /// assert!(!srcu.poll(cookie), "the section is still open");
    /// drop(section);
    /// while !srcu.poll(cookie) {
    ///     std::thread::yield_now();
    /// }
    /// ```
    #[doc(alias = "start_poll_synchronize_srcu")]
    pub fn start_poll(&self) -> Cookie {
        let state = self.state();
        let want = state.snapshot();
        // ORDER(srcu-polled): Relaxed: `schedule` publishes it, ORDER(srcu-scheduled).
        state.pending.polled.fetch_max(want, Ordering::Relaxed);
        inbox::schedule(state);
        // Without a reclaimer, `poll` drives the grace period.
        reclaimer::start_unless_forked();
        Cookie {
            want,
            domain: address(state),
        }
    }

    /// Tells whether the grace period of the cookie has ended, and so all sections that began
    /// before the cookie was made.
    ///
    /// If so, objects that were unlinked before the cookie was made can be freed. The answer may be
    /// false for a moment after the last of these sections has ended.
    ///
    /// # Panics
    /// If the cookie is of another domain. A cookie of a domain that was dropped may pass this
    /// check.
    #[doc(alias = "poll_state_synchronize_srcu")]
    pub fn poll(&self, cookie: Cookie) -> bool {
        let state = self.state();
        assert_eq!(
            address(state),
            cookie.domain,
            "the cookie was made by another domain; poll that one"
        );
        state.passed(cookie.want) || {
            reclaimer::drive_polled(state);
            state.passed(cookie.want)
        }
    }

    /// Calls `f` on the background thread once all sections that are open now have ended. (If the
    /// system gives no thread, [`barrier`](Self::barrier) calls `f`.)
    ///
    /// Allocates; [`call_raw`](Self::call_raw) does not. May be called inside sections and
    /// callbacks. The callbacks of one domain run in the order of the calls. `f` should not block,
    /// because one thread runs the callbacks of all domains. A panic in `f` is caught, counted
    /// ([`callback_panics`](Self::callback_panics)) and reported ([`set_callback_panic_hook`]), and
    /// the other callbacks still run. Callers are not throttled: queued callbacks stay in memory
    /// until the readers' sections end.
    ///
    /// # Source
    /// `call_srcu`, kernel/rcu/srcutree.c.
    /// # Examples
    /// ```
    /// let srcu = srcu::Srcu::new();
    /// let old = vec![1, 2, 3]; // No longer reachable by new readers.
    /// srcu.call(move || drop(old));
    /// srcu.barrier().unwrap(); // Now it is gone.
    /// ```
    ///
    /// [`set_callback_panic_hook`]: crate::set_callback_panic_hook
    #[doc(alias = "call_srcu")]
    pub fn call(&self, f: impl FnOnce() + Send + 'static) {
        let state = self.state();
        reclaimer::start();
        if callback::push_boxed(&state.pending.queue, f) {
            inbox::schedule(state);
        }
    }

    /// Waits until every callback queued before the call has returned.
    ///
    /// If no callback is queued or running, it returns at once, without a grace period.
    ///
    /// # Blocking
    /// Sleeps until then.
    /// # Errors
    /// [`WouldDeadlock`] inside a section of this domain, or in a callback of any domain, because
    /// one thread runs the callbacks of all domains.
    /// # Source
    /// `srcu_barrier`, kernel/rcu/srcutree.c.
    #[doc(alias = "srcu_barrier")]
    pub fn barrier(&self) -> Result<(), WouldDeadlock> {
        self.wait_for_callbacks(|state| {
            reclaimer::barrier(state);
        })
    }

    /// Waits until no callback is queued or running, including those that callbacks queue.
    ///
    /// If each callback queues another one, this call never returns.
    ///
    /// # Blocking
    /// Sleeps until then.
    /// # Errors
    /// The errors of [`barrier`](Self::barrier).
    pub fn drain_until_idle(&self) -> Result<(), WouldDeadlock> {
        self.wait_for_callbacks(|state| while !reclaimer::barrier(state) {})
    }

    /// Returns how many callbacks of this domain have panicked.
    pub fn callback_panics(&self) -> u64 {
        self.handle.peek().pending.panics.load(Ordering::Relaxed)
    }

    /// For models, which have no background thread: runs one turn of it, if there is work to do.
    #[cfg(mmun_loom)]
    #[doc(hidden)]
    pub fn take_turn(&self) {
        reclaimer::take_turn(self.state());
    }

    fn wait_for_callbacks(&self, wait: impl FnOnce(&State)) -> Result<(), WouldDeadlock> {
        if self.read_lock_held() || current::is_reclaimer() {
            return Err(WouldDeadlock);
        }
        reclaimer::start_if_inherited();
        if let Some(state) = self.handle.used() {
            wait(state);
        }
        Ok(())
    }

    pub(crate) fn state(&self) -> &State {
        self.handle.get()
    }
}

fn address(state: &State) -> usize {
    std::ptr::from_ref(state).addr()
}

impl Default for Srcu {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Srcu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Srcu").field(self.handle.peek()).finish()
    }
}

impl Drop for Srcu {
    #[doc(alias = "cleanup_srcu_struct")]
    fn drop(&mut self) {
        let Some(state) = self.handle.used() else {
            return;
        };
        // No thread borrows the domain, so the sums are exact, and an open section is a leaked one.
        if !current::is_reclaimer() && !state.any_open() {
            reclaimer::barrier(state);
        }
    }
}
