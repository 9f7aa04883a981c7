//! One subscriber in memory, and the counted reference to it.
//!
//! # Safety
//! A node is handled as `NonNull`. It is one `Box<Aligned<N>>`, or lies in memory of a caller of [`raw`](crate::raw). Two
//! facts carry every `unsafe` block here:
//!
//! * **counted**: a [`NodeRef`] holds one of `users`. While `users` is not zero nobody queues the free.
//! * **deferred**: the free is queued once, by the one thread that saw `users` become zero (or that consumed the
//!   `Registration`), after the node was unlinked, and runs after a grace period of the address space's domain. So a
//!   node reached through the list is alive until the end of the read section it was reached in.

mod raw;

pub use raw::{Embedded, SurplusPut};

use crate::context;
use crate::subsystem::Pending;
use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, Ordering};
use crate::sync::{Arc, mutant};
use crate::{InvalidateRange, Mm, Notifier, WouldBlock, lockdep};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};

/// What the list knows of a subscriber, whatever its type.
///
/// # Invariants
/// It is the first field of a `Node<N>`, and `notifier` points to the `value` of that same node.
#[repr(C)]
pub(super) struct Header {
    /// First, so that the address of a queued head is the address of its node.
    rcu: UnsafeCell<srcu::Head>,
    pub(super) next: AtomicPtr<Header>,
    /// The link that points here, null when not listed. Changed under the list's lock only.
    pub(super) pprev: AtomicPtr<AtomicPtr<Header>>,
    /// Whether `get` may find it: every bracket that does not call it has ended.
    live: AtomicBool,
    /// Which count of `owner` holds the queued free.
    bank: AtomicU8,
    users: AtomicU32,
    /// The subsystem: the key of a notifier that `get` made, and what counts the free of either kind. Not every
    /// `Registration` has one, and none is found by it, because none is ever `live`.
    owner: Option<Arc<Pending>>,
    mm: Mm,
    /// Behind the first cache line, which is all that get and put touch, with the value, which is what it calls.
    notifier: NonNull<dyn Callbacks>,
}

impl Header {
    #[inline(always)]
    pub(super) fn callbacks(&self) -> &dyn Callbacks {
        // SAFETY: The pointee must be alive and not mutably borrowed. It is the `value` of the node that `self` is part of
        // (invariant), so it lives as long as `self` does, and nobody makes a `&mut` to it before the node is freed.
        unsafe { self.notifier.as_ref() }
    }

    pub(super) fn is_inherited(&self) -> bool {
        self.mm.is_inherited()
    }

    fn users_max(&self) -> u32 {
        self.owner.as_ref().map_or(u32::MAX, |owner| owner.users_max)
    }

