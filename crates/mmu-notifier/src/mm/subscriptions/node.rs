//! One subscriber in memory, and the counted reference to it.
//!
//! # The life of a node
//! 1. [`NodeRef::new`] makes the node with one user. No list holds it yet.
//! 2. `Subscriptions::insert` links it at the front of the list. Brackets that begin from now on
//!    call it; older open brackets do not.
//! 3. A grace period passes, so every older bracket has ended. Only then does `set_live` let `get`
//!    find the node.
//! 4. `get` and `try_clone` add users; `put` removes them. The count never leaves zero again.
//! 5. The put that takes `users` to zero delists the node and queues its free (`retire`). A walker
//!    may still stand on the node.
//! 6. After one more grace period no walker can reach the node, and the background thread frees it.
//!
//! A `Registration` never becomes `live`. `unregister` may replace steps 5 and 6: it delists the
//! node, waits for the grace period itself, and returns the value.
//!
//! # Safety
//! A node is handled as `NonNull`. Each node is one `Box<Aligned<N>>`, or lies in memory that a
//! caller of [`raw`](crate::raw) provides. The `unsafe` blocks of this module rely on two facts:
//!
//! * **counted**: a [`NodeRef`] holds one of `users`. While `users` is not zero, no thread queues
//!   the free.
//! * **deferred**: exactly one thread queues the free, once: the thread that took `users` to zero,
//!   or the thread that consumed the `Registration`. This thread has unlinked the node before, and
//!   the free runs after a grace period of the address space's domain. So a node that was reached
//!   through the list stays alive until the end of the read section in which it was reached.

mod raw;
pub(crate) mod registrar;

pub use raw::{Embedded, SurplusPut};

use crate::mm::context;
use crate::pending::Pending;
use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, Ordering};
use crate::sync::{Arc, mutant};
use crate::{InvalidateRange, Mm, Notifier, WouldBlock, lockdep};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};

/// The part of a subscriber that does not depend on its type.
///
/// # Invariants
/// The header is the first field of a `Node<N>`, and `notifier` points to the `value` of that same
/// node.
#[repr(C)]
pub(super) struct Header {
    /// First, so that the address of a queued head is the address of its node.
    rcu: UnsafeCell<srcu::Head>,
    pub(super) next: AtomicPtr<Header>,
    /// The link that points to this header, or null if the node is not listed. Changed under the
    /// list's lock only.
    pub(super) pprev: AtomicPtr<AtomicPtr<Header>>,
    /// Whether `get` may find the node: every bracket that does not call it has ended.
    live: AtomicBool,
    /// Which of the two counts of `owner` holds the queued free.
    bank: AtomicU8,
    users: AtomicU32,
    /// The subsystem, if the notifier has one. The subsystem counts the queued free. It is also the
    /// key by which `get` finds a notifier that `get` made. A `Registration` may have no subsystem,
    /// and no lookup finds a `Registration`, because it is never `live`.
    owner: Option<Arc<Pending>>,
    mm: Mm,
    /// Last, so that this pointer is beside the value, which brackets call through it. `get` and
    /// `put` touch the first cache line only.
    notifier: NonNull<dyn Callbacks>,
}

impl Header {
    #[inline(always)]
    pub(super) fn callbacks(&self) -> &dyn Callbacks {
        // SAFETY: The pointee must be alive and not mutably borrowed. The pointee is the `value` of
        // the node that `self` is part of (invariant), so it lives as long as `self` does, and no
        // code makes a `&mut` to the value before the node is freed.
        unsafe { self.notifier.as_ref() }
    }

    pub(super) fn is_inherited(&self) -> bool {
        self.mm.is_inherited()
    }

    fn users_max(&self) -> u32 {
        self.owner
            .as_ref()
            .map_or(u32::MAX, |owner| owner.users_max)
    }

    /// Runs `dispose`, drops the node's reference to the address space, and only then reports the
    /// free to the subsystem: when `synchronize` returns, value and reference must be gone.
    fn freed(self, dispose: impl FnOnce()) {
        let Self {
            mm, owner, bank, ..
        } = self;
        context::freeing(|| {
            mm.catching(dispose);
            drop(mm);
        });
        if let Some(owner) = owner {
            owner.freed(bank.load(Ordering::Relaxed));
        }
    }

    #[inline(always)]
    pub(super) fn is_listed(&self) -> bool {
        !self.pprev.load(Ordering::Relaxed).is_null()
    }
}

