//! A shadow of this process's own memory, kept right while the allocator gives memory back
//! underneath it.
//!
//! `cargo run -p mmu-source --example own_process`
//!
//! One thread allocates blocks, fills them, and frees them; the other one reads them through a
//! shadow: a table that translates a page to a pointer, filled at the first use of the page.
//! Reading does not ask the kernel whether the page is still there. That is sound because the hook
//! tells the shadow *before* a page leaves, wherever that happens: in the middle of `free`, for
//! one. A mistake in the protocol ends this program with SIGSEGV.
//!
//! The callback may run while the allocator's locks are held, so it neither allocates nor frees,
//! and no more does any code that holds the shadow's lock. `SoftTlb` is a table of fixed size, and
//! `CheckedAlloc` proves it for every call.

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{InvalidateSeq, PAGE_SIZE, SoftTlb, Subsystem, Va, VaRange};
use mmu_source::hook::Hook;
use std::error::Error;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// Ends the program if a callback uses the heap.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

/// Where a page is. In a shadow of guest memory or of a device's this would be another address than
/// the page's own.
#[derive(Clone, Copy)]
struct Host(NonNull<u8>);

// SAFETY: the memory belongs to no thread, and is read under the shadow's lock.
unsafe impl Send for Host {}

type Shadow = InvalidateSeq<SoftTlb<Host>>;

static SHADOW: Subsystem<Shadow> =
    Subsystem::new(|_mm| Ok(InvalidateSeq::new([VaRange::ALL], SoftTlb::new(1024))));

/// Where the latest block begins, and how many there were. Reading it is free of any order: the
/// block may be gone already.
static BLOCK: AtomicU64 = AtomicU64::new(0);

const BLOCK_SIZE: usize = 2 << 20;

/// Reads the first byte of a page through the shadow. `None` if the page is not mapped.
fn read(shadow: &Shadow, page: VaRange) -> Option<u8> {
    loop {
        // Under the shadow's lock no page can leave it, and so none can leave memory.
        let hit = shadow.with_shadow(|tlb| {
            // SAFETY: a page that is in the shadow is mapped and readable: the callback for its
            // removal waits for the lock.
            tlb.get(page.start())
                .map(|Host(host)| unsafe { host.as_ptr().read_volatile() })
        });
        if hit.is_some() {
            return hit;
        }
        // A miss: look the page up, without the lock, and enter it unless it has changed meanwhile.
        let snapshot = shadow.snapshot(page);
        let host = walk(page.start())?;
        let _ = shadow.try_install(snapshot, |tlb| tlb.insert(page.start(), host));
    }
}

/// Asks the kernel whether a page can be read, by having it copy the first byte.
fn walk(page: Va) -> Option<Host> {
    let start: *mut u8 = ptr::with_exposed_provenance_mut(page.get() as usize);
    let mut byte = 0_u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: start.cast(),
        iov_len: 1,
    };
    // SAFETY: writes one byte to a local, and fails where the page cannot be read.
    let copied =
        unsafe { libc::process_vm_readv(std::process::id() as i32, &local, 1, &remote, 1, 0) };
    NonNull::new(start).filter(|_| copied == 1).map(Host)
}

fn main() -> Result<(), Box<dyn Error>> {
    // Subscribe first: a bracket that is open, or opens later, then calls the shadow.
    let shadow = SHADOW.get(&mmu_source::current())?;
    let hook = Hook::install()?;

    let stop = AtomicBool::new(false);
    let read = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut missing) = (0_u64, 0_u64);
            while !stop.load(Ordering::Relaxed) {
                let block = BLOCK.load(Ordering::Relaxed);
                for number in 0..BLOCK_SIZE as u64 / PAGE_SIZE {
                    let page = VaRange::covering(Va::new(block + number * PAGE_SIZE), 1);
                    match page
                        .ok()
                        .filter(|_| block != 0)
                        .and_then(|page| read(&shadow, page))
                    {
                        Some(_) => reads += 1,
                        None => missing += 1,
                    }
                }
            }
            (reads, missing)
        });
        for round in 0..2000_usize {
            let block = vec![round as u8; BLOCK_SIZE + ((round % 7) << 16)];
            BLOCK.store(
                (block.as_ptr().expose_provenance() as u64).next_multiple_of(PAGE_SIZE),
                Ordering::Relaxed,
            );
            thread::yield_now();
            // Freed here: by `munmap`, by `brk`, or by leaving it in the heap, as the allocator
            // sees fit.
        }
        stop.store(true, Ordering::Relaxed);
        reader.join()
    });
    let (reads, missing) = read.map_err(|_| "the reader panicked")?;

    // The other way round: first the source, then the subscription, then wait until the notifier
    // was freed.
    drop(hook);
    shadow.put();
    SHADOW.synchronize()?;
    println!("2000 blocks freed under {reads} reads through the shadow; {missing} pages were gone");
    Ok(())
}

#[cfg(test)]
#[test]
fn it_runs() {
    main().expect("the example succeeds");
}
