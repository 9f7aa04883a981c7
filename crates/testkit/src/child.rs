//! A child of a real `fork`.

/// Forks a child that runs `f`, and returns the result of `f`. A child that hangs is killed after
/// 120 s.
///
/// # Panics
/// If the fork fails, or if the child died by a signal.
pub fn in_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: After a fork in a program with threads, the child may only do what is safe there.
    // glibc makes `malloc` usable in the child, and the caller chooses an `f` that is meant to run
    // in such a child.
    run(unsafe { libc::fork() }, f)
}

/// Like [`in_child`], with a `clone` system call, which runs no fork handlers.
///
/// # Panics
/// If the fork fails, or if the child died by a signal.
pub fn in_raw_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: As above. `malloc` is usable in the child unless another thread is in it, and the
    // caller has no such thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    run(child.try_into().unwrap(), f)
}

fn run(child: libc::pid_t, f: impl FnOnce() -> bool) -> bool {
    match child {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            // SAFETY: The call has no preconditions.
            unsafe { libc::alarm(120) };
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            // SAFETY: Ends the process at once, which is always allowed.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        child => {
            let mut status = 0;
            // SAFETY: The call writes to an integer, which is a local variable.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert!(
                libc::WIFEXITED(status),
                "the child died by signal {}",
                libc::WTERMSIG(status)
            );
            status == 0
        }
    }
}