/// A notifier as brackets call it. `start` and `end` catch its panics, so a walk consists of calls
/// that do not unwind, and the compiler can keep the bracket around the walk in registers.
pub(super) trait Callbacks: Notifier {
    extern "C" fn start(&self, range: &InvalidateRange<'_>);
    extern "C" fn end(&self, range: &InvalidateRange<'_>);
    /// Does not catch a panic: after one, the caller must record that the start may have taken
    /// effect.
    fn try_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock>;
    /// Returns the subscriber, for its rarer callbacks.
    fn notifier(&self) -> &dyn Notifier;
}

impl<N: Notifier> Callbacks for N {
    extern "C" fn start(&self, range: &InvalidateRange<'_>) {
        let _callback = lockdep::callback::<N>("invalidate_range_start");
        range.mm.catching(|| self.invalidate_range_start(range));
    }

    extern "C" fn end(&self, range: &InvalidateRange<'_>) {
        let _callback = lockdep::callback::<N>("invalidate_range_end");
        range.mm.catching(|| self.invalidate_range_end(range));
    }

    fn try_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        let _callback = lockdep::callback::<N>("try_invalidate_range_start");
        self.try_invalidate_range_start(range)
    }

    fn notifier(&self) -> &dyn Notifier {
        self
    }
}

/// The memory of one subscriber of type `N`: the header that the list uses, and the notifier.
#[repr(C)]
pub struct Node<N: Notifier> {
    header: Header,
    value: N,
}

/// A node that has its cache lines to itself, so that getters of one address space do not slow the
/// getters of another.
#[repr(C, align(128))]
struct Aligned<N: Notifier>(Node<N>);

impl<N: Notifier> Node<N> {
    /// Returns an unlisted node with one user, for [`NodeRef::adopt`].
    pub(crate) fn unlisted(mm: Mm, owner: Option<Arc<Pending>>, value: N) -> Self {
        let header = Header {
            rcu: UnsafeCell::new(srcu::Head::new()),
            next: AtomicPtr::new(ptr::null_mut()),
            pprev: AtomicPtr::new(ptr::null_mut()),
            live: AtomicBool::new(false),
            bank: AtomicU8::new(0),
            users: AtomicU32::new(1),
            owner,
            mm,
            notifier: NonNull::<N>::dangling(),
        };
        Self { header, value }
    }
}

/// One counted reference to a node.
pub(crate) struct NodeRef<N: Notifier> {
    node: NonNull<Node<N>>,
    owns: PhantomData<Node<N>>,
}

// SAFETY: `NodeRef` gives `&N` to its holder and lets the value be dropped on the reclaimer thread,
// so `N` must be `Send` and `Sync`, which `Notifier` demands. The rest of the node is atomics, the
// `Send + Sync` handles `Mm` and `Arc`, and the head, which only the queueing thread and after it
// the reclaimer touch.
unsafe impl<N: Notifier> Send for NodeRef<N> {}
// SAFETY: As for `Send`: everything reachable through `&NodeRef` is `Sync`.
unsafe impl<N: Notifier> Sync for NodeRef<N> {}

/// A queued free that the node's subsystem counts, so that `synchronize` waits for it.
pub(crate) struct CountedFree {
    owner: Arc<Pending>,
    bank: u8,
}

impl CountedFree {
    /// Counts the free as done.
    pub(crate) fn freed(self) {
        self.owner.freed(self.bank);
    }
}

/// The reason why no reference to a node could be taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotCounted {
    /// There is no such node, or its last reference was put.
    Gone,
    /// The node's count is at the maximum.
    Overflow,
}

impl<N: Notifier> NodeRef<N> {
    /// Makes an unlisted node with one user.
    pub(crate) fn new(mm: Mm, owner: Option<Arc<Pending>>, value: N) -> Self {
        let node = Aligned(Node::unlisted(mm, owner, value));
        let node = NonNull::from(Box::leak(Box::new(node))).cast();
        // SAFETY: The node must be new, and alive as long as it has a user: it was made above, and
        // only the put of its last user frees its box. The wrapper begins with the node.
        unsafe { Self::adopt(node) }
    }

    /// Makes the one reference to a node that was just written to its final place.
    ///
    /// # Safety
    /// `node` must be an unlisted node with one user, not shared yet, and must stay alive as long
    /// as it has users.
    pub(crate) unsafe fn adopt(node: NonNull<Node<N>>) -> Self {
        // SAFETY: The place must be within a live allocation: it is a field of the node. No
        // reference is made.
        let value = unsafe { &raw mut (*node.as_ptr()).value };
        let notifier: *mut dyn Callbacks = value;
        let notifier = NonNull::new(notifier).expect("the address of a field is not null");
        // SAFETY: Writing needs a live place that no other thread uses: `node` is not shared yet.
        unsafe { (*node.as_ptr()).header.notifier = notifier };
        // INVARIANT: `notifier` points to the value of its own node from here on.
        Self {
            node,
            owns: PhantomData,
        }
    }

