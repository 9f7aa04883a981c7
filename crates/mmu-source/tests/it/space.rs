//! The address space of this process, and of its forked child.

use crate::memory::in_a_child;
use mmu_source::{current, current_if_made};

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
