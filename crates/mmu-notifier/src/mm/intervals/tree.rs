//! An augmented B+tree of intervals.
//!
//! ```text
//!   inner node:   first: least first address below       last: greatest last address below
//!                 [ 0x1000 .. 0x9000 | 0xa000 .. 0xf000 ]
//!                      |                    |
//!   leaves:       intervals, ordered by first address, then by the interval's own address
//! ```
//!
//! To find the intervals that meet a range, a walk skips every entry that begins after the range,
//! and every entry whose greatest last address lies before it. That takes O(log n + found). A node
//! is six adjacent cache lines, which are fetched together. A binary tree would read four lines one
//! after the other instead.
//!
//! No change of the tree allocates or frees, because the caller holds a lock that a callback takes,
//! and the allocator may run a callback when it returns memory to the kernel. An insert uses nodes
//! that were stored in the tree's [`Spares`] beforehand, and a removal stores the nodes that it no
//! longer needs there.

use crate::VaRange;
use std::mem;
use std::ptr::NonNull;

/// How many entries a node has at most. [`Node::begin_by`] searches 15 keys in four steps.
const FANOUT: usize = 15;

/// Two neighbours are merged if together they have at most this many entries. The node that results
/// is not full, so the next insert does not split it again.
const MERGED: usize = FANOUT * 3 / 4;

/// A tree of pointers to `T`. The tree never dereferences them.
pub(super) struct Tree<T> {
    root: Option<Box<Node<T>>>,
    /// The number of levels, which is the same on every path.
    height: usize,
    pub(super) spares: Spares<T>,
}

/// A node: its entries in order, and for each entry the least first address and the greatest last
/// address below it.
#[repr(C, align(64))]
pub(super) struct Node<T> {
    len: usize,
    /// From index `len` on, all bits are ones.
    first: [u64; FANOUT],
    last: [u64; FANOUT],
    entries: Entries<T>,
}

/// The entries of a node. From index `len` on, they are `None`.
enum Entries<T> {
    Intervals([Option<NonNull<T>>; FANOUT]),
    Children([Option<Box<Node<T>>>; FANOUT]),
}

enum Entry<T> {
    Interval(NonNull<T>),
    Child(Box<Node<T>>),
}

/// The key by which the tree is ordered.
type Key<T> = (u64, NonNull<T>);

const ENTRY: &str = "there is an entry below the length";

impl<T> Tree<T> {
    pub(super) const fn new() -> Self {
        Self {
            root: None,
            height: 0,
            spares: Spares::new(),
        }
    }

    /// Returns the root, for a walk during which no thread changes the tree.
    pub(super) fn root(&self) -> Option<&Node<T>> {
        self.root.as_deref()
    }

    /// Returns how many spare nodes the insert of this interval needs.
    pub(super) fn need(&self, range: VaRange, interval: NonNull<T>) -> usize {
        let full = self
            .root()
            .map_or(0, |root| root.full_towards((range.start().get(), interval)));
        // If the root splits, it gets a parent. The first interval gets a leaf.
        if full == self.height { full + 1 } else { full }
    }

    /// Returns how many spare nodes to reserve for each of several inserts, whatever removals are
    /// among them.
    ///
    /// 1. An insert splits at most one node on each level that the tree has now. So `n` inserts
    ///    add at most `n` entries to the first new level above.
    /// 2. A full node splits at its next addition. A node from a split in the middle splits at its
    ///    seventh addition at the earliest, a node from a split at the edge at its fourteenth. A
    ///    split at the edge also leaves a full node behind, which may split at its next addition.
    ///    So thirteen additions make at most two nodes.
    /// 3. The first node of a new level is the root, with two entries. So the nodes on all new
    ///    levels together are fewer than the inserts.
    /// 4. A removal that merges two nodes makes one of them a spare node, so removals do not
    ///    change the bound.
    pub(super) fn need_each(&self) -> usize {
        self.height + 1
    }

    /// Adds an interval.
    /// # Panics
    /// If there are fewer spare nodes than the insert needs.
    pub(super) fn insert(&mut self, range: VaRange, interval: NonNull<T>) {
        let key = (range.start().get(), interval);
        let right = match &mut self.root {
            Some(root) => {
                let edge = key.0 < root.first[0] || root.greatest_first() < key.0;
                root.insert(key, range.last().get(), edge, &mut self.spares)
            }
            None => {
                let mut leaf = self.spares.take();
                leaf.entries = Entries::Intervals([None; FANOUT]);
                leaf.open(0, (key.0, range.last().get()), Entry::Interval(interval));
                Some(leaf)
            }
        };
        let Some(right) = right else { return };
        self.height += 1;
        self.root = Some(match self.root.take() {
            None => right,
            Some(left) => {
                let mut above = self.spares.take();
                for (at, child) in [left, right].into_iter().enumerate() {
                    above.open(at, child.hull(), Entry::Child(child));
                }
                above
            }
        });
    }

