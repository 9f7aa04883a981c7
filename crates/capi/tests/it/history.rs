//! Random histories: the test does the same operations through C and through Rust, and compares the
//! results.
//!
//! One thread uses two address spaces, one through C and one through Rust. It does each operation
//! on both, and records the callbacks on both sides. `HISTORY_SEED` repeats a run that failed.

use mmu_notifier::{
    Event, GetError, InvalidateRange, Mm, MmWithUser, Notifier, Subscription, Subsystem, Va,
    VaRange, WouldBlock,
};
use std::cell::RefCell;
use std::convert::Infallible;
use std::ffi::{c_int, c_ulong};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const KEYS: usize = 3;
const STEPS: usize = 400;

/// One callback, with the key of its notifier and its arguments.
#[derive(Debug, Clone, PartialEq)]
enum Call {
    Alloc(usize),
    Start(usize, u64, u64, u32, bool),
    End(usize, u64, u64),
    Release(usize),
}

thread_local! {
    static IN_C: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
    static IN_RUST: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
}
static FREED: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// Whether the notifiers of each key refuse a start that may not sleep.
static REFUSES: [AtomicBool; KEYS] = [const { AtomicBool::new(false) }; KEYS];

/// `struct mmu_notifier_range`, as far as a callback reads it.
#[repr(C)]
struct Range {
    mm: *mut mmun::MmStruct,
    start: c_ulong,
    end: c_ulong,
    flags: u32,
    event: u32,
    owner: *mut (),
    private: [usize; 18],
}

type Notice = *mut mmun::MmuNotifier;

#[repr(C)]
struct Table {
    release: Option<unsafe extern "C" fn(Notice, *mut mmun::MmStruct)>,
    young: [usize; 3],
    start: Option<unsafe extern "C" fn(Notice, *const Range) -> c_int>,
    end: Option<unsafe extern "C" fn(Notice, *const Range)>,
    tlbs: usize,
    alloc: Option<unsafe extern "C" fn(*mut mmun::MmStruct) -> Notice>,
    free: Option<unsafe extern "C" fn(Notice)>,
}

#[repr(C)]
struct Object<const KEY: usize> {
    notifier: MaybeUninit<mmun::MmuNotifier>,
}

fn in_c(call: Call) {
    IN_C.with_borrow_mut(|calls| calls.push(call));
}

unsafe extern "C" fn alloc<const KEY: usize>(_: *mut mmun::MmStruct) -> Notice {
    in_c(Call::Alloc(KEY));
    Box::into_raw(Box::new(Object::<KEY> {
        notifier: MaybeUninit::zeroed(),
    }))
    .cast()
}

unsafe extern "C" fn free<const KEY: usize>(notifier: Notice) {
    FREED[0].fetch_add(1, Ordering::Relaxed);
    // SAFETY: The library passes each notifier that `alloc` has leaked once.
    drop(unsafe { Box::from_raw(notifier.cast::<Object<KEY>>()) });
}

unsafe extern "C" fn start<const KEY: usize>(_: Notice, range: *const Range) -> c_int {
    // SAFETY: The library passes a range that is valid until the callback returns.
    let range = unsafe { &*range };
    let blocks = range.flags & 1 != 0;
    in_c(Call::Start(
        KEY,
        range.start,
        range.end,
        range.event,
        blocks,
    ));
    if !blocks && REFUSES[KEY].load(Ordering::Relaxed) {
        -libc::EAGAIN
    } else {
        0
    }
}

unsafe extern "C" fn end<const KEY: usize>(_: Notice, range: *const Range) {
    // SAFETY: The library passes a range that is valid until the callback returns.
    let range = unsafe { &*range };
    in_c(Call::End(KEY, range.start, range.end));
}

unsafe extern "C" fn release<const KEY: usize>(_: Notice, _: *mut mmun::MmStruct) {
    in_c(Call::Release(KEY));
}

const fn table<const KEY: usize>() -> Table {
    Table {
        release: Some(release::<KEY>),
        young: [0; 3],
        start: Some(start::<KEY>),
        end: Some(end::<KEY>),
        tlbs: 0,
        alloc: Some(alloc::<KEY>),
        free: Some(free::<KEY>),
    }
}

static TABLES: [Table; KEYS] = [table::<0>(), table::<1>(), table::<2>()];

