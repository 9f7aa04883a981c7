//! A library to preload. Before a program's `main` it installs the hook, and the kernel source if
//! that works.
//!
//! `LD_PRELOAD=libpreload.so PROG`. With `MMUN_PRELOAD_REPORT=FILE` every process appends a line to
//! `FILE`: when it exits, the number of brackets that it has seen; or when it starts, the reason
//! why there is no hook. The program's behaviour does not change. The library can also be loaded by
//! `dlopen`.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{InvalidateRange, Notifier, Registration};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Ends the program if a callback uses the heap, which a callback must not do: see `Notifier`.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

static SEEN: AtomicU64 = AtomicU64::new(0);
static HELD: OnceLock<(Hook, Option<Arc<Kernel>>, Registration<Count>)> = OnceLock::new();

struct Count;

impl Notifier for Count {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        SEEN.fetch_add(1, Ordering::Relaxed);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    let Ok(watch) = Registration::new(&mmu_source::current(), Count) else {
        return;
    };
    let hook = match Hook::install() {
        Ok(hook) => hook,
        Err(error) => return write_report(&format!("refused: {error}")),
    };
    let kernel = Kernel::start().ok();
    let _ = HELD.set((hook, kernel, watch));
    // SAFETY: the hook keeps this library loaded, so the function stays valid.
    unsafe { libc::atexit(report) };
}

extern "C" fn report() {
    let kernel = HELD.get().is_some_and(|held| held.1.is_some());
    write_report(&format!(
        "brackets {} kernel {kernel}",
        SEEN.load(Ordering::Relaxed)
    ));
}

fn write_report(line: &str) {
    let Some(path) = std::env::var_os("MMUN_PRELOAD_REPORT") else {
        return;
    };
    let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) else {
        return;
    };
    let _ = writeln!(file, "{line}");
}
