//! Compares the tree of intervals with a plain list. The fuzzer's bytes choose inserts, removals
//! and searches.
#![no_main]

#[path = "../../crates/mmu-notifier/src/mm/intervals/tree.rs"]
mod tree;

use libfuzzer_sys::fuzz_target;
use mmu_notifier::{Va, VaRange};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use tree::{Spares, Tree};

fn pages(first: u8, count: u8) -> VaRange {
    VaRange::covering(Va::new(u64::from(first) << 12), (u64::from(count) + 1) << 12).expect("it is short")
}

fuzz_target!(|steps: Vec<(u8, u8, u8)>| {
    let (mut tree, mut list) = (Tree::<u8>::new(), BTreeMap::new());
    for (number, first, count) in steps {
        // A pointer that is never dereferenced. Only its address identifies the interval.
        let interval = NonNull::<u8>::without_provenance(NonZeroUsize::MIN.saturating_add(usize::from(number)));
        if let Some(range) = list.remove(&interval) {
            tree.remove(range, interval);
            drop(tree.spares.take_all());
        } else {
            let range = pages(first, count);
            let need = tree.need(range, interval);
            assert!(need <= tree.need_each());
            tree.spares.add(Spares::allocate(need));
            tree.insert(range, interval);
            assert_eq!(tree.spares.len(), 0, "it takes what it asked for");
            list.insert(interval, range);
        }
        let query = pages(count, first % 8);
        let mut expected: Vec<_> = list.iter().filter(|(_, range)| range.overlaps(query)).collect();
        expected.sort_by_key(|(interval, range)| (range.start(), **interval));
        let mut found = Vec::new();
        let root = tree.root();
        root.map(|root| root.visit(query, &mut |interval| { found.push(interval); true }));
        assert!(found.iter().eq(expected.iter().map(|(interval, _)| *interval)));
        assert_eq!(root.is_some_and(|root| root.meets(query)), !found.is_empty());
    }
});
