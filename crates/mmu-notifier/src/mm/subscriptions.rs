//! The subscribers of one address space: the list, the rules for its walkers, and how it changes
//! under them.
//!
//! ```text
//!   head --> C --> B --> A        newest first; each `pprev` points back at the link to its node
//!            |
//!            +-- a bracket keeps the node that was first when it began, and both of its walks
//!                begin there: start calls C, B, A; end calls those of them that are still listed
//!
//!   insert D:  head --> D --> C   older brackets begin at C, so they never call D
//!   delist B:  C --> A            B keeps its `next`, so a walker that stands on B reaches A
//! ```
//!
//! # Safety
//! The list is singly linked for readers and changed under one lock. A walker holds a read section
//! of the domain. A node is freed only after it was unlinked and a grace period has passed. An
//! unlinked node keeps its `next`, so a walker that stands on it still reaches the rest. No code
//! calls a callback, allocates or frees while it holds the lock. Each of these may begin a bracket,
//! whose callbacks may put, and a last put takes the same lock.
//!
//! # Who takes part
//! A bracket must call `end` on exactly those subscribers on which it called `start`, except those
//! that were delisted in between. Both walks begin at the node that was first when the bracket
//! began. The read section keeps that node alive, even if it is put meanwhile. New nodes are linked
//! at the front only, so no node appears behind that first node: the end walk reaches the nodes of
//! the start walk, or fewer.

mod node;

pub use node::{Embedded, Node, SurplusPut};
pub(crate) use node::{NodeRef, NotCounted, registrar};

use crate::mm::context;
use crate::mm::intervals::Window;
use crate::mm::owned_guard::OwnedGuard;
use crate::pending::Pending;
use crate::sync::atomic::{AtomicPtr, Ordering};
use crate::sync::{Arc, Mutex, lock, mutant};
use crate::{InvalidateRange, Mm, Notifier, WouldBlock};
use node::Header;
use srcu::{Guard, Srcu};
use std::marker::PhantomData;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// The list head, and the domain that protects the list.
#[derive(Debug)]
#[doc(alias = "mmu_notifier_subscriptions")]
pub(crate) struct Subscriptions {
    head: AtomicPtr<Header>,
    srcu: Srcu,
    lock: Mutex<()>,
}

impl Subscriptions {
    pub(crate) fn new() -> Self {
        Self {
            head: AtomicPtr::new(ptr::null_mut()),
            srcu: Srcu::new(),
            lock: Mutex::new(()),
        }
    }

    #[inline]
    pub(crate) fn srcu(&self) -> &Srcu {
        &self.srcu
    }

