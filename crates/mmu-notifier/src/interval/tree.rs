//! An augmented AVL tree of intervals whose links lie in the intervals themselves.
//!
//! Ordered by first address, then by the node's own address; each node knows the greatest last address below it, so that
//! the intervals which meet a range are found in O(log n + found). Inserting and removing allocate nothing.
//!
//! # Safety
//! Every pointer in a tree is null or a live [`Links`]. Whoever changes a tree has it to itself (`&mut`, or the lock of
//! its owner); whoever walks it knows that nobody changes it meanwhile. Each function below says that as its duty, and
//! `NonNull::as_ptr` dereferences inside rest on it.

#![expect(clippy::multiple_unsafe_ops_per_block, reason = "one duty, the tree's, carries every line of a rotation")]

use crate::VaRange;
use std::ptr;

/// The links of one interval in one tree.
#[derive(Debug)]
pub(super) struct Links {
    left: *mut Links,
    right: *mut Links,
    first: u64,
    last: u64,
    /// The greatest `last` in this subtree.
    max_last: u64,
    /// The greatest `last` in the left subtree, zero if there is none: a search that goes right then never reads the left
    /// child, which in a large tree is a cache line from memory.
    left_max: u64,
    height: u32,
}

impl Links {
    pub(super) fn new(range: VaRange) -> Self {
        let (first, last) = (range.start().get(), range.last().get());
        Self { left: ptr::null_mut(), right: ptr::null_mut(), first, last, max_last: last, left_max: 0, height: 1 }
    }

    fn overlaps(&self, range: VaRange) -> bool {
        self.first <= range.last().get() && range.start().get() <= self.last
    }
}

/// A subtree: null, or the links of its root.
pub(super) type Root = *mut Links;

/// # Safety
/// `root` must be null or live and not being changed.
unsafe fn summary(root: Root) -> (u32, u64) {
    // SAFETY: Live or null, and not being changed: the caller's duty.
    unsafe { root.as_ref() }.map_or((0, 0), |node| (node.height, node.max_last))
}

/// Computes what `node` says of its subtree from its children.
///
/// # Safety
/// `node` must be live, and the caller must have the tree to itself.
unsafe fn update(node: *mut Links) {
    // SAFETY: Live, and nobody else's: the caller's duty.
    let node = unsafe { &mut *node };
    // SAFETY: A child of a live node is null or live, and the caller has the tree to itself.
    let (left, right) = unsafe { (summary(node.left), summary(node.right)) };
    node.height = left.0.max(right.0) + 1;
    node.left_max = left.1;
    node.max_last = node.last.max(left.1).max(right.1);
}

/// Turns the subtree so that its left child becomes its root.
///
/// # Safety
/// As [`update`]; the left child must not be null.
unsafe fn rotate_right(root: Root) -> Root {
    // SAFETY: Both are live, distinct and nobody else's: the caller's duty.
    unsafe {
        let left = (*root).left;
        (*root).left = (*left).right;
        (*left).right = root;
        update(root);
        update(left);
        left
    }
}

/// Turns the subtree so that its right child becomes its root.
///
/// # Safety
/// As [`update`]; the right child must not be null.
unsafe fn rotate_left(root: Root) -> Root {
    // SAFETY: Both are live, distinct and nobody else's: the caller's duty.
    unsafe {
        let right = (*root).right;
        (*root).right = (*right).left;
        (*right).left = root;
        update(root);
        update(right);
        right
    }
}

/// Makes the heights of the children differ by one at most, where they differ by two at most.
///
/// # Safety
/// As [`update`].
unsafe fn balance(root: Root) -> Root {
    // SAFETY: `root` is live and nobody else's (the caller's duty). A child that is rotated is higher than its sibling by two,
    // so it is not null; its own higher child likewise.
    unsafe {
        let (left, right) = ((*root).left, (*root).right);
        let (left_height, right_height) = (summary(left).0, summary(right).0);
        if left_height > right_height + 1 {
            if summary((*left).left).0 < summary((*left).right).0 {
                (*root).left = rotate_left(left);
            }
            rotate_right(root)
        } else if right_height > left_height + 1 {
            if summary((*right).right).0 < summary((*right).left).0 {
                (*root).right = rotate_right(right);
            }
            rotate_left(root)
        } else {
            update(root);
            root
        }
    }
}

/// The order of the tree.
///
/// # Safety
/// Both must be live and not being changed.
unsafe fn precedes(a: *const Links, b: *const Links) -> bool {
    // SAFETY: Live and not being changed: the caller's duty.
    let (first_a, first_b) = unsafe { ((*a).first, (*b).first) };
    (first_a, a.addr()) < (first_b, b.addr())
}

/// Adds `node`, and returns the new root.
///
/// # Safety
/// The caller must have the tree to itself; `node` must be live until it is removed, and in no tree.
pub(super) unsafe fn insert(root: Root, node: *mut Links) -> Root {
    // SAFETY: Everything reached is live and the caller's alone; `node` is too (the caller's duty).
    unsafe {
        if root.is_null() {
            (*node).left = ptr::null_mut();
            (*node).right = ptr::null_mut();
            update(node);
            return node;
        }
        if precedes(node, root) {
            (*root).left = insert((*root).left, node);
        } else {
            (*root).right = insert((*root).right, node);
        }
        balance(root)
    }
}

