//! The subscribers of one address space: the list, who may walk it, and how it changes under walkers.
//!
//! # Safety
//! The list is singly linked for readers and changed under one lock. A walker holds a read section of the domain; a
//! node is freed only after it was unlinked and a grace period passed, and an unlinked node keeps its `next`, so a walker
//! that stands on it still reaches the rest. The lock is never held over a callback, an allocation or a free.
//!
//! # Who takes part
//! A bracket must call `end` on exactly those subscribers it called `start` on, less those put in between. Nodes are linked
//! at the front only, so whatever is reached from the node that was first when the bracket began is what its start walk
//! reached, or less. Both walks begin at that node: the read section keeps it, even if it is put meanwhile.

mod node;

pub use node::{Embedded, Node, SurplusPut};
pub(crate) use node::{NodeRef, NotCounted};

use crate::interval::Window;
use crate::owned_guard::OwnedGuard;
use crate::subsystem::Pending;
use crate::sync::atomic::{AtomicPtr, Ordering};
use crate::sync::{Arc, Mutex, lock, mutant};
use crate::{InvalidateRange, Mm, Notifier, WouldBlock, context};
use node::Header;
use srcu::{Guard, Srcu};
use std::marker::PhantomData;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// The list head and the domain that protects it.
#[derive(Debug)]
#[doc(alias = "mmu_notifier_subscriptions")]
pub(crate) struct Subscriptions {
    head: AtomicPtr<Header>,
    srcu: Srcu,
    lock: Mutex<()>,
}