    /// Returns the node. Its count passes to the caller.
    pub(crate) fn into_node(self) -> NonNull<Node<N>> {
        ManuallyDrop::new(self).node
    }

    /// Makes a reference from the node and the count that `into_node` returned.
    ///
    /// # Safety
    /// `node` must be alive and counted, and the caller must own that count.
    pub(crate) unsafe fn from_node(node: NonNull<Node<N>>) -> Self {
        Self {
            node,
            owns: PhantomData,
        }
    }

    pub(super) fn header(&self) -> NonNull<Header> {
        self.node.cast()
    }

    fn as_header(&self) -> &Header {
        // SAFETY: The node must be alive: counted. Only shared references to a `Header` are ever
        // made.
        unsafe { self.header().as_ref() }
    }

    pub(crate) fn value(&self) -> &N {
        // SAFETY: The node must be alive: counted. No code makes a `&mut N` before the free.
        unsafe { &(*self.node.as_ptr()).value }
    }

    pub(crate) fn mm(&self) -> &Mm {
        &self.as_header().mm
    }

    pub(crate) fn users(&self) -> u32 {
        self.as_header().users.load(Ordering::Relaxed)
    }

    pub(crate) fn set_live(&self) {
        // ORDER(core-live): orders the grace period before this store. Partner: the load in
        // `lookup`. A getter that reads true returns without waiting, so it relies on that grace
        // period. If weaker, it could return while an older bracket that does not call the node is
        // still open.
        self.as_header().live.store(true, Ordering::Release);
    }

    /// Counts a free that the caller is about to queue, at the node's subsystem if it has one.
    pub(crate) fn count_free(&self) -> Option<CountedFree> {
        let owner = Arc::clone(self.as_header().owner.as_ref()?);
        Some(CountedFree {
            bank: owner.queued(),
            owner,
        })
    }

    pub(crate) fn try_clone(&self) -> Result<Self, NotCounted> {
        // SAFETY: The node must be a live `Node<N>`: it is counted, and `self` has this type.
        unsafe { Self::from_header(self.header(), self.as_header().users_max()) }
    }

    /// Takes one more reference, unless the count is zero or full.
    ///
    /// # Safety
    /// `node` must be the header of a live `Node<N>`, with the provenance of the pointer that `new`
    /// made or `adopt` got. If the new reference becomes the last one, its drop frees the node
    /// through this pointer.
    #[inline(always)]
    unsafe fn from_header(node: NonNull<Header>, max: u32) -> Result<Self, NotCounted> {
        // SAFETY: The node must be alive, which the caller promises.
        let header = unsafe { node.as_ref() };
        let mut users = header.users.load(Ordering::Relaxed);
        loop {
            match users {
                0 if !mutant("get_revives") => return Err(NotCounted::Gone),
                n if n >= max => return Err(NotCounted::Overflow),
                _ => {}
            }
            // ORDER: Relaxed is enough. The caller holds a reference or found the node in the list,
            // so it already sees the content. Which thread frees the node depends on the count
            // alone. Model: loom `s_27`.
            match header.users.compare_exchange_weak(
                users,
                users + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Ok(Self {
                        node: node.cast(),
                        owns: PhantomData,
                    });
                }
                Err(now) => users = now,
            }
        }
    }

    /// Takes the value out of a node that was delisted before a grace period which has ended.
    ///
    /// # Safety
    /// The node must be delisted, a grace period of its domain must have passed since, and `self`
    /// must be its only user.
    pub(crate) unsafe fn into_value(self) -> N {
        // SAFETY: A `Box` needs the unique pointer that came from one: `new` leaked the box. The
        // caller promises that `self` is the only user and that no walker can stand on the node any
        // more.
        let node = unsafe { Box::from_raw(self.into_node().cast::<Aligned<N>>().as_ptr()) };
        node.0.value
    }
}

/// Drops the reference. The drop of the last one delists the node and queues its free. The drop
/// never blocks and never allocates.
impl<N: Notifier> Drop for NodeRef<N> {
    #[inline]
    fn drop(&mut self) {
        // ORDER(core-put): AcqRel orders each earlier put, and every use of the node before it,
        // before the free by the last put. Partner: itself. If weaker, the free could overtake the
        // last access through another reference.
        let order = if mutant("put_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::AcqRel
        };
        if self.as_header().users.fetch_sub(1, order) == 1 {
            // SAFETY: The node must be alive, without users, and of the type of `free`. Only
            // `retire` queues its free, the subtraction found the last user, and the node is a
            // `Node<N>`.
            unsafe { retire(self.header(), free::<N>) };
        }
    }
}

