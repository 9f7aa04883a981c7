//! The source `uffd`: which changes of which memory are reported, what a callback may do, forks,
//! and closed descriptors.

use crate::memory::{Log, Scratch, memory_file, page_size};
use mmu_notifier::{Va, VaRange};
use mmu_source::uffd::Uffd;
use mmu_source::{Error, current};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use testkit::{Cap, in_child, require};

fn start() -> Option<Arc<Uffd>> {
    require(Cap::Userfaultfd).then(|| Uffd::start().expect("userfaultfd is there"))
}

fn told(uffd: &Arc<Uffd>, name: &str, memory: Scratch, change: impl FnOnce(&Scratch)) {
    let log = Log::about(&current(), memory.range());
    let armed = uffd
        .arm(memory.range())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    uffd.settle().expect("no fork");
    log.take();
    change(&memory);
    uffd.settle().expect("no fork");
    assert!(!log.take().is_empty(), "{name}: no subscriber was told");
    drop(armed);
    // Another thread may have mapped memory where the change has unmapped it.
    std::mem::forget(memory);
    drop(log.unregister().expect("outside of brackets"));
}

fn munmap(memory: &Scratch) {
    // SAFETY: the test's own scratch memory.
    assert_eq!(unsafe { libc::munmap(memory.page(0), memory.bytes) }, 0);
}

fn advise(memory: &Scratch, advice: i32) {
    // SAFETY: the test's own scratch memory.
    let result = unsafe { libc::madvise(memory.page(0), memory.bytes, advice) };
    assert_eq!(
        result,
        0,
        "madvise {advice}: {}",
        std::io::Error::last_os_error()
    );
}

#[test]
fn changes_of_anonymous_memory_are_reported() {
    let Some(uffd) = start() else { return };
    told(&uffd, "munmap", Scratch::anonymous(4), munmap);
    told(&uffd, "MADV_DONTNEED", Scratch::anonymous(4), |memory| {
        advise(memory, libc::MADV_DONTNEED)
    });
    told(&uffd, "mremap", Scratch::anonymous(4), |memory| {
        // SAFETY: moves the test's own scratch memory to an address that the kernel chooses.
        unsafe {
            libc::mremap(
                memory.page(0),
                4 * page_size(),
                4096 * page_size(),
                libc::MREMAP_MAYMOVE,
            )
        };
    });
    told(&uffd, "mmap over it", Scratch::anonymous(4), |memory| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces a part of the test's own scratch memory.
        unsafe { libc::mmap(memory.page(2), page_size(), libc::PROT_READ, flags, -1, 0) };
    });
    told(&uffd, "fork", Scratch::anonymous(4), |_| {
        assert!(in_child(|| true))
    });
}

#[test]
fn changes_of_shared_memory_are_reported() {
    let Some(uffd) = start() else { return };
    let file = memory_file(4);
    let shared = || Scratch::map(4, libc::MAP_SHARED, file.as_raw_fd()).expect("mmap");
    told(&uffd, "munmap", shared(), munmap);
    told(&uffd, "MADV_REMOVE", shared(), |memory| {
        advise(memory, libc::MADV_REMOVE)
    });
}

#[test]
fn changes_of_huge_pages_are_reported() {
    let Some(uffd) = start() else { return };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let huge = || {
        // What one page table maps, whose entries have eight bytes.
        let bytes = page_size() / 8 * page_size();
        // SAFETY: a new mapping, at an address that the kernel chooses. The test does not touch it,
        // because there may be no free huge pages.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Scratch {
            at: at.cast(),
            bytes,
        }
    };
    told(&uffd, "munmap", huge(), munmap);
    told(&uffd, "MADV_DONTNEED", huge(), |memory| {
        advise(memory, libc::MADV_DONTNEED)
    });
}

#[test]
fn what_cannot_be_armed_is_an_error() {
    let Some(uffd) = start() else { return };
    let memory = Scratch::anonymous(4);
    // SAFETY: our own scratch memory.
    assert_eq!(unsafe { libc::munmap(memory.page(2), page_size()) }, 0);
    let error = uffd.arm(memory.range()).expect_err("there is a hole in it");
    assert!(matches!(error, Error::Arm { .. }), "{error}");
    std::mem::forget(memory);
    let nothing = VaRange::covering(Va::new(0x1000), 4096).expect("a page");
    assert!(matches!(uffd.arm(nothing), Err(Error::Arm { .. })));
    assert!(matches!(uffd.arm(VaRange::ALL), Err(Error::Arm { .. })));
}

