//! The address space of this process, and of its forked child.

use mmu_source::{current, current_if_made};

/// Runs `check` in a forked child; true if it returned true there.
fn in_a_child(check: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs `check` and ends without unwinding or running the parent's exit handlers; glibc makes its
    // allocator usable in the child.
    match unsafe { libc::fork() } {
        0 => {
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).unwrap_or(false);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!passed)) }
        }
        child => {
            assert!(child > 0, "fork");
            let mut status = 0;
            // SAFETY: writes one int to a local.
            let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(reaped, child);
            status == 0
        }
    }
}

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
    assert!(in_a_child(fresh));
    assert_eq!(current().id(), id, "the parent keeps its own");
    assert!(in_a_child(|| in_a_child(|| current_if_made().is_none())), "a grandchild as well");
}