impl Subscriptions {
    pub(crate) fn new() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()), srcu: Srcu::new(), lock: Mutex::new(()) }
    }

    #[inline]
    pub(crate) fn srcu(&self) -> &Srcu {
        &self.srcu
    }

    /// Opens a read section and finds who is subscribed.
    #[inline(always)]
    pub(crate) fn read(&self) -> Reading<Guard<'_>> {
        let guard = self.srcu.read_lock();
        Reading { first: self.first(), guard }
    }

    /// The caller has opened a read section.
    #[inline(always)]
    fn first(&self) -> *mut Header {
        // ORDER(core-publish): partner of the stores in `insert` and `unlink`. Weaker, a walk could go into a half-made node. Model:
        // loom `s_66_s_69`.
        self.head.load(if mutant("first_relaxed") { Ordering::Relaxed } else { Ordering::Acquire })
    }

    /// Links a new node at the front, for brackets that begin from now on. A grace period later no older bracket is left.
    pub(crate) fn insert<N: Notifier>(&self, node: &NodeRef<N>) {
        let _lock = lock(&self.lock);
        let header = node.header();
        // SAFETY: A reference needs a live node: `node` counts it.
        let node = unsafe { header.as_ref() };
        let first = self.head.load(Ordering::Relaxed);
        node.next.store(first, Ordering::Relaxed);
        node.pprev.store((&raw const self.head).cast_mut(), Ordering::Relaxed);
        // SAFETY: A reference needs a live node: `first` is listed, and nobody delists it while we hold the lock.
        if let Some(first) = unsafe { first.as_ref() } {
            first.pprev.store((&raw const node.next).cast_mut(), Ordering::Relaxed);
        }
        // ORDER(core-publish): the node's content before the pointer to it. Partner: the load in `first`. Weaker, a walker could call through a half-made node.
        self.head.store(header.as_ptr(), Ordering::Release);
    }

    /// Unlinks a node if it is listed. It keeps its `next`, for walkers that stand on it.
    fn delist(&self, node: &Header) {
        if node.is_inherited() {
            // Nobody walks the list here, and its lock may be held by a thread that is not here.
            return;
        }
        let _lock = lock(&self.lock);
        Self::unlink(node);
    }

    /// Unlinks every node.
    pub(crate) fn delist_all(&self) {
        let _lock = lock(&self.lock);
        // SAFETY: A reference needs a live node: the first one is listed, and nobody else delists while we hold the lock.
        while let Some(node) = unsafe { self.head.load(Ordering::Relaxed).as_ref() } {
            Self::unlink(node);
        }
    }

    /// The caller holds the lock of the list that `node` is on.
    fn unlink(node: &Header) {
        let pprev = node.pprev.load(Ordering::Relaxed);
        node.pprev.store(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: A reference needs a live link: not null, it is the head's or that of the listed node before this one, and
        // nobody delists that one while the caller holds the lock.
        let Some(link) = (unsafe { pprev.as_ref() }) else {
            return;
        };
        let next = node.next.load(Ordering::Relaxed);
        // ORDER(core-delist): partner of the load in `is_empty`.
        // ORDER(core-publish): the content of `next`, to walks that begin at it. Partner: the load in `first`.
        link.store(next, Ordering::Release);
        // SAFETY: A reference needs a live node: `next` of a listed node is listed, and stays so under the lock.
        if let Some(next) = unsafe { next.as_ref() } {
            next.pprev.store(pprev, Ordering::Relaxed);
        }
    }

    /// Unlinks the node of `node` if exit has not done so.
    pub(crate) fn delist_ref<N: Notifier>(&self, node: &NodeRef<N>) {
        // SAFETY: A reference needs a live node: `node` counts it.
        self.delist(unsafe { node.header().as_ref() });
    }

    /// Delists a node that was never shared, waits until no walker can stand on it, and takes its value out.
    ///
    /// # Panics
    /// If this thread would wait for itself; the caller asks `would_deadlock` after the last callback that it runs.
    pub(crate) fn reclaim<N: Notifier>(&self, node: NodeRef<N>) -> N {
        self.delist_ref(&node);
        self.srcu.synchronize().expect("unregister asked whether it may wait");
        // SAFETY: The node must be delisted, a grace period must have passed since, and `node` must be its one user: the two
        // lines above, and the caller's `Registration`, which has no key by which a second user could find it.
        unsafe { node.into_value() }
    }

    /// Delists a node that was never shared, and passes its value to `free` after a grace period.
    pub(crate) fn reclaim_later<N: Notifier>(&self, node: NodeRef<N>, free: impl FnOnce(N) + Send + 'static) {
        let counted = node.count_free();
        self.delist_ref(&node);
        self.srcu.call(move || {
            let mm = node.mm().clone();
            if mm.is_inherited() {
                // Queued before a fork, and this is the child: both are the parent's.
                return mem::forget((node, free, counted));
            }
            // SAFETY: The node must be delisted, a grace period must have passed since, and `node` must be its one user: the
            // line before `call`, what `call` waits for, and the caller's `Registration`, which has no key.
            let value = unsafe { node.into_value() };
            context::freeing(|| {
                mm.catching(|| free(value));
                drop(mm);
            });
            if let Some(counted) = counted {
                counted.freed();
            }
        });
    }

    /// Tells whether a node is listed. Only a hint while exit may run.
    pub(crate) fn is_listed<N: Notifier>(&self, node: &NodeRef<N>) -> bool {
        // SAFETY: A reference needs a live node: `node` counts it.
        unsafe { node.header().as_ref() }.is_listed()
    }

    /// Tells whether nobody is subscribed. Only a hint while registrars run.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // ORDER(core-delist): whoever finds the list empty sees what was done before the last node was unlinked, its
        // `release` above all. Partner: the store in `unlink`. Weaker, exit could return before the effects of a `release`
        // that `unregister` ran. Model: loom `s_48_s_50`.
        let order = if mutant("exit_peeks_relaxed") { Ordering::Relaxed } else { Ordering::Acquire };
        self.head.load(order).is_null()
    }

    /// Finds the newest live node of a subsystem that is wanted, and counts it.
    #[inline(always)]
    pub(crate) fn lookup<N: Notifier>(
        &self,
        owner: &Arc<Pending>,
        is_wanted: impl Fn(&N) -> bool,
    ) -> Result<NodeRef<N>, NotCounted> {
        let _guard = self.srcu.read_lock();
        // SAFETY: The node must be reached in an open read section: `_guard`, until the return. Only `Subsystem<N>` calls this,
        // with its own `owner`.
        unsafe { node::lookup(self.first(), owner, is_wanted) }
    }
}

/// An open read section, and who was subscribed when it was opened.
///
/// # Invariants
/// `first` is null or was reached in the section that `guard` keeps open.
#[derive(Debug)]
pub(crate) struct Reading<G> {
    first: *const Header,
    guard: G,
}

// SAFETY: What moves is a guard that may, and a pointer to a subscriber that the guard's section keeps
// in place: subscribers are `Send` and `Sync`. Without this, a bracket that is sent to another thread
// is refused in the name of this private type.
unsafe impl<G: Send> Send for Reading<G> {}

impl Reading<OwnedGuard> {
    /// The same, keeping the address space itself.
    pub(crate) fn of(mm: Mm) -> Self {
        let guard = OwnedGuard::new(mm);
        Self { first: guard.mm().subscriptions().first(), guard }
    }

    pub(crate) fn mm(&self) -> &Mm {
        self.guard.mm()
    }
}

