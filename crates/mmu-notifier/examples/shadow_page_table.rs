//! A shadow page table over real memory. If a thread uses a page that has no entry, it faults the
//! entry in. `munmap` may run at any time.
//!
//! Readers follow the table's pointers without a system call. That is sound only if an entry leaves
//! the table before its page is unmapped: a mistake in the protocol may end this program with
//! SIGSEGV.
//!
//! This program opens a bracket by hand around each `munmap`. With an event source, the code that
//! calls `munmap` stays as it is.

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{
    Event, InstallError, InvalidateSeq, MmWithUser, SoftTlb, Subsystem, Va, VaRange,
};
use std::io::Error;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const PAGES: u64 = 32;
const PAGE: u64 = mmu_notifier::PAGE_SIZE;

/// Ends the program if a callback uses the heap, which no callback may do: see `Notifier`.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

/// Where a page of the guest lies in this process.
#[derive(Clone, Copy)]
struct Host(NonNull<u8>);

// SAFETY: The memory belongs to no thread, and threads dereference the pointer only under the
// table's lock.
unsafe impl Send for Host {}

/// The host address of each page that was used since its last unmap. KVM calls such an entry an
/// spte.
type Shadow = InvalidateSeq<SoftTlb<Host>>;

/// The guest's memory. Any page of it may be missing.
struct Guest {
    range: VaRange,
}

impl Guest {
    fn map() -> Self {
        let start = mmap(ptr::null_mut(), PAGES * PAGE, 0);
        Self {
            range: VaRange::covering(Va::new(start), PAGES * PAGE).expect("a mapping is not empty"),
        }
    }

    fn page(&self, number: u64) -> VaRange {
        VaRange::covering(Va::new(self.range.start().get() + number * PAGE), PAGE)
            .expect("a page is not empty")
    }

    fn unmap(&self, mm: &MmWithUser, number: u64) {
        let page = self.page(number);
        let _bracket = mm.invalidate(page, Event::Unmap);
        // SAFETY: No code may use the page. Threads reach guest memory only through the shadow. The
        // shadow has dropped the page, and takes no entry of it while the bracket is open.
        let done = unsafe { libc::munmap(page.start().get() as *mut libc::c_void, PAGE as usize) };
        assert_eq!(done, 0, "munmap: {}", Error::last_os_error());
    }

    /// Maps a missing page again. No translation of it exists, so no bracket is needed.
    fn map_again(&self, number: u64) {
        mmap(
            self.page(number).start().get() as *mut libc::c_void,
            PAGE,
            libc::MAP_FIXED_NOREPLACE,
        );
    }

    /// Walks the primary page table: returns the page's address if it is mapped.
    fn walk(&self, page: VaRange) -> Option<Host> {
        let start = page.start().get() as *mut libc::c_void;
        let mut resident = 0;
        // SAFETY: `mincore` only reads the page table, and fails with ENOMEM for an unmapped page.
        // It writes one byte for one page.
        let mapped = unsafe { libc::mincore(start, PAGE as usize, &raw mut resident) } == 0;
        NonNull::new(start.cast::<u8>())
            .filter(|_| mapped)
            .map(Host)
    }
}

fn mmap(at: *mut libc::c_void, length: u64, flags: libc::c_int) -> u64 {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
    );
    // SAFETY: The call maps only free addresses: the kernel chooses them, or MAP_FIXED_NOREPLACE is
    // set.
    let start = unsafe { libc::mmap(at, length as usize, protection, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED, "mmap: {}", Error::last_os_error());
    start as u64
}

/// Adds one to a byte of the guest, through the shadow. Returns two values: the old byte, which is
/// `None` if the page is not mapped, and whether the page had no entry at first.
fn increment(shadow: &Shadow, guest: &Guest, number: u64) -> (Option<u8>, bool) {
    let page = guest.page(number);
    let address = page.start();
    let mut faulted = false;
    loop {
        // The closure runs under the shadow's lock, so no bracket zaps an entry meanwhile.
        let hit = shadow.with_shadow(|table| {
            table.get(address).map(|Host(host)| {
                // SAFETY: The page must be mapped. `munmap` comes only after the bracket has zapped
                // the entry, and the entry is still in the shadow.
                let value = unsafe { host.as_ptr().read_volatile() };
                // SAFETY: The page must be mapped, as above. Only holders of the lock write to it.
                unsafe { host.as_ptr().write_volatile(value.wrapping_add(1)) };
                value
            })
        });
        if hit.is_some() {
            return (hit, faulted);
        }
        faulted = true;
        let snapshot = shadow.snapshot(page);
        let Some(host) = guest.walk(page) else {
            return (None, faulted);
        };
        match shadow.try_install(snapshot, |table| table.insert(address, host)) {
            // The next turn hits the entry, unless a bracket has zapped it already. A refusal means
            // that a bracket of some page of the guest has ended since the snapshot, or that an
            // open one may cover this page. The next turn looks the page up again.
            Ok(_) | Err(InstallError::Retry) => {}
            // The address space has ended.
            Err(_) => return (None, faulted),
        }
    }
}

fn main() {
    let mm = MmWithUser::new();
    let guest = Guest::map();
    let range = guest.range;
    let shadows = Subsystem::<Shadow, std::convert::Infallible, _>::new(move |_: &MmWithUser| {
        Ok(InvalidateSeq::new([range], SoftTlb::new(PAGES as usize)))
    });
    let shadow = shadows.get(&mm).expect("no bracket is open here");

    assert_eq!(
        increment(&shadow, &guest, 0),
        (Some(0), true),
        "the first use faults"
    );
    assert_eq!(
        increment(&shadow, &guest, 0),
        (Some(1), false),
        "the second does not"
    );
    guest.unmap(&mm, 0);
    assert_eq!(increment(&shadow, &guest, 0), (None, true));
    guest.map_again(0);
    assert_eq!(
        increment(&shadow, &guest, 0),
        (Some(0), true),
        "a new page, which is empty"
    );

    // The same while other threads run the guest.
    let stop = AtomicBool::new(false);
    let (hits, faults) = thread::scope(|scope| {
        let processors = [1, 5].map(|stride| {
            let (shadow, guest, stop) = (&shadow, &guest, &stop);
            scope.spawn(move || {
                let (mut hits, mut faults) = (0_u64, 0_u64);
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) || hits == 0 || faults == 0 {
                    match increment(shadow, guest, number) {
                        (Some(_), false) => hits += 1,
                        (Some(_), true) => faults += 1,
                        (None, _) => {}
                    }
                    number = (number + stride) % PAGES;
                }
                (hits, faults)
            })
        });
        for number in (0..PAGES).cycle().take(2000) {
            guest.unmap(&mm, number);
            guest.map_again(number);
        }
        stop.store(true, Ordering::Relaxed);
        processors
            .map(|processor| processor.join().expect("processors do not panic"))
            .into_iter()
            .unzip::<_, _, Vec<_>, Vec<_>>()
    });
    assert_eq!(shadow.in_progress(), None);

    // The address space ends. Then the table is empty, and no thread can install an entry any more.
    drop(mm);
    assert!(shadow.with_shadow(|table| table.is_empty()));
    assert!(
        shadow
            .try_install(shadow.snapshot(guest.page(1)), |_| ())
            .is_err()
    );
    shadow.put();
    shadows.synchronize().expect("no bracket is open here");
    println!("2000 pages unmapped under {hits:?} hits and {faults:?} faults of two processors");
}

#[cfg(test)]
#[test]
fn it_runs() {
    main();
}