    /// Opens a read section, and records the node that is first now.
    #[inline(always)]
    pub(crate) fn read(&self) -> ReadSection<Guard<'_>> {
        let guard = self.srcu.read_lock();
        ReadSection {
            first: self.first(),
            guard,
        }
    }

    /// Returns the first node. The caller must have opened a read section, which keeps the node
    /// alive.
    #[inline(always)]
    fn first(&self) -> *mut Header {
        // ORDER(core-publish): partner of the stores in `insert` and `unlink`. If weaker, a walk
        // could enter a node whose fields it does not see yet. Model: loom `s_66_s_69`.
        self.head.load(if mutant("first_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        })
    }

    /// Links a new node at the front. Brackets that begin from now on call the node. After a grace
    /// period, every bracket that does not call the node has ended.
    pub(crate) fn insert<N: Notifier>(&self, node: &NodeRef<N>) {
        let _lock = lock(&self.lock);
        let header = node.header();
        // SAFETY: A reference needs a live node: `node` holds a count of it.
        let node = unsafe { header.as_ref() };
        let first = self.head.load(Ordering::Relaxed);
        node.next.store(first, Ordering::Relaxed);
        node.pprev
            .store((&raw const self.head).cast_mut(), Ordering::Relaxed);
        // SAFETY: A reference needs a live node: `first` is listed, and no thread delists it while
        // this one holds the lock.
        if let Some(first) = unsafe { first.as_ref() } {
            first
                .pprev
                .store((&raw const node.next).cast_mut(), Ordering::Relaxed);
        }
        // ORDER(core-publish): orders the node's content before the pointer to it. Partner: the
        // load in `first`. If weaker, a walker could call through a half-made node.
        self.head.store(header.as_ptr(), Ordering::Release);
    }

    /// Unlinks a node if it is listed. The node keeps its `next`, for walkers that stand on it.
    fn delist(&self, node: &Header) {
        if node.is_inherited() {
            // This is the child of a fork. No thread here walks the parent's list, and a thread
            // that exists in the parent only may hold the lock for ever.
            return;
        }
        let _lock = lock(&self.lock);
        Self::unlink(node);
    }

    /// Unlinks every node.
    pub(crate) fn delist_all(&self) {
        let _lock = lock(&self.lock);
        // SAFETY: A reference needs a live node: the first one is listed, and no other thread
        // delists it while this one holds the lock.
        while let Some(node) = unsafe { self.head.load(Ordering::Relaxed).as_ref() } {
            Self::unlink(node);
        }
    }

    /// Unlinks `node` if it is listed. The caller holds the lock of its list.
    fn unlink(node: &Header) {
        let pprev = node.pprev.load(Ordering::Relaxed);
        node.pprev.store(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: A reference needs a live link. If `pprev` is not null, it points to the list's
        // head or to the `next` of the listed node in front, and no thread delists that node while
        // the caller holds the lock.
        let Some(link) = (unsafe { pprev.as_ref() }) else {
            return;
        };
        let next = node.next.load(Ordering::Relaxed);
        // ORDER(core-delist): partner of the load in `is_empty`.
        // ORDER(core-publish): orders the content of `next` before the link to it, for walks that
        // begin at `next`. Partner: the load in `first`.
        link.store(next, Ordering::Release);
        // SAFETY: A reference needs a live node: the successor of a listed node is listed, and
        // stays so under the lock.
        if let Some(next) = unsafe { next.as_ref() } {
            next.pprev.store(pprev, Ordering::Relaxed);
        }
    }

    /// Unlinks the node of a reference, unless exit has done so.
    pub(crate) fn delist_ref<N: Notifier>(&self, node: &NodeRef<N>) {
        // SAFETY: A reference needs a live node: `node` holds a count of it.
        self.delist(unsafe { node.header().as_ref() });
    }

    /// Delists a node whose `NodeRef` was never cloned, waits until no walker can stand on the
    /// node, and returns the value.
    ///
    /// # Panics
    /// If this thread would wait for itself. The caller rules that out: it calls `would_deadlock`
    /// after the last callback that it runs.
    pub(crate) fn reclaim<N: Notifier>(&self, node: NodeRef<N>) -> N {
        self.delist_ref(&node);
        self.srcu
            .synchronize()
            .expect("unregister asked whether it may wait");
        // SAFETY: The node must be delisted, a grace period must have passed since, and `node` must
        // be its only user. The lines above do the first two. `node` comes from a `Registration`,
        // which has no key by which a second user could find it.
        unsafe { node.into_value() }
    }

    /// Delists a node whose `NodeRef` was never cloned, and passes the value to `free` after a
    /// grace period.
    pub(crate) fn reclaim_later<N: Notifier>(
        &self,
        node: NodeRef<N>,
        free: impl FnOnce(N) + Send + 'static,
    ) {
        let counted = node.count_free();
        self.delist_ref(&node);
        self.srcu.call(move || {
            let mm = node.mm().clone();
            if mm.is_inherited() {
                // The free was queued before a fork, and this is the child. The parent frees the
                // node and the closure.
                return mem::forget((node, free, counted));
            }
            // SAFETY: The node must be delisted, a grace period must have passed since, and `node`
            // must be its only user. The line before `call` delists it, and `call` waits for the
            // grace period. `node` comes from a `Registration`, which has no key by which a second
            // user could find it.
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

    /// Tells whether a node is listed. The answer may be stale at once if exit runs in parallel.
    pub(crate) fn is_listed<N: Notifier>(&self, node: &NodeRef<N>) -> bool {
        // SAFETY: A reference needs a live node: `node` holds a count of it.
        unsafe { node.header().as_ref() }.is_listed()
    }

    /// Tells whether the list is empty. The answer may be stale at once if registrars run in
    /// parallel.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // ORDER(core-delist): a thread that finds the list empty sees everything that happened
        // before the last node was unlinked, above all its `release`. Partner: the store in
        // `unlink`. If weaker, exit could return before the effects of a `release` that
        // `unregister` ran. Model: loom `s_48_s_50`.
        let order = if mutant("exit_peeks_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        self.head.load(order).is_null()
    }

    /// Finds the newest live node of a subsystem for which `is_wanted` is true, and takes a
    /// reference to it.
    #[inline(always)]
    pub(crate) fn lookup<N: Notifier>(
        &self,
        owner: &Arc<Pending>,
        is_wanted: impl Fn(&N) -> bool,
    ) -> Result<NodeRef<N>, NotCounted> {
        let _guard = self.srcu.read_lock();
        // SAFETY: The node must be reached in an open read section: `_guard` keeps one open until
        // the return. Only `Subsystem<N>` calls this, with its own `owner`.
        unsafe { node::lookup(self.first(), owner, is_wanted) }
    }
}

/// An open read section, and the first subscriber at the time it was opened.
///
/// # Invariants
/// `first` is null or was reached in the section that `guard` keeps open.
#[derive(Debug)]
pub(crate) struct ReadSection<G> {
    first: *const Header,
    guard: G,
}

// SAFETY: A guard and a pointer to a subscriber move to the other thread. The guard is `Send`, and
// the subscriber is `Send` and `Sync` and stays alive in the guard's section. Without this impl,
// the compiler's message about a bracket that is sent to another thread would name this private
// type.
unsafe impl<G: Send> Send for ReadSection<G> {}

impl ReadSection<OwnedGuard> {
    /// Opens a section that keeps its address space alive.
    pub(crate) fn of(mm: Mm) -> Self {
        let guard = OwnedGuard::new(mm);
        Self {
            first: guard.mm().subscriptions().first(),
            guard,
        }
    }

    pub(crate) fn mm(&self) -> &Mm {
        self.guard.mm()
    }
}

impl<G> ReadSection<G> {
    /// Tells whether the list was empty when the section was opened.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_null()
    }

    /// Calls `f` for each subscriber, newest first, and continues after one that panics.
    pub(crate) fn for_each(&self, mm: &Mm, mut f: impl FnMut(&dyn Notifier)) {
        self.walk()
            .each(|node| mm.catching(|| f(node.callbacks().notifier())));
    }

    /// Calls the non-blockable start of every subscriber. If any of them refuses, closes the window
    /// of the intervals and calls the end of those that accepted.
    pub(crate) fn try_start(
        &self,
        range: &InvalidateRange<'_>,
        window: Option<Window>,
    ) -> Result<(), WouldBlock> {
        if try_start_from(None, &mut self.walk(), range, window, false) {
            Err(WouldBlock)
        } else {
            Ok(())
        }
    }

    /// Returns a cursor that stands on the newest subscriber.
    #[inline(always)]
    pub(crate) fn walk(&self) -> Walk<'_> {
        Walk {
            at: self.first,
            section: PhantomData,
        }
    }
}

/// The cursor of a walk.
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

    /// Calls `f` for each node that is still listed when the walk reaches it. A callback of this
    /// walk may delist later nodes.
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
        // SAFETY: A reference needs a live node. `at` was reached in a section that is still open
        // (invariant), so no thread has freed it yet.
        unsafe { self.at.as_ref() }
    }

    /// Advances the cursor to the successor of `node`, on which the cursor stands.
    #[inline(always)]
    fn pass(&mut self, node: &'a Header) {
        // ORDER: Relaxed is enough. A node's successor was linked earlier, under the same lock, so
        // the Acquire load in `first` covers its content too.
        // INVARIANT: the successor was reached from a node of the same section.
        self.at = node.next.load(Ordering::Relaxed);
    }
}

/// How many subscribers one frame of [`try_start_from`] remembers.
const AT_ONCE: usize = 32;

/// Some of the subscribers that accepted a start, newest first, and a link to the frame that holds
/// the newer ones. The stack records which subscribers accepted, because a start must not allocate.
struct Accepted<'f, 'a> {
    nodes: [Option<&'a Header>; AT_ONCE],
    newer: Option<&'f Accepted<'f, 'a>>,
}

impl Accepted<'_, '_> {
    /// Calls the end of each of these subscribers, newest first. Skips subscribers that were
    /// delisted since their start, as every end does.
    fn end(&self, range: &InvalidateRange<'_>) {
        if let Some(newer) = self.newer {
            newer.end(range);
        }
        for node in self.nodes.iter().flatten().filter(|node| node.is_listed()) {
            node.callbacks().end(range);
        }
    }
}

/// Starts the next subscribers and, by recursion, the rest. Starts every subscriber, even after one
/// has refused. If one refuses, or if a newer one did (`refused`), closes the window, ends the
/// subscribers that accepted, and returns true.
fn try_start_from<'a>(
    newer: Option<&Accepted<'_, 'a>>,
    walk: &mut Walk<'a>,
    range: &InvalidateRange<'_>,
    window: Option<Window>,
    mut refused: bool,
) -> bool {
    let mut accepted = Accepted {
        nodes: [None; AT_ONCE],
        newer,
    };
    for slot in &mut accepted.nodes {
        let Some(node) = walk.here() else {
            if refused {
                // The same order as in every end: first the window of the intervals, then the
                // subscribers.
                window
                    .into_iter()
                    .for_each(|window| range.mm.intervals().end(window));
                accepted.end(range);
            }
            return refused;
        };
        walk.pass(node);
        if !node.is_listed() {
            // A callback that ran earlier in this bracket has delisted this node.
            continue;
        }
        // A start that panicked may have done part of its work, so it counts as accepted and its
        // end runs.
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