impl<G> Reading<G> {
    /// Tells whether nobody was subscribed.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_null()
    }

    /// Calls `f` for each subscriber, newest first, and goes on after one that panics.
    pub(crate) fn for_each(&self, mm: &Mm, mut f: impl FnMut(&dyn Notifier)) {
        self.walk().each(|node| mm.catching(|| f(node.callbacks())));
    }

    /// Calls the non-blockable start of every subscriber; if any refuses, closes the window of the intervals and ends those
    /// that accepted.
    pub(crate) fn try_start(&self, range: &InvalidateRange<'_>, window: Option<Window>) -> Result<(), WouldBlock> {
        if try_start_from(None, &mut self.walk(), range, window, false) { Err(WouldBlock) } else { Ok(()) }
    }

    /// Stands before the newest subscriber.
    #[inline(always)]
    pub(crate) fn walk(&self) -> Walk<'_> {
        Walk { at: self.first, section: PhantomData }
    }
}

/// A walk in progress.
///
/// # Invariants
/// `at` is null or was reached in a section that is open for `'a`.
pub(crate) struct Walk<'a> {
    at: *const Header,
    section: PhantomData<&'a Srcu>,
}

impl<'a> Walk<'a> {
    /// Calls the start of every subscriber.
    #[inline(always)]
    pub(crate) fn start(self, range: &InvalidateRange<'_>) {
        self.each(|node| node.callbacks().start(range));
    }

    /// Calls the end of every subscriber.
    #[inline(always)]
    pub(crate) fn end(self, range: &InvalidateRange<'_>) {
        self.each(|node| node.callbacks().end(range));
    }

    /// Runs `f` for each one that was not put since the section was opened, by a callback say.
    #[inline(always)]
    fn each(mut self, mut f: impl FnMut(&Header)) {
        while let Some(node) = self.here() {
            self.pass(node);
            if node.is_listed() {
                f(node);
            }
        }
    }

    #[inline(always)]
    fn here(&self) -> Option<&'a Header> {
        // SAFETY: A reference needs a live node: it was reached in a section that is still open (invariant), so it is not freed yet.
        unsafe { self.at.as_ref() }
    }

    /// Goes on behind `node`, which is the one that it stands on.
    #[inline(always)]
    fn pass(&mut self, node: &'a Header) {
        // ORDER: Relaxed is enough: what is behind a node was linked before it, under the same lock, so `first` covers it.
        // INVARIANT: Reached from a node of the same section.
        self.at = node.next.load(Ordering::Relaxed);
    }
}

/// Subscribers whose starts one call of [`try_start_from`] remembers.
const AT_ONCE: usize = 32;

/// Some of the subscribers that accepted a start, newest first, and the frame that holds the newer ones. The stack is the
/// memory of who accepted, because nothing here may allocate.
struct Accepted<'f, 'a> {
    nodes: [Option<&'a Header>; AT_ONCE],
    newer: Option<&'f Accepted<'f, 'a>>,
}

impl Accepted<'_, '_> {
    /// Calls the end of each of them, newest first. One that was put since its start gets no end, as everywhere.
    fn end(&self, range: &InvalidateRange<'_>) {
        if let Some(newer) = self.newer {
            newer.end(range);
        }
        for node in self.nodes.iter().flatten().filter(|node| node.is_listed()) {
            node.callbacks().end(range);
        }
    }
}

/// Starts the subscribers that come next and, by recursion, the rest. If one of them refuses, or `refused` says that a
/// newer one has, it closes the window, ends all that accepted, and returns true.
fn try_start_from<'a>(
    newer: Option<&Accepted<'_, 'a>>,
    walk: &mut Walk<'a>,
    range: &InvalidateRange<'_>,
    window: Option<Window>,
    mut refused: bool,
) -> bool {
    let mut accepted = Accepted { nodes: [None; AT_ONCE], newer };
    for slot in &mut accepted.nodes {
        let Some(node) = walk.here() else {
            if refused {
                // In the order of every end: first the window of the intervals, then the subscribers.
                window.into_iter().for_each(|window| range.mm.intervals().end(window));
                accepted.end(range);
            }
            return refused;
        };
        walk.pass(node);
        if !node.is_listed() {
            // An interval's callback has put it.
            continue;
        }
        // A start that panicked may have done its work: it counts as accepted, so that its end comes.
        match catch_unwind(AssertUnwindSafe(|| node.callbacks().try_start(range))) {
            Ok(Err(WouldBlock)) => refused = true,
            Ok(Ok(())) => *slot = Some(node),
            Err(panic) => {
                range.mm.count_panic(panic);
                *slot = Some(node);
            }
        }
    }
    try_start_from(Some(&accepted), walk, range, window, refused)
}
