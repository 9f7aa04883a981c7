//! Calls that the hook claims to see: each is reported before and after, with the right range, and
//! its result does not change.

use crate::child::{alone, in_a_child};
use crate::log::Watch;
use crate::pages::{FLAGS, PROTECTION, at, errno, map, page_size, unmap};
use mmu_notifier::Event;
use mmu_source::hook::{Hook, State, probe};
use std::ptr;

/// The page size, as a signed distance.
fn p() -> i64 {
    page_size() as i64
}

#[test]
fn every_site_is_ours_while_installed() {
    let watch = Watch::new();
    let status = watch.hook.status();
    assert!(
        status.iter().all(|patch| patch.state == State::Ours),
        "{status:#?}"
    );
    for name in [
        "munmap",
        "mmap",
        "mremap",
        "madvise",
        "process_madvise",
        "brk",
        "shmat",
        "shmdt",
        "mprotect",
        "pkey_mprotect",
        "remap_file_pages",
        "syscall",
    ] {
        assert!(
            status.iter().any(|patch| patch.name == name),
            "{name}: {status:#?}"
        );
    }
    let in_loader = |name| {
        status
            .iter()
            .any(|patch| patch.name == name && patch.module.starts_with("ld-linux"))
    };
    assert!(
        in_loader("munmap") && in_loader("mmap") && in_loader("mprotect"),
        "{status:#?}"
    );
}

#[test]
fn munmap() {
    let watch = Watch::new();
    let pages = map(3, 7);
    watch.listen_and_look(pages, 3 * page_size());
    unmap(pages, 1);
    let heard = watch.heard();
    assert_eq!(
        heard[0].content, 7,
        "the page is there in the start callback"
    );
    watch.listen(pages, 3 * page_size());
    unmap(pages + page_size(), 2);
    watch.expect("the rest", Event::Unmap, &[(p(), 3 * p())]);
}

/// The kernel rounds the length up to whole pages of the file. It may refuse the call for lack of
/// huge pages; the test does not need the mapping.
#[test]
fn mmap_of_a_file_of_huge_pages_replaces_whole_ones() {
    const HUGE: usize = 1 << 21;
    let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    // SAFETY: takes a string and an integer, returns a descriptor.
    let file = unsafe { libc::memfd_create(c"huge".as_ptr(), flags) };
    if file < 0 {
        println!("SKIP: this machine has no huge pages of 2 MiB");
        return;
    }
    let watch = Watch::new();
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let place = unsafe { libc::mmap(ptr::null_mut(), 3 * HUGE, libc::PROT_NONE, FLAGS, -1, 0) };
    assert_ne!(place, libc::MAP_FAILED);
    let aligned = place.expose_provenance().next_multiple_of(HUGE);
    watch.listen(aligned, 2 * HUGE);
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: replaces a mapping of this test.
    let mapped = unsafe { libc::mmap(at(aligned), page_size(), PROTECTION, flags, file, 0) };
    watch.expect("a huge page", Event::Unmap, &[(0, HUGE as i64)]);
    // So does `mremap`, at both places.
    watch.listen(aligned, 2 * HUGE);
    let (moves, huge) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, HUGE as i64);
    let (length, target) = (page_size(), at(aligned + HUGE));
    // SAFETY: moves a mapping of this test onto another one.
    let moved = unsafe { libc::mremap(at(aligned), length, length, moves, target) };
    // Linux before 5.16 moves no huge pages.
    let is_refused = moved == libc::MAP_FAILED && errno() == libc::EINVAL;
    watch.expect("moved", Event::Unmap, &[(0, huge), (huge, 2 * huge)]);
    assert!(
        is_refused || (moved == target) == (mapped != libc::MAP_FAILED),
        "only what was mapped moves"
    );
    // SAFETY: the test owns the descriptor.
    unsafe { libc::close(file) };
    // SAFETY: the test owns both mappings. The call unmaps what is left of the first together with
    // the second.
    unsafe { libc::munmap(place, 3 * HUGE) };
}