    /// Runs `dispose`, gives the reference to the address space back, and only then tells the subsystem.
    fn freed(self, dispose: impl FnOnce()) {
        let Self { mm, owner, bank, .. } = self;
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

/// A notifier as brackets call it: its panics are caught in here. So a walk is made of calls that do not unwind, and the
/// bracket around it stays in registers.
pub(super) trait Callbacks: Notifier {
    extern "C" fn start(&self, range: &InvalidateRange<'_>);
    extern "C" fn end(&self, range: &InvalidateRange<'_>);
    /// Its panics are not caught: the caller has to know of them.
    fn try_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock>;
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
}

/// The memory of one subscriber of type `N`: how the list knows it, and the notifier itself.
#[repr(C)]
pub struct Node<N: Notifier> {
    header: Header,
    value: N,
}

/// Alone on its cache lines: getters of one address space must not slow those of another.
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

// SAFETY: `NodeRef` gives `&N` to whoever holds it and lets the value be dropped on the reclaimer: N must be `Send` and
// `Sync`, which `Notifier` demands. The rest of the node is atomics, the `Send + Sync` handles `Mm` and `Arc`, and the
// head, which only the queueing thread and then the reclaimer touch.
unsafe impl<N: Notifier> Send for NodeRef<N> {}
// SAFETY: As for `Send`: everything reachable through `&NodeRef` is `Sync`.
unsafe impl<N: Notifier> Sync for NodeRef<N> {}

/// A free that is queued, of a node that takes part in its subsystem's `synchronize`.
pub(crate) struct CountedFree {
    owner: Arc<Pending>,
    bank: u8,
}

impl CountedFree {
    /// Counts it as done.
    pub(crate) fn freed(self) {
        self.owner.freed(self.bank);
    }
}

/// Why no reference to a node could be had.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotCounted {
    /// There is none, or it was put for the last time.
    Gone,
    /// Its count is at the maximum.
    Overflow,
}

impl<N: Notifier> NodeRef<N> {
    /// Makes an unlisted node with one user.
    pub(crate) fn new(mm: Mm, owner: Option<Arc<Pending>>, value: N) -> Self {
        let node = Aligned(Node::unlisted(mm, owner, value));
        let node = NonNull::from(Box::leak(Box::new(node))).cast();
        // SAFETY: The node must be new, and alive as long as it has a user: it was made above, and `free` is the only end of
        // its box. The wrapper begins with the node.
        unsafe { Self::adopt(node) }
    }

    /// Makes the one reference to a node that was just written to where it stays.
    ///
    /// # Safety
    /// `node` must be an unlisted node with one user, not shared yet, and stay alive as long as it has users.
    pub(crate) unsafe fn adopt(node: NonNull<Node<N>>) -> Self {
        // SAFETY: The place must be within a live allocation: it is a field of the node. No reference is made.
        let value = unsafe { &raw mut (*node.as_ptr()).value };
        let notifier: *mut dyn Callbacks = value;
        let notifier = NonNull::new(notifier).expect("the address of a field is not null");
        // SAFETY: Writing needs a live place that nobody else uses: `node` is not shared yet.
        unsafe { (*node.as_ptr()).header.notifier = notifier };
        // INVARIANT: `notifier` points to the value of its own node from here on.
        Self { node, owns: PhantomData }
    }

    /// Returns the node, whose count the caller takes over.
    pub(crate) fn into_node(self) -> NonNull<Node<N>> {
        ManuallyDrop::new(self).node
    }

    /// Returns the reference that `into_node` gave away.
    ///
    /// # Safety
    /// `node` must be alive and counted, and the count be the caller's to give.
    pub(crate) unsafe fn from_node(node: NonNull<Node<N>>) -> Self {
        Self { node, owns: PhantomData }
    }

    pub(super) fn header(&self) -> NonNull<Header> {
        self.node.cast()
    }

    fn as_header(&self) -> &Header {
        // SAFETY: The node must be alive: counted. `Header` is only ever shared.
        unsafe { self.header().as_ref() }
    }

    pub(crate) fn value(&self) -> &N {
        // SAFETY: The node must be alive: counted. Nobody makes a `&mut N` before the free.
        unsafe { &(*self.node.as_ptr()).value }
    }

    pub(crate) fn mm(&self) -> &Mm {
        &self.as_header().mm
    }

    pub(crate) fn users(&self) -> u32 {
        self.as_header().users.load(Ordering::Relaxed)
    }

    pub(crate) fn set_live(&self) {
        // ORDER(core-live): the grace period before this store, to whoever finds the node without waiting itself. Partner:
        // the load in `lookup`. Weaker, a second getter could trust a subscription that an older bracket does not know.
        self.as_header().live.store(true, Ordering::Release);
    }

    /// Counts, at its subsystem if it has one, a free that the caller is about to queue by itself.
    pub(crate) fn count_free(&self) -> Option<CountedFree> {
        let owner = Arc::clone(self.as_header().owner.as_ref()?);
        Some(CountedFree { bank: owner.queued(), owner })
    }

    pub(crate) fn try_clone(&self) -> Result<Self, NotCounted> {
        // SAFETY: The node must be alive: counted. It is an `N`, as `self` is.
        unsafe { Self::from_header(self.header(), self.as_header().users_max()) }
    }

    /// Takes one more reference, unless the last one is gone or the count is full.
    ///
    /// # Safety
    /// `node` must be the header of a live `Node<N>`, by the pointer that `new` made: it may become the one to free it by.
    #[inline(always)]
    unsafe fn from_header(node: NonNull<Header>, max: u32) -> Result<Self, NotCounted> {
        // SAFETY: The node must be alive: the caller's duty.
        let header = unsafe { node.as_ref() };
        let mut users = header.users.load(Ordering::Relaxed);
        loop {
            match users {
                0 if !mutant("get_revives") => return Err(NotCounted::Gone),
                n if n >= max => return Err(NotCounted::Overflow),
                _ => {}
            }
            // ORDER: Relaxed is enough: whoever holds a reference or found the node in the list already sees its content, and
            // the count alone decides who frees. Model: loom `s_27`.
            match header.users.compare_exchange_weak(users, users + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    return Ok(Self { node: node.cast(), owns: PhantomData });
                }
                Err(now) => users = now,
            }
        }
    }

    /// Takes the value out of a node that was delisted before a grace period which has ended.
    ///
    /// # Safety
    /// The node must be delisted, a grace period of its domain must have passed since, and `self` must be its one user.
    pub(crate) unsafe fn into_value(self) -> N {
        // SAFETY: A `Box` needs the unique pointer that came from one: `new` leaked it, `self` is the one user, and no walker
        // can stand on it any more (the caller's duty).
        let node = unsafe { Box::from_raw(self.into_node().cast::<Aligned<N>>().as_ptr()) };
        node.0.value
    }
}

/// Gives the reference back; the last one delists the node and queues its free. Never blocks, never allocates.
impl<N: Notifier> Drop for NodeRef<N> {
    #[inline]
    fn drop(&mut self) {
        // ORDER(core-put): AcqRel: every use of the node by whoever put earlier, before the free by whoever puts last. Partner:
        // itself. Weaker, the free could overtake another putter's last access.
        let order = if mutant("put_relaxed") { Ordering::Relaxed } else { Ordering::AcqRel };
        if self.as_header().users.fetch_sub(1, order) == 1 {
            // SAFETY: The node is alive until it is freed, this was its last user, and `free` is for the `N` that it is.
            unsafe { retire(self.header(), free::<N>) };
        }
    }
}

/// Finds the newest node of `owner` that is wanted, live and can still be counted.
///
/// # Safety
/// `header` must be null or a node reached in a read section that is still open, and `owner` that of a `Subsystem<N>`.
#[inline(always)]
pub(super) unsafe fn lookup<N: Notifier>(
    mut header: *mut Header,
    owner: &Arc<Pending>,
    is_wanted: impl Fn(&N) -> bool,
) -> Result<NodeRef<N>, NotCounted> {
    while let Some(pointer) = NonNull::new(header) {
        // SAFETY: A reference needs a live node: reached in an open read section (the caller's duty), so deferred.
        let node = unsafe { pointer.as_ref() };
        // ORDER(core-live): partner of the store in `set_live`.
        let ours = node.owner.as_ref().is_some_and(|key| Arc::ptr_eq(key, owner))
            && (node.live.load(Ordering::Acquire) || mutant("get_trusts_the_unready"));
        // SAFETY: It must be a live `Node<N>`: reached in an open read section, and only `Subsystem<N>` makes nodes with its own
        // `owner`.
        if ours && is_wanted(unsafe { &(*pointer.cast::<Node<N>>().as_ptr()).value }) {
            // SAFETY: As above.
            match unsafe { NodeRef::from_header(pointer, owner.users_max) } {
                Err(NotCounted::Gone) => {}
                found => return found,
            }
        }
        // ORDER: Relaxed is enough, as in the walks.
        header = node.next.load(Ordering::Relaxed);
    }
    Err(NotCounted::Gone)
}

/// Delists a node and queues its free.
///
/// # Safety
/// `node` must be alive, its last user gone, and `free` right for its type.
#[cold]
unsafe fn retire(node: NonNull<Header>, free: unsafe fn(NonNull<srcu::Head>)) {
    // ORDER(core-put): What earlier putters did is behind us, by the subtraction; the queue hands it on to the free.
    // SAFETY: A reference needs a live node: the caller's duty, and nobody queues the free but this.
    let header = unsafe { node.as_ref() };
    if header.is_inherited() {
        // The value is the parent's to free.
        return;
    }
    // Queueing a head twice may do anything, also never end; where a mutant can do that, it is caught here.
    assert!(!mutant("get_revives") || header.live.swap(false, Ordering::Relaxed), "retired twice");
    if let Some(owner) = &header.owner {
        header.bank.store(owner.queued(), Ordering::Relaxed);
    }
    let list = header.mm.subscriptions();
    list.delist(header);
    let head: NonNull<srcu::Head> = node.cast();
    if mutant("free_at_once") {
        // SAFETY: None; this is what the models must catch.
        return unsafe { free(head) };
    }
    // The free drops the node's handle of the address space, which may be the last and take the domain with it, while
    // this still runs; a handle of our own would have to be dropped here, and that could wait.
    // SAFETY: `head` must stay valid and be queued only once until `free` runs, and `free` must be right for it: the node
    // lives until then (deferred) and its last user is gone, `Head` is the node's first field, and `free` is for its type (the
    // caller's duties).
    unsafe { list.srcu().call_raw_dropping(head, free) };
}

/// Frees a node: its value, then its reference to the address space, and only then tells the subsystem.
///
/// # Safety
/// `head` must be that of a retired `Node<N>`, and a grace period must have passed since it was delisted.
unsafe fn free<N: Notifier>(head: NonNull<srcu::Head>) {
    // SAFETY: A reference needs a live node: this is what frees it, and the header begins with the head.
    if unsafe { head.cast::<Header>().as_ref() }.is_inherited() {
        // Queued before a fork, and this is the child: it is the parent's to free.
        return;
    }
    // SAFETY: A `Box` needs the unique pointer that came from one: `new` leaked it, no user is left and no walker can stand
    // on it (the caller's duty); the head is the first field of the first field.
    let node = unsafe { Box::from_raw(head.cast::<Aligned<N>>().as_ptr()) };
    // In a block of its own, so that the memory is gone before the subsystem is told.
    let (header, value) = {
        let Aligned(Node { header, value }) = *node;
        (header, value)
    };
    header.freed(|| drop(value));
}
