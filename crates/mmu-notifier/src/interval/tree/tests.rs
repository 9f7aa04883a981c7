use super::*;
use crate::Va;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

type Interval = NonNull<u64>;

/// A place that is never looked at.
fn interval(number: usize) -> Interval {
    NonNull::without_provenance(NonZeroUsize::MIN.saturating_add(number))
}

fn pages(first: u64, count: u64) -> VaRange {
    VaRange::covering(Va::new(first << 12), count << 12).unwrap()
}

/// A tree beside a plain list that does the same.
struct Pair {
    tree: Tree<u64>,
    list: BTreeMap<Interval, VaRange>,
}

impl Pair {
    fn new() -> Self {
        Self { tree: Tree::new(), list: BTreeMap::new() }
    }

    /// Gives the tree exactly what it says it needs.
    fn insert(&mut self, range: VaRange, interval: Interval) {
        let need = self.tree.need(range, interval);
        assert!(need <= self.tree.need_each());
        let lack = need - self.tree.spares.len();
        Spares::allocate(lack).move_to(&mut self.tree.spares, 0);
        self.tree.insert(range, interval);
        assert_eq!(self.tree.spares.len(), 0, "it takes what it asked for");
        self.list.insert(interval, range);
    }

    fn remove(&mut self, interval: Interval) {
        let range = self.list.remove(&interval).unwrap();
        let before = nodes(&self.tree);
        self.tree.remove(range, interval);
        assert_eq!(self.tree.spares.len(), before - nodes(&self.tree), "no node is lost");
        self.tree.spares.move_to(&mut Spares::new(), 0);
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
        assert_eq!(found, expected.iter().map(|(_, interval)| *interval).collect::<Vec<_>>());
        assert_eq!(self.tree.root().is_some_and(|root| root.meets(query)), !found.is_empty());
        if let Some(root) = self.tree.root().filter(|_| !found.is_empty()) {
            assert!(!root.visit(query, &mut |one| one != found[found.len() / 2]), "it stops when told to");
        }
    }

    /// Checks order, heights and sums.
    fn check(&self) {
        fn below(node: &Node<u64>, level: usize, keys: &mut Vec<Key<u64>>) {
            assert!((1..=FANOUT).contains(&node.len));
            assert!(node.first[node.len..].iter().all(|first| *first == u64::MAX));
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
            Entries::Children(children) => 1 + children.iter().flatten().map(|child| below(child)).sum::<usize>(),
        }
    }
    tree.root().map_or(0, below)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Few firsts and many intervals: most keys differ by the interval's address alone.
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

    /// The promise behind inserts that are put off: what each reserves is enough for all of them, removals among them or not.
    #[test]
    fn many_inserts_take_no_more_than_each_reserves(
        before in 0..2000_usize,
        late in prop::collection::vec((0..4000_u64, 1..20_u64, 0..5_usize), 1..400),
    ) {
        let mut pair = Pair::new();
        for number in 0..before {
            pair.insert(pages(2 * number as u64, 1), interval(number));
        }
        let reserved = late.len() * pair.tree.need_each();
        Spares::allocate(reserved).move_to(&mut pair.tree.spares, 0);
        for (number, (first, count, removals)) in late.into_iter().enumerate() {
            let interval = interval(before + number);
            pair.tree.insert(pages(first, count), interval);
            pair.list.insert(interval, pages(first, count));
            for _ in 0..removals * usize::from(before % 2 == 0) {
                let Some((old, range)) = pair.list.pop_first() else { break };
                pair.tree.remove(range, old);
            }
        }
        pair.check();
    }
}

#[test]
fn the_last_address_and_the_whole_of_an_address_space_are_found() {
    let mut pair = Pair::new();
    pair.insert(pages((1 << 52) - 1, 1), interval(1));
    pair.insert(VaRange::ALL, interval(2));
    for query in [VaRange::ALL, pages(0, 1), pages((1 << 52) - 1, 1), pages(7, 1)] {
        pair.agree(query);
    }
    pair.remove(interval(2));
    for query in [VaRange::ALL, pages(0, 1), pages((1 << 52) - 1, 1), pages(7, 1)] {
        pair.agree(query);
    }
}

#[test]
fn nodes_are_full_after_inserts_in_order_and_go_with_what_they_held() {
    const COUNT: usize = 20_000;
    let mut pair = Pair::new();
    for number in 0..COUNT {
        pair.insert(pages(number as u64, 1), interval(number));
    }
    pair.check();
    assert!(nodes(&pair.tree) <= COUNT / FANOUT * 11 / 10, "{} nodes", nodes(&pair.tree));
    // Nine out of ten, all over the place.
    for number in (0..COUNT).filter(|number| number % 10 != 0) {
        pair.remove(interval(number));
    }
    pair.check();
    let left = COUNT / 10;
    assert!(nodes(&pair.tree) <= left / FANOUT * 3, "{} nodes for {left} intervals", nodes(&pair.tree));
}
