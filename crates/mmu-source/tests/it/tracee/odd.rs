//! Programs that are harder to trace: unreadable memory, filters of their own, threads that run
//! `execve`, a wait in `vfork`.

use std::ffi::CString;
use std::os::unix::process::CommandExt;
use std::{env, process, ptr, thread};

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, PROT_READ, PROT_WRITE, c_long,
    sock_filter,
};

use crate::sys::{self, call, map, page_size, touch};

/// Runs `case` with memory that a tracer without privileges may not read, as if the program's file
/// were executable but not readable.
pub(crate) fn hidden(case: impl FnOnce()) {
    assert_eq!(call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 0]), 0);
    case();
}

/// Pages out, moves and replaces pages by calls whose arguments or files the tracer cannot examine.
pub(crate) fn advice_on_itself() {
    let arena = map(4 * page_size(), PROT_READ | PROT_WRITE);
    touch(arena, 4 * page_size());
    let own = call(libc::SYS_pidfd_open, &[u64::from(process::id()), 0]) as u64;
    let vector = [arena, 2 * page_size()];
    let advice = libc::MADV_PAGEOUT as u64;
    let result = call(
        libc::SYS_process_madvise,
        &[own, sys::address(&vector), 1, advice, 0],
    );
    println!(
        "process_madvise {arena:#x} {:#x} {result}",
        arena + 2 * page_size()
    );
    let (pages, nodes, mut status) = ([arena], [0_i32], [0_i32]);
    let pid = u64::from(process::id());
    let (pages, nodes) = (sys::address(&pages), sys::address(&nodes));
    let result = call(
        libc::SYS_move_pages,
        &[pid, 1, pages, nodes, sys::address_mut(&mut status), 2],
    );
    println!("move_pages {arena:#x} {:#x} {result}", arena + page_size());
    let file = call(
        libc::SYS_memfd_create,
        &[
            c"huge".as_ptr() as u64,
            u64::from(libc::MFD_HUGETLB | libc::MFD_CLOEXEC),
        ],
    );
    // A kernel without hugetlbfs has no such files.
    if file >= 0 {
        // The kernel replaces a huge page's range although the length is smaller.
        let huge = page_size() / 8 * page_size();
        let start = map(2 * huge, PROT_READ).next_multiple_of(huge);
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let result = call(
            libc::SYS_mmap,
            &[
                start,
                page_size(),
                PROT_READ as u64,
                flags as u64,
                file as u64,
                0,
            ],
        );
        println!("mmap {start:#x} {:#x} {result}", start + huge);
    }
}

/// Installs a filter that asks for a tracer at a memory call and at another call, and makes both
/// calls.
pub(crate) fn own_filter() {
    const fn statement(code: u32, k: u32) -> sock_filter {
        sock_filter {
            code: code as u16,
            jt: 0,
            jf: 0,
            k,
        }
    }
    let found = |number: c_long, distance| {
        let test = statement(BPF_JMP | BPF_JEQ | BPF_K, number as u32);
        sock_filter {
            jt: distance,
            ..test
        }
    };
    let filter = [
        statement(BPF_LD | BPF_W | BPF_ABS, 0),
        found(libc::SYS_mprotect, 2),
        found(libc::SYS_getppid, 1),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_TRACE | 77),
    ];
    let at = map(page_size(), PROT_READ | PROT_WRITE);
    assert_eq!(
        call(
            libc::SYS_prctl,
            &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0]
        ),
        0
    );
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    assert_eq!(
        call(
            libc::SYS_seccomp,
            &[
                libc::SECCOMP_SET_MODE_FILTER as u64,
                0,
                sys::address(&program)
            ]
        ),
        0
    );
    let protected = call(libc::SYS_mprotect, &[at, page_size(), PROT_READ as u64]);
    let parent = call(libc::SYS_getppid, &[]);
    println!("mprotect {protected}");
    println!("getppid {parent}");
}

/// A process with many threads. A thread that is not the leader runs the program again by `execve`,
/// many times.
pub(crate) fn exec_loop(left: u64) {
    if left == 0 {
        process::exit(4);
    }
    let spawn = |run: fn()| thread::Builder::new().stack_size(1 << 16).spawn(run);
    for _ in 0..40 {
        spawn(thread::park).expect("a thread");
    }
    let executing = thread::spawn(move || {
        let itself = env::current_exe().expect("the program has a path");
        process::Command::new(itself)
            .args(["exec-loop", &(left - 1).to_string()])
            .exec()
    });
    println!("{:?}", executing.join());
}

/// Starts a child by `vfork`. The child blocks until a process opens the named pipe at `path` for
/// writing.
pub(crate) fn waits_in_vfork(path: &str) {
    let path = CString::new(path).expect("a path");
    let program = c"/bin/true";
    let argv = [program.as_ptr().cast_mut(), ptr::null_mut()];
    let mut actions = std::mem::MaybeUninit::uninit();
    println!("ready");
    assert_eq!(
        // SAFETY: initialises the local.
        unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) },
        0
    );
    // SAFETY: initialised above, and the path is a live string.
    let added = unsafe {
        libc::posix_spawn_file_actions_addopen(
            actions.as_mut_ptr(),
            9,
            path.as_ptr(),
            libc::O_RDONLY,
            0,
        )
    };
    assert_eq!(added, 0);
    let mut child = 0;
    let (actions, environment) = (actions.as_ptr(), [ptr::null_mut()]);
    // SAFETY: initialised above. The strings and the arrays of strings outlive the call.
    let spawned = unsafe {
        libc::posix_spawn(
            &mut child,
            program.as_ptr(),
            actions,
            ptr::null(),
            argv.as_ptr(),
            environment.as_ptr(),
        )
    };
    assert_eq!(spawned, 0);
    println!("waited {}", sys::wait(child, 0));
}
