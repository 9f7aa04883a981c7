//! Lists of regions as links between the regions' entries, so that they need no memory of their
//! own.

use crate::raw::region::Entry;

/// A list of regions. Each link is a region's number plus one, or zero for none.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct List {
    pub(super) head: u32,
    pub(super) tail: u32,
}

/// A singly linked list of dead regions without a lease. The holder of the chain deregisters them
/// one by one.
#[derive(Debug, Default)]
#[must_use = "only the holder deregisters them"]
pub(crate) struct Chain(pub(super) u32);

impl Chain {
    pub(crate) fn is_empty(&self) -> bool {
        self.0 == 0
    }
}

impl List {
    /// Adds a region at the front.
    pub(super) fn push(&mut self, entries: &mut [Entry], region: u32) {
        let entry = &mut entries[region as usize];
        (entry.prev, entry.next) = (0, self.head);
        match self.head.checked_sub(1) {
            Some(head) => entries[head as usize].prev = region + 1,
            None => self.tail = region + 1,
        }
        self.head = region + 1;
    }

    pub(super) fn remove(&mut self, entries: &mut [Entry], region: u32) {
        let Entry { next, prev, .. } = entries[region as usize];
        match next.checked_sub(1) {
            Some(next) => entries[next as usize].prev = prev,
            None => self.tail = prev,
        }
        match prev.checked_sub(1) {
            Some(prev) => entries[prev as usize].next = next,
            None => self.head = next,
        }
    }
}
