//! S-63: the detector finds a wait for callbacks under a lock that a callback takes, whether the
//! callback takes the lock before the wait or after it.

use crate::support::{Gate, page, spawn};
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, InvalidateSeq, MmWithUser,
    Notifier, Registration, ShadowOps, Subsystem, lockdep,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

struct Table {
    lock: Mutex<u32>,
    order: lockdep::Map,
}

impl Table {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            lock: Mutex::new(0),
            order: lockdep::Map::new("Table::lock"),
        })
    }

    fn with<R>(&self, f: impl FnOnce(&mut u32) -> R) -> R {
        let _order = self.order.acquire();
        f(&mut self.lock.lock().unwrap())
    }
}

/// Takes the table's lock in its start, and in its drop.
struct Client(Arc<Table>);

impl Notifier for Client {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        self.0.with(|count| *count += 1);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.with(|count| *count += 1);
    }
}

struct Empty;
impl Notifier for Empty {}
impl IntervalOps for Empty {
    fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
        None
    }
}

impl ShadowOps for Empty {
    fn zap(&mut self, _: &InvalidateRange<'_>) {}
}

/// Runs `f`. Returns the message of the detector if it stopped `f`.
fn report(f: impl FnOnce()) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(f)).err()?;
    Some(
        panic
            .downcast::<String>()
            .map_or_else(|_| "no text".into(), |text| *text),
    )
}

fn places(text: &str) -> usize {
    text.matches("lockdep.rs:").count()
}

#[test]
fn s_63_a_wait_under_a_lock_that_a_callback_took_is_reported() {
    let (mm, table) = (MmWithUser::new(), Table::new());
    let client = Registration::new(&mm, Client(Arc::clone(&table))).unwrap();
    let other = Registration::new(&mm, Empty).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    let text = report(|| {
        let _order = table.order.acquire();
        drop(other.unregister());
    })
    .expect("the kernel would hang here one day");
    assert!(
        text.contains("Table::lock") && places(&text) == 3,
        "it names the wait, the lock and the callback: {text}"
    );
    drop(client.unregister());
}

#[test]
fn s_63_a_callback_that_takes_a_lock_held_in_a_wait_is_reported() {
    let (mm, table) = (MmWithUser::new(), Table::new());
    let _client = Registration::new(&mm, Client(Arc::clone(&table))).unwrap();
    table.with(|_| drop(Registration::new(&mm, Empty).unwrap().unregister()));
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(
        mm.callback_panics(),
        1,
        "the callback was stopped before it could hang"
    );
    assert_eq!(table.with(|count| *count), 0);
}

#[test]
fn s_63_exit_and_synchronize_are_waits_too() {
    let (mm, table) = (MmWithUser::new(), Table::new());
    let clients = Subsystem::<_, std::convert::Infallible, _>::new({
        let table = Arc::clone(&table);
        move |_: &MmWithUser| Ok(Client(Arc::clone(&table)))
    });
    let client = clients.get(&mm).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    let text = report(|| {
        let _order = table.order.acquire();
        let _waits = clients.synchronize();
    });
    assert!(text.is_some());
    let text = report(|| {
        let _order = table.order.acquire();
        drop(mm);
    });
    assert!(text.is_some());
    drop(client);
}

#[test]
fn s_63_the_write_lock_and_the_first_insert_are_waits_too() {
    let (mm, table) = (MmWithUser::new(), Table::new());
    let client = Registration::new(&mm, Client(Arc::clone(&table))).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    let waits: [fn(&MmWithUser); 2] = [
        |mm| drop(mm.mmap_write_lock()),
        |mm| drop(IntervalNotifier::insert(mm, page(1), Empty)),
    ];
    for wait in waits {
        let text = report(|| {
            let _order = table.order.acquire();
            wait(&mm);
        })
        .expect("a registrar may hold the write lock, and wait");
        assert_eq!(places(&text), 3, "{text}");
    }
    drop(client.unregister());
}

