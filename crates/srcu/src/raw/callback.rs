//! Callbacks: heads in a queue, the batch that waits for a grace period, and the box around a
//! closure.
//!
//! # Safety
//! # Invariants
//! A head in a queue or batch was given to `call_raw`, whose caller promised that it stays valid
//! and untouched until its function is called. So the crate alone reads and writes it from the push
//! until the call.

use crate::sync::{self, Ordering};
use std::cell::Cell;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, compiler_fence};

pub(super) type Function = unsafe fn(NonNull<Head>);

/// The part of an object that lets it wait for its grace period without an allocation.
///
/// Embed one in an object and give its address to [`Srcu::call_raw`](crate::Srcu::call_raw). A head
/// can be queued again once its function has been called.
#[doc(alias = "rcu_head")]
#[doc(alias = "callback_head")]
#[derive(Default)]
pub struct Head {
    /// The one queued before.
    next: Cell<Option<NonNull<Head>>>,
    /// The one queued after: see [`Batch`].
    newer: Cell<Option<NonNull<Head>>>,
    function: Cell<Option<Function>>,
}

// SAFETY: A head's cells are reached only through `call_raw`'s promise (module invariant), by one
// thread at a time. An object with a head in it may be shared and sent as it could be without.
unsafe impl Sync for Head {}
// SAFETY: As for `Sync`.
unsafe impl Send for Head {}

impl Head {
    /// A head that is not queued.
    pub const fn new() -> Self {
        Self {
            next: Cell::new(None),
            newer: Cell::new(None),
            function: Cell::new(None),
        }
    }

    /// Whether it was queued and its function has not been called since.
    pub(crate) fn is_queued(&self) -> bool {
        self.function.get().is_some()
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Head").finish_non_exhaustive()
    }
}

/// Queues a head; says whether the queue was empty, in which case the caller must `schedule` the
/// domain.
///
/// # Safety
/// As for [`Srcu::call_raw`](crate::Srcu::call_raw).
pub(crate) unsafe fn push(
    queue: &sync::AtomicPtr<Head>,
    head: NonNull<Head>,
    function: Function,
) -> bool {
    // SAFETY: The caller's promise is passed on.
    unsafe { push_if(queue, head, function, |_| true) }.is_some_and(|newest| newest.is_null())
}

/// Queues a head if the queue is not empty; says whether it did. Then the queue, which may be gone,
/// is not used behind the push.
///
/// # Safety
/// As for [`Srcu::call_raw`](crate::Srcu::call_raw), if it returns true.
pub(crate) unsafe fn push_behind(
    queue: &sync::AtomicPtr<Head>,
    head: NonNull<Head>,
    function: Function,
) -> bool {
    // SAFETY: The caller's promise is passed on.
    unsafe { push_if(queue, head, function, |newest| !newest.is_null()) }.is_some()
}

/// Queues a head behind the newest if `may` says so, and returns that one, perhaps null.
///
/// # Safety
/// As for [`Srcu::call_raw`](crate::Srcu::call_raw).
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
            // SAFETY: The head must be valid and not in use: the caller's promise, until the push
            // succeeds. The reference ends before it.
            let head = unsafe { head.as_ref() };
            head.function.set(Some(function));
            head.next.set(NonNull::new(newest));
        }
        // ORDER(srcu-queue): Release for the head and for all that happened before the call.
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

/// Queues a closure; says as `push` does whether the domain must be scheduled.
pub(crate) fn push_boxed<F: FnOnce() + Send + 'static>(
    queue: &sync::AtomicPtr<Head>,
    f: F,
) -> bool {
    /// # Safety
    /// `head` is that of a leaked `Boxed<F>`, which is given up.
    unsafe fn call<F: FnOnce()>(head: NonNull<Head>) {
        // SAFETY: Needs a box of this type, once: the caller's duty. `Boxed` is `repr(C)` and
        // begins with its head.
        let boxed = unsafe { Box::from_raw(head.cast::<Boxed<F>>().as_ptr()) };
        (boxed.f)();
    }
    let boxed = NonNull::from(Box::leak(Box::new(Boxed {
        head: Head::new(),
        f,
    })));
    // SAFETY: The box is leaked until `call`, no other code knows it, and `F: Send + 'static` may
    // be called anywhere later.
    unsafe { push(queue, boxed.cast(), call::<F>) }
}

