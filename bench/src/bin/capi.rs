//! What does a call from C cost compared with the same call from Rust, and what does loading the
//! library cost?
//!
//! `cargo build --release -p mmun-capi && cargo run --release -p bench --bin capi [ROUNDS]`
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

#[cfg(has_capi)]
mod measured {
    use mmu_notifier::{
        Event, InvalidateRange, MmWithUser, Notifier, Registration, Subsystem, VaRange,
    };
    use mmu_source::Watch;
    use regcache::{Device, Options, Registrar};
    use std::convert::Infallible;
    use std::ffi::{CString, c_char, c_void};
    use std::hint::black_box;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::time::Instant;
    use std::{env, fs};

    unsafe extern "C" {
        fn capi_load(path: *const c_char) -> f64;
        fn capi_prepare(buffer: *mut c_void, length: usize, source: u32) -> i32;
        fn capi_get_put(calls: u32);
        fn capi_bracket(calls: u32);
        fn capi_current(calls: u32);
        fn capi_subscribe() -> i32;
        fn capi_unsubscribe() -> i32;
        fn capi_watch_valid(calls: u32) -> u32;
        fn capi_regcache(buffer: *mut c_void, length: usize, calls: u32) -> usize;
    }

    struct Empty;

    impl Notifier for Empty {
        fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
            black_box(range);
        }
        fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
            black_box(range);
        }
    }

    struct Nothing;

    impl Registrar for Nothing {
        type Handle = u64;
        type Error = Infallible;

        fn register(&self, range: VaRange) -> Result<u64, Infallible> {
            Ok(range.start().get())
        }

        fn deregister(&self, _: u64) {}
    }

    /// The number of calls of a burst. It is small, so that many bursts run without an
    /// interruption.
    const CALLS: u32 = 2_000;
    const OWN: u32 = 4;
    const KERNEL: u32 = 2;

    fn median(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    fn time(mut call: impl FnMut()) -> f64 {
        let start = Instant::now();
        call();
        start.elapsed().as_nanos() as f64 / f64::from(CALLS)
    }

    /// Times both functions alternately. Prints the minimum of each, which is the undisturbed cost
    /// of a call, and the difference of the two minima. The medians show how much other programs
    /// disturbed the run.
    fn compare(
        name: &str,
        rounds: usize,
        bar: &str,
        mut in_rust: impl FnMut(),
        mut in_c: impl FnMut(),
    ) {
        let times: Vec<[f64; 2]> = (0..rounds)
            .map(|_| [time(&mut in_rust), time(&mut in_c)])
            .collect();
        let of =
            |side: usize, f: fn(Vec<f64>) -> f64| f(times.iter().map(|pair| pair[side]).collect());
        let (rust, c) = (of(0, least), of(1, least));
        println!(
            "{name:<44} {rust:7.2} ns in Rust {c:7.2} in C {:+6.2}   {bar:<10} (medians {:.2}, {:.2})",
            c - rust,
            of(0, median),
            of(1, median)
        );
    }

    fn least(values: Vec<f64>) -> f64 {
        values.into_iter().fold(f64::INFINITY, f64::min)
    }

    fn library() -> PathBuf {
        let own = env::current_exe().expect("this program has a path");
        own.parent()
            .expect("it lies in a folder")
            .join("libmmun.so")
    }

    fn load(path: &Path) -> f64 {
        let path = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: The function takes a C string. The process calls it only once.
        unsafe { capi_load(path.as_ptr()) }
    }

    fn size_and_loading(library: &Path) {
        let stripped = env::temp_dir().join(format!("libmmun-{}.so", std::process::id()));
        let strip = Command::new("strip")
            .arg("-o")
            .arg(&stripped)
            .arg(library)
            .status();
        if strip.is_ok_and(|status| status.success()) {
            let bytes = fs::metadata(&stripped).map_or(0, |file| file.len());
            println!(
                "stripped {:38.0} KiB {:>40}",
                bytes as f64 / 1024.0,
                "<= 1024 KiB"
            );
            let _ = fs::remove_file(&stripped);
        }
        let own = env::current_exe().expect("this program has a path");
        let once = || {
            let output = Command::new(&own)
                .arg("--load")
                .output()
                .expect("this program runs");
            String::from_utf8_lossy(&output.stdout)
                .trim()
                .parse::<f64>()
                .expect("a number")
        };
        let time = median((0..21).map(|_| once()).collect());
        println!("dlopen {:42.2} us {:>38}", time / 1e3, "<= 1000 us");
    }

    pub(crate) fn main() {
        let library = library();
        if env::args().nth(1).as_deref() == Some("--load") {
            println!("{}", load(&library));
            return;
        }
        if !library.exists() {
            println!(
                "SKIP: {} is missing: cargo build --release -p mmun-capi",
                library.display()
            );
            return;
        }
        let rounds = env::args()
            .nth(1)
            .map_or(1001, |rounds| rounds.parse().expect("a number of rounds"));
        println!("{rounds} rounds of {CALLS} calls, the least");
        size_and_loading(&library);
        assert!(load(&library) > 0.0, "the library loads");

        let mut buffer = vec![1_u8; 64 << 10];
        let (place, length) = (buffer.as_mut_ptr().cast::<c_void>(), buffer.len());
        assert_eq!(
            // SAFETY: The buffer lives until the end of `main`, and the library is loaded.
            unsafe { capi_prepare(place, length, OWN) },
            0,
            "the library works"
        );
        let range = VaRange::of(&buffer).expect("it is not empty");

        let mm = MmWithUser::new();
        let subsystem: Subsystem<Empty> = Subsystem::new((|_| Ok(Empty)) as fn(&_) -> _);
        let held = subsystem.get(&mm).expect("subscribes");
        compare(
            "get + put of what exists",
            rounds,
            "<= +5",
            || (0..CALLS).for_each(|_| drop(black_box(subsystem.get(black_box(&mm))))),
            // SAFETY: `capi_prepare` has succeeded.
            || unsafe { capi_get_put(CALLS) },
        );
        let page = VaRange::covering(mmu_notifier::Va::new(0x1000), 4096).expect("a page");
        compare(
            "start + end, one struct mmu_notifier",
            rounds,
            "<= +2",
            || {
                (0..CALLS)
                    .for_each(|_| drop(black_box(mm.invalidate(black_box(page), Event::Clear))))
            },
            // SAFETY: `capi_prepare` has succeeded.
            || unsafe { capi_bracket(CALLS) },
        );
        drop(held);

        let watch = Watch::new(range).expect("a watch");
        compare(
            "watch, valid, by brackets",
            rounds,
            "in C <= 3",
            || (0..CALLS).for_each(|_| assert!(black_box(&watch).is_valid())),
            // SAFETY: `capi_prepare` has succeeded.
            || assert_eq!(unsafe { capi_watch_valid(CALLS) }, CALLS),
        );

        let device = Device::new(Nothing, Options::new());
        let cache = device.open(&mmu_source::current()).expect("a cache");
        compare(
            "regcache, hit",
            rounds,
            "<= +3",
            || {
                let hit = |_| *cache.get(black_box(range)).expect("a hit").handle();
                let _ = black_box((0..CALLS).map(hit).sum::<u64>());
            },
            // SAFETY: `capi_prepare` has succeeded, and the buffer lives.
            || assert_ne!(unsafe { capi_regcache(place, length, CALLS) }, 0),
        );

        // Both rows include the subscribers of the watch and of the cache. The second row's
        // difference between C and Rust, minus the first row's, is the cost of the additional
        // subscriber.
        let current = mmu_source::current();
        let rust = || {
            (0..CALLS)
                .for_each(|_| drop(black_box(current.invalidate(black_box(page), Event::Clear))))
        };
        // SAFETY: `capi_prepare` has succeeded.
        let c = || unsafe { capi_current(CALLS) };
        compare("start + end, before mmun_subscribe", rounds, "", rust, c);
        let registration =
            Registration::new(&current, Empty).unwrap_or_else(|_| panic!("outside of callbacks"));
        // SAFETY: `capi_prepare` has succeeded.
        assert_eq!(unsafe { capi_subscribe() }, 0);
        compare(
            "start + end, one mmun_subscription more",
            rounds,
            "<= +2 more",
            rust,
            c,
        );
        drop(registration);
        // SAFETY: `capi_subscribe` has succeeded, and the subscription has not been ended.
        assert_eq!(unsafe { capi_unsubscribe() }, 0);

        if let Ok(kernel) = mmu_source::kernel::Kernel::start() {
            let watch = kernel.watch(range).expect("a watch");
            assert_eq!(
                // SAFETY: The buffer lives, and the library is loaded. The objects of the first
                // `capi_prepare` are leaked.
                unsafe { capi_prepare(place, length, KERNEL) },
                0,
                "the source starts"
            );
            let mut valid = 0;
            compare(
                "watch, valid, by the kernel",
                rounds,
                "in C <= 3",
                || {
                    for _ in 0..CALLS {
                        let _ = black_box(black_box(&watch).is_valid());
                    }
                },
                // SAFETY: `capi_prepare` has succeeded.
                || valid += unsafe { capi_watch_valid(CALLS) },
            );
            assert!(valid > 0);
        }
    }
}

#[cfg(has_capi)]
fn main() {
    measured::main();
}

#[cfg(not(has_capi))]
fn main() {
    println!("SKIP: there was no C compiler when this was built");
}
