//! Calls the functions of `mmun.h` with arguments from the fuzzer: sizes of older and newer
//! structs, fields, ranges, error numbers, null and misaligned pointers. Results of one function
//! are arguments of the next. No function may crash, and none may write beyond the size of a
//! struct.
#![no_main]

use libfuzzer_sys::{arbitrary, fuzz_target};
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

const LARGEST: usize = 4096;

unsafe extern "C" {
    fn mmun_open(options: *const c_void, mmun: *mut *mut c_void) -> c_int;
    fn mmun_close(mmun: *mut c_void);
    fn mmun_status(mmun: *const c_void, status: *mut c_void) -> c_int;
    fn mmun_strerror(code: c_int) -> *const i8;
    fn mmun_watch(
        mmun: *const c_void,
        address: *const c_void,
        length: usize,
        watch: *mut *mut c_void,
    ) -> c_int;
    fn mmun_watch_valid(watch: *const c_void) -> bool;
    fn mmun_watch_renew(watch: *mut c_void) -> c_int;
    fn mmun_unwatch(watch: *mut c_void);
    fn mmun_fill_begin(mmun: *const c_void) -> u64;
    fn mmun_fill_retry(mmun: *const c_void, seq: u64) -> bool;
    fn mmun_subscribe(
        mmun: *const c_void,
        ops: *const c_void,
        ctx: *mut c_void,
        to: *mut *mut c_void,
    ) -> c_int;
    fn mmun_unsubscribe(subscription: *mut c_void) -> c_int;
    fn mmun_regcache_open(
        mmun: *const c_void,
        registrar: *const c_void,
        options: *const c_void,
        cache: *mut *mut c_void,
    ) -> c_int;
    fn mmun_regcache_close(cache: *mut c_void) -> c_int;
    fn mmun_regcache_get(
        cache: *const c_void,
        address: *mut c_void,
        length: usize,
        lease: *mut c_void,
    ) -> c_int;
    fn mmun_regcache_put(lease: *mut c_void);
    fn mmun_regcache_flush(cache: *const c_void) -> u64;
    fn mmun_regcache_stats(cache: *const c_void, stats: *mut c_void) -> c_int;
    fn mmun_lease_valid(lease: *const c_void) -> bool;
    fn mmun_lease_range(
        lease: *const c_void,
        address: *mut *mut c_void,
        length: *mut usize,
    ) -> c_int;
}

/// This line links the library. This file declares the library's functions itself, as the C headers
/// do.
use mmun as _;

extern "C" fn register(
    answer: *mut c_void,
    _: *mut c_void,
    length: usize,
    handle: *mut *mut c_void,
) -> c_int {
    assert!(length > 0 && length % 4096 == 0);
    // SAFETY: The library passes a pointer to its variable for the handle.
    unsafe { *handle = answer };
    answer.addr() as c_int
}

extern "C" fn deregister(_: *mut c_void, _: *mut c_void, _: usize, _: *mut c_void) {}

extern "C" fn changed(_: *mut c_void, _: *const c_void) {}

/// A struct from the fuzzer: its size, then words. A guard word follows the struct.
struct Struct([u64; LARGEST / 8 + 2]);

const GUARD: u64 = 0x6775_6172_6421;

impl Struct {
    fn new(size: u16, words: &[u64]) -> Self {
        let mut fields = [0; LARGEST / 8 + 2];
        fields[0] = u64::from(size);
        fields[1..]
            .iter_mut()
            .zip(words)
            .for_each(|(field, word)| *field = *word);
        // The struct has as many bytes as its size says, up to `LARGEST`. The guard follows.
        fields[(usize::from(size).min(LARGEST)).div_ceil(8).max(1)] = GUARD;
        Self(fields)
    }

    fn place(&mut self, misaligned: bool) -> *mut c_void {
        self.0
            .as_mut_ptr()
            .cast::<u8>()
            .wrapping_add(usize::from(misaligned))
            .cast()
    }

    fn check(&self) {
        let at = (self.0[0] as usize).min(LARGEST).div_ceil(8).max(1);
        assert_eq!(self.0[at], GUARD, "written beyond its size");
    }
}

#[derive(Debug, arbitrary::Arbitrary)]
enum Step {
    Open(u16, [u64; 2], bool),
    Status(u16, bool),
    Strerror(i32),
    Watch(u64, u64),
    Renew,
    Unwatch,
    Fill(u64),
    Subscribe(u16, [u64; 2], bool),
    Unsubscribe,
    Cache(u16, u64, u16, [u64; 4], i16),
    Get(u64, u64, bool),
    Put,
    Flush,
    Stats(u16),
    Close,
}

struct Opened(*mut c_void);

// SAFETY: Any thread may use a handle of the library at any time.
unsafe impl Send for Opened {}
// SAFETY: As for `Send`.
unsafe impl Sync for Opened {}

fn opened() -> *mut c_void {
    static OPENED: OnceLock<Opened> = OnceLock::new();
    OPENED
        .get_or_init(|| {
            let options = [16_u64, 4];
            let mut mmun = ptr::null_mut();
            // SAFETY: Both pointers point to local variables. The options have 16 bytes, as their
            // size says.
            assert_eq!(
                unsafe { mmun_open(options.as_ptr().cast(), &raw mut mmun) },
                0
            );
            Opened(mmun)
        })
        .0
}

