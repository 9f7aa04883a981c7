//! A child of a real `fork`.

/// Forks a child that runs `f`, and returns the result of `f`. A child that hangs is killed after
/// 120 s.
///
/// # Panics
/// If the fork fails, or if the child died by a signal.
pub fn in_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: The child may only do what is safe after a fork in a program with threads; glibc
    // makes `malloc` usable there, and what `f` does besides is what the caller tests.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            // SAFETY: No preconditions.
            unsafe { libc::alarm(120) };
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            // SAFETY: Ends the process at once, which is always allowed.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        child => {
            let mut status = 0;
            // SAFETY: Needs a place for the status.
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
