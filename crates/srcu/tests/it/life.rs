//! Making and dropping domains.

use crate::{Count, Gate};
use srcu::{Head, Srcu};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

static IN_A_STATIC: Srcu = Srcu::new();

#[test]
fn a_domain_can_be_a_static() {
    let section = IN_A_STATIC.read_lock();
    assert!(IN_A_STATIC.synchronize().is_err());
    drop(section);
    IN_A_STATIC.synchronize().unwrap();
}

#[test]
fn an_unused_domain_is_small() {
    assert!(size_of::<Srcu>() <= 16);
    let many: Vec<_> = (0..10_000).map(|_| Srcu::new()).collect();
    assert!(many.iter().all(|srcu| !srcu.read_lock_held()));
}

#[test]
fn s_89_a_drop_runs_the_pending_callbacks() {
    let count = Count::default();
    let srcu = Srcu::new();
    for _ in 0..1000 {
        let count = count.clone();
        srcu.call(move || count.add());
    }
    drop(srcu);
    assert_eq!(count.get(), 1000);
}

#[test]
fn a_domain_dropped_in_its_own_callback_lives_until_the_last_has_returned() {
    let count = Count::default();
    let other = Srcu::new();
    for _ in 0..200 {
        let srcu = Arc::new(Srcu::new());
        let section = srcu.read_lock();
        for last in [false, true] {
            let (mine, count) = (Arc::clone(&srcu), count.clone());
            srcu.call(move || {
                if !last {
                    // Queue a callback behind the callback that drops the domain.
                    let count = count.clone();
                    mine.call(move || count.add());
                }
                drop(mine);
                count.add();
            });
        }
        drop(section);
        drop(srcu);
    }
    // The domains are dropped, so the test cannot call their `barrier`. If a callback drops the
    // last handle, the reclaimer runs the remaining callbacks later.
    while count.get() < 600 {
        other.call(|| ());
        other.barrier().unwrap();
    }
    assert_eq!(count.get(), 600);
}

#[test]
fn a_domain_dropped_in_a_callback_of_another_runs_its_pending_callbacks() {
    let count = Count::default();
    let (outer, inner) = (Srcu::new(), Srcu::new());
    let gate = Gate::new();
    outer.call(gate.waiter());
    let in_callback = count.clone();
    outer.call(move || {
        inner.call(move || in_callback.add());
        drop(inner);
    });
    gate.open();
    outer.barrier().unwrap();
    while count.get() == 0 {
        outer.call(|| ());
        outer.barrier().unwrap();
    }
    assert_eq!(count.get(), 1);
}

#[test]
fn s_89_a_leaked_guard_does_not_hang_the_drop() {
    static HEAD: Head = Head::new();
    static RAN: AtomicBool = AtomicBool::new(false);
    unsafe fn run(_: NonNull<Head>) {
        RAN.store(true, Ordering::Relaxed);
    }
    let srcu = Srcu::new();
    std::mem::forget(srcu.read_lock());
    assert!(srcu.synchronize().is_err(), "the thread is inside for ever");
    // SAFETY: The head is a static that is queued once. `run` may run on any thread.
    unsafe { srcu.call_raw(NonNull::from(&HEAD), run) };
    drop(srcu);
    assert!(!RAN.load(Ordering::Relaxed), "its grace period never comes");
}

#[test]
fn domains_are_made_used_and_dropped_on_many_threads() {
    let count = Count::default();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let srcu = Srcu::new();
                    drop(srcu.read_lock());
                    let count = count.clone();
                    srcu.call(move || count.add());
                }
            });
        }
    });
    assert_eq!(count.get(), 2000);
}

/// Each node keeps the domain alive in which it is queued. The free of the last node drops the
/// domain, perhaps before other threads have returned from `call_raw_dropping`.
#[test]
fn the_last_callback_may_drop_its_domain() {
    #[repr(C)]
    struct Node {
        head: Head,
        srcu: Arc<Srcu>,
        freed: Count,
    }
    unsafe fn free(head: NonNull<Head>) {
        // SAFETY: The head is the first field of a node from `Box::leak` below. The node is queued
        // once, and no other code uses it now.
        let node = unsafe { Box::from_raw(head.cast::<Node>().as_ptr()) };
        node.freed.add();
    }
    let freed = Count::default();
    for _ in 0..1000 {
        let srcu = Arc::new(Srcu::new());
        srcu.prepare();
        let nodes = [(); 4].map(|()| Node {
            head: Head::new(),
            srcu: Arc::clone(&srcu),
            freed: freed.clone(),
        });
        drop(srcu);
        thread::scope(|scope| {
            for node in nodes {
                scope.spawn(|| {
                    let node = NonNull::from(Box::leak(Box::new(node)));
                    // SAFETY: A reference needs a live node. The node lives until `free`, which
                    // cannot run before the call below.
                    let srcu = &unsafe { node.as_ref() }.srcu;
                    // SAFETY: The node lives until `free`, which frees nodes of this type, and its
                    // head is its first field. The node keeps the domain alive until the head is
                    // queued.
                    unsafe { srcu.call_raw_dropping(node.cast(), free) };
                });
            }
        });
    }
    while freed.get() != 4000 {
        thread::yield_now();
    }
}
