//! The subscribers of one address space: the list, who may walk it, and how it changes under walkers.
//!
//! # Safety
//! The list is singly linked for readers and changed under one lock. A walker holds a read section of the domain; a
//! node is freed only after it was unlinked and a grace period passed, and an unlinked node keeps its `next`, so a walker
//! that stands on it still reaches the rest. The lock is never held over a callback, an allocation or a free.
//!
//! # Epochs
//! A bracket must call `end` on exactly those subscribers it called `start` on, less those put in between. It loads the
//! epoch once; a subscriber takes part if its stamp is not younger. A registrar links its node first, with the stamp
//! `epoch + 1`, and then publishes that epoch: whoever reads the new epoch finds the node, whoever read the old one
//! leaves it out from start to end.

mod node;

pub(crate) use node::{NodeRef, NotCounted};

use crate::subsystem::Pending;
use crate::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
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
    epoch: AtomicU64,
    srcu: Srcu,
    lock: Mutex<()>,
}

/// The subscribers that one bracket calls: those no younger than it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epoch(u64);

impl Subscriptions {
    pub(crate) fn new() -> Self {
        Self {
            head: AtomicPtr::new(ptr::null_mut()),
            epoch: AtomicU64::new(0),
            srcu: Srcu::new(),
            lock: Mutex::new(()),
        }
    }

    #[inline]
    pub(crate) fn srcu(&self) -> &Srcu {
        &self.srcu
    }