fuzz_target!(|steps: Vec<Step>| {
    let mmun = opened();
    let [mut watch, mut subscription, mut cache] = [ptr::null_mut::<c_void>(); 3];
    let mut lease: Option<Box<[u64; 3]>> = None;
    for step in steps {
        // SAFETY: Each pointer is null, misaligned by one byte, or points to a live object.
        unsafe {
            match step {
                Step::Open(size, words, misaligned) => {
                    // Clear the bits of the hook and the kernel source, and set `OWN`: to patch
                    // libc in each of a million runs would be too slow.
                    let mut options = Struct::new(size, &[words[0] & !0x3_0000_0003 | 4, words[1]]);
                    let mut other = ptr::null_mut();
                    if mmun_open(options.place(misaligned), &raw mut other) == 0 {
                        mmun_close(other);
                    } else {
                        assert!(other.is_null());
                    }
                    options.check();
                }
                Step::Status(size, misaligned) => {
                    let mut status = Struct::new(size, &[]);
                    mmun_status(mmun, status.place(misaligned));
                    status.check();
                }
                Step::Strerror(code) => assert_ne!(*mmun_strerror(code), 0),
                Step::Watch(address, length) => {
                    mmun_unwatch(watch);
                    mmun_watch(
                        mmun,
                        ptr::without_provenance(address as usize),
                        length as usize,
                        &raw mut watch,
                    );
                    assert!(watch.is_null() || mmun_watch_valid(watch));
                }
                Step::Renew => _ = mmun_watch_renew(watch),
                Step::Unwatch => mmun_unwatch(std::mem::replace(&mut watch, ptr::null_mut())),
                Step::Fill(seq) => {
                    let begun = mmun_fill_begin(mmun);
                    assert!(begun != 0 && !mmun_fill_retry(mmun, begun));
                    mmun_fill_retry(mmun, seq);
                }
                Step::Subscribe(size, words, with) if subscription.is_null() => {
                    let callback = if with { changed as *const () as u64 } else { 0 };
                    // The words after the two functions are fields of a newer version.
                    let mut ops = Struct::new(size, &[callback, callback, words[0], words[1]]);
                    mmun_subscribe(
                        mmun,
                        ops.place(false),
                        ptr::null_mut(),
                        &raw mut subscription,
                    );
                    ops.check();
                }
                Step::Unsubscribe | Step::Subscribe(..) => {
                    mmun_unsubscribe(std::mem::replace(&mut subscription, ptr::null_mut()));
                }
                Step::Cache(size, flags, options_size, words, answer) if cache.is_null() => {
                    let functions = [register as *const () as u64, deregister as *const () as u64];
                    let context = i64::from(answer.min(3)) as u64;
                    let mut registrar =
                        Struct::new(size, &[context, functions[0], functions[1], flags]);
                    // Limit the number of regions: a table for 2^26 regions in each run would be
                    // slow, and tests nothing more.
                    let mut options = Struct::new(
                        options_size,
                        &[words[0] & 0x3ff_0000_0007, words[1], words[2], words[3]],
                    );
                    mmun_regcache_open(
                        mmun,
                        registrar.place(false),
                        options.place(false),
                        &raw mut cache,
                    );
                    registrar.check();
                    options.check();
                }
                Step::Get(address, length, misaligned) if lease.is_none() => {
                    let mut place = Box::new([7_u64; 4]);
                    let at = place
                        .as_mut_ptr()
                        .cast::<u8>()
                        .wrapping_add(usize::from(misaligned))
                        .cast();
                    let address = ptr::without_provenance_mut(address as usize);
                    if mmun_regcache_get(cache, address, length as usize, at) == 0 {
                        let (mut start, mut bytes) = (ptr::null_mut(), 0);
                        assert!(
                            mmun_lease_valid(at)
                                && mmun_lease_range(at, &raw mut start, &raw mut bytes) == 0
                        );
                        assert!(start <= address && bytes as u64 >= length);
                        lease = Some(Box::new([place[0], place[1], place[2]]));
                    }
                    assert_eq!(place[3], 7);
                }
                Step::Put | Step::Get(..) => {
                    if let Some(mut held) = lease.take() {
                        mmun_regcache_put(held.as_mut_ptr().cast());
                        assert!(!mmun_lease_valid(held.as_ptr().cast()));
                    }
                }
                Step::Flush => _ = mmun_regcache_flush(cache),
                Step::Stats(size) => {
                    let mut stats = Struct::new(size, &[]);
                    mmun_regcache_stats(cache, stats.place(false));
                    stats.check();
                }
                Step::Close | Step::Cache(..) => {
                    let closed = mmun_regcache_close(cache);
                    assert_eq!(closed == 0, lease.is_none() || cache.is_null());
                    if closed == 0 {
                        cache = ptr::null_mut();
                    }
                }
            }
        }
    }
    // SAFETY: Each pointer is null or points to a live object.
    unsafe {
        lease
            .into_iter()
            .for_each(|mut held| mmun_regcache_put(held.as_mut_ptr().cast()));
        assert_eq!(mmun_regcache_close(cache), 0);
        mmun_unwatch(watch);
        mmun_unsubscribe(subscription);
    }
});
