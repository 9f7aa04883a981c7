//! The memory calls, one by one.

use libc::{
    MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_READ,
    PROT_WRITE,
};

use crate::script::Script;
use crate::sys::{self, call, map, mmap, munmap, page_size, touch};

const RW: i32 = PROT_READ | PROT_WRITE;
const EINVAL: i64 = -(libc::EINVAL as i64);

/// `munmap`, `mmap`, `mprotect`, `pkey_mprotect` and `remap_file_pages`.
pub(crate) fn mappings() {
    let arena = map(16 * page_size(), RW);
    touch(arena, 16 * page_size());
    let mut script = Script::new();
    script.unmap(
        "munmap",
        arena,
        2 * page_size(),
        munmap(arena, 2 * page_size()),
    );
    script.unmap(
        "munmap",
        arena + 2 * page_size(),
        page_size(),
        munmap(arena + 2 * page_size(), 1),
    );

    let fixed = |flags| {
        mmap(
            arena + 4 * page_size(),
            2 * page_size(),
            PROT_READ,
            MAP_PRIVATE | MAP_ANONYMOUS | flags,
        ) as i64
    };
    script.unmap(
        "mmap",
        arena + 4 * page_size(),
        2 * page_size(),
        fixed(MAP_FIXED),
    );
    // This mapping fills the hole that the first call has left, so it replaces nothing.
    mmap(
        arena,
        page_size(),
        RW,
        MAP_PRIVATE | MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
    );
    map(page_size(), RW);

    let protect = |page, prot: i32| {
        call(
            libc::SYS_mprotect,
            &[arena + page * page_size(), 2 * page_size(), prot as u64],
        )
    };
    script.seen(
        "mprotect",
        "protection_vma",
        arena + 6 * page_size(),
        2 * page_size(),
        protect(6, PROT_READ),
    );
    script.seen(
        "mprotect",
        "protection_vma",
        arena + 6 * page_size(),
        2 * page_size(),
        protect(6, RW),
    );
    let pkey = call(
        libc::SYS_pkey_mprotect,
        &[
            arena + 8 * page_size(),
            page_size() + 1,
            PROT_READ as u64,
            u64::MAX,
        ],
    );
    script.seen(
        "pkey_mprotect",
        "protection_vma",
        arena + 8 * page_size(),
        2 * page_size(),
        pkey,
    );

    let shared = mmap(0, 4 * page_size(), RW, MAP_SHARED | MAP_ANONYMOUS);
    let remapped = call(libc::SYS_remap_file_pages, &[shared, page_size(), 0, 2, 0]);
    script.unmap("remap_file_pages", shared, page_size(), remapped);
    script.finish();
}

/// Advice that clears, and advice that does not.
pub(crate) fn advice() {
    const DONTNEED_LOCKED: i32 = 24;
    const GUARD_INSTALL: i32 = 102;
    const GUARD_REMOVE: i32 = 103;
    let arena = map(8 * page_size(), RW);
    let shared = mmap(0, 4 * page_size(), RW, MAP_SHARED | MAP_ANONYMOUS);
    touch(arena, 8 * page_size());
    touch(shared, 4 * page_size());
    let advise =
        |at: u64, advice: i32| call(libc::SYS_madvise, &[at, 2 * page_size() - 1, advice as u64]);
    let mut script = Script::new();
    for (at, advice) in [
        (arena, libc::MADV_DONTNEED),
        (arena, libc::MADV_FREE),
        (shared, libc::MADV_REMOVE),
        (arena, libc::MADV_PAGEOUT),
        (arena, libc::MADV_COLLAPSE),
        (arena, DONTNEED_LOCKED),
        (arena, GUARD_INSTALL),
        // An advice that does not exist today. The kernel refuses it; the tracer must assume that
        // it clears.
        (arena, 1000),
    ] {
        script.seen("madvise", "clear", at, 2 * page_size(), advise(at, advice));
    }
    for advice in [
        libc::MADV_NORMAL,
        libc::MADV_WILLNEED,
        libc::MADV_DONTFORK,
        libc::MADV_POPULATE_READ,
        GUARD_REMOVE,
    ] {
        advise(arena + 4 * page_size(), advice);
    }
    assert_eq!(
        call(libc::SYS_madvise, &[arena, 0, libc::MADV_DONTNEED as u64]),
        0
    );

    let own = call(libc::SYS_pidfd_open, &[u64::from(std::process::id()), 0]) as u64;
    let vectors = [arena, page_size(), arena + 4 * page_size(), 2 * page_size()];
    let result = call(
        libc::SYS_process_madvise,
        &[own, sys::address(&vectors), 2, libc::MADV_PAGEOUT as u64, 0],
    );
    script.seen("process_madvise", "clear", arena, page_size(), result);
    script.seen(
        "process_madvise",
        "clear",
        arena + 4 * page_size(),
        2 * page_size(),
        result,
    );
    // Values that stand for a pidfd of the caller. The kernel's result shows which of them it
    // knows.
    for own in [-10_000_i64, -10_001, -20_000] {
        let advice = libc::MADV_DONTNEED as u64;
        let result = call(
            libc::SYS_process_madvise,
            &[own as u64, sys::address(&vectors), 1, advice, 0],
        );
        script.seen("process_madvise", "clear", arena, page_size(), result);
    }
    script.finish();
}