#[test]
fn a_range_that_is_armed_twice_is_reported_until_both_are_dropped() {
    let Some(uffd) = start() else { return };
    let memory = Scratch::anonymous(8);
    let log = Log::about(&current(), memory.range());
    let is_told = |page: usize| {
        log.take();
        assert_eq!(
            // SAFETY: our own scratch memory.
            unsafe { libc::madvise(memory.page(page), page_size(), libc::MADV_DONTNEED) },
            0
        );
        uffd.settle().expect("no fork");
        log.take().iter().any(|range| {
            // A range counts pages of 4 KiB.
            range.contains(Va::new(memory.page(page).addr() as u64))
                && range.pages() == page_size() as u64 / 4096
        })
    };
    let part = VaRange::covering(
        Va::new(memory.page(2).addr() as u64),
        2 * page_size() as u64,
    )
    .expect("two pages");
    let whole = uffd.arm(memory.range()).expect("armed");
    let inside = uffd.arm(part).expect("armed");
    drop(whole);
    let told: Vec<bool> = (0..8).map(is_told).collect();
    assert_eq!(told, [false, false, true, true, false, false, false, false]);
    drop(inside);
    assert!(!is_told(2));
}

#[test]
fn a_callback_may_unmap_armed_memory_and_disarm() {
    let Some(uffd) = start() else { return };
    struct Unmaps(
        VaRange,
        std::sync::Mutex<Option<(mmu_source::uffd::Armed, Scratch)>>,
    );
    impl mmu_notifier::Notifier for Unmaps {
        fn invalidate_range_start(&self, range: &mmu_notifier::InvalidateRange<'_>) {
            if range.range().overlaps(self.0)
                && let Some((armed, memory)) = self.1.lock().expect("no panic").take()
            {
                munmap(&memory);
                drop(armed);
                std::mem::forget(memory);
            }
        }
    }
    let (first, second) = (Scratch::anonymous(1), Scratch::anonymous(1));
    let log = Log::about(&current(), second.range());
    let armed = uffd.arm(second.range()).expect("armed");
    let unmaps = Unmaps(first.range(), std::sync::Mutex::new(Some((armed, second))));
    let unmaps = mmu_notifier::Registration::new(&current(), unmaps).expect("outside of brackets");
    let _armed = uffd.arm(first.range()).expect("armed");
    advise(&first, libc::MADV_DONTNEED);
    uffd.settle().expect("no fork");
    uffd.settle().expect("no fork");
    assert!(
        unmaps.1.lock().expect("no panic").is_none(),
        "the callback ran"
    );
    assert!(!log.take().is_empty(), "and what it unmapped was told");
    assert!(unmaps.unregister().is_ok());
}

/// Returns whether memory can be unmapped that was armed and then moved, after the source has
/// ended. A child that was forked before the end still lives.
fn outlived_by_a_child() -> bool {
    let uffd = Uffd::start().expect("userfaultfd is there");
    let memory = Scratch::anonymous(4);
    let armed = uffd.arm(memory.range()).expect("armed");
    // A moved range stays registered, and no call disarms it at its new address.
    let (flags, place) = (
        libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
        Scratch::anonymous(4),
    );
    // SAFETY: both are our own scratch memory.
    let moved = unsafe {
        libc::mremap(
            memory.page(0),
            memory.bytes,
            memory.bytes,
            flags,
            place.page(0),
        )
    };
    assert_eq!(moved, place.page(0));
    // The first range is gone, and the second one is unmapped below.
    let bytes = memory.bytes;
    std::mem::forget((memory, place));
    uffd.settle().expect("no fork");
    // SAFETY: the child makes only a call that is safe after a fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: takes no arguments, and sleeps until a signal arrives.
            unsafe { libc::pause() };
        }
    }
    drop((armed, uffd));
    let moved = moved.addr();
    let (unmapped, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: the test's own memory, which no other code knows.
        unmapped.send(unsafe { libc::munmap(std::ptr::without_provenance_mut(moved), bytes) })
    });
    let result = wait.recv_timeout(std::time::Duration::from_secs(60));
    // SAFETY: the test's own child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    result == Ok(0)
}

#[test]
fn memory_that_was_armed_can_be_unmapped_after_the_source_although_a_child_lives() {
    // Run in a child, because other tests keep the source alive in this process.
    assert!(!require(Cap::Userfaultfd) || in_child(outlived_by_a_child));
}