    /// Removes an interval.
    ///
    /// # Panics
    /// If it is not in the tree.
    pub(super) fn remove(&mut self, range: VaRange, interval: NonNull<T>) {
        let root = self
            .root
            .as_mut()
            .expect("an empty tree has nothing to remove");
        root.remove((range.start().get(), interval), &mut self.spares);
        if root.len == 0 {
            self.spares.give(self.root.take().expect("it has a root"));
            self.height = 0;
        }
        while let Some(only) = self.root.as_mut().and_then(|root| root.take_only_child()) {
            self.spares.give(mem::replace(
                self.root.as_mut().expect("it has a root"),
                only,
            ));
            self.height -= 1;
        }
    }
}

impl<T> Node<T> {
    /// Returns how many entries begin at or before `address`.
    fn begin_by(&self, address: u64) -> usize {
        const { assert!(FANOUT == 8 + 4 + 2 + 1) };
        let mut count = 0;
        for step in [8, 4, 2, 1] {
            count += usize::from(self.first[count + step - 1] <= address) * step;
        }
        // If all bits of `address` are ones, unused entries are counted as well.
        count.min(self.len)
    }

    /// Tells whether any interval below meets `range`.
    pub(super) fn meets(&self, range: VaRange) -> bool {
        let Some(nearest) = self.begin_by(range.last().get()).checked_sub(1) else {
            return false;
        };
        let reaches = |last: &u64| *last >= range.start().get();
        if reaches(&self.last[nearest]) {
            match &self.entries {
                Entries::Intervals(intervals) => {
                    // The caller is about to call this interval.
                    fetch(intervals[nearest].expect(ENTRY).as_ptr(), 128);
                    return true;
                }
                Entries::Children(children) => {
                    let child = children[nearest].as_deref().expect(ENTRY);
                    fetch(child, size_of::<Self>());
                    if child.meets(range) {
                        return true;
                    }
                }
            }
        }
        // The intervals of earlier entries begin no later than those of the nearest entry, so none
        // of them begins after the range. Only their last addresses matter.
        self.last[..nearest].iter().any(reaches)
    }

    /// Calls `visit` for each interval that meets `range`, in order, until a call returns false.
    /// Returns false if a call did so.
    pub(super) fn visit(&self, range: VaRange, visit: &mut impl FnMut(NonNull<T>) -> bool) -> bool {
        let begun = self.begin_by(range.last().get());
        let mut meeting = (0..begun).filter(|at| self.last[*at] >= range.start().get());
        match &self.entries {
            Entries::Intervals(intervals) => {
                // Prefetch the cache lines of all these intervals now. Otherwise each callback
                // would wait for the lines of its interval.
                meeting
                    .clone()
                    .for_each(|at| fetch(intervals[at].expect(ENTRY).as_ptr(), 128));
                meeting.all(|at| visit(intervals[at].expect(ENTRY)))
            }
            Entries::Children(children) => {
                meeting.all(|at| children[at].as_ref().expect(ENTRY).visit(range, visit))
            }
        }
    }

    /// Returns the first interval of an entry.
    fn head(&self, at: usize) -> NonNull<T> {
        match &self.entries {
            Entries::Intervals(intervals) => intervals[at].expect(ENTRY),
            Entries::Children(children) => children[at].as_ref().expect(ENTRY).head(0),
        }
    }

    /// Returns how many entries have a key that is at most `key`.
    fn rank(&self, key: Key<T>) -> usize {
        let mut rank = self.begin_by(key.0);
        while rank != 0 && (self.first[rank - 1], self.head(rank - 1)) > key {
            rank -= 1;
        }
        rank
    }

    /// Returns the index of the entry below which `key` is, or would be inserted.
    fn towards(&self, key: Key<T>) -> usize {
        self.rank(key).saturating_sub(1)
    }

    /// Returns how many full nodes there are at the end of the path to a key, below the last node
    /// with room.
    fn full_towards(&self, key: Key<T>) -> usize {
        let (mut node, mut full) = (self, 0);
        loop {
            full = if node.len == FANOUT { full + 1 } else { 0 };
            let Entries::Children(children) = &node.entries else {
                return full;
            };
            node = children[node.towards(key)].as_ref().expect(ENTRY);
        }
    }