/// Takes `node` out, and returns the new root.
///
/// # Safety
/// The caller must have the tree to itself, and `node` must be in it.
pub(super) unsafe fn remove(root: Root, node: *mut Links) -> Root {
    // SAFETY: Everything reached is live and the caller's alone; the search ends at `node`, which is in the tree (the caller's
    // duty), so `root` is never null.
    unsafe {
        if root == node {
            if (*node).right.is_null() {
                return (*node).left;
            }
            let (next, right) = pop_first((*node).right);
            (*next).left = (*node).left;
            (*next).right = right;
            return balance(next);
        }
        if precedes(node, root) {
            (*root).left = remove((*root).left, node);
        } else {
            (*root).right = remove((*root).right, node);
        }
        balance(root)
    }
}

/// Takes the first node out, and returns it and the new root.
///
/// # Safety
/// The caller must have the tree to itself, and `root` must not be null.
unsafe fn pop_first(root: Root) -> (*mut Links, Root) {
    // SAFETY: Everything reached is live and the caller's alone: the caller's duty.
    unsafe {
        if (*root).left.is_null() {
            return (root, (*root).right);
        }
        let (first, left) = pop_first((*root).left);
        (*root).left = left;
        (first, balance(root))
    }
}

/// Calls `visit` for each interval that meets `range`, in order, until it says false; tells whether it never did.
///
/// # Safety
/// Nobody may change the tree meanwhile.
pub(super) unsafe fn visit(root: Root, range: VaRange, f: &mut impl FnMut(*mut Links) -> bool) -> bool {
    // SAFETY: Null or live, and not being changed: the caller's duty.
    let Some(node) = (unsafe { root.as_ref() }) else { return true };
    // SAFETY: As for the whole tree.
    if node.left_max >= range.start().get() && !unsafe { visit(node.left, range, f) } {
        return false;
    }
    if node.first > range.last().get() {
        return true;
    }
    if node.overlaps(range) && !f(root) {
        return false;
    }
    if node.max_last < range.start().get() {
        return true;
    }
    // SAFETY: As for the whole tree.
    unsafe { visit(node.right, range, f) }
}

/// Tells whether any interval meets `range`.
///
/// # Safety
/// Nobody may change the tree meanwhile.
pub(super) unsafe fn meets(mut root: Root, range: VaRange) -> bool {
    // SAFETY: Null or live, and not being changed: the caller's duty.
    while let Some(node) = unsafe { root.as_ref() } {
        if node.overlaps(range) {
            return true;
        }
        // If the left subtree reaches the range's start and none of it meets the range, all of it that reaches so far
        // begins after the range, and so does everything to the right.
        let left_reaches = !node.left.is_null() && node.left_max >= range.start().get();
        root = if left_reaches { node.left } else { node.right };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Va;

    fn pages(first: u64, count: u64) -> VaRange {
        VaRange::covering(Va::new(first << 12), count << 12).unwrap()
    }

    /// Checks order, balance and the summaries; returns height and number of nodes.
    fn check(root: Root) -> (u32, usize) {
        // SAFETY: The test owns the tree.
        let Some(node) = (unsafe { root.as_ref() }) else { return (0, 0) };
        let (left, right) = (check(node.left), check(node.right));
        assert!(left.0.abs_diff(right.0) <= 1 && node.height == left.0.max(right.0) + 1);
        for child in [node.left, node.right].into_iter().filter(|child| !child.is_null()) {
            // SAFETY: The test owns the tree.
            let (max, before) = unsafe { ((*child).max_last, precedes(child, root)) };
            assert!(max <= node.max_last);
            assert!(child != node.left || max == node.left_max);
            assert_eq!(before, child == node.left);
        }
        (node.height, left.1 + right.1 + 1)
    }

    #[test]
    fn random_changes_keep_order_and_balance_and_agree_with_a_plain_list() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % bound
        };
        let nodes: Vec<*mut Links> =
            (0..300).map(|_| Box::into_raw(Box::new(Links::new(pages(next(400), 1 + next(20)))))).collect();
        let (mut root, mut inside) = (ptr::null_mut(), Vec::<*mut Links>::new());
        for step in 0..6000 {
            let node = nodes[usize::try_from(next(300)).unwrap()];
            if let Some(index) = inside.iter().position(|one| *one == node) {
                inside.swap_remove(index);
                // SAFETY: The test owns the tree, and `node` is in it.
                root = unsafe { remove(root, node) };
            } else {
                inside.push(node);
                // SAFETY: The test owns the tree, and `node` is not in it.
                root = unsafe { insert(root, node) };
            }
            let query = pages(next(420), 1 + next(10));
            // SAFETY: The test owns the nodes.
            let mut expected: Vec<_> = inside.iter().copied().filter(|one| unsafe { &**one }.overlaps(query)).collect();
            // SAFETY: The test owns the nodes.
            expected.sort_by_key(|one| (unsafe { (**one).first }, one.addr()));
            let mut found = Vec::new();
            // SAFETY: The test owns the tree.
            unsafe {
                visit(root, query, &mut |node| {
                    found.push(node);
                    true
                })
            };
            assert_eq!(found, expected, "at step {step}");
            // SAFETY: The test owns the tree.
            assert_eq!(unsafe { meets(root, query) }, !expected.is_empty());
            if step % 50 == 0 {
                assert_eq!(check(root).1, inside.len());
            }
        }
        for node in nodes {
            // SAFETY: Each came from `Box::into_raw` above and is used no more.
            drop(unsafe { Box::from_raw(node) });
        }
    }
}
