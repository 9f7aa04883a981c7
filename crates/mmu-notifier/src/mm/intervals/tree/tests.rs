use super::*;
use crate::Va;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

type Interval = NonNull<u64>;

/// A pointer that the tree compares and never dereferences.
fn interval(number: usize) -> Interval {
    NonNull::without_provenance(NonZeroUsize::MIN.saturating_add(number))
}

fn pages(first: u64, count: u64) -> VaRange {
    VaRange::covering(Va::new(first << 12), count << 12).unwrap()
}

/// A tree, and a plain list with the same content.
struct Pair {
    tree: Tree<u64>,
    list: BTreeMap<Interval, VaRange>,
    removed: usize,
    /// Whether the test has reserved the spare nodes of all later inserts.
    reserved: bool,
}

impl Pair {
    fn new() -> Self {
        Self {
            tree: Tree::new(),
            list: BTreeMap::new(),
            removed: 0,
            reserved: false,
        }
    }

    fn reserve(&mut self, inserts: usize) {
        self.reserved = true;
        self.tree
            .spares
            .add(Spares::allocate(inserts * self.tree.need_each()));
    }

    /// Reserves exactly the spare nodes that `need` asks for, unless the test has reserved all, and
    /// inserts.
    fn insert(&mut self, range: VaRange, interval: Interval) {
        let need = self.tree.need(range, interval);
        assert!(self.reserved || need <= self.tree.need_each());
        if !self.reserved {
            self.tree.spares.add(Spares::allocate(need));
        }
        let before = self.tree.spares.len();
        self.tree.insert(range, interval);
        assert_eq!(
            self.tree.spares.len(),
            before - need,
            "it takes what it asked for"
        );
        assert!(self.list.insert(interval, range).is_none());
    }

    fn remove(&mut self, interval: Interval) {
        let range = self.list.remove(&interval).unwrap();
        self.removed += 1;
        let all = nodes(&self.tree) + self.tree.spares.len();
        self.tree.remove(range, interval);
        assert_eq!(
            self.tree.spares.len() + nodes(&self.tree),
            all,
            "no node is lost"
        );
        if !self.reserved {
            drop(self.tree.spares.take_all());
        }
    }

    fn agree(&self, query: VaRange) {
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        let visited_all = self.tree.root().is_none_or(|root| {
            root.visit(query, &mut |interval| {
                found.push(interval);
                true
            })
        });
        assert!(visited_all);
        for (interval, range) in &self.list {
            if range.start() <= query.last() && query.start() <= range.last() {
                expected.push((range.start(), *interval));
            }
        }
        expected.sort();
        assert_eq!(
            found,
            expected
                .iter()
                .map(|(_, interval)| *interval)
                .collect::<Vec<_>>()
        );
        assert_eq!(
            self.tree.root().is_some_and(|root| root.meets(query)),
            !found.is_empty()
        );
        if let Some(root) = self.tree.root().filter(|_| !found.is_empty()) {
            assert!(
                !root.visit(query, &mut |one| one != found[found.len() / 2]),
                "it stops when told to"
            );
        }
    }

    /// Checks the order, the heights, and the first and last address that each child covers.
    fn check(&self) {
        fn below(node: &Node<u64>, level: usize, keys: &mut Vec<Key<u64>>) {
            assert!((1..=FANOUT).contains(&node.len));
            assert!(
                node.first[node.len..]
                    .iter()
                    .all(|first| *first == u64::MAX)
            );
            match &node.entries {
                Entries::Intervals(intervals) => {
                    assert_eq!(level, 1, "all leaves lie on one level");
                    keys.extend((0..node.len).map(|at| (node.first[at], intervals[at].unwrap())));
                    assert!(intervals[node.len..].iter().all(Option::is_none));
                }
                Entries::Children(children) => {
                    for (at, child) in children[..node.len].iter().enumerate() {
                        let child = child.as_ref().unwrap();
                        assert_eq!((node.first[at], node.last[at]), child.hull());
                        below(child, level - 1, keys);
                    }
                    assert!(children[node.len..].iter().all(Option::is_none));
                }
            }
        }
        let mut keys = Vec::new();
        if let Some(root) = self.tree.root() {
            below(root, self.tree.height, &mut keys);
            assert!(root.len > 1 || matches!(root.entries, Entries::Intervals(_)));
        } else {
            assert_eq!(self.tree.height, 0);
        }
        assert!(keys.is_sorted());
        assert_eq!(keys.len(), self.list.len());
    }
}

