//! The border to C: exports functions, reports misuse, and ends the process if a function cannot
//! return an error.

use std::sync::atomic::{AtomicBool, Ordering};

/// Defines exported functions. A panic in such a function is a bug of this library, and ends the
/// process with a message that names the function.
macro_rules! export {
    ($($(#[$attribute:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$attribute])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) $(-> $result)? {
            // The exported function is `extern "C"`, so a panic aborts after this message.
            let border = $crate::border::on_unwind!($crate::border::say_bug(stringify!($name)));
            #[allow(clippy::redundant_closure_call, reason = "so that `return` and `?` stay within the border")]
            let result = (|| $(-> $result)? { $body })();
            std::mem::forget(border);
            result
        }
    )*};
}

pub(crate) use export;

/// Makes a value that evaluates `$call` when unwinding drops the value. Without unwinding, the
/// caller forgets the value. The value has no fields, because a field with the function's name
/// would cost a store on each call.
macro_rules! on_unwind {
    ($call:expr) => {{
        struct OnUnwind;
        impl Drop for OnUnwind {
            #[cold]
            fn drop(&mut self) {
                $call;
            }
        }
        OnUnwind
    }};
}

pub(crate) use on_unwind;

/// Runs a callback of the program. An exception or a cancellation that leaves the callback ends the
/// process.
macro_rules! guarded {
    ($name:literal, $callback:expr) => {{
        let guard = $crate::border::on_unwind!($crate::border::die(
            $name,
            "an exception or the cancellation of a thread has left the callback"
        ));
        let result = $callback;
        std::mem::forget(guard);
        result
    }};
}

pub(crate) use guarded;
pub(crate) use srcu::Uncancelled;

/// Reports that an exported function has panicked.
#[cold]
pub(crate) fn say_bug(function: &str) {
    say(&[
        "libmmun: bug: ",
        function,
        " panicked; please report the message above",
    ]);
}

/// Writes a line to standard error. Does not use the allocator, because this thread may be inside
/// the allocator.
fn say(words: &[&str]) {
    let mut line = [0_u8; 512];
    let mut length = 0;
    for word in words {
        let room = word.len().min(line.len() - 1 - length);
        line[length..length + room].copy_from_slice(&word.as_bytes()[..room]);
        length += room;
    }
    line[length] = b'\n';
    // SAFETY: `write` reads `length + 1` bytes, and `length` is less than the length of `line`.
    unsafe { libc::write(2, line.as_ptr().cast(), length + 1) };
}

/// Ends the process, because the function cannot return an error, and to continue would hang or
/// corrupt memory.
#[cold]
pub(crate) fn die(function: &str, reason: &str) -> ! {
    say(&["libmmun: ", function, ": ", reason]);
    std::process::abort();
}

/// Warns once of a mistake of the caller that this library tolerates.
#[cold]
pub(crate) fn warn(said: &AtomicBool, words: &[&str]) {
    if !said.swap(true, Ordering::Relaxed) {
        let mut line = ["libmmun: warning: ", "", "", "", ""];
        line[1..]
            .iter_mut()
            .zip(words)
            .for_each(|(place, word)| *place = word);
        say(&line);
    }
}

/// Warns of a mistake of the caller, once for each place in the code that uses this macro: the
/// kernel's `WARN_ON_ONCE`.
macro_rules! warn_once {
    ($($word:expr),+) => {{
        static SAID: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        $crate::border::warn(&SAID, &[$($word),+]);
    }};
}

pub(crate) use warn_once;

/// The message of a function that cannot return an error and would wait for its own thread.
pub(crate) const SELF_WAIT: &str = "called inside an invalidation or callback, or in free_notifier: the call would wait for itself";

#[cfg(test)]
#[allow(
    unreachable_pub,
    reason = "a test's function, exported as the library's functions are"
)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    export! {
        /// # Safety
        /// Has no preconditions.
        fn mmun_test_that_panics() {
            panic!("on purpose");
        }
    }

    #[test]
    fn a_panic_ends_the_process_with_the_name_of_the_function() {
        const CHILD: &str = "MMUN_TEST_PANICS";
        if env::var_os(CHILD).is_some() {
            // SAFETY: The function has no preconditions.
            return unsafe { mmun_test_that_panics() };
        }
        let own = env::current_exe().expect("this program has a path");
        let name = "border::tests::a_panic_ends_the_process_with_the_name_of_the_function";
        let child = Command::new(own)
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output();
        let child = child.expect("this program runs");
        let stderr = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{stderr}");
        assert!(
            stderr.contains("libmmun: bug: mmun_test_that_panics panicked"),
            "{stderr}"
        );
    }
}