#[test]
fn populating_for_writing_gives_pages_of_their_own() {
    let watch = Watch::new();
    let pages = map(2, 7);
    watch.listen(pages, 2 * page_size());
    // SAFETY: changes no byte of the test's pages.
    unsafe { libc::madvise(at(pages), 2 * page_size(), libc::MADV_POPULATE_WRITE) };
    watch.expect("populated", Event::Clear, &[(0, 2 * p())]);
    unmap(pages, 2);
}

#[test]
fn results_and_errno_are_the_kernels() {
    let watch = Watch::new();
    let pages = map(1, 0);
    assert_eq!(
        // SAFETY: the kernel refuses a misaligned address.
        (unsafe { libc::munmap(at(pages + 1), page_size()) }, errno()),
        (-1, libc::EINVAL)
    );
    assert_eq!(
        (
            // SAFETY: the kernel refuses a misaligned address. The call is made by its number.
            unsafe { libc::syscall(libc::SYS_munmap, pages + 1, page_size()) },
            errno()
        ),
        (-1, libc::EINVAL)
    );
    assert_eq!(
        (
            // SAFETY: the kernel refuses an unknown advice.
            unsafe { libc::madvise(at(pages), page_size(), 9999) },
            errno()
        ),
        (-1, libc::EINVAL)
    );
    assert_eq!(
        // SAFETY: the kernel refuses an unknown advice. This function returns the error instead of
        // setting `errno`.
        unsafe { libc::posix_madvise(at(pages), page_size(), 9999) },
        libc::EINVAL
    );
    assert_eq!(
        // SAFETY: a hint, which changes nothing.
        unsafe { libc::posix_madvise(at(pages), page_size(), libc::POSIX_MADV_WILLNEED) },
        0
    );
    assert_eq!(
        // SAFETY: no segment is attached there.
        (unsafe { libc::shmdt(at(pages)) }, errno()),
        (-1, libc::EINVAL)
    );
    // SAFETY: nothing is mapped there, and without a flag the kernel does not move it.
    let moved = unsafe { libc::mremap(at(16), page_size(), page_size(), 0) };
    assert_eq!((moved, errno()), (libc::MAP_FAILED, libc::EINVAL));
    assert_eq!(
        // SAFETY: only returns the pid.
        unsafe { libc::syscall(libc::SYS_getpid) },
        i64::from(std::process::id())
    );
    // SAFETY: a new mapping. The sixth argument of the call is the seventh of the function, which
    // is on the stack.
    let by_number =
        unsafe { libc::syscall(libc::SYS_mmap, 0, page_size(), PROTECTION, FLAGS, -1, 0_i64) };
    assert!(by_number > 0);
    // SAFETY: the kernel refuses an offset that is not page-aligned.
    let refused =
        unsafe { libc::syscall(libc::SYS_mmap, 0, page_size(), PROTECTION, FLAGS, -1, 1_i64) };
    assert_eq!((refused, errno()), (-1, libc::EINVAL));
    unmap(by_number as usize, 1);
    unmap(pages, 1);
    drop(watch);
}

