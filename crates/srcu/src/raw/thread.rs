//! Threads that the child of a fork can start, whatever the parent's threads were doing at the
//! fork.
//!
//! A thread of the standard library takes a global lock of that library as it starts and as it
//! ends. A fork copies a lock that another thread holds, and in the child no thread ever releases
//! it: a `std::thread` that the child starts could wait for ever. `pthread_create` may be called
//! in a child: glibc resets its own locks there.

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// A thread that the child of a fork can start. It runs with all signals blocked, so that handlers
/// of the program never run on it.
///
/// For the parts of this workspace. Dropping the handle neither detaches nor joins: in the child
/// of a fork, the handle of a thread of the parent must not be used in another way.
#[derive(Debug)]
pub struct Thread(libc::pthread_t);

impl Thread {
    /// Starts a thread. `name` has at most 15 bytes; the kernel cuts a longer one.
    ///
    /// A panic of `f` ends the thread and nothing else, as in the standard library.
    ///
    /// # Errors
    /// Those of `pthread_create`.
    pub fn spawn<F: FnOnce() + Send + 'static>(name: &'static CStr, f: F) -> io::Result<Self> {
        let work = Box::into_raw(Box::new((name, f)));
        let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
        // SAFETY: Needs a place for the thread's name, default attributes, and a function that
        // takes the argument: `main::<F>` takes the box made above, and may run in any thread,
        // since `F` is `Send` and borrows nothing.
        let error = without_signals(|| unsafe {
            libc::pthread_create(thread.as_mut_ptr(), ptr::null(), main::<F>, work.cast())
        });
        if error != 0 {
            // SAFETY: Needs the box that `into_raw` gave away: there is no thread that could have
            // it.
            drop(unsafe { Box::from_raw(work) });
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: Needs a value that is initialised: the call succeeded and has written it.
        Ok(Self(unsafe { thread.assume_init() }))
    }

    /// Waits for the end of the thread.
    pub fn join(self) {
        // SAFETY: Needs a thread that nothing has joined or detached: both consume the handle, and
        // there is one.
        unsafe { libc::pthread_join(self.0, ptr::null_mut()) };
    }

    /// Has the thread free its stack when it ends.
    pub fn detach(self) {
        // SAFETY: As for `join`.
        unsafe { libc::pthread_detach(self.0) };
    }

    /// Tells whether the caller runs on this thread.
    #[must_use]
    pub fn is_current(&self) -> bool {
        // SAFETY: No preconditions.
        self.0 == unsafe { libc::pthread_self() }
    }
}

extern "C" fn main<F: FnOnce()>(work: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: Needs the box that `into_raw` gave away: `spawn` made it with this type, for this
    // call alone.
    let (name, f) = *unsafe { Box::from_raw(work.cast::<(&'static CStr, F)>()) };
    // SAFETY: Needs a string that ends with a zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    // The panic hook has told the program.
    drop(catch_unwind(AssertUnwindSafe(f)));
    ptr::null_mut()
}

/// Runs `f` with all signals blocked. A thread that it starts inherits that: the program's handlers
/// never run there, and a signal that the program waits for is not taken from it.
pub fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    let _held = Blocked::new();
    f()
}

/// The signals of this thread wait while this is alive. It stays on its thread.
pub(super) struct Blocked(libc::sigset_t, PhantomData<*mut ()>);

impl Blocked {
    pub(super) fn new() -> Self {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: Needs a place for a set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: Needs an initialized set, from the line above, and a place for the old one.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: Needs an initialized set: the call before filled it in.
        Self(unsafe { before.assume_init() }, PhantomData)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: Needs an initialized set: the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}