/// Finds the newest live node of `owner` for which `is_wanted` is true, and takes a reference to
/// it.
///
/// # Safety
/// `header` must be null or a node that was reached in a read section that is still open. `owner`
/// must be the `Pending` of a `Subsystem<N>`.
#[inline(always)]
pub(super) unsafe fn lookup<N: Notifier>(
    mut header: *mut Header,
    owner: &Arc<Pending>,
    is_wanted: impl Fn(&N) -> bool,
) -> Result<NodeRef<N>, NotCounted> {
    while let Some(pointer) = NonNull::new(header) {
        // SAFETY: A reference needs a live node. The caller promises that the node was reached in
        // an open read section, so its free is deferred.
        let node = unsafe { pointer.as_ref() };
        // ORDER(core-live): partner of the store in `set_live`.
        let ours = node
            .owner
            .as_ref()
            .is_some_and(|key| Arc::ptr_eq(key, owner))
            && (node.live.load(Ordering::Acquire) || mutant("get_trusts_the_unready"));
        // SAFETY: `node` must be a live `Node<N>`. It was reached in an open read section, and only
        // a `Subsystem<N>` makes nodes with its own `owner`.
        if ours && is_wanted(unsafe { &(*pointer.cast::<Node<N>>().as_ptr()).value }) {
            // SAFETY: `node` must be a live `Node<N>`, which it is, as above.
            match unsafe { NodeRef::from_header(pointer, owner.users_max) } {
                Err(NotCounted::Gone) => {}
                found => return found,
            }
        }
        // ORDER: Relaxed is enough, as in `Walk::pass`.
        header = node.next.load(Ordering::Relaxed);
    }
    Err(NotCounted::Gone)
}

/// Delists a node and queues its free.
///
/// # Safety
/// `node` must be alive and without users, and `free` must free nodes of its type.
#[cold]
unsafe fn retire(node: NonNull<Header>, free: unsafe fn(NonNull<srcu::Head>)) {
    // ORDER(core-put): the subtraction that took the count to zero orders all earlier puts before
    // this point, and the queue orders this point before the free.
    // SAFETY: A reference needs a live node. The caller promises that, and no other thread queues
    // the free.
    let header = unsafe { node.as_ref() };
    if header.is_inherited() {
        // This is the child of a fork, and the parent frees the node.
        return;
    }
    // A head that is queued twice corrupts the queue, and a walk of the queue may then never end.
    // So this assertion stops the mutant that retires a node twice.
    assert!(
        !mutant("get_revives") || header.live.swap(false, Ordering::Relaxed),
        "retired twice"
    );
    if let Some(owner) = &header.owner {
        header.bank.store(owner.queued(), Ordering::Relaxed);
    }
    let list = header.mm.subscriptions();
    list.delist(header);
    let head: NonNull<srcu::Head> = node.cast();
    if mutant("free_at_once") {
        // SAFETY: None: this mutant is unsound, and the models must catch it.
        return unsafe { free(head) };
    }
    // The free drops the node's handle of the address space. That handle may be the last one, and
    // then the domain is dropped while this call still runs; `call_raw_dropping` allows that.
    // Keeping a second handle here would not help: dropping it could be the last drop, which waits,
    // and a put must not wait.
    // SAFETY: `head` must stay valid and must not be queued again until `free` runs, and `free`
    // must accept it. The node lives until then (deferred), and only the put of its last user
    // queues it. `Head` is the node's first field, and the caller promises that `free` frees nodes
    // of this type.
    unsafe { list.srcu().call_raw_dropping(head, free) };
}

/// Drops a node's value and then its reference to the address space. Only then reports the free to
/// the subsystem.
///
/// # Safety
/// `head` must be the head of a retired `Node<N>`, and a grace period must have passed since the
/// node was delisted.
unsafe fn free<N: Notifier>(head: NonNull<srcu::Head>) {
    // SAFETY: A reference needs a live node. Only this function frees the node, and the header
    // begins with the head.
    if unsafe { head.cast::<Header>().as_ref() }.is_inherited() {
        // The free was queued before a fork, and this is the child. The parent frees the node.
        return;
    }
    // SAFETY: A `Box` needs the unique pointer that came from one: `new` leaked the box. The caller
    // promises that the node is retired and the grace period over, so no user is left and no walker
    // can stand on the node. The head is the first field of the header, and the header is the first
    // field of the node.
    let node = unsafe { Box::from_raw(head.cast::<Aligned<N>>().as_ptr()) };
    // The block frees the node's memory before `freed` reports to the subsystem.
    let (header, value) = {
        let Aligned(Node { header, value }) = *node;
        (header, value)
    };
    header.freed(|| drop(value));
}
