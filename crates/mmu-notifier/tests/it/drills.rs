//! Whole systems. `b_47` uses real mappings.

use crate::support::{Counter, page, wait_until};
use mmu_notifier::{
    Event, InvalidateRange, InvalidateSeq, Mm, MmWithUser, Notifier, Owner, ShadowOps, Subsystem,
    Va, VaRange,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

/// A module whose operations must not run once it is unloaded.
#[derive(Default)]
struct Module {
    unloaded: AtomicBool,
    calls: AtomicUsize,
    too_late: AtomicUsize,
}

impl Module {
    fn enter(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.unloaded.load(Ordering::SeqCst) {
            self.too_late.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Op(Arc<Module>);

impl Notifier for Op {
    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.0.enter();
    }

    fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
        self.0.enter();
        thread::yield_now();
        self.0.enter();
    }

    fn release(&self, _mm: &Mm) {
        self.0.enter();
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        thread::yield_now();
        self.0.enter();
    }
}

#[test]
fn b_46_after_the_last_puts_and_synchronize_no_operation_runs() {
    for _ in 0..testkit::rounds(20) {
        let module = Arc::new(Module::default());
        let subsystem = Subsystem::<Op, std::convert::Infallible, _>::new(|_: &MmWithUser| {
            Ok(Op(Arc::clone(&module)))
        });
        let mms: Vec<_> = (0..3).map(|_| MmWithUser::new()).collect();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for mm in &mms {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        drop(mm.invalidate(page(1), Event::Clear));
                    }
                });
            }
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for mm in mms.iter().cycle().take(60) {
                            let held = subsystem.get(mm).unwrap();
                            held.try_clone().unwrap().put();
                            held.put();
                        }
                    });
                }
            });
            // The last puts are done, and the events continue.
            subsystem.synchronize().unwrap();
            module.unloaded.store(true, Ordering::SeqCst);
            for mm in &mms {
                drop(mm.invalidate(page(1), Event::Clear));
            }
            stop.store(true, Ordering::Relaxed);
        });
        drop(mms);
        assert_eq!(
            module.too_late.load(Ordering::Relaxed),
            0,
            "an operation ran after the module was unloaded"
        );
        assert!(module.calls.load(Ordering::Relaxed) > 0);
    }
}

const PAGES: usize = 16;
/// The size of a page of these tests: a multiple of each page size of x86-64 and AArch64 kernels.
const PAGE: usize = if cfg!(target_arch = "aarch64") {
    64 << 10
} else {
    4 << 10
};

/// Real anonymous memory. `write_stamp` writes a stamp to the beginning of a page: an integer that
/// no page has had before.
struct Memory {
    base: usize,
    stamp: AtomicU64,
}

impl Memory {
    fn map() -> Self {
        let base = Self::mmap(std::ptr::null_mut(), PAGES * PAGE, 0);
        let memory = Self {
            base,
            stamp: AtomicU64::new(1),
        };
        (0..PAGES).for_each(|page| memory.write_stamp(page));
        memory
    }

