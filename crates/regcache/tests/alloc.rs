//! Requests that may come from within an allocator must not call the allocator. These tests are a
//! program of their own, because its `malloc` replaces that of the C library and counts the calls.

#![cfg(target_env = "gnu")]

use mmu_notifier::{MmWithUser, Va, VaRange};
use regcache::{Counting, Device, Error, Options, RegCache};
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::mpsc;
use std::thread;
use testkit::in_child;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
}

/// Replaces the C library's function, also for calls from that library.
///
/// # Safety
/// The caller must follow the rules of the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    CALLS.set(CALLS.get() + 1);
    // SAFETY: `__libc_malloc` has the rules of `malloc`, which the caller follows (see # Safety).
    unsafe { __libc_malloc(size) }
}

/// Like [`malloc`].
///
/// # Safety
/// The caller must follow the rules of the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    CALLS.set(CALLS.get() + 1);
    // SAFETY: `__libc_calloc` has the rules of `calloc`, which the caller follows (see # Safety).
    unsafe { __libc_calloc(count, size) }
}

/// Returns how often `f` allocates on this thread.
fn allocations<R>(f: impl FnOnce() -> R) -> (usize, R) {
    let before = CALLS.get();
    let result = f();
    (CALLS.get() - before, result)
}

fn pages(first: u64, count: u64) -> VaRange {
    VaRange::covering(Va::new(first << 12), count << 12).expect("a range")
}

fn open(options: Options) -> (MmWithUser, RegCache<Counting>) {
    let mm = MmWithUser::new();
    let cache = Device::new(Counting::default(), options)
        .open(&mm)
        .expect("it is alive");
    (mm, cache)
}

#[test]
fn what_allocates_is_counted() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))).0, 1);
    assert_eq!(
        allocations(|| drop(std::hint::black_box(vec![0_u8; 100]))).0,
        1
    );
}

#[test]
fn the_first_hit_of_a_thread_allocates_nothing() {
    let (_mm, cache) = open(Options::new());
    drop(cache.get(pages(10, 1)).expect("registered"));
    thread::scope(|scope| {
        let hit = || allocations(|| cache.get(pages(10, 1)).is_ok());
        assert_eq!(scope.spawn(hit).join().expect("no panic"), (0, true));
        let cached = || allocations(|| cache.get_cached(pages(10, 1)).is_some());
        assert_eq!(scope.spawn(cached).join().expect("no panic"), (0, true));
    });
}

#[test]
fn a_refusal_allocates_nothing() {
    let (mm, cache) = open(Options::new().max_regions(1).max_bytes(8192));
    let lease = cache.get(pages(10, 1)).expect("registered");
    let (calls, result) = allocations(|| cache.get(pages(20, 1)).map(drop));
    assert!(
        matches!(result, Err(Error::Full { range, regions: 1, bytes: 4096 }) if range == pages(20, 1)),
        "{result:?}"
    );
    assert_eq!(calls, 0);
    let (calls, result) = allocations(|| cache.get(pages(20, 3)).map(drop));
    assert!(
        matches!(result, Err(Error::TooLarge { range, limit: 8192 }) if range == pages(20, 3)),
        "{result:?}"
    );
    assert_eq!(calls, 0);
    assert!(in_child(|| {
        let (calls, result) = allocations(|| cache.get(pages(10, 1)).map(drop));
        matches!(result, Err(Error::Forked)) && calls == 0
    }));
    drop(lease);
    // The address space exits while another thread still has a handle of the cache.
    let (ended, ends) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            drop(mm);
            ended.send(()).expect("the test waits");
        });
        ends.recv().expect("it ends");
    });
    let (calls, result) = allocations(|| cache.get(pages(10, 1)).map(drop));
    assert!(matches!(result, Err(Error::Exited)), "{result:?}");
    assert_eq!(calls, 0);
}