#[test]
fn mmap_over_live_memory() {
    let watch = Watch::new();
    let pages = map(3, 5);
    watch.listen_and_look(pages, 3 * page_size());
    // SAFETY: replaces pages of this test.
    let new = unsafe {
        libc::mmap(
            at(pages),
            page_size(),
            PROTECTION,
            FLAGS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    assert_eq!(new, at(pages));
    assert_eq!(
        watch.heard()[0].content,
        5,
        "the old page is there in the start callback"
    );
    watch.listen(pages, 3 * page_size());
    // SAFETY: the kernel refuses the call, because pages are mapped there.
    let new = unsafe {
        libc::mmap(
            at(pages),
            page_size(),
            PROTECTION,
            FLAGS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!((new, errno()), (libc::MAP_FAILED, libc::EEXIST));
    watch.expect("nothing replaced", Event::Unmap, &[]);
    watch.listen(pages, 3 * page_size());
    // SAFETY: replaces pages of this test.
    unsafe {
        libc::mmap(
            at(pages + page_size()),
            2 * page_size(),
            PROTECTION,
            FLAGS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    watch.expect("two pages", Event::Unmap, &[(p(), 3 * p())]);
    unmap(pages, 3);
}

#[test]
fn mremap_reports_both_ranges() {
    let watch = Watch::new();
    let pages = map(8, 1);
    watch.listen(pages, 8 * page_size());
    // SAFETY: shrinks a mapping of this test.
    unsafe { libc::mremap(at(pages), 8 * page_size(), 6 * page_size(), 0) };
    watch.expect("shrink", Event::Unmap, &[(6 * p(), 8 * p())]);
    watch.listen(pages, 8 * page_size());
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: moves a page of this test over another one.
    let moved = unsafe {
        libc::mremap(
            at(pages),
            page_size(),
            page_size(),
            flags,
            at(pages + 3 * page_size()),
        )
    };
    assert_eq!(moved, at(pages + 3 * page_size()));
    watch.expect(
        "over live memory",
        Event::Unmap,
        &[(0, p()), (3 * p(), 4 * p())],
    );
    watch.listen(pages, 8 * page_size());
    // SAFETY: moves the test's pages elsewhere and leaves the old range mapped and empty.
    let elsewhere = unsafe {
        libc::mremap(
            at(pages + 4 * page_size()),
            2 * page_size(),
            2 * page_size(),
            libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP,
            0,
        )
    };
    assert_ne!(elsewhere, libc::MAP_FAILED);
    watch.expect("leaving the mapping", Event::Unmap, &[(4 * p(), 6 * p())]);
    unmap(elsewhere.addr(), 2);
    unmap(pages, 6);
}

#[test]
fn advice_that_discards() {
    let watch = Watch::new();
    let pages = map(4, 9);
    watch.listen_and_look(pages, 4 * page_size());
    assert_eq!(
        // SAFETY: discards a page of this test.
        unsafe { libc::madvise(at(pages), page_size(), libc::MADV_DONTNEED) },
        0
    );
    assert_eq!(
        watch.heard()[0].content,
        9,
        "the content is there in the start callback"
    );
    watch.listen(pages, 4 * page_size());
    assert_eq!(
        // SAFETY: discards pages of this test.
        unsafe { libc::madvise(at(pages + page_size()), 2 * page_size(), libc::MADV_FREE) },
        0
    );
    watch.expect("MADV_FREE", Event::Clear, &[(p(), 3 * p())]);
    watch.listen(pages, 4 * page_size());
    assert_eq!(
        // SAFETY: a hint.
        unsafe { libc::madvise(at(pages), page_size(), libc::MADV_WILLNEED) },
        0
    );
    watch.expect("MADV_WILLNEED", Event::Clear, &[]);
    unmap(pages, 4);
}

#[test]
fn process_madvise_on_this_process() {
    let watch = Watch::new();
    let pages = map(4, 9);
    // SAFETY: makes a descriptor.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let vectors = [0, 2].map(|page| libc::iovec {
        iov_base: at(pages + page * page_size()),
        iov_len: page_size(),
    });
    watch.listen(pages, 4 * page_size());
    // SAFETY: the vectors point to the test's pages. Before Linux 6.13 the kernel refuses this
    // advice, and the hook reports it anyway.
    unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            own,
            vectors.as_ptr(),
            2,
            libc::MADV_DONTNEED,
            0,
        )
    };
    watch.expect(
        "both vectors",
        Event::Clear,
        &[(0, p()), (2 * p(), 3 * p())],
    );
    // SAFETY: the descriptor is of this test.
    unsafe { libc::close(own as i32) };
    unmap(pages, 4);
}

#[test]
fn mprotect_and_its_sibling_with_a_key() {
    let watch = Watch::new();
    let pages = map(2, 0);
    watch.listen(pages, 2 * page_size());
    assert_eq!(
        // SAFETY: pages of this test that no other code touches meanwhile.
        unsafe { libc::mprotect(at(pages), page_size(), libc::PROT_READ) },
        0
    );
    watch.expect("mprotect", Event::ProtectionVma, &[(0, p())]);
    for key in [0, -1] {
        watch.listen(pages, 2 * page_size());
        // SAFETY: pages of this test that no other code touches meanwhile. A processor without
        // protection keys refuses the call.
        unsafe { pkey_mprotect(at(pages + page_size()), page_size(), libc::PROT_READ, key) };
        watch.expect("pkey_mprotect", Event::ProtectionVma, &[(p(), 2 * p())]);
    }
    unmap(pages, 2);
}

unsafe extern "C" {
    fn pkey_mprotect(address: *mut libc::c_void, length: usize, protection: i32, key: i32) -> i32;
    fn remap_file_pages(
        address: *mut libc::c_void,
        size: usize,
        protection: i32,
        offset: usize,
        flags: i32,
    ) -> i32;
}

#[test]
fn segments_of_shared_memory() {
    let watch = Watch::new();
    // SAFETY: makes a segment.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 2 * page_size(), libc::IPC_CREAT | 0o600) };
    assert!(id >= 0, "shmget");
    let pages = map(4, 3);
    watch.listen_and_look(pages, 4 * page_size());
    // SAFETY: replaces pages of this test.
    let attached = unsafe { libc::shmat(id, at(pages), libc::SHM_REMAP) };
    // SAFETY: marks the test's segment for removal.
    unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) };
    assert_eq!(attached, at(pages));
    let heard = watch.heard();
    assert_eq!(
        (heard[0].from, heard[0].to, heard[0].content, heard.len()),
        (0, 2 * p(), 3, 2)
    );
    watch.listen(pages, 4 * page_size());
    // SAFETY: detaches what this test attached.
    assert_eq!(unsafe { libc::shmdt(attached) }, 0);
    watch.expect("shmdt", Event::Unmap, &[(0, 2 * p())]);
    unmap(pages + 2 * page_size(), 2);
}