fn nodes(tree: &Tree<u64>) -> usize {
    fn below(node: &Node<u64>) -> usize {
        match &node.entries {
            Entries::Intervals(_) => 1,
            Entries::Children(children) => {
                1 + children
                    .iter()
                    .flatten()
                    .map(|child| below(child))
                    .sum::<usize>()
            }
        }
    }
    tree.root().map_or(0, below)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The intervals share few first addresses, so most keys differ only in the pointer.
    #[test]
    fn random_changes_keep_order_and_sums_and_agree_with_a_plain_list(
        steps in prop::collection::vec((0..300_usize, 0..60_u64, 1..20_u64, 0..80_u64), 1..800),
    ) {
        let mut pair = Pair::new();
        for (step, (number, first, count, query)) in steps.into_iter().enumerate() {
            let interval = interval(number);
            if pair.list.contains_key(&interval) {
                pair.remove(interval);
            } else {
                pair.insert(pages(first, count), interval);
            }
            pair.agree(pages(query, 1 + query % 7));
            if step % 20 == 0 {
                pair.check();
            }
        }
        pair.agree(VaRange::ALL);
        while let Some((interval, _)) = pair.list.first_key_value() {
            pair.remove(*interval);
            pair.check();
        }
    }

    /// The promise that deferred inserts rely on: if each insert reserves `need_each` nodes, the
    /// nodes suffice for all inserts, whatever removals are among them.
    #[test]
    fn many_inserts_take_no_more_than_each_reserves(
        before in prop::collection::vec(run(), 0..3),
        late in prop::collection::vec((run(), 0..3_usize), 1..8),
    ) {
        let mut pair = Pair::new();
        let insert_all = |pair: &mut Pair, firsts: Vec<u64>| {
            for first in firsts {
                let interval = interval(pair.list.len() + pair.removed);
                pair.insert(pages(first, 1), interval);
            }
        };
        before.into_iter().for_each(|run| insert_all(&mut pair, run));
        pair.reserve(late.iter().map(|(run, _)| run.len()).sum());
        for (run, removals) in late {
            for firsts in run.chunks(1 + run.len() / 50) {
                insert_all(&mut pair, firsts.to_vec());
                for _ in 0..removals {
                    let oldest = pair.list.first_key_value().map(|(interval, _)| *interval);
                    oldest.into_iter().for_each(|oldest| pair.remove(oldest));
                }
            }
        }
        pair.check();
    }
}

/// Returns the first pages of intervals, in ascending, descending or random order.
fn run() -> impl Strategy<Value = Vec<u64>> {
    (0..4_u64, 1..1500_u64, 0..3_u8).prop_map(|(region, len, order)| {
        let of = |number| region * 10_000 + number;
        match order {
            0 => (0..len).map(of).collect(),
            1 => (0..len).rev().map(of).collect(),
            _ => (0..len).map(|number| of(number * 7919 % 9973)).collect(),
        }
    })
}

#[test]
fn the_last_address_and_the_whole_of_an_address_space_are_found() {
    let mut pair = Pair::new();
    pair.insert(pages((1 << 52) - 1, 1), interval(1));
    pair.insert(VaRange::ALL, interval(2));
    for query in [
        VaRange::ALL,
        pages(0, 1),
        pages((1 << 52) - 1, 1),
        pages(7, 1),
    ] {
        pair.agree(query);
    }
    pair.remove(interval(2));
    for query in [
        VaRange::ALL,
        pages(0, 1),
        pages((1 << 52) - 1, 1),
        pages(7, 1),
    ] {
        pair.agree(query);
    }
}

/// These inserts arrive in descending order, but after the interval at page 0, so not at an edge of
/// the tree. If each of them split a full node at its front, each would take one node on every new
/// level, more than `need_each` reserves.
#[test]
fn inserts_down_to_a_full_tree_take_no_more_than_each_reserves() {
    for up in [15, 224, 3100, 3375] {
        let mut pair = Pair::new();
        pair.insert(pages(0, 1), interval(0));
        pair.reserve(up + 30_000);
        for number in 0..up {
            pair.insert(pages(100_000 + number as u64, 1), interval(1 + number));
        }
        for number in 0..30_000 {
            pair.insert(pages(90_000 - number as u64, 1), interval(10_000 + number));
        }
        pair.check();
        let count = pair.list.len();
        assert!(
            nodes(&pair.tree) <= count / FANOUT * 3,
            "{} nodes for {count} intervals",
            nodes(&pair.tree)
        );
    }
}

#[test]
fn nodes_are_full_after_inserts_in_order_and_freed_with_their_intervals() {
    const COUNT: usize = 20_000;
    for down in [false, true] {
        let mut pair = Pair::new();
        for number in 0..COUNT {
            pair.insert(
                pages(if down { COUNT - number } else { number } as u64, 1),
                interval(number),
            );
        }
        pair.check();
        assert!(
            nodes(&pair.tree) <= COUNT / FANOUT * 11 / 10,
            "{} nodes",
            nodes(&pair.tree)
        );
        // Remove nine intervals out of ten.
        for number in (0..COUNT).filter(|number| number % 10 != 0) {
            pair.remove(interval(number));
        }
        pair.check();
        let left = COUNT / 10;
        assert!(
            nodes(&pair.tree) <= left / FANOUT * 3,
            "{} nodes for {left} intervals",
            nodes(&pair.tree)
        );
    }
}