    /// Returns the least first and the greatest last address.
    fn hull(&self) -> (u64, u64) {
        (
            self.first[0],
            self.last[..self.len].iter().copied().fold(0, u64::max),
        )
    }

    /// Returns the first address of the last interval.
    fn greatest_first(&self) -> u64 {
        let mut node = self;
        while let Entries::Children(children) = &node.entries {
            node = children[node.len - 1].as_ref().expect(ENTRY);
        }
        node.first[node.len - 1]
    }

    /// Adds an interval. Splits at an edge if the interval begins before or after all others. If
    /// the node was split, returns its new successor.
    fn insert(
        &mut self,
        key: Key<T>,
        last: u64,
        edge: bool,
        spares: &mut Spares<T>,
    ) -> Option<Box<Self>> {
        let rank = self.rank(key);
        let Entries::Children(children) = &mut self.entries else {
            return self.put(rank, (key.0, last), Entry::Interval(key.1), edge, spares);
        };
        let at = rank.saturating_sub(1);
        let right = children[at]
            .as_mut()
            .expect(ENTRY)
            .insert(key, last, edge, spares);
        self.sum_up(at);
        right.and_then(|right| self.put(at + 1, right.hull(), Entry::Child(right), edge, spares))
    }

    /// Removes an interval.
    fn remove(&mut self, key: Key<T>, spares: &mut Spares<T>) {
        let at = self.towards(key);
        let Entries::Children(children) = &mut self.entries else {
            assert_eq!(
                self.head(at),
                key.1,
                "an interval that is removed is in the tree"
            );
            return self.close_interval(at);
        };
        let child = children[at].as_mut().expect(ENTRY);
        child.remove(key, spares);
        if child.len == 0 {
            spares.give(self.close_child(at));
            return;
        }
        self.sum_up(at);
        if !self.merge(at, spares) && at != 0 {
            self.merge(at - 1, spares);
        }
    }

    /// Merges two neighbours if together they have at most [`MERGED`] entries. Returns whether it
    /// merged them.
    fn merge(&mut self, at: usize, spares: &mut Spares<T>) -> bool {
        let Entries::Children(children) = &mut self.entries else {
            return false;
        };
        let Some([Some(left), Some(right)]) = children.get_mut(at..at + 2) else {
            return false;
        };
        if left.len + right.len > MERGED {
            return false;
        }
        right.move_tail(0, left);
        spares.give(self.close_child(at + 1));
        self.sum_up(at);
        true
    }

    /// Takes the child out of an inner node that has only one.
    fn take_only_child(&mut self) -> Option<Box<Self>> {
        let inner = matches!(self.entries, Entries::Children(_));
        (inner && self.len == 1).then(|| self.close_child(0))
    }

    /// Recomputes the addresses of a child's entry.
    fn sum_up(&mut self, at: usize) {
        if let Entries::Children(children) = &self.entries {
            (self.first[at], self.last[at]) = children[at].as_ref().expect(ENTRY).hull();
        }
    }

    /// Adds an entry. If the node was split, returns its new successor.
    fn put(
        &mut self,
        at: usize,
        hull: (u64, u64),
        entry: Entry<T>,
        edge: bool,
        spares: &mut Spares<T>,
    ) -> Option<Box<Self>> {
        if self.len < FANOUT {
            self.open(at, hull, entry);
            return None;
        }
        let mut right = spares.take();
        right.entries = self.entries.none();
        // Intervals that arrive in ascending or descending order leave full nodes behind them.
        let middle = if edge { at } else { FANOUT / 2 };
        self.move_tail(middle, &mut right);
        if at <= FANOUT / 2 {
            self.open(at, hull, entry)
        } else {
            right.open(at - middle, hull, entry)
        }
        Some(right)
    }

    /// Adds an entry where there is room.
    fn open(&mut self, at: usize, (first, last): (u64, u64), entry: Entry<T>) {
        self.first.copy_within(at..self.len, at + 1);
        self.last.copy_within(at..self.len, at + 1);
        (self.first[at], self.last[at]) = (first, last);
        self.len += 1;
        match (&mut self.entries, entry) {
            (Entries::Intervals(intervals), Entry::Interval(interval)) => {
                intervals[at..self.len].rotate_right(1);
                intervals[at] = Some(interval);
            }
            (Entries::Children(children), Entry::Child(child)) => {
                children[at..self.len].rotate_right(1);
                children[at] = Some(child);
            }
            _ => unreachable!("a leaf has intervals, an inner node has children"),
        }
    }

