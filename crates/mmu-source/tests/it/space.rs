//! The address space of this process, and of its forked child.

use mmu_source::{current, current_if_made};
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
    assert!(in_child(|| in_child(|| current_if_made().is_none())), "a grandchild as well");
}