fn ops(key: usize) -> *const mmun::Ops {
    ptr::from_ref(&TABLES[key]).cast()
}

/// The same driver in Rust.
struct Probe(usize);

fn in_rust(call: Call) {
    IN_RUST.with_borrow_mut(|calls| calls.push(call));
}

fn code(event: Event) -> u32 {
    match event {
        Event::Unmap => 0,
        Event::Clear => 1,
        Event::ProtectionVma => 2,
        _ => 99,
    }
}

impl Notifier for Probe {
    fn release(&self, _: &Mm) {
        in_rust(Call::Release(self.0));
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let (start, last) = (range.range().start().get(), range.range().last().get());
        in_rust(Call::Start(
            self.0,
            start,
            last + 1,
            code(range.event()),
            true,
        ));
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        let (start, last) = (range.range().start().get(), range.range().last().get());
        in_rust(Call::Start(
            self.0,
            start,
            last + 1,
            code(range.event()),
            false,
        ));
        if REFUSES[self.0].load(Ordering::Relaxed) {
            Err(WouldBlock)
        } else {
            Ok(())
        }
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        in_rust(Call::End(
            self.0,
            range.range().start().get(),
            range.range().last().get() + 1,
        ));
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        FREED[1].fetch_add(1, Ordering::Relaxed);
    }
}