    /// Removes an interval from a leaf.
    fn close_interval(&mut self, at: usize) {
        self.close(at);
        if let Entries::Intervals(intervals) = &mut self.entries {
            intervals[at..=self.len].rotate_left(1);
            intervals[self.len] = None;
        }
    }

    /// Removes a child from an inner node.
    fn close_child(&mut self, at: usize) -> Box<Self> {
        self.close(at);
        let Entries::Children(children) = &mut self.entries else {
            unreachable!("a leaf has no children")
        };
        children[at..=self.len].rotate_left(1);
        children[self.len].take().expect(ENTRY)
    }

    fn close(&mut self, at: usize) {
        self.first.copy_within(at + 1..self.len, at);
        self.last.copy_within(at + 1..self.len, at);
        self.len -= 1;
        self.first[self.len] = u64::MAX;
    }

    /// Moves the entries from `from` on to the end of a node of the same kind, which has room for
    /// them.
    fn move_tail(&mut self, from: usize, to: &mut Self) {
        let (here, there) = (from..self.len, to.len..to.len + self.len - from);
        to.first[there.clone()].swap_with_slice(&mut self.first[here.clone()]);
        to.last[there.clone()].swap_with_slice(&mut self.last[here.clone()]);
        match (&mut self.entries, &mut to.entries) {
            (Entries::Intervals(from), Entries::Intervals(to)) => {
                to[there.clone()].swap_with_slice(&mut from[here])
            }
            (Entries::Children(from), Entries::Children(to)) => {
                to[there.clone()].swap_with_slice(&mut from[here])
            }
            _ => unreachable!("neighbours are of one kind"),
        }
        (self.len, to.len) = (from, there.end);
    }
}

impl<T> Entries<T> {
    /// Returns an empty set of entries of the same kind.
    fn none(&self) -> Self {
        match self {
            Self::Intervals(_) => Self::Intervals([None; FANOUT]),
            Self::Children(_) => Self::Children([const { None }; FANOUT]),
        }
    }
}

/// Nodes without entries, for inserts. The first child of a node is the next node.
pub(super) struct Spares<T> {
    front: Option<Box<Node<T>>>,
    len: usize,
}

impl<T> Spares<T> {
    pub(super) const fn new() -> Self {
        Self {
            front: None,
            len: 0,
        }
    }

    /// Allocates this many nodes.
    pub(super) fn allocate(count: usize) -> Self {
        let mut spares = Self::new();
        for _ in 0..count {
            let entries = Entries::Intervals([None; FANOUT]);
            spares.give(Box::new(Node {
                len: 0,
                first: [u64::MAX; FANOUT],
                last: [0; FANOUT],
                entries,
            }));
        }
        spares
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn add(&mut self, mut more: Self) {
        while more.len != 0 {
            self.give(more.take());
        }
    }

    /// Takes all nodes.
    pub(super) fn take_all(&mut self) -> Self {
        mem::replace(self, Self::new())
    }

    /// Takes one node, as an inner node.
    ///
    /// # Panics
    /// If there is no node.
    fn take(&mut self) -> Box<Node<T>> {
        let mut node = self
            .front
            .take()
            .expect("the spare nodes were counted before");
        let Entries::Children(children) = &mut node.entries else {
            unreachable!("a spare node may have children")
        };
        self.front = children[0].take();
        self.len -= 1;
        node
    }

    /// Adds a node that has no entry.
    fn give(&mut self, mut node: Box<Node<T>>) {
        debug_assert_eq!(node.len, 0, "a spare node has no entry");
        let mut children = [const { None }; FANOUT];
        children[0] = self.front.take();
        node.entries = Entries::Children(children);
        self.front = Some(node);
        self.len += 1;
    }
}

impl<T> Drop for Spares<T> {
    /// Drops the nodes in a loop, because recursion could overflow the stack.
    fn drop(&mut self) {
        while self.front.is_some() {
            drop(self.take());
        }
    }
}

/// Prefetches the cache lines of data that will be read next.
#[inline(always)]
fn fetch<U>(place: *const U, bytes: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: A prefetch has no precondition: it neither reads nor faults, whatever the
        // address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.wrapping_byte_add(line).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (place, bytes);
}

#[cfg(test)]
mod tests;
