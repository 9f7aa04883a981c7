//! Notifiers and intervals in memory that the caller provides.
#![expect(unsafe_code, reason = "that memory")]

use mmu_notifier::raw::{Embedded, Interval, Node, Notifiers, RawIntervalOps, SurplusPut};
use mmu_notifier::{
    Event, InvalidateRange, MmWithUser, Notifier, Va, VaRange, WouldBlock, WouldDeadlock,
};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Calls {
    starts: AtomicUsize,
    releases: AtomicUsize,
    disposed: AtomicUsize,
}

struct Counter(u32, Arc<Calls>);

impl Notifier for Counter {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        self.1.starts.fetch_add(1, Ordering::Relaxed);
    }

    fn release(&self, _: &mmu_notifier::Mm) {
        self.1.releases.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: The memory of each node is a box of its own, which `place` leaks and only `dispose` takes
// back.
unsafe impl Embedded for Counter {
    unsafe fn dispose(node: NonNull<Node<Self>>) {
        // SAFETY: `place` leaked the memory, and no thread uses the node any more.
        let node = unsafe { Box::from_raw(node.as_ptr().cast::<MaybeUninit<Node<Self>>>()) };
        // SAFETY: The node is still initialised.
        let value = unsafe { node.assume_init_ref() }.value();
        // SAFETY: The value is moved out only here.
        let value = unsafe { std::ptr::read(value) };
        value.1.disposed.fetch_add(1, Ordering::Relaxed);
    }
}

fn place<T>() -> NonNull<T> {
    NonNull::from(Box::leak(Box::new(MaybeUninit::<T>::uninit()))).cast()
}

fn register(
    all: &Notifiers<Counter>,
    mm: &MmWithUser,
    number: u32,
    calls: &Arc<Calls>,
) -> NonNull<Node<Counter>> {
    let node = place();
    let mut locked = mm.mmap_write_lock().unwrap();
    // SAFETY: `place` leaked the memory, and only `dispose` takes it back.
    unsafe { all.register(node, Counter(number, Arc::clone(calls)), &mut locked) }.unwrap();
    node
}

#[test]
fn s_15_a_registered_node_is_found_and_s_16_the_newest_first() {
    let (all, mm, calls) = (Notifiers::new(), MmWithUser::new(), Arc::default());
    let one = register(&all, &mm, 1, &calls);
    let newer = register(&all, &mm, 1, &calls);
    let other = register(&all, &mm, 2, &calls);
    assert_eq!(all.find(&mm, |counter| counter.0 == 1), Ok(Some(newer)));
    assert_eq!(all.find(&mm, |counter| counter.0 == 2), Ok(Some(other)));
    assert_eq!(all.find(&mm, |counter| counter.0 == 3), Ok(None));
    assert_eq!(
        all.find(&MmWithUser::new(), |_| true),
        Ok(None),
        "it is another address space"
    );
    drop(mm.invalidate(VaRange::ALL, Event::Clear));
    assert_eq!(calls.starts.load(Ordering::Relaxed), 3);
    for (node, users) in [(one, 1), (newer, 2), (other, 2)] {
        // SAFETY: The node must be alive. It is counted, `users` times.
        assert_eq!(unsafe { node.as_ref() }.users(), users);
        for _ in 0..users {
            // SAFETY: The node must be alive, and this is one of its `users` puts.
            assert_eq!(unsafe { Node::put(node) }, Ok(()));
        }
    }
    all.synchronize().unwrap();
    assert_eq!(
        (calls.disposed.load(Ordering::Relaxed), mm.mm_count()),
        (3, 1)
    );
}

#[test]
fn s_29_a_surplus_put_is_an_error() {
    let (all, mm, calls) = (Notifiers::new(), MmWithUser::new(), Arc::default());
    let node = register(&all, &mm, 1, &calls);
    let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
    // SAFETY: The node has one user.
    assert_eq!(unsafe { Node::put(node) }, Ok(()));
    // SAFETY: The bracket delays the `dispose` of the node.
    assert_eq!(unsafe { Node::put(node) }, Err(SurplusPut));
    drop(bracket);
    all.synchronize().unwrap();
    assert_eq!(calls.disposed.load(Ordering::Relaxed), 1);
}

#[test]
fn s_60_unregister_gives_the_memory_back_though_there_are_users() {
    let (all, mm, calls) = (Notifiers::new(), MmWithUser::new(), Arc::default());
    let node = register(&all, &mm, 1, &calls);
    assert!(all.find(&mm, |_| true).unwrap().is_some());
    let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
    // SAFETY: The node is registered, and stays so, because the call is refused.
    assert_eq!(unsafe { Node::unregister(node) }, Err(WouldDeadlock));
    drop(bracket);
    // SAFETY: The node is registered, and no thread uses it any more.
    assert_eq!(unsafe { Node::unregister(node) }, Ok(()));
    assert_eq!(
        (
            calls.releases.load(Ordering::Relaxed),
            calls.disposed.load(Ordering::Relaxed)
        ),
        (1, 0)
    );
    assert_eq!(mm.mm_count(), 1);
    // SAFETY: `place` leaked the memory, and the node is unregistered. Only its value is still to
    // be dropped.
    unsafe { Counter::dispose(node) };
    assert_eq!((Arc::strong_count(&calls), mm.has_notifiers()), (1, false));
}

struct Range {
    me: NonNull<Interval<Range>>,
    locked: Arc<Mutex<()>>,
    seen: Arc<AtomicU64>,
}

// SAFETY: The pointer points to the interval itself, which is alive during its callbacks.
unsafe impl Send for Range {}
// SAFETY: As for `Send`. A callback uses the pointer only to store the sequence, which is atomic.
unsafe impl Sync for Range {}

impl RawIntervalOps for Range {
    fn invalidate(&self, range: &InvalidateRange<'_>, seq: u64) -> Result<(), WouldBlock> {
        let held = self.locked.try_lock().map_err(|_| WouldBlock)?;
        // SAFETY: The interval is inserted, because this is its callback.
        unsafe { self.me.as_ref() }.set_seq(seq);
        drop(held);
        self.seen
            .store(range.range().start().get(), Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn b_14_b_22_b_29_a_raw_interval_keeps_its_own_lock_and_sequence() {
    let (mm, locked, seen) = (MmWithUser::new(), Arc::default(), Arc::default());
    let page = |number: u64| VaRange::covering(Va::new(number << 12), 1).unwrap();
    let me = place();
    let ops = Range {
        me,
        locked: Arc::clone(&locked),
        seen: Arc::clone(&seen),
    };
    // SAFETY: The place is leaked until it is removed.
    unsafe { Interval::insert(me, &mm, page(7), ops) }.unwrap();
    // SAFETY: The interval is inserted.
    let interval = unsafe { me.as_ref() };
    let seq = interval.read_begin();
    drop(mm.invalidate(page(8), Event::Clear));
    assert!(!interval.read_retry(seq));
    let held = locked.lock().unwrap();
    assert!(mm.try_invalidate(page(7), Event::Clear).is_err());
    drop(held);
    let bracket = mm.invalidate(page(7), Event::Clear);
    assert!(interval.read_retry(seq) && seen.load(Ordering::Relaxed) == 7 << 12);
    assert_eq!(interval.read_begin(), 0, "it would wait for this thread");
    // SAFETY: The interval is inserted, and stays so, because the call is refused.
    assert_eq!(unsafe { Interval::remove(me) }, Err(WouldDeadlock));
    drop(bracket);
    drop(mm.clone());
    assert_eq!(mm.mm_count(), 2);
    // SAFETY: The interval is inserted, and no thread uses it any more.
    unsafe { Interval::remove(me) }.unwrap();
    assert_eq!((mm.mm_count(), Arc::strong_count(&seen)), (1, 1));
    // SAFETY: `place` leaked the memory, and after `remove` only this test uses it.
    drop(unsafe { Box::from_raw(me.as_ptr().cast::<MaybeUninit<Interval<Range>>>()) });
    let mut locked = mm.mmap_write_lock().unwrap();
    let me = place();
    let ops = Range {
        me,
        locked: Arc::default(),
        seen: Arc::default(),
    };
    // SAFETY: The place is leaked until it is removed.
    unsafe { Interval::insert_locked(me, &mut locked, page(7), ops) }.unwrap();
    drop(locked);
    // SAFETY: The interval is inserted.
    unsafe { Interval::remove(me) }.unwrap();
    // SAFETY: `place` leaked the memory, and after `remove` only this test uses it.
    drop(unsafe { Box::from_raw(me.as_ptr().cast::<MaybeUninit<Interval<Range>>>()) });
}
