//! The address space of this process, and of its forked child.

use mmu_notifier::MmWithUser;
use mmu_source::{current, current_if_made};
use std::sync::{Arc, Barrier};
use testkit::in_child;

#[test]
fn a_forked_child_has_a_fresh_one() {
    let mine = current();
    let id = mine.id();
    let fresh = || {
        current_if_made().is_none()
            && current().id() != id
            && current().id() == current().id()
            && !current().has_notifiers()
    };
    assert!(in_child(fresh));
    assert_eq!(current().id(), id, "the parent keeps its own");
    assert!(
        in_child(|| in_child(|| current_if_made().is_none())),
        "a grandchild as well"
    );
}

/// A second address space could never be dropped, and a leak checker would report it.
#[test]
fn threads_that_ask_first_at_the_same_time_make_one() {
    const THREADS: usize = 4;
    for _ in 0..200 {
        assert!(in_child(|| {
            let together = Arc::new(Barrier::new(THREADS));
            let ask = |_| {
                let together = Arc::clone(&together);
                let ask = move || {
                    together.wait();
                    let _ = current();
                };
                srcu::Thread::spawn(c"asks", ask).expect("a thread")
            };
            let threads: Vec<_> = (0..THREADS).map(ask).collect();
            threads.into_iter().for_each(srcu::Thread::join);
            // Identities are assigned in order, and no other thread of this child makes an address
            // space.
            MmWithUser::new().id() == current().id() + 1
        }));
    }
}