/// Without a free descriptor, the hook cannot read where the segment is attached. So it reports the
/// whole address space.
#[test]
fn what_cannot_be_looked_up_is_everything() {
    alone("calls::what_cannot_be_looked_up_is_everything", || {
        let watch = Watch::new();
        // SAFETY: makes a segment.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, page_size(), libc::IPC_CREAT | 0o600) };
        // SAFETY: attaches the segment at an address that the kernel chooses.
        let attached = unsafe { libc::shmat(id, ptr::null(), 0) };
        // SAFETY: marks the test's segment for removal.
        unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) };
        assert_ne!(attached, libc::MAP_FAILED);
        watch.listen(attached.addr(), page_size());
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the call reads a local. This process opens no other file.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &none) }, 0);
        // SAFETY: detaches what this test attached.
        assert_eq!(unsafe { libc::shmdt(attached) }, 0);
        let heard = watch.heard();
        assert_eq!(heard.len(), 2, "before and after: {heard:?}");
        assert_eq!(
            heard[0].from,
            -(attached.addr() as i64),
            "from the first address on: {heard:?}"
        );
    });
}

#[test]
fn the_program_break() {
    alone("calls::the_program_break", || {
        let watch = Watch::new();
        // SAFETY: only returns the break.
        let start = unsafe { libc::sbrk(0) }
            .addr()
            .next_multiple_of(page_size());
        // SAFETY: the process has one thread, which allocates nothing between the growth and the
        // shrink.
        unsafe { libc::brk(at(start + 4 * page_size())) };
        watch.listen(start, 4 * page_size());
        // SAFETY: unmaps what was just added.
        unsafe { libc::sbrk(-(page_size() as isize)) };
        watch.expect("sbrk", Event::Unmap, &[(3 * p(), 4 * p())]);
        // SAFETY: adds memory that no code uses.
        unsafe { libc::brk(at(start + 4 * page_size())) };
        watch.listen(start, 4 * page_size());
        // SAFETY: unmaps what was just added.
        unsafe { libc::brk(at(start)) };
        watch.expect("brk", Event::Unmap, &[(0, 4 * p())]);
    });
}

