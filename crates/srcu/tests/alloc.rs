//! Counts the calls of the allocator in functions that must not allocate.
#![cfg(not(mmun_loom))]

use srcu::{Head, Srcu};
use std::ptr::NonNull;
use std::thread;
use testkit::Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_threads_first_section_and_a_domains_first_use_do_not_allocate() {
    static SHARED: Srcu = Srcu::new();
    // Run more threads at once than fit in the domain's page, so that the domain makes further
    // buckets.
    let together = std::sync::Barrier::new(100);
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let in_shared = Counting::calls(|| drop(SHARED.read_lock()));
                let in_own = Counting::calls(|| {
                    let own = Srcu::new();
                    drop(own.read_lock());
                    own.synchronize().unwrap();
                });
                together.wait();
                assert_eq!((in_shared, in_own), (0, 0));
            });
        }
    });
}

#[test]
fn call_raw_does_not_allocate_after_prepare() {
    unsafe fn nothing(_: NonNull<Head>) {}
    static HEADS: [Head; 1000] = [const { Head::new() }; 1000];
    let srcu = Srcu::new();
    srcu.prepare();
    let queued = Counting::calls(|| {
        let section = srcu.read_lock();
        for head in &HEADS {
            // SAFETY: The heads are statics, and each is queued once. `nothing` may run on any
            // thread.
            unsafe { srcu.call_raw(NonNull::from(head), nothing) };
        }
        let _ = srcu.start_poll();
        drop(section);
    });
    assert_eq!(queued, 0);
    srcu.barrier().unwrap();
}
