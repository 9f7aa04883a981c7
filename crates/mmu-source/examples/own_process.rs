//! A shadow of this process's own memory that stays correct while the allocator returns memory to
//! the kernel.
//!
//! `cargo run -p mmu-source --example own_process`
//!
//! One thread allocates blocks, fills them, and frees them. The other thread reads them through a
//! shadow: a table that translates a page to a pointer and is filled at the first use of the page.
//! The reader does not ask the kernel whether the page is still mapped. That is sound because the
//! hook notifies the shadow *before* a page is unmapped, wherever that happens, for example in the
//! middle of `free`. A mistake in the protocol may end this program with SIGSEGV.
//!
//! The callback may run while the allocator's locks are held. So the callback neither allocates nor
//! frees, and neither does any code that holds the shadow's lock. `SoftTlb` is a table of fixed
//! size. `CheckedAlloc` checks the rule at every call.

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

/// The address of a page. In a shadow of guest or device memory this address would differ from the
/// page's own address.
#[derive(Clone, Copy)]
struct Host(NonNull<u8>);

// SAFETY: no thread owns the memory, and every read is under the shadow's lock.
unsafe impl Send for Host {}

type Shadow = InvalidateSeq<SoftTlb<Host>>;

static SHADOW: Subsystem<Shadow> =
    Subsystem::new(|_mm| Ok(InvalidateSeq::new([VaRange::ALL], SoftTlb::new(1024))));

/// The first page boundary in the latest block. Loads need no ordering, because the block may be
/// unmapped at any time.
static BLOCK: AtomicU64 = AtomicU64::new(0);

const BLOCK_SIZE: usize = 2 << 20;

/// Reads the first byte of a page through the shadow. `None` if the page is not mapped.
fn read(shadow: &Shadow, page: VaRange) -> Option<u8> {
    loop {
        // While this thread holds the shadow's lock, no page can leave the shadow, and so no page
        // of the shadow can be unmapped.
        let hit = shadow.with_shadow(|tlb| {
            // SAFETY: a page in the shadow is mapped and readable, because the callback that would
            // remove it waits for the lock.
            tlb.get(page.start())
                .map(|Host(host)| unsafe { host.as_ptr().read_volatile() })
        });
        if hit.is_some() {
            return hit;
        }
        // A miss: look up the page without the lock. Insert the translation unless the page has
        // changed meanwhile.
        let snapshot = shadow.snapshot(page);
        let host = walk(page.start())?;
        let _ = shadow.try_install(snapshot, |tlb| tlb.insert(page.start(), host));
    }
}

/// Asks the kernel whether a page is readable, by letting the kernel copy the first byte.
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
    // SAFETY: the call writes one byte to a local. It fails if the page is not readable.
    let copied =
        unsafe { libc::process_vm_readv(std::process::id() as i32, &local, 1, &remote, 1, 0) };
    NonNull::new(start).filter(|_| copied == 1).map(Host)
}

fn main() -> Result<(), Box<dyn Error>> {
    // Subscribe first. Then the shadow sees every bracket that is open now or opens later.
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
            // The block is freed here. The allocator decides how: by `munmap`, by `brk`, or by
            // keeping it in the heap.
        }
        stop.store(true, Ordering::Relaxed);
        reader.join()
    });
    let (reads, missing) = read.map_err(|_| "the reader panicked")?;

    // End in the reverse order: first the source, then the subscription. Then wait until the
    // notifier has been freed.
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
