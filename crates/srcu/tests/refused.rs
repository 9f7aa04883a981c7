//! A kernel, or a sandbox, that refuses `membarrier`: readers fall back to real fences. One test,
//! since the answer is kept for the process.
#![cfg(not(mmun_loom))]

use srcu::Srcu;
use std::thread;

/// Has the kernel answer `membarrier` with EPERM in this process from now on.
fn refuse_membarrier() {
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_membarrier as u32,
            1,
        ),
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            0,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    assert_eq!(
        // SAFETY: Takes integers.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) },
        0
    );
    // SAFETY: Needs a valid program of that length, which outlives the call.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_refused_membarrier_is_done_without() {
    refuse_membarrier();
    assert_eq!(
        // SAFETY: Takes integers.
        unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) },
        -1
    );
    let srcu = Srcu::new();
    let section = srcu.read_lock();
    let cookie = srcu.start_poll();
    assert!(!srcu.poll(cookie));
    drop(section);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..1000).for_each(|_| drop(srcu.read_lock())));
        }
        for _ in 0..100 {
            srcu.synchronize().unwrap();
        }
    });
    srcu.call(|| ());
    srcu.barrier().unwrap();
    assert!(srcu.poll(cookie));
}