fn subsystem(key: usize) -> Subsystem<Probe> {
    type Alloc = fn(&MmWithUser) -> Result<Probe, Infallible>;
    const ALLOC: [Alloc; KEYS] = [|_| made(0), |_| made(1), |_| made(2)];
    fn made(key: usize) -> Result<Probe, Infallible> {
        in_rust(Call::Alloc(key));
        Ok(Probe(key))
    }
    Subsystem::new(ALLOC[key])
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

fn history(seed: u64) {
    let mut random = Random(seed | 1);
    let subsystems: [Subsystem<Probe>; KEYS] = std::array::from_fn(subsystem);
    let freed_before = [0, 1].map(|side: usize| FREED[side].load(Ordering::Relaxed));
    // SAFETY: The function has no preconditions.
    let mm_c = unsafe { mmun::mmun_mm_new() };
    let mm_rust = MmWithUser::new();
    let mut held_c: [Vec<Notice>; KEYS] = Default::default();
    let mut held_rust: [Vec<Subscription<Probe>>; KEYS] = Default::default();
    let mut open_c: Vec<Box<Range>> = Vec::new();
    let mut open_rust: Vec<mmu_notifier::Bracket<'_>> = Vec::new();

    for step in 0..STEPS {
        let key = random.below(KEYS as u64) as usize;
        let what = random.below(10);
        let result: (i64, i64) = match what {
            0..3 => {
                // SAFETY: The table is static, and the test holds a user of `mm_c`.
                let got = unsafe { mmun::mmun_get(ops(key), mm_c) };
                let error = got.addr() as i64;
                let in_c = if (-4095..0).contains(&error) {
                    error
                } else {
                    0
                };
                if in_c == 0 {
                    held_c[key].push(got);
                }
                let in_rust = match subsystems[key].get(&mm_rust) {
                    Ok(got) => {
                        held_rust[key].push(got);
                        0
                    }
                    Err(GetError::WouldDeadlock) => i64::from(-libc::EDEADLK),
                    Err(error) => panic!("{error}"),
                };
                (in_c, in_rust)
            }
            3..6 => {
                let in_c = held_c[key].pop().map_or(-1, |held| {
                    // SAFETY: The notifier was got, and this reference was not put.
                    unsafe { mmun::mmun_put(held) };
                    0
                });
                let in_rust = held_rust[key].pop().map_or(-1, |held| {
                    held.put();
                    0
                });
                (in_c, in_rust)
            }
            6..8 if open_c.len() < 3 => {
                let (first, pages) = (random.below(16), 1 + random.below(8));
                let (start, end) = (first << 12, (first + pages) << 12);
                let number = random.below(3) as u32;
                let event = [Event::Unmap, Event::Clear, Event::ProtectionVma][number as usize];
                let blocks = random.below(2) == 0;
                let (mm, flags, event_c) = (mm_c, blocks.into(), number);
                let owner = ptr::null_mut();
                let mut range = Box::new(Range {
                    mm,
                    start,
                    end,
                    flags,
                    event: event_c,
                    owner,
                    private: [0; 18],
                });
                let place = ptr::from_mut(&mut *range).cast();
                let pages = VaRange::new(Va::new(start), Va::new(end)).expect("whole pages");
                if blocks {
                    // SAFETY: The range is in a box, so it does not move before its end.
                    unsafe { mmun::mmun_invalidate_range_start(place) };
                    open_c.push(range);
                    open_rust.push(mm_rust.invalidate(pages, event));
                    (0, 0)
                } else {
                    // SAFETY: The range is in a box, so it does not move before its end.
                    let in_c = unsafe { mmun::mmun_invalidate_range_start_nonblock(place) };
                    let in_rust = mm_rust.try_invalidate(pages, event);
                    let result = (
                        in_c.into(),
                        if in_rust.is_ok() {
                            0
                        } else {
                            i64::from(-libc::EAGAIN)
                        },
                    );
                    if in_c == 0 {
                        open_c.push(range);
                    }
                    open_rust.extend(in_rust);
                    result
                }
            }
            6..9 => {
                if let Some(mut range) = open_c.pop() {
                    // SAFETY: This thread has started the range, which is still in its box.
                    unsafe { mmun::mmun_invalidate_range_end(ptr::from_mut(&mut *range).cast()) };
                }
                drop(open_rust.pop());
                (open_c.len() as i64, open_rust.len() as i64)
            }
            _ if open_c.is_empty() => {
                // SAFETY: The function has no preconditions.
                unsafe { mmun::mmun_synchronize() };
                subsystems
                    .iter()
                    .for_each(|subsystem| subsystem.synchronize().expect("outside of callbacks"));
                let freed =
                    |side: usize| (FREED[side].load(Ordering::Relaxed) - freed_before[side]) as i64;
                (freed(0), freed(1))
            }
            _ => {
                REFUSES[key].fetch_xor(true, Ordering::Relaxed);
                (0, 0)
            }
        };
        assert_eq!(
            result.0, result.1,
            "seed {seed}, step {step}, operation {what} on {key}"
        );
        let calls = (
            IN_C.with_borrow_mut(std::mem::take),
            IN_RUST.with_borrow_mut(std::mem::take),
        );
        assert_eq!(
            calls.0, calls.1,
            "seed {seed}, step {step}, operation {what} on {key}"
        );
    }
    while let Some(mut range) = open_c.pop() {
        // SAFETY: This thread has started the range, which is still in its box.
        unsafe { mmun::mmun_invalidate_range_end(ptr::from_mut(&mut *range).cast()) };
        drop(open_rust.pop());
    }
    drop(open_rust);
    // SAFETY: `mm_c` is a handle of the test.
    unsafe { mmun::mmun_mmgrab(mm_c) };
    // Exit calls `release` of every subscriber that is left.
    // SAFETY: `mm_c` was made with one user, which the test drops here.
    unsafe { mmun::mmun_mmput(mm_c) };
    let kept: Mm = (*mm_rust).clone();
    drop(mm_rust);
    assert_eq!(
        IN_C.with_borrow_mut(std::mem::take),
        IN_RUST.with_borrow_mut(std::mem::take),
        "seed {seed}, exit"
    );
    for held in held_c.iter_mut().flat_map(|held| held.drain(..)) {
        // SAFETY: The notifier was got, and this reference was not put.
        unsafe { mmun::mmun_put(held) };
    }
    held_rust.iter_mut().for_each(Vec::clear);
    // SAFETY: The function has no preconditions.
    unsafe { mmun::mmun_synchronize() };
    subsystems
        .iter()
        .for_each(|subsystem| subsystem.synchronize().expect("outside of callbacks"));
    let freed = [0, 1].map(|side: usize| FREED[side].load(Ordering::Relaxed) - freed_before[side]);
    assert_eq!(freed[0], freed[1], "seed {seed}, frees");
    // SAFETY: The test has taken this handle with `mmun_mmgrab` above.
    unsafe { mmun::mmun_mmdrop(mm_c) };
    drop(kept);
}

#[test]
fn c_and_rust_do_the_same() {
    if let Some(seed) = std::env::var("HISTORY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        return history(seed);
    }
    (1..400).for_each(|number: u64| history(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
}
