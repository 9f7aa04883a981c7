//! If the kernel or a sandbox refuses `membarrier`, readers fall back to real fences. There is one
//! test only, because the process keeps the kernel's first answer.
#![cfg(not(mmun_loom))]

use srcu::Srcu;
use std::thread;

#[test]
fn a_refused_membarrier_is_done_without() {
    testkit::refuse_calls(&[libc::SYS_membarrier], libc::EPERM);
    assert_eq!(
        // SAFETY: The system call takes three integers and touches no memory.
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
