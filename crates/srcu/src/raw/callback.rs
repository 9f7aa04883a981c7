//! Callbacks: heads in a queue, the batch that waits for a grace period, and the box around a
//! closure.
//!
//! # Safety
//! # Invariants
//! A head in a queue or batch is part of a box that `push_boxed` leaked, or was given to `call_raw`
//! or `call_raw_dropping`. Their callers promise that the head stays valid and untouched until its
//! function is called. So from the push until the call, only this crate reads and writes the head.

use crate::sync::{self, Ordering};
use std::cell::Cell;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, compiler_fence};

pub(super) type Function = unsafe fn(NonNull<Head>);

/// Embedded in an object, a head lets the object wait for its grace period without an allocation.
///
/// Give the address of the head to [`Srcu::call_raw`](crate::Srcu::call_raw). Once its function has
/// been called, the head can be queued again.
#[doc(alias = "rcu_head")]
#[doc(alias = "callback_head")]
#[derive(Default)]
pub struct Head {
    /// The head that was queued before this one.
    next: Cell<Option<NonNull<Head>>>,
    /// The head that was queued after this one: see [`Batch`].
    newer: Cell<Option<NonNull<Head>>>,
    function: Cell<Option<Function>>,
}

// SAFETY: no public method reads or writes a head's cells. This crate accesses the cells only from
// the push until the call (the module's invariant), and only on one thread at a time.
unsafe impl Sync for Head {}
// SAFETY: as for `Sync`.
unsafe impl Send for Head {}

impl Head {
    /// Makes a head that is not queued.
    pub const fn new() -> Self {
        Self {
            next: Cell::new(None),
            newer: Cell::new(None),
            function: Cell::new(None),
        }
    }

    /// Tells whether the head is queued and its function has not been called yet.
    pub(crate) fn is_queued(&self) -> bool {
        self.function.get().is_some()
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Head").finish_non_exhaustive()
    }
}

/// Queues a head. Returns whether the queue was empty. If so, the caller must `schedule` the
/// domain.
///
/// # Safety
/// The caller must follow the rules of [`Srcu::call_raw`](crate::Srcu::call_raw).
pub(crate) unsafe fn push(
    queue: &sync::AtomicPtr<Head>,
    head: NonNull<Head>,
    function: Function,
) -> bool {
    // SAFETY: the caller follows the rules of `call_raw`, which are those of `push_if`.
    unsafe { push_if(queue, head, function, |_| true) }.is_some_and(|newest| newest.is_null())
}

/// Queues a head if the queue is not empty, and returns whether it did. After the push, this
/// function does not use the queue, which may be gone by then.
///
/// # Safety
/// The caller must follow the rules of [`Srcu::call_raw`](crate::Srcu::call_raw). If the result is
/// false, the head is not queued, and the caller may use the head again.
pub(crate) unsafe fn push_behind(
    queue: &sync::AtomicPtr<Head>,
    head: NonNull<Head>,
    function: Function,
) -> bool {
    // SAFETY: the caller follows the rules of `call_raw`, which are those of `push_if`.
    unsafe { push_if(queue, head, function, |newest| !newest.is_null()) }.is_some()
}

/// Queues a head if `may` allows that for the newest head, which is null in an empty queue. Returns
/// that newest head, or `None` if `head` was not queued.
///
/// # Safety
/// The caller must follow the rules of [`Srcu::call_raw`](crate::Srcu::call_raw).
#[inline(always)]
unsafe fn push_if(
    queue: &sync::AtomicPtr<Head>,
    head: NonNull<Head>,
    function: Function,
    may: impl Fn(*mut Head) -> bool,
) -> Option<*mut Head> {
    let mut newest = queue.load(Ordering::Relaxed);
    while may(newest) {
        {
            // SAFETY: the head must be valid and unused, which the caller promises until the push
            // succeeds. The reference ends before the push.
            let head = unsafe { head.as_ref() };
            head.function.set(Some(function));
            head.next.set(NonNull::new(newest));
        }
        // ORDER(srcu-queue): Release, for the head and everything that happened before the call.
        // Partner: the Acquire in `Batch::fill`. Model: loom
        // `a_barrier_waits_for_the_calls_of_both_threads`.
        match queue.compare_exchange_weak(
            newest,
            head.as_ptr(),
            Ordering::Release,
            Ordering::Relaxed,
        ) {
            Ok(_) => return Some(newest),
            Err(newer) => newest = newer,
        }
    }
    None
}

#[repr(C)]
struct Boxed<F> {
    head: Head,
    f: F,
}

/// Queues a closure. As with `push`, the result says whether the domain must be scheduled.
pub(crate) fn push_boxed<F: FnOnce() + Send + 'static>(
    queue: &sync::AtomicPtr<Head>,
    f: F,
) -> bool {
    /// # Safety
    /// `head` is the head of a leaked `Boxed<F>`, and the caller gives that box up.
    unsafe fn call<F: FnOnce()>(head: NonNull<Head>) {
        // SAFETY: `from_raw` needs a leaked box of this type, once, which the caller promises.
        // `Boxed` is `repr(C)` and begins with its head.
        let boxed = unsafe { Box::from_raw(head.cast::<Boxed<F>>().as_ptr()) };
        (boxed.f)();
    }
    let boxed = NonNull::from(Box::leak(Box::new(Boxed {
        head: Head::new(),
        f,
    })));
    // SAFETY: the box is leaked until `call`, and no other code has it. `F: Send + 'static` may
    // be called later on any thread.
    unsafe { push(queue, boxed.cast(), call::<F>) }
}