#[test]
fn the_same_by_number() {
    let watch = Watch::new();
    let pages = map(8, 1);
    let number = |number: libc::c_long, args: [usize; 6]| {
        watch.listen(pages, 8 * page_size());
        // SAFETY: every call below is on pages of this test.
        unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) }
    };
    assert_eq!(
        number(
            libc::SYS_munmap,
            [pages + 7 * page_size(), page_size(), 0, 0, 0, 0]
        ),
        0
    );
    watch.expect("munmap", Event::Unmap, &[(7 * p(), 8 * p())]);
    assert_eq!(
        number(
            libc::SYS_madvise,
            [pages, page_size(), libc::MADV_DONTNEED as usize, 0, 0, 0]
        ),
        0
    );
    watch.expect("madvise", Event::Clear, &[(0, p())]);
    assert_eq!(
        number(
            libc::SYS_mprotect,
            [pages, page_size(), libc::PROT_NONE as usize, 0, 0, 0]
        ),
        0
    );
    watch.expect("mprotect", Event::ProtectionVma, &[(0, p())]);
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
    number(
        libc::SYS_mremap,
        [
            pages + page_size(),
            page_size(),
            page_size(),
            flags,
            pages + 2 * page_size(),
            0,
        ],
    );
    watch.expect(
        "mremap",
        Event::Unmap,
        &[(p(), 2 * p()), (2 * p(), 3 * p())],
    );
    number(libc::SYS_mbind, [pages, page_size(), 0, 0, 0, 0]);
    watch.expect("mbind without a flag to move", Event::Unmap, &[]);
    unmap(pages, 7);
}

#[test]
fn remap_file_pages_is_reported() {
    let watch = Watch::new();
    let pages = map(2, 1);
    watch.listen(pages, 2 * page_size());
    // SAFETY: the test's pages. The kernel refuses the call, because they are private.
    unsafe { remap_file_pages(at(pages), page_size(), 0, 0, 0) };
    watch.expect("remap_file_pages", Event::Unmap, &[(0, p())]);
    unmap(pages, 2);
}

#[test]
fn without_a_hook_nothing_is_reported() {
    alone("calls::without_a_hook_nothing_is_reported", || {
        let Watch { log, hook } = Watch::new();
        let second = Hook::install().expect("it worked before");
        let all = |state| {
            probe()
                .expect("there are sites")
                .iter()
                .all(|patch| patch.state == state)
        };
        drop(hook);
        assert!(all(State::Ours), "one hook is left");
        drop(second);
        assert!(all(State::Free));
        let watch = Watch {
            log,
            hook: Hook::install().expect("it worked before"),
        };
        assert!(all(State::Ours));
        let pages = map(1, 0);
        watch.listen(pages, page_size());
        let Watch { log, hook } = watch;
        drop(hook);
        unmap(pages, 1);
        let watch = Watch {
            log,
            hook: Hook::install().expect("it worked before"),
        };
        watch.expect("nothing", Event::Unmap, &[]);
    });
}

#[test]
fn a_forked_child_has_a_hook_of_its_own() {
    alone("calls::a_forked_child_has_a_hook_of_its_own", || {
        let watch = Watch::new();
        let pages = map(1, 0);
        watch.listen_to_all(pages, page_size());
        in_a_child(|| {
            let own = Watch::new();
            assert!(
                own.hook
                    .status()
                    .iter()
                    .all(|patch| patch.state == State::Ours)
            );
            assert!(watch.hook.is_inherited() && !own.hook.is_inherited());
            own.listen(pages, page_size());
            unmap(pages, 1);
            own.expect("the child's", Event::Unmap, &[(0, p())]);
            assert_eq!(
                watch.heard(),
                [],
                "the parent's subscriber hears nothing of the child"
            );
        });
        assert_eq!(watch.heard(), [], "nor in the parent");
        assert!(!watch.hook.is_inherited());
        watch.listen(pages, page_size());
        unmap(pages, 1);
        watch.expect("the parent's", Event::Unmap, &[(0, p())]);
    });
}