#[test]
fn the_threads_take_none_of_the_programs_signals() {
    let Some(_uffd) = start() else { return };
    // The threads of other tests start and end meanwhile, and a list that is read at that time can
    // be incomplete.
    let ours = loop {
        let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
        let threads =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
        let ours: Vec<_> = threads
            .filter(|status| status.starts_with("Name:\tmmu-uffd-"))
            .collect();
        if ours.len() >= 2 {
            break ours;
        }
    };
    for status in ours {
        let blocked = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:\t"))
            .expect("a mask");
        let blocked = u64::from_str_radix(blocked, 16).expect("hexadecimal");
        for signal in [libc::SIGTERM, libc::SIGUSR1, libc::SIGCHLD] {
            assert_ne!(blocked & 1 << (signal - 1), 0, "{signal}: {status}");
        }
    }
}

#[test]
fn a_forked_child_has_no_part_in_its_parents_source() {
    let Some(uffd) = start() else { return };
    let memory = Scratch::anonymous(2);
    let mut armed = Some(uffd.arm(memory.range()).expect("armed"));
    assert!(in_child(|| {
        let refused =
            matches!(uffd.settle(), Err(Error::AfterFork { .. })) && armed.take().is_some();
        // The child's memory is not registered. Otherwise this call would wait for a reader that
        // does not exist here.
        advise(&memory, libc::MADV_DONTNEED);
        refused
            && Uffd::start()
                .is_ok_and(|own| own.arm(memory.range()).is_ok() && own.settle().is_ok())
    }));
    let log = Log::about(&current(), memory.range());
    advise(&memory, libc::MADV_DONTNEED);
    uffd.settle().expect("no fork");
    assert!(!log.take().is_empty(), "the parent is still armed");
    assert!(armed.is_some());
}

/// Closes every descriptor and opens files of the program as the same descriptors. With `over`,
/// replaces each descriptor by a file instead. Returns whether the source still works and has not
/// touched these files.
fn closed_and_used_again(over: bool) -> bool {
    let uffd = Uffd::start().expect("userfaultfd is there");
    let memory = Scratch::anonymous(2);
    let armed = uffd.arm(memory.range()).expect("armed");
    let zero = std::fs::File::open("/dev/zero").expect("a file");
    let files: Vec<_> = if over {
        let over = (3..64).filter(|number| {
            // SAFETY: takes integers. In this child no code owns or needs the replaced descriptors.
            *number != zero.as_raw_fd() && unsafe { libc::dup2(zero.as_raw_fd(), *number) } >= 0
        });
        over.collect()
    } else {
        std::mem::forget(zero);
        assert_eq!(
            // SAFETY: takes integers. In this child no code owns or needs the closed descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) },
            0
        );
        (0..40)
            .map(|_| {
                std::os::fd::IntoRawFd::into_raw_fd(
                    std::fs::File::open("/dev/zero").expect("a file"),
                )
            })
            .collect()
    };
    let log = Log::about(&current(), memory.range());
    advise(&memory, libc::MADV_DONTNEED);
    uffd.settle().expect("it still works");
    let told = !log.take().is_empty();
    let other = Scratch::anonymous(1);
    drop(uffd.arm(other.range()).expect("it still works"));
    drop((armed, uffd));
    // SAFETY: `F_GETFD` takes integers and changes nothing.
    told && files
        .iter()
        .all(|file| unsafe { libc::fcntl(*file, libc::F_GETFD) } >= 0)
}

#[test]
fn closing_every_descriptor_does_not_silence_the_source() {
    if require(Cap::Userfaultfd) {
        assert!(in_child(|| closed_and_used_again(false)));
        assert!(in_child(|| closed_and_used_again(true)));
    }
}

/// The kernel makes a descriptor for each fork, which the source closes.
#[test]
fn without_a_free_descriptor_a_fork_does_not_wait_and_the_source_ends() {
    if !require(Cap::Userfaultfd) {
        return;
    }
    let mut most = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes to a local.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut most) } == 0;
    assert!(known);
    let none = libc::rlimit {
        rlim_cur: 0,
        ..most
    };
    // SAFETY: the call reads a local.
    let limit = |limit| unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) } == 0;
    let has_ended = |error| matches!(error, Some(Error::Kernel { .. }));
    assert!(in_child(|| {
        let uffd = Uffd::start().expect("userfaultfd is there");
        let memory = Scratch::anonymous(2);
        let armed = uffd.arm(memory.range()).expect("armed");
        let log = Log::about(&current(), memory.range());
        let forks = limit(&none) && in_child(|| true) && limit(&most);
        let ended = has_ended(uffd.settle().err())
            && has_ended(uffd.arm(memory.range()).err())
            && !log.take().is_empty();
        drop((armed, uffd));
        let anew = Uffd::start().expect("it can be started anew");
        forks && ended && anew.arm(memory.range()).is_ok() && in_child(|| true)
    }));
}
