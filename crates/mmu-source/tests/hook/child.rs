//! Tests in a process of their own, because no other thread may use the heap during them.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::{env, fs, mem};

/// Runs `test` in a forked child.
#[track_caller]
pub(crate) fn in_a_child(test: impl FnOnce()) {
    // SAFETY: the child runs `test` and ends without unwinding and without the parent's exit
    // handlers. glibc makes its allocator usable in the child.
    match unsafe { libc::fork() } {
        0 => {
            // The default panic hook takes locks that a thread of the parent may have held, and
            // writes to the test harness's buffer.
            std::panic::set_hook(Box::new(|info| {
                // SAFETY: the descriptor is open and stays open.
                let stderr: fs::File = unsafe { std::os::fd::FromRawFd::from_raw_fd(2) };
                let mut stderr = mem::ManuallyDrop::new(stderr);
                let _ = writeln!(stderr, "in the child: {info}");
            }));
            let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!passed)) }
        }
        child => {
            assert!(child > 0, "fork");
            let mut status = 0;
            // SAFETY: writes one int to a local.
            let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(
                (reaped, status),
                (child, 0),
                "the child fails; its message is above"
            );
        }
    }
}

/// Runs `body` in a new process whose allocator has one arena. `test` is the name of the calling
/// test.
pub(crate) fn alone(test: &str, body: impl FnOnce()) {
    const MARK: &str = "MMUN_TEST_ALONE";
    if env::var_os(MARK).is_some() {
        // Turn a hang into a failure.
        // SAFETY: takes an integer.
        unsafe { libc::alarm(240) };
        return body();
    }
    let mut command = Command::new(env::current_exe().expect("this program has a name"));
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    let output = command
        .env(MARK, "1")
        .env("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
        .output()
        .expect("it runs again");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "{stdout}{stderr}"
    );
}