    fn mmap(at: *mut libc::c_void, length: usize, flags: libc::c_int) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: The call maps anonymous memory at free addresses, or over pages that only this
        // test owns and reaches by system calls only.
        let got = unsafe {
            libc::mmap(
                at,
                length,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        assert_ne!(
            got,
            libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        got as usize
    }

    fn address(&self, page: usize) -> usize {
        self.base + page * PAGE
    }

    fn range(&self, page: usize) -> VaRange {
        VaRange::covering(Va::new(self.address(page) as u64), PAGE as u64).unwrap()
    }

    /// Copies between a page and `value`. Returns false if the page is not mapped. The kernel
    /// copies, so a page that is not mapped causes no SIGSEGV.
    fn copy(&self, page: usize, value: &mut u64, write: bool) -> bool {
        let local = libc::iovec {
            iov_base: std::ptr::from_mut(value).cast(),
            iov_len: 8,
        };
        let remote = libc::iovec {
            iov_base: self.address(page) as *mut libc::c_void,
            iov_len: 8,
        };
        let me = std::process::id() as i32;
        let call = if write {
            libc::process_vm_writev
        } else {
            libc::process_vm_readv
        };
        // SAFETY: `local` is a live `u64`. The kernel checks `remote`, which belongs to this test.
        let copied = unsafe { call(me, &raw const local, 1, &raw const remote, 1, 0) };
        copied == 8
    }

    fn read(&self, page: usize) -> Option<u64> {
        let mut value = 0;
        self.copy(page, &mut value, false).then_some(value)
    }

    fn write_stamp(&self, page: usize) {
        let mut stamp = self.stamp.fetch_add(1, Ordering::Relaxed);
        assert!(self.copy(page, &mut stamp, true), "the page is mapped");
    }

    fn unmap(&self, page: usize) {
        assert_eq!(
            // SAFETY: The page belongs to this test, which reaches it by system calls only.
            unsafe { libc::munmap(self.address(page) as *mut libc::c_void, PAGE) },
            0
        );
    }

    /// Discards the content and keeps the mapping.
    fn clear(&self, page: usize) {
        let at = self.address(page) as *mut libc::c_void;
        // SAFETY: The page belongs to this test, as in `unmap`.
        assert_eq!(unsafe { libc::madvise(at, PAGE, libc::MADV_DONTNEED) }, 0);
    }

    fn map_again(&self, page: usize) {
        Self::mmap(
            self.address(page) as *mut libc::c_void,
            PAGE,
            libc::MAP_FIXED,
        );
    }
}

/// A device's copy: for each page the stamp that the device found there. The stamp stands for the
/// frame.
struct Mirror {
    entries: BTreeMap<u64, u64>,
    /// The owner whose migrations this device ignores.
    owner: Owner,
}

impl ShadowOps for Mirror {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        if range.event().owner() != Some(self.owner) {
            self.entries
                .retain(|page, _| !range.range().contains(Va::new(*page)));
        }
    }
}

/// Runs a mirror thread until the address space has ended. It faults pages in, and checks that each
/// entry it looks at has the stamp of its page.
fn mirror(shadow: &InvalidateSeq<Mirror>, memory: &Memory, alive: &Mm, found: &Counter) {
    for page in (0..PAGES).cycle() {
        let Some(_user) = alive.mmget_not_zero() else {
            return;
        };
        let range = memory.range(page);
        let snapshot = shadow.snapshot(range);
        if let Some(frame) = memory.read(page) {
            let installed = shadow.try_install(snapshot, |mirror| {
                mirror.entries.insert(range.start().get(), frame)
            });
            if installed.is_ok() {
                found.add();
            }
        }
        let page = (page * 7) % PAGES;
        shadow.with_shadow(|mirror| {
            if let Some(entry) = mirror.entries.get(&memory.range(page).start().get()) {
                assert_eq!(
                    memory.read(page),
                    Some(*entry),
                    "an entry of a page that is gone"
                );
            }
        });
    }
}

/// Mirrors of two devices on one address space, whose pages are unmapped, cleared, mapped over and
/// migrated. The address space also forks, and ends.
#[test]
fn b_47_no_mirror_has_an_entry_of_a_freed_page() {
    let memory = Memory::map();
    let all = VaRange::new(
        memory.range(0).start(),
        memory.range(PAGES - 1).end().unwrap(),
    )
    .unwrap();
    let owners = [Owner::new(), Owner::new()];
    let devices = owners.map(|owner| {
        Subsystem::<InvalidateSeq<Mirror>, std::convert::Infallible, _>::new(
            move |_: &MmWithUser| {
                Ok(InvalidateSeq::new(
                    [all],
                    Mirror {
                        entries: BTreeMap::new(),
                        owner,
                    },
                ))
            },
        )
    });
    let mm = MmWithUser::new();
    let handle = (*mm).clone();
    let held = devices.each_ref().map(|device| device.get(&mm).unwrap());
    let found = [Counter::default(), Counter::default()];
    thread::scope(|scope| {
        for (shadow, found) in held.iter().zip(&found) {
            let (memory, handle) = (&memory, &handle);
            scope.spawn(move || mirror(shadow, memory, handle, found));
        }
        let mut round = 0;
        while round < testkit::rounds(1000) || found.iter().any(|found| found.get() < 100) {
            change(&mm, &memory, round, owners[0], &held[0]);
            round += 1;
        }
        // This drop is exit, unless a mirror in the middle of a fault has the last user. Remove the
        // mappings after exit.
        drop(mm);
        wait_until(|| !handle.has_notifiers());
        (0..PAGES).for_each(|page| memory.unmap(page));
        for shadow in &held {
            assert_eq!(
                shadow.with_shadow(|mirror| mirror.entries.len()),
                0,
                "an entry outlived its address space"
            );
            let snapshot = shadow.snapshot(memory.range(0));
            assert!(shadow.try_install(snapshot, |_| ()).is_err());
        }
    });
    drop(held);
    for device in &devices {
        device.synchronize().unwrap();
    }
    assert_eq!((handle.mm_count(), handle.callback_panics()), (1, 0));
}

/// Makes one change of the address space in a bracket. After an unmap, maps the page again.
fn change(
    mm: &MmWithUser,
    memory: &Memory,
    round: usize,
    owner: Owner,
    own: &InvalidateSeq<Mirror>,
) {
    let page = (round * 5) % PAGES;
    let range = memory.range(page);
    match round % 5 {
        0 => {
            let bracket = mm.invalidate(range, Event::Unmap);
            memory.unmap(page);
            drop(bracket);
            memory.map_again(page);
            memory.write_new(mm, page);
        }
        1 => {
            let bracket = mm.invalidate(range, Event::Clear);
            memory.clear(page);
            memory.write_stamp(page);
            drop(bracket);
        }
        2 => {
            // Map over live memory: `mmap` removes the old page.
            let bracket = mm.invalidate(range, Event::Unmap);
            memory.map_again(page);
            memory.write_stamp(page);
            drop(bracket);
        }
        3 if round % 100 == 3 => fork(mm),
        _ => {
            // The first device moves the page itself, so it updates its entry. The other device
            // drops its entry.
            let bracket = mm.invalidate(range, Event::Migrate { owner: Some(owner) });
            own.with_shadow(|mirror| {
                memory.write_stamp(page);
                if let Some(entry) = mirror.entries.get_mut(&range.start().get()) {
                    *entry = memory.read(page).expect("it is mapped");
                }
            });
            drop(bracket);
        }
    }
}

impl Memory {
    /// Changes the content of a page in a bracket, so that every mirror must look it up again.
    fn write_new(&self, mm: &Mm, page: usize) {
        mm.with_invalidation(self.range(page), Event::ProtectionPage, |_| {
            self.write_stamp(page)
        });
    }
}

/// Forks a real child in a bracket. A new `MmWithUser` stands for the child's address space, which
/// starts without subscribers.
fn fork(mm: &MmWithUser) {
    let bracket = mm.invalidate(VaRange::ALL, Event::ProtectionPage);
    // SAFETY: The child only calls `_exit`, which is allowed after a fork of a program with
    // threads.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: The call only ends the process.
        unsafe { libc::_exit(0) };
    }
    assert!(child > 0, "fork: {}", std::io::Error::last_os_error());
    let child_mm = MmWithUser::new();
    assert!(!child_mm.has_notifiers());
    drop(bracket);
    let mut status = 0;
    // SAFETY: The call needs a place for the status, which is a local.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
}