/// Calls functions that may wait and that no test above calls, under a lock that a callback of the
/// same address space has taken.
#[test]
fn s_63_every_function_that_may_wait_is_one() {
    let (mm, table, gate) = (Arc::new(MmWithUser::new()), Table::new(), Gate::new());
    let _client = Registration::new(&mm, Client(Arc::clone(&table))).unwrap();
    let subsystem: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    let shadow = InvalidateSeq::new([page(1)], Empty);
    let intervals =
        [1, 1].map(|number| IntervalNotifier::insert(&mm, page(number), Empty).unwrap());
    let [read, removed] = intervals;
    let mut locked = mm.mmap_write_lock().unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    let stopped = |name, wait: Box<dyn FnOnce() + '_>| {
        let text = report(|| {
            let _order = table.order.acquire();
            wait();
        });
        let text = text.unwrap_or_else(|| panic!("{name} is not known to wait"));
        assert!(
            text.contains("Table::lock") && places(&text) == 3,
            "{name}: {text}"
        );
    };
    stopped(
        "get_locked",
        Box::new(|| drop(subsystem.get_locked(&mut locked))),
    );
    stopped(
        "drain_until_idle",
        Box::new(|| subsystem.drain_until_idle().unwrap()),
    );
    stopped("watch", Box::new(|| shadow.watch([], |_| ()).unwrap()));
    stopped("remove", Box::new(|| drop(removed.remove())));
    // Another thread opens a window, so that a reader waits.
    let source = spawn({
        let (mm, gate) = (Arc::clone(&mm), Arc::clone(&gate));
        move || mm.with_invalidation(page(1), Event::Unmap, |_| gate.pass())
    });
    gate.wait_for(1);
    stopped(
        "read_begin",
        Box::new(|| assert!(read.check_retry(read.read_begin()))),
    );
    gate.open();
    source.join();
}

/// A lock that is taken inside two brackets must not be held in a wait for either.
#[test]
fn s_63_a_nested_bracket_hides_no_outer_one() {
    let (mms, table) = ([MmWithUser::new(), MmWithUser::new()], Table::new());
    let [outer, inner] = mms
        .each_ref()
        .map(|mm| mm.invalidate(page(1), Event::Unmap));
    table.with(|_| ());
    drop((outer, inner));
    for mm in &mms {
        let text = report(|| {
            let _order = table.order.acquire();
            drop(Registration::new(mm, Empty));
        });
        assert!(text.is_some_and(|text| places(&text) == 3));
    }
}

/// The drop of a `Map` removes what the detector has recorded of its lock, because a later lock may
/// get the same place in the detector's table.
#[test]
fn s_63_a_new_lock_is_not_taken_for_an_old_one() {
    let mm = MmWithUser::new();
    for _ in 0..20 {
        let bracket = mm.invalidate(page(1), Event::Unmap);
        Table::new().with(|_| ());
        drop(bracket);
        let held_in_wait = Table::new();
        held_in_wait.with(|_| drop(Registration::new(&mm, Empty).unwrap().unregister()));
        drop(held_in_wait);
    }
    assert_eq!(mm.callback_panics(), 0);
}

#[test]
fn s_63_a_wait_that_is_refused_is_not_reported() {
    let (mm, table) = (MmWithUser::new(), Table::new());
    let subsystem: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    table.with(|_| {
        assert!(subsystem.get(&mm).is_err() && Registration::new(&mm, Empty).is_err());
        assert!(IntervalNotifier::insert(&mm, page(1), Empty).is_err());
    });
    drop(bracket);
}

#[test]
fn s_63_an_interval_must_not_wait_under_its_own_state() {
    let mm = MmWithUser::new();
    let interval = IntervalNotifier::insert(&mm, page(1), Empty).unwrap();
    let text = report(|| interval.with_state(|_| drop(Registration::new(&mm, Empty))));
    assert!(text.is_some_and(|text| text.contains("interval's state") && places(&text) == 2));
    interval.with_state(|_| drop(Registration::new(&MmWithUser::new(), Empty)));
}

#[test]
fn s_63_waits_and_locks_that_cannot_meet_are_not_reported() {
    let (mm, other, table) = (MmWithUser::new(), MmWithUser::new(), Table::new());
    let client = Registration::new(&mm, Client(Arc::clone(&table))).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    // Another address space, and another lock.
    table.with(|_| drop(Registration::new(&other, Empty).unwrap().unregister()));
    Table::new().with(|_| drop(Registration::new(&mm, Empty).unwrap().unregister()));
    // A lock that is released before the wait.
    table.with(|_| ());
    drop(client.unregister());
    // A lock that only a free takes, and that a thread holds while it waits for brackets.
    let freed = Table::new();
    drop(Registration::new(&mm, Client(Arc::clone(&freed))).unwrap());
    let subsystem: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    subsystem.get(&mm).unwrap().put();
    subsystem.synchronize().unwrap();
    freed.with(|_| drop(Registration::new(&mm, Empty).unwrap().unregister()));
    assert_eq!(mm.callback_panics(), 0);
}
