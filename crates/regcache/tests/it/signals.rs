//! Leases that signal handlers take and end, and requests that would wait for their own thread.

use crate::support::{Book, counting, pages};
use mmu_notifier::{Event, MmWithUser};
use regcache::{Counting, Device, Error, Lease, Mlock, Options, RegCache};
use std::cell::UnsafeCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;
use testkit::{has_timers, in_child, signal_every};

static CACHE: OnceLock<RegCache<Counting>> = OnceLock::new();

/// The lease of the handler. `STEP` says whether the handler or the thread may access it.
struct Kept(UnsafeCell<Option<Lease<'static, Counting>>>);
// SAFETY: only one thread and its signal handler access the lease: the handler in the steps `TAKE`
// and `END`, the thread in the step `HAS`.
unsafe impl Sync for Kept {}
static KEPT: Kept = Kept(UnsafeCell::new(None));

static STEP: AtomicU8 = AtomicU8::new(TAKE);
/// `TAKE`: the handler must take a lease. `HAS`: the handler has taken a lease. `END`: the handler
/// must end its lease.
const TAKE: u8 = 1;
const HAS: u8 = 2;
const END: u8 = 3;

static SIGNALS: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
static BROKEN: AtomicBool = AtomicBool::new(false);

extern "C" fn handler(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    let Some(cache) = CACHE.get() else { return };
    match STEP.load(Ordering::Relaxed) {
        TAKE => match cache.get(pages(20, 1)) {
            Ok(lease) => {
                // SAFETY: in the step `TAKE`, only the handler accesses the lease.
                unsafe { *KEPT.0.get() = Some(lease) };
                STEP.store(HAS, Ordering::Relaxed);
            }
            Err(Error::WouldDeadlock) => _ = REFUSED.fetch_add(1, Ordering::Relaxed),
            Err(_) => BROKEN.store(true, Ordering::Relaxed),
        },
        END => {
            // SAFETY: in the step `END`, only the handler accesses the lease.
            drop(unsafe { (*KEPT.0.get()).take() });
            STEP.store(TAKE, Ordering::Relaxed);
        }
        _ => {}
    }
}

/// How many signals a test waits for.
fn enough() -> u64 {
    testkit::rounds(20_000) as u64
}

fn send_signals() {
    send_signals_to(handler);
}

fn send_signals_to(handler: extern "C" fn(i32)) {
    // SAFETY: the handler calls only functions that the documentation of `RegCache` allows in a
    // handler. Its shared data is atomic or guarded by `STEP`.
    unsafe { libc::signal(libc::SIGUSR1, handler as *const () as usize) };
    signal_every(Duration::from_micros(50), libc::SIGUSR1).expect("a timer");
}

#[test]
fn a_signal_handlers_lease_is_kept_and_its_end_is_seen() {
    if !has_timers() {
        return;
    }
    assert!(in_child(|| {
        let (mm, device) = (
            MmWithUser::new(),
            Device::new(Counting::default(), Options::new()),
        );
        assert!(CACHE.set(device.open(&mm).unwrap()).is_ok());
        let (cache, counts) = (CACHE.get().unwrap(), device.registrar());
        let registered = || counts.registered() - counts.deregistered();
        drop(cache.get(pages(20, 1)).unwrap());
        send_signals();
        let (mut leases, enough) = (0, enough());
        while SIGNALS.load(Ordering::Relaxed) < enough || leases <= 100 {
            match STEP.load(Ordering::Relaxed) {
                // If the handler interrupts this request, the request must not overwrite the slot
                // of the handler's lease.
                TAKE => drop(cache.get(pages(10, 1)).unwrap()),
                HAS => {
                    leases += 1;
                    drop(mm.invalidate(pages(20, 1), Event::Unmap));
                    cache.flush();
                    // SAFETY: in the step `HAS`, the handler does not access the lease.
                    let stale = unsafe { (*KEPT.0.get()).as_ref() }
                        .is_some_and(|lease| !lease.is_current());
                    assert!(stale, "the lease does not know what has happened");
                    assert_eq!(
                        registered(),
                        1,
                        "deregistered under a lease, or registered without one"
                    );
                    STEP.store(END, Ordering::Relaxed);
                    // The handler often interrupts `flush` while it holds the lock. Then the
                    // handler cannot check whether its lease was the last, and a later scan does.
                    while STEP.load(Ordering::Relaxed) == END {
                        cache.flush();
                    }
                    cache.flush();
                    drop(mm.invalidate(pages(20, 1), Event::Unmap));
                    cache.flush();
                }
                _ => unreachable!("this thread alone ends that step, or has seen it end"),
            }
        }
        // SAFETY: the call installs no handler, so no code must be safe in a handler.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
        // SAFETY: signals are ignored now, so no handler accesses the lease.
        drop(unsafe { (*KEPT.0.get()).take() });
        cache.flush();
        !BROKEN.load(Ordering::Relaxed) && registered() == 0
    }));
}

static LOCKED: OnceLock<RegCache<Mlock>> = OnceLock::new();
static BUFFER: AtomicU64 = AtomicU64::new(0);
static HITS: AtomicU64 = AtomicU64::new(0);

extern "C" fn looks_up(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    let Some(cache) = LOCKED.get() else { return };
    if let Some(lease) = cache.get_cached(pages(BUFFER.load(Ordering::Relaxed) / 4096, 1)) {
        HITS.fetch_add(1, Ordering::Relaxed);
        lease.end_later();
    }
}

#[test]
fn a_handler_that_looks_up_never_enters_the_registrar() {
    if !has_timers() {
        return;
    }
    assert!(in_child(|| {
        let buffer = vec![1_u8; 8 * 4096];
        let first = (buffer.as_ptr().addr() as u64).next_multiple_of(4096);
        BUFFER.store(first, Ordering::Relaxed);
        let (kept, other) = (pages(first / 4096, 1), pages(first / 4096 + 2, 1));
        let device = Device::new(Mlock::new(), Options::new());
        let mm = MmWithUser::new();
        assert!(LOCKED.set(device.open(&mm).unwrap()).is_ok());
        let cache = LOCKED.get().unwrap();
        send_signals_to(looks_up);
        let (mut leased, enough) = (cache.get(kept).unwrap(), enough());
        while SIGNALS.load(Ordering::Relaxed) < enough || HITS.load(Ordering::Relaxed) < 100 {
            // From here on the handler's look-up misses. Meanwhile this thread is inside the
            // registrar, whose lock the handler must not take.
            drop(mm.invalidate(kept, Event::Unmap));
            drop(cache.get(other).unwrap());
            cache.flush();
            leased = cache.get(kept).unwrap();
        }
        // SAFETY: the call installs no handler, so no code must be safe in a handler.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
        drop(leased);
        cache.flush();
        device.registrar().locked_pages() == 0
    }));
}

#[test]
fn a_lease_that_is_ended_later_is_deregistered_by_the_next_scan() {
    let (mm, device, cache) = counting(Options::new());
    assert!(cache.get_cached(pages(10, 1)).is_none() && device.registrar().registered() == 0);
    drop(cache.get(pages(10, 1)).unwrap());
    let lease = cache
        .get_cached(pages(10, 1))
        .expect("it is in the look-up");
    drop(mm.invalidate(pages(10, 1), Event::Unmap));
    assert!(!lease.is_current() && cache.get_cached(pages(10, 1)).is_none());
    lease.end_later();
    assert_eq!(
        device.registrar().deregistered(),
        0,
        "the registrar was called"
    );
    cache.reap();
    assert_eq!(device.registrar().deregistered(), 1);
}

#[test]
fn a_request_that_would_wait_for_its_own_thread_is_refused() {
    assert!(in_child(|| {
        // SAFETY: the call has no preconditions. The alarm ends the child after 20 seconds if it
        // hangs.
        unsafe { libc::alarm(20) };
        let (mm, device) = (
            MmWithUser::new(),
            Device::new(Book::default(), Options::new()),
        );
        let cache = device.open(&mm).unwrap();
        let (same, other) = (cache.try_clone().unwrap(), cache.try_clone().unwrap());
        static ANSWERS: AtomicU64 = AtomicU64::new(0);
        device.registrar().during_next(move || {
            let refused = matches!(same.get(pages(10, 1)), Err(Error::WouldDeadlock));
            let good = other.get(pages(20, 1)).is_ok();
            ANSWERS.fetch_add(u64::from(refused) + u64::from(good), Ordering::Relaxed);
        });
        drop(cache.get(pages(10, 4)).unwrap());
        ANSWERS.load(Ordering::Relaxed) == 2
    }));
}

#[test]
fn a_nested_request_that_needs_a_larger_table_is_refused() {
    let (mm, device) = (
        MmWithUser::new(),
        Device::new(Book::default(), Options::new()),
    );
    let cache = device.open(&mm).unwrap();
    let same = cache.try_clone().unwrap();
    static REFUSED: AtomicU64 = AtomicU64::new(0);
    device.registrar().during_next(move || {
        // The ranges are far apart, so that no two requests are merged.
        let refused = (0..10_000).find_map(|at| match same.get(pages(1000 + 10 * at, 1)) {
            Ok(_) => None,
            Err(error) => Some((at, error)),
        });
        let (at, error) = refused.expect("the first table is not so large");
        assert!(matches!(error, Error::WouldDeadlock), "{error:?}");
        REFUSED.store(1000 + 10 * at, Ordering::Relaxed);
    });
    drop(cache.get(pages(10, 4)).unwrap());
    let refused = REFUSED.load(Ordering::Relaxed);
    assert!(refused > 1000, "some were registered before");
    assert!(
        cache.get(pages(refused, 1)).is_ok(),
        "outside it is not refused"
    );
}
