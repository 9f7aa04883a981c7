//! The detector: the locks that each thread holds, the brackets and callbacks that it is inside of,
//! and where each lock was taken.
//!
//! No code here allocates or locks, except to report an error, because a callback may run in the
//! middle of `free`. If a table is full, the detector misses inversions, but it never reports a
//! wrong one.
//!
//! # Safety
//! The one `unsafe` block makes a reference from the pointer of a `&'static Location`.

use std::cell::Cell;
use std::io::Write;
use std::marker::PhantomData;
use std::panic::Location;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::{fmt, io, process, ptr, thread};

type Place = &'static Location<'static>;

/// Stands for all address spaces and the deferred frees. The ids of address spaces begin at 1.
const ANY: u64 = u64::MAX;

/// Stands for the deferred frees.
const FREES: u64 = u64::MAX - 1;

/// Tells whether `a` and `b` are the same address space, or one of them stands for all.
fn meet(a: u64, b: u64) -> bool {
    a == b || a == ANY || b == ANY
}

/// For up to four address spaces, the first place in the code that was recorded.
struct Seen([(AtomicU64, AtomicPtr<Location<'static>>); 4]);

impl Seen {
    const fn new() -> Self {
        Self([const { (AtomicU64::new(0), AtomicPtr::new(ptr::null_mut())) }; 4])
    }

    /// Keeps the first place seen for `mm`.
    fn add(&self, mm: u64, place: Place) {
        for (of, at) in &self.0 {
            // ORDER: Relaxed is enough here and in `find`: places are constants, and a report may
            // come a moment late.
            let before = of
                .compare_exchange(0, mm, Ordering::Relaxed, Ordering::Relaxed)
                .unwrap_or_else(|of| of);
            if before == mm {
                return;
            }
            if before == 0 {
                at.store(ptr::from_ref(place).cast_mut(), Ordering::Relaxed);
                return;
            }
        }
    }

    fn find(&self, mm: u64) -> Option<Place> {
        self.0.iter().find_map(|(of, at)| {
            let of = of.load(Ordering::Relaxed);
            // SAFETY: A reference needs a live value: a pointer that is not null comes from the
            // `&'static Location` that `add` stored.
            (of != 0 && meet(of, mm))
                .then(|| unsafe { at.load(Ordering::Relaxed).as_ref() })
                .flatten()
        })
    }

    /// Tells whether there is an entry for any address space. An entry for deferred frees does not
    /// count: the allocator does not wait for those.
    fn any(&self) -> bool {
        self.0
            .iter()
            .any(|(of, _)| ![0, FREES].contains(&of.load(Ordering::Relaxed)))
    }

    fn clear(&self) {
        for (of, at) in &self.0 {
            at.store(ptr::null_mut(), Ordering::Relaxed);
            of.store(0, Ordering::Relaxed);
        }
    }
}

/// What the detector knows of one lock. The records are in a table, so that a forgotten [`Held`]
/// leaves an index behind and no dangling pointer.
struct Record {
    used: AtomicUsize,
    taken_inside: Seen,
    held_while_waiting: Seen,
}

const RECORDS: usize = 256;

static TABLE: [Record; RECORDS] = [const {
    Record {
        used: AtomicUsize::new(0),
        taken_inside: Seen::new(),
        held_while_waiting: Seen::new(),
    }
}; RECORDS];

pub(super) struct Map {
    name: &'static str,
    /// One more than the index of the lock's record. Zero until the lock is first acquired.
    record: AtomicUsize,
}

impl Map {
    pub(super) const fn new(name: &'static str) -> Self {
        Self {
            name,
            record: AtomicUsize::new(0),
        }
    }

    fn record(&self) -> Option<usize> {
        let known = self.record.load(Ordering::Relaxed);
        if known != 0 {
            return Some(known - 1);
        }
        let free = |record: &Record| {
            record
                .used
                .compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        let index = TABLE.iter().position(free)?;
        match self
            .record
            .compare_exchange(0, index + 1, Ordering::Relaxed, Ordering::Relaxed)
        {
            Ok(_) => Some(index),
            Err(first) => {
                TABLE[index].used.store(0, Ordering::Relaxed);
                Some(first - 1)
            }
        }
    }

    #[track_caller]
    pub(super) fn acquire(&self) -> Held<'_> {
        let place = Location::caller();
        let Some(index) = self.record() else {
            return Held::nothing();
        };
        for mm in inside() {
            TABLE[index].taken_inside.add(mm, place);
            let waited = TABLE[index].held_while_waiting.find(mm);
            if let Some(waited) = waited.filter(|_| !thread::panicking()) {
                panic!(
                    "lock order: `{}` is taken at {place} inside a bracket or callback, and was held at {waited} by a thread \
                     that waited for those to end; let go of it before waiting",
                    self.name
                );
            }
        }
        Held::of(Lock::Map(index, self.name), place)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if let Some(index) = self.record.get_mut().checked_sub(1) {
            TABLE[index].taken_inside.clear();
            TABLE[index].held_while_waiting.clear();
            TABLE[index].used.store(0, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Map").field(&self.name).finish()
    }
}

/// What a thread may hold.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lock {
    /// The lock beside a map: the index of its record, and its name.
    Map(usize, &'static str),
    /// The state of an interval of this address space.
    State(u64),
}

const DEPTH: usize = 16;

/// A callback: the name of its notifier's type, and of the method.
type Called = (fn() -> &'static str, &'static str);

thread_local! {
    static CALLED: Cell<Option<Called>> = const { Cell::new(None) };
    static HELD: [Cell<Option<(Lock, Place)>>; DEPTH] = const { [const { Cell::new(None) }; DEPTH] };
    static INSIDE: [Cell<u64>; DEPTH] = const { [const { Cell::new(0) }; DEPTH] };
}

/// Returns the address spaces in whose brackets or callbacks this thread is.
fn inside() -> impl Iterator<Item = u64> {
    INSIDE
        .with(|cells| cells.each_ref().map(Cell::get))
        .into_iter()
        .filter(|mm| *mm != 0)
}

/// A bracket or callback section of one address space, or a deferred free.
#[derive(Debug)]
pub(crate) struct Section(u64);

impl Section {
    pub(crate) fn enter(mm: Option<u64>) -> Self {
        let mm = mm.unwrap_or(FREES);
        INSIDE.with(|cells| {
            if let Some(free) = cells.iter().find(|cell| cell.get() == 0) {
                free.set(mm);
            }
        });
        Self(mm)
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        INSIDE.with(|cells| {
            if let Some(mine) = cells.iter().find(|cell| cell.get() == self.0) {
                mine.set(0);
            }
        });
    }
}

/// A callback that runs in this thread. A callback of a nested bracket ends before this one does.
#[derive(Debug)]
pub(crate) struct Callback(Option<Called>);

impl Callback {
    pub(crate) fn enter(notifier: fn() -> &'static str, method: &'static str) -> Self {
        Self(CALLED.replace(Some((notifier, method))))
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        CALLED.set(self.0);
    }
}

/// Ends the process if the allocator must not be called here.
///
/// A panic in a callback may allocate its message: the panic itself is reported.
pub(super) fn might_allocate(call: &str) {
    if let Some((notifier, method)) = CALLED.get().filter(|_| !thread::panicking()) {
        CALLED.set(None);
        stop(format_args!(
            "`{}` of `{}` {call} memory: a callback may run in the middle of `free`, whose locks it would wait for; \
             keep what it needs in memory of a fixed size, such as `SoftTlb`",
            method,
            notifier()
        ));
    }
    let taken_in_callback = |lock: Lock| match lock {
        Lock::Map(index, name) => TABLE[index].taken_inside.any().then_some(name),
        Lock::State(_) => Some("the state of an interval"),
    };
    for (lock, held) in HELD
        .with(|cells| cells.each_ref().map(Cell::get))
        .into_iter()
        .flatten()
    {
        if let Some(name) = taken_in_callback(lock).filter(|_| !thread::panicking()) {
            HELD.with(|cells| cells.iter().for_each(|cell| cell.set(None)));
            stop(format_args!(
                "the holder of `{name}` (locked at {held}, and in a callback) {call} memory: the allocator may make a memory \
                 call, whose callback would wait for that lock; unlock it before"
            ));
        }
    }
}

/// Prints the reason and ends the process, because a caller of the allocator does not expect a
/// panic.
fn stop(why: fmt::Arguments<'_>) -> ! {
    let _ = writeln!(io::stderr(), "mmu_notifier::lockdep: {why}");
    process::abort()
}

#[derive(Debug)]
pub(crate) struct Held<'a> {
    lock: Option<Lock>,
    map: PhantomData<&'a Map>,
}

impl Held<'_> {
    fn nothing() -> Self {
        Self {
            lock: None,
            map: PhantomData,
        }
    }

    fn of(lock: Lock, place: Place) -> Self {
        HELD.with(|cells| {
            let free = cells.iter().find(|cell| cell.get().is_none());
            free.map_or(Self::nothing(), |free| {
                free.set(Some((lock, place)));
                Self {
                    lock: Some(lock),
                    map: PhantomData,
                }
            })
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        HELD.with(|cells| {
            let mine = |cell: &&Cell<Option<(Lock, Place)>>| {
                cell.get().is_some_and(|(lock, _)| Some(lock) == self.lock)
            };
            if let Some(mine) = cells.iter().rev().find(mine) {
                mine.set(None);
            }
        });
    }
}

#[track_caller]
pub(super) fn holds_state(mm: u64) -> Held<'static> {
    Held::of(Lock::State(mm), Location::caller())
}

#[track_caller]
pub(super) fn might_wait(mm: Option<u64>) {
    let (mm, place) = (mm.unwrap_or(ANY), Location::caller());
    for (lock, held) in HELD
        .with(|cells| cells.each_ref().map(Cell::get))
        .into_iter()
        .flatten()
    {
        if thread::panicking() {
            return;
        }
        match lock {
            Lock::Map(index, name) => {
                TABLE[index].held_while_waiting.add(mm, place);
                if let Some(taken) = TABLE[index].taken_inside.find(mm) {
                    panic!(
                        "lock order: waiting at {place} for brackets and callbacks to end, while holding `{name}` since {held}, \
                         which is taken inside one at {taken}; let go of it before waiting"
                    );
                }
            }
            Lock::State(of) if meet(of, mm) => panic!(
                "lock order: waiting at {place} for brackets and callbacks to end, while holding an interval's state since \
                 {held}, which its callback takes; let go of it before waiting"
            ),
            Lock::State(_) => {}
        }
    }
}