/// The callbacks that were taken from the queue together and wait for one grace period.
///
/// A fork may interrupt the reclaimer between any two of its stores. (It often does: the
/// reclaimer's first write after the fork has to wait until the kernel has copied the memory.) So
/// the child must find the callbacks whatever the last store was. For that reason the queue's own
/// links stay unchanged, and the order from the oldest to the newest has separate links.
///
/// # Invariants
/// * If `oldest` is set, the heads from it along `newer` are the batch.
/// * If `oldest` is null and `newest` is set, the heads from it along `next` are the batch, unless
///   the queue still contains them.
pub(crate) struct Batch {
    newest: AtomicPtr<Head>,
    oldest: AtomicPtr<Head>,
    /// The sequence number at which these callbacks may run.
    want: Cell<u64>,
    /// The number of callbacks that the last `fill` took.
    taken: Cell<usize>,
}

impl Batch {
    #[expect(
        clippy::declare_interior_mutable_const,
        reason = "the seed of each batch"
    )]
    pub(super) const EMPTY: Batch = Batch {
        newest: AtomicPtr::new(ptr::null_mut()),
        oldest: AtomicPtr::new(ptr::null_mut()),
        want: Cell::new(0),
        taken: Cell::new(0),
    };

    pub(super) fn is_empty(&self) -> bool {
        self.oldest.load(Ordering::Relaxed).is_null()
    }

    pub(super) fn taken(&self) -> usize {
        self.taken.get()
    }

    pub(super) fn want(&self) -> u64 {
        self.want.get()
    }

    /// Takes all callbacks from the queue. Then takes from `snapshot` the sequence number at which
    /// these callbacks may run. The batch must be empty.
    pub(super) fn fill(&self, queue: &sync::AtomicPtr<Head>, snapshot: impl FnOnce() -> u64) {
        debug_assert!(self.is_empty(), "a batch is filled only when it has run");
        self.taken.set(0);
        loop {
            let newest = queue.load(Ordering::Relaxed);
            self.newest.store(newest, Ordering::Relaxed);
            if newest.is_null() {
                return;
            }
            // ORDER(srcu-queue): Acquire; partner in `push`. Release: a thread that reads the null
            // also sees that `busy` is set, ORDER(srcu-busy). Release also keeps the store to
            // `newest` before this exchange, for the child of a fork.
            if queue
                .compare_exchange(newest, ptr::null_mut(), Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                break;
            }
        }
        self.want.set(snapshot());
        self.link();
    }

    /// Links the heads from the oldest to the newest.
    fn link(&self) {
        let (mut head, mut newer) = (NonNull::new(self.newest.load(Ordering::Relaxed)), None);
        while let Some(this) = head {
            self.taken.set(self.taken.get() + 1);
            // SAFETY: the head must be valid and belong to this crate, which the module's invariant
            // says.
            let links = unsafe { this.as_ref() };
            links.newer.set(newer);
            newer = head;
            head = links.next.get();
        }
        // ORDER(srcu-fork): Release: if the child of a fork finds this store, it also finds the
        // links.
        // INVARIANT: all heads are linked.
        self.oldest.store(
            newer.map_or(ptr::null_mut(), NonNull::as_ptr),
            Ordering::Release,
        );
    }

    /// In the child of a fork: completes or undoes a `fill` that was in progress.
    #[cfg(not(mmun_loom))]
    pub(super) fn after_fork(&self, queue: &sync::AtomicPtr<Head>, snapshot: impl FnOnce() -> u64) {
        if !self.is_empty() || self.newest.load(Ordering::Relaxed).is_null() {
            return;
        }
        let newest = self.newest.load(Ordering::Relaxed);
        let mut queued = queue.load(Ordering::Relaxed);
        while queued != newest {
            let Some(head) = NonNull::new(queued) else {
                self.want.set(snapshot());
                self.link();
                return;
            };
            // SAFETY: the head must be valid and belong to this crate, which the module's invariant
            // says.
            queued = unsafe { head.as_ref() }
                .next
                .get()
                .map_or(ptr::null_mut(), NonNull::as_ptr);
        }
        // The heads are still in the queue, so `fill` had taken nothing.
        self.newest.store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Removes the oldest callback from the batch and returns it with its function. The caller has
    /// checked that the batch's grace period has passed.
    pub(super) fn take_one(&self) -> Option<(NonNull<Head>, Function)> {
        let oldest = NonNull::new(self.oldest.load(Ordering::Relaxed))?;
        // SAFETY: the head must be valid and belong to this crate, which the module's invariant
        // says. The reference ends before the function is called.
        let head = unsafe { oldest.as_ref() };
        let newer = head.newer.get();
        if newer.is_none() {
            self.newest.store(ptr::null_mut(), Ordering::Relaxed);
        }
        // INVARIANT: `newest` was cleared before the last head leaves `oldest`.
        // ORDER(srcu-fork): Release and the fence keep the stores to `newest`, `oldest` and
        // `function` in this order for the child of a fork. So if the child finds the head in the
        // batch, it also finds the head's function.
        self.oldest.store(
            newer.map_or(ptr::null_mut(), NonNull::as_ptr),
            Ordering::Release,
        );
        compiler_fence(Ordering::SeqCst);
        let function = head.function.take().expect("queued with a function");
        Some((oldest, function))
    }
}