/// `mremap` in all its forms.
pub(crate) fn moves() {
    let arena = map(64 * page_size(), RW);
    touch(arena, 64 * page_size());
    let remap = |old: u64, old_pages: u64, new_pages: u64, flags: i32, new: u64| {
        call(
            libc::SYS_mremap,
            &[
                old,
                old_pages * page_size(),
                new_pages * page_size(),
                flags as u64,
                new,
            ],
        )
    };
    let mut script = Script::new();
    script.unmap(
        "mremap",
        arena + 2 * page_size(),
        2 * page_size(),
        remap(arena, 4, 2, 0, 0),
    );
    // The mapping grows in place or moves. In both cases the old range is reported.
    let moved = remap(arena, 2, 8, MREMAP_MAYMOVE, 0);
    script.unmap("mremap", arena, 2 * page_size(), moved);
    remap(moved as u64, 8, 8, MREMAP_MAYMOVE, 0);
    let (from, to) = (arena + 16 * page_size(), arena + 32 * page_size());
    let fixed = remap(from, 2, 4, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    script.unmap("mremap", from, 2 * page_size(), fixed);
    script.unmap("mremap", to, 4 * page_size(), fixed);
    let emptied = remap(
        arena + 40 * page_size(),
        2,
        2,
        MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP,
        0,
    );
    script.unmap("mremap", arena + 40 * page_size(), 2 * page_size(), emptied);
    // There is no room to grow in place: the call fails and changes nothing.
    let failed = remap(arena + 48 * page_size(), 1, 2, 0, 0);
    assert_eq!(failed, -i64::from(libc::ENOMEM));
    // Duplicating a shared mapping leaves it where it is.
    // This mapping has a file. If a huge page could begin at its address, the source would report a
    // whole one. None begins at a page with an odd number.
    let shared = mmap(0, 3 * page_size(), RW, MAP_SHARED | MAP_ANONYMOUS) | page_size();
    let to = arena + 50 * page_size();
    script.unmap(
        "mremap",
        to,
        2 * page_size(),
        remap(shared, 0, 2, MREMAP_MAYMOVE | MREMAP_FIXED, to),
    );
    script.finish();
}

/// Shrinks the heap in several steps, after growth that succeeded and growth that failed.
pub(crate) fn program_break() {
    let mut script = Script::new();
    let brk = |address: u64| call(libc::SYS_brk, &[address]);
    let base = (brk(0) as u64).next_multiple_of(page_size());
    assert_eq!(brk(base + 16 * page_size()) as u64, base + 16 * page_size());
    touch(base, 16 * page_size());
    script.unmap(
        "brk",
        base + 12 * page_size(),
        4 * page_size(),
        brk(base + 12 * page_size()),
    );
    // A change within a page unmaps nothing.
    assert_eq!(
        brk(base + 12 * page_size() - 1) as u64,
        base + 12 * page_size() - 1
    );
    // Below the heap `brk` unmaps nothing, whatever is mapped there.
    assert_eq!(
        brk(page_size()) as u64,
        base + 12 * page_size() - 1,
        "it is ignored"
    );
    assert_eq!(
        brk(0x7fff_0000_0000) as u64,
        base + 12 * page_size() - 1,
        "there is no room for that"
    );
    script.unmap(
        "brk",
        base + 4 * page_size(),
        8 * page_size(),
        brk(base + 4 * page_size()),
    );
    script.unmap("brk", base, 4 * page_size(), brk(base));
    script.finish();
}

/// SysV shared memory.
pub(crate) fn segment() {
    let size = 4 * page_size();
    let id = call(libc::SYS_shmget, &[libc::IPC_PRIVATE as u64, size, 0o600]);
    assert!(id >= 0, "shmget: {id}");
    let id = id as u64;
    let arena = map(8 * page_size(), RW);
    let mut script = Script::new();
    let at = call(libc::SYS_shmat, &[id, 0, 0]) as u64;
    touch(at, size);
    // With a hole in it, the segment is detached in pieces.
    script.unmap(
        "munmap",
        at + page_size(),
        page_size(),
        munmap(at + page_size(), page_size()),
    );
    let detached = call(libc::SYS_shmdt, &[at]);
    script.unmap("shmdt", at, page_size(), detached);
    script.unmap("shmdt", at + 2 * page_size(), 2 * page_size(), detached);
    // Attach over memory that is in use.
    let over = call(
        libc::SYS_shmat,
        &[id, arena + 2 * page_size(), libc::SHM_REMAP as u64],
    );
    script.unmap("shmat", arena + 2 * page_size(), size, over);
    script.unmap(
        "shmdt",
        arena + 2 * page_size(),
        size,
        call(libc::SYS_shmdt, &[arena + 2 * page_size()]),
    );
    // No segment is attached there any more.
    assert_eq!(call(libc::SYS_shmdt, &[arena + 2 * page_size()]), EINVAL);
    call(libc::SYS_shmctl, &[id, libc::IPC_RMID as u64, 0]);
    script.finish();
}

/// The calls that move pages between nodes.
pub(crate) fn migrate() {
    const MPOL_MF_MOVE: u64 = 2;
    // As large as the memory that one page table maps. An entry has eight bytes.
    let huge_page = page_size() / 8 * page_size();
    let arena = map(2 * huge_page, libc::PROT_NONE).next_multiple_of(huge_page);
    assert_eq!(
        call(libc::SYS_mprotect, &[arena, 4 * page_size(), RW as u64]),
        0
    );
    touch(arena, 4 * page_size());
    let mut script = Script::new();
    let bound = call(
        libc::SYS_mbind,
        &[
            arena,
            2 * page_size(),
            libc::MPOL_DEFAULT as u64,
            0,
            0,
            MPOL_MF_MOVE,
        ],
    );
    // Whole folios move, and a folio may be as large as a huge page.
    script.seen("mbind", "migrate", arena, huge_page, bound);
    call(
        libc::SYS_mbind,
        &[arena, 2 * page_size(), libc::MPOL_DEFAULT as u64, 0, 0, 0],
    );

    let (pages, nodes, mut status) = ([arena + page_size()], [0_i32], [0_i32; 1]);
    let [pages, nodes] = [sys::address(&pages), sys::address(&nodes)];
    let status = sys::address_mut(&mut status);
    let moved = call(
        libc::SYS_move_pages,
        &[0, 1, pages, nodes, status, MPOL_MF_MOVE],
    );
    script.seen("move_pages", "migrate", arena, huge_page, moved);
    call(libc::SYS_move_pages, &[0, 1, pages, 0, status, 0]);

    let mask = [1_u64];
    let mask = sys::address(&mask);
    let migrated = call(
        libc::SYS_migrate_pages,
        &[u64::from(std::process::id()), 8, mask, mask],
    );
    script.seen("migrate_pages", "migrate", 0, 0, migrated);
    script.finish();
}

/// Calls that the kernel refuses, some of them before it reads any memory.
pub(crate) fn refused() {
    let mut script = Script::new();
    let top = u64::MAX - page_size() + 1;
    script.unmap(
        "munmap",
        page_size(),
        2 * page_size(),
        munmap(page_size() + 1, page_size()),
    );
    assert_eq!(munmap(page_size(), 0), EINVAL);
    assert_eq!(
        munmap(top, 2 * page_size()),
        EINVAL,
        "it runs past the last address, so there is no range"
    );
    assert_eq!(munmap(u64::MAX, u64::MAX), EINVAL);
    // An address beyond any address space, which is not a tagged address either.
    let beyond = 1 << 54;
    script.unmap("munmap", beyond, page_size(), munmap(beyond, page_size()));
    script.seen(
        "madvise",
        "clear",
        beyond,
        page_size(),
        call(libc::SYS_madvise, &[beyond, page_size(), 4]),
    );
    script.unmap(
        "mremap",
        beyond,
        page_size(),
        call(libc::SYS_mremap, &[beyond, page_size(), 2 * page_size(), 1]),
    );
    call(libc::SYS_process_madvise, &[u64::MAX, 0, 1, 4, 0]);
    call(libc::SYS_move_pages, &[1 << 30, 1, 0, 1, 0, 0]);
    call(libc::SYS_shmdt, &[12345]);
    call(libc::SYS_shmat, &[u64::MAX, 0, libc::SHM_REMAP as u64]);
    call(libc::SYS_clone3, &[0, 0]);
    script.finish();
}