/// Callbacks taken from the queue together, the oldest first, that wait for one grace period.
///
/// A fork may leave the reclaimer behind between any two of its stores (it stops there for long, as
/// its first write after the fork has to wait for the copying to end), so the child must find the
/// callbacks whatever the last store was. Hence the queue's own links stay as they are, and the way
/// back from the oldest has links of its own.
///
/// # Invariants
/// * `oldest` is set: its heads, along `newer`, are the batch.
/// * `oldest` is null, `newest` is set: the heads along `next` are the batch, unless the queue
///   still has them.
pub(crate) struct Batch {
    newest: AtomicPtr<Head>,
    oldest: AtomicPtr<Head>,
    /// The sequence number at which they may run.
    want: Cell<u64>,
    /// How many the last `fill` took.
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

    /// Takes all that is queued, and then asks `snapshot` for the number at which they may run. The
    /// batch must be empty.
    pub(super) fn fill(&self, queue: &sync::AtomicPtr<Head>, snapshot: impl FnOnce() -> u64) {
        debug_assert!(self.is_empty(), "a batch is filled only when it has run");
        self.taken.set(0);
        loop {
            let newest = queue.load(Ordering::Relaxed);
            self.newest.store(newest, Ordering::Relaxed);
            if newest.is_null() {
                return;
            }
            // ORDER(srcu-queue): Acquire, partner in `push`. Release: a thread that reads our null
            // also sees `busy` set, ORDER(srcu-busy). It also keeps the store to `newest` in front,
            // for a child.
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

    /// Links the heads from the oldest to `newest`.
    fn link(&self) {
        let (mut head, mut newer) = (NonNull::new(self.newest.load(Ordering::Relaxed)), None);
        while let Some(this) = head {
            self.taken.set(self.taken.get() + 1);
            // SAFETY: The head must be valid and ours: module invariant.
            let links = unsafe { this.as_ref() };
            links.newer.set(newer);
            newer = head;
            head = links.next.get();
        }
        // ORDER(srcu-fork): Release: a child that finds this finds the links.
        // INVARIANT: All of them are linked.
        self.oldest.store(
            newer.map_or(ptr::null_mut(), NonNull::as_ptr),
            Ordering::Release,
        );
    }

    /// In the child of a fork: takes up a `fill` that was under way.
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
            // SAFETY: The head must be valid and ours: module invariant.
            queued = unsafe { head.as_ref() }
                .next
                .get()
                .map_or(ptr::null_mut(), NonNull::as_ptr);
        }
        // Still in the queue: nothing was taken.
        self.newest.store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Takes the oldest out of the batch, with its function. Its grace period has passed.
    pub(super) fn take_one(&self) -> Option<(NonNull<Head>, Function)> {
        let oldest = NonNull::new(self.oldest.load(Ordering::Relaxed))?;
        // SAFETY: The head must be valid and ours: module invariant. The reference ends before the
        // function is called.
        let head = unsafe { oldest.as_ref() };
        let newer = head.newer.get();
        if newer.is_none() {
            self.newest.store(ptr::null_mut(), Ordering::Relaxed);
        }
        // INVARIANT: `newest` went before the last of `oldest`.
        // ORDER(srcu-fork): Release and the fence keep it so for a child, which must
        // find a head either here with its function, or not at all.
        self.oldest.store(
            newer.map_or(ptr::null_mut(), NonNull::as_ptr),
            Ordering::Release,
        );
        compiler_fence(Ordering::SeqCst);
        let function = head.function.take().expect("queued with a function");
        Some((oldest, function))
    }
}
