//! Runs random operations of several threads on the core and on the reference model. Both must
//! agree in their answers and callbacks. `World::agree` says which callbacks may come in another
//! order.
//!
//! One thread operates at a time, with one exception. If an operation waits for brackets of other
//! threads, these threads end the brackets meanwhile.

mod callbacks;
mod steps;
mod threads;
mod world;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use world::World;

/// One step. If a thread makes the step, the first field is the thread's index. An index of an
/// object is taken modulo the count of the existing objects.
#[derive(Debug, Clone)]
enum Op {
    MmNew,
    MmGet(usize),
    MmPut(usize, usize),
    Get(usize, usize, usize, u8),
    GetLocked(usize, usize, usize, u8),
    Clone(usize, usize),
    Put(usize, usize),
    Register(usize, usize, bool),
    RegisterTlb(usize, usize),
    RegisterShadow(usize, usize, u64, u64),
    Unregister(usize, usize),
    UnregisterNoRelease(usize, usize),
    Forget(usize, usize),
    Invalidate(usize, usize, u64, u64),
    TryInvalidate(usize, usize, u64, u64),
    End(usize),
    Young(usize, usize, u64),
    Flush(usize, usize, u64),
    Synchronize(usize, usize),
    Drain(usize, usize),
    Insert(usize, usize, u64, u64, bool),
    Remove(usize, usize),
    ReadBegin(usize, usize),
    TryInstall(usize, usize),
    Snapshot(usize, u64),
    Install(usize, usize),
    Watch(usize, usize, u64, u64),
    Fork,
}

fn op() -> impl Strategy<Value = Op> {
    let n = || 0..16_usize;
    let t = || 0..world::THREADS;
    let key = || 0..2_usize;
    let (page, count) = (|| 0..12_u64, || 0..3_u64);
    prop_oneof![
        3 => prop_oneof![
            2 => Just(Op::MmNew),
            2 => n().prop_map(Op::MmGet),
            4 => (t(), n()).prop_map(|(t, mm)| Op::MmPut(t, mm)),
            1 => Just(Op::Fork),
        ],
        14 => prop_oneof![
            6 => (t(), key(), n(), 0..4_u8).prop_map(|(t, key, mm, alloc)| Op::Get(t, key, mm, alloc)),
            2 => (t(), key(), n(), 0..4_u8).prop_map(|(t, key, mm, alloc)| Op::GetLocked(t, key, mm, alloc)),
            2 => (t(), n()).prop_map(|(t, one)| Op::Clone(t, one)),
            4 => (t(), n()).prop_map(|(t, one)| Op::Put(t, one)),
            1 => (t(), key()).prop_map(|(t, key)| Op::Synchronize(t, key)),
            1 => (t(), key()).prop_map(|(t, key)| Op::Drain(t, key)),
        ],
        9 => prop_oneof![
            2 => (t(), n(), any::<bool>()).prop_map(|(t, mm, refuses)| Op::Register(t, mm, refuses)),
            1 => (t(), n()).prop_map(|(t, mm)| Op::RegisterTlb(t, mm)),
            2 => (t(), n(), page(), count()).prop_map(|(t, mm, page, count)| Op::RegisterShadow(t, mm, page, count)),
            2 => (t(), n()).prop_map(|(t, one)| Op::Unregister(t, one)),
            1 => (t(), n()).prop_map(|(t, one)| Op::UnregisterNoRelease(t, one)),
            1 => (t(), n()).prop_map(|(t, one)| Op::Forget(t, one)),
        ],
        16 => prop_oneof![
            4 => (t(), n(), page(), count()).prop_map(|(t, mm, page, count)| Op::Invalidate(t, mm, page, count)),
            4 => (t(), n(), page(), count()).prop_map(|(t, mm, page, count)| Op::TryInvalidate(t, mm, page, count)),
            7 => n().prop_map(Op::End),
            1 => (t(), n(), page()).prop_map(|(t, mm, page)| Op::Young(t, mm, page)),
            1 => (t(), n(), page()).prop_map(|(t, mm, page)| Op::Flush(t, mm, page)),
        ],
        16 => prop_oneof![
            5 => (t(), n(), page(), count(), any::<bool>())
                .prop_map(|(t, mm, page, count, refuses)| Op::Insert(t, mm, page, count, refuses)),
            3 => (t(), n()).prop_map(|(t, one)| Op::Remove(t, one)),
            4 => (t(), n()).prop_map(|(t, one)| Op::ReadBegin(t, one)),
            4 => (t(), n()).prop_map(|(t, one)| Op::TryInstall(t, one)),
        ],
        8 => prop_oneof![
            3 => (n(), page()).prop_map(|(one, page)| Op::Snapshot(one, page)),
            3 => (t(), n()).prop_map(|(t, one)| Op::Install(t, one)),
            1 => (t(), n(), page(), count()).prop_map(|(t, one, page, count)| Op::Watch(t, one, page, count)),
        ],
    ]
}

/// `PROPTEST_RNG_SEED` repeats a run, and `PROPTEST_CASES` sets the count of its cases.
#[test]
fn random_operations_agree_with_the_model() {
    let chosen = ProptestConfig::default();
    let seed = match chosen.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => rand_seed(),
    };
    println!("PROPTEST_RNG_SEED={seed}");
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() {
        chosen.cases
    } else {
        testkit::rounds(400) as u32
    };
    let config = ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..chosen
    };
    proptest!(config, |(ops in proptest::collection::vec(op(), 1..120))| {
        let mut world = World::new();
        world.run(&Op::MmNew);
        for op in &ops {
            world.run(op);
        }
        world.finish();
    });
}

fn rand_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64)
}