    /// Returns which subscribers a bracket calls that begins now. Its read section is open already.
    #[inline]
    pub(crate) fn epoch(&self) -> Epoch {
        // ORDER(core-publish): partner of the stores in `insert`. Weaker, a bracket could read a new epoch and miss the node
        // in its start walk, then find it in its end walk.
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Links a new node at the front, for brackets that begin from now on. A grace period later no older bracket is left.
    pub(crate) fn insert<N: Notifier>(&self, node: &NodeRef<N>) {
        let _lock = lock(&self.lock);
        let header = node.header();
        // SAFETY: A reference needs a live node: `node` counts it.
        let node = unsafe { header.as_ref() };
        let first = self.head.load(Ordering::Relaxed);
        let stamp = self.epoch.load(Ordering::Relaxed) + 1;
        node.stamp.store(stamp, Ordering::Relaxed);
        node.next.store(first, Ordering::Relaxed);
        node.pprev.store((&raw const self.head).cast_mut(), Ordering::Relaxed);
        // SAFETY: A reference needs a live node: `first` is listed, and nobody delists it while we hold the lock.
        if let Some(first) = unsafe { first.as_ref() } {
            first.pprev.store((&raw const node.next).cast_mut(), Ordering::Relaxed);
        }
        if mutant("epoch_before_link") {
            self.epoch.store(stamp, Ordering::Release);
        }
        // ORDER(core-publish): the node's content before the pointer to it. Partners: the loads of `head` and `next` in the
        // walks. Weaker, a walker could call through a half-made node.
        self.head.store(header.as_ptr(), Ordering::Release);
        // ORDER(core-publish): the node before its epoch. Partner: the load in `epoch`.
        self.epoch.store(stamp, Ordering::Release);
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
        // ORDER(core-publish): the content of `next`, to walkers that reach it through this link for the first time. Partners:
        // the loads in the walks.
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
    /// If this thread would wait for itself; the caller asks `would_deadlock` before.
    pub(crate) fn reclaim<N: Notifier>(&self, node: NodeRef<N>) -> N {
        self.delist_ref(&node);
        self.srcu.synchronize().expect("unregister asked whether it may wait");
        // SAFETY: The node must be delisted, a grace period must have passed since, and `node` must be its one user: the two
        // lines above, and the caller's `Registration`, which has no key by which a second user could find it.
        unsafe { node.into_value() }
    }

    /// Delists a node that was never shared, and passes its value to `free` after a grace period.
    pub(crate) fn reclaim_later<N: Notifier>(&self, node: NodeRef<N>, free: impl FnOnce(N) + Send + 'static) {
        self.delist_ref(&node);
        self.srcu.call(move || {
            let mm = node.mm().clone();
            if mm.is_inherited() {
                // Queued before a fork, and this is the child: both are the parent's.
                return mem::forget((node, free));
            }
            // SAFETY: The node must be delisted, a grace period must have passed since, and `node` must be its one user: the
            // line before `call`, what `call` waits for, and the caller's `Registration`, which has no key.
            let value = unsafe { node.into_value() };
            context::freeing(|| mm.catching(|| free(value)));
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

    /// Finds the live node of a subsystem and counts it.
    pub(crate) fn lookup<N: Notifier>(&self, owner: &Arc<Pending>) -> Option<Result<NodeRef<N>, NotCounted>> {
        let _guard = self.srcu.read_lock();
        // ORDER(core-publish): partner of the store in `insert`.
        let first = self.head.load(Ordering::Acquire);
        // SAFETY: The node must be reached in an open read section: `_guard`, until the return. Only `Subsystem<N>` calls this,
        // with its own `owner`.
        unsafe { node::lookup(first, owner) }
    }

    /// Calls `f` for each subscriber that takes part in `epoch`, newest first, and goes on after one that panics.
    #[inline]
    pub(crate) fn for_each(&self, section: Section<'_>, epoch: Epoch, mm: &Mm, mut f: impl FnMut(&dyn Notifier)) {
        let mut walk = Walk::new(self, section, epoch);
        if walk.is_done() {
            return;
        }
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| {
            while let Some(node) = walk.next() {
                f(node.notifier());
            }
        })) {
            mm.count_panic(panic);
        }
    }

    /// Calls the non-blockable start of every subscriber; if any refuses, ends those that accepted.
    pub(crate) fn try_start(
        &self,
        section: Section<'_>,
        epoch: Epoch,
        range: &InvalidateRange<'_>,
    ) -> Result<(), WouldBlock> {
        if try_start_from(&mut Walk::new(self, section, epoch), range, false) { Err(WouldBlock) } else { Ok(()) }
    }
}

impl Epoch {
    /// Every subscriber, whenever it came.
    pub(crate) const ALL: Self = Self(u64::MAX);
}

/// The proof of an open read section, by value: a guard whose address is never taken stays in registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section<'a>(PhantomData<&'a Srcu>);

impl<'a> Section<'a> {
    #[inline(always)]
    pub(crate) fn of(_guard: &'a Guard<'_>) -> Self {
        Self(PhantomData)
    }
}

/// A walk in progress: it stands before `at`.
struct Walk<'a> {
    at: *const Header,
    epoch: Epoch,
    _section: Section<'a>,
}

impl<'a> Walk<'a> {
    #[inline]
    fn new(list: &Subscriptions, section: Section<'a>, epoch: Epoch) -> Self {
        // ORDER(core-publish): partner of the store in `insert`.
        Self { at: list.head.load(Ordering::Acquire), epoch, _section: section }
    }

    #[inline]
    fn is_done(&self) -> bool {
        self.at.is_null()
    }

    #[inline]
    fn next(&mut self) -> Option<&'a Header> {
        loop {
            // SAFETY: A reference needs a live node: it was reached in the read section that `_section` proves, which outlives `'a`, so it
            // cannot be freed yet.
            let node = unsafe { self.at.as_ref() }?;
            // ORDER(core-publish): partner of the stores in `insert` and `unlink`.
            self.at = node.next.load(Ordering::Acquire);
            if node.stamp.load(Ordering::Relaxed) <= self.epoch.0 {
                return Some(node);
            }
        }
    }
}

/// Starts the next few subscribers and, by recursion, the rest; returns whether anybody refused, `refused` included, and
/// has then ended those that accepted. The stack is the memory of who accepted: nothing here may allocate.
fn try_start_from(walk: &mut Walk<'_>, range: &InvalidateRange<'_>, mut refused: bool) -> bool {
    const AT_ONCE: usize = 32;
    let mut accepted: [Option<&Header>; AT_ONCE] = [None; AT_ONCE];
    let mut full = true;
    for slot in &mut accepted {
        let Some(node) = walk.next() else {
            full = false;
            break;
        };
        // A start that panicked may have done its work: it counts as accepted, so that its end comes.
        match catch_unwind(AssertUnwindSafe(|| node.notifier().try_invalidate_range_start(range))) {
            Ok(Err(WouldBlock)) => refused = true,
            Ok(Ok(())) => *slot = Some(node),
            Err(panic) => {
                range.mm.count_panic(panic);
                *slot = Some(node);
            }
        }
    }
    if full {
        refused = try_start_from(walk, range, refused);
    }
    if refused {
        // One that was put since its start gets no end, as everywhere.
        for node in accepted.into_iter().flatten().filter(|node| node.is_listed()) {
            range.mm.catching(|| node.notifier().invalidate_range_end(range));
        }
    }
    refused
}
