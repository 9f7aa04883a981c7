//! Threads that the child of a fork can start, whatever the parent's threads were doing during the
//! fork.
//!
//! A thread of the standard library takes a global lock of that library when it starts and when it
//! ends. If another thread holds that lock during a fork, the lock stays locked in the child for
//! ever, and a `std::thread` that the child starts could wait for ever. `pthread_create` may be
//! called in a child, because glibc resets its own locks there.

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// A thread that the child of a fork can start. The thread runs with all signals blocked, so the
/// program's signal handlers never run on it.
///
/// This type is internal to the workspace. Dropping the handle neither detaches nor joins the
/// thread, because the child of a fork must do neither to a thread of its parent.
#[derive(Debug)]
pub struct Thread(libc::pthread_t);

impl Thread {
    /// Starts a thread. `name` has at most 15 bytes; the kernel truncates a longer one.
    ///
    /// A panic of `f` ends only the thread, as in the standard library.
    ///
    /// # Errors
    /// The errors of `pthread_create`.
    pub fn spawn<F: FnOnce() + Send + 'static>(name: &'static CStr, f: F) -> io::Result<Self> {
        let work = Box::into_raw(Box::new((name, f)));
        let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
        // SAFETY: the call needs room for the thread's handle, default attributes, and a function
        // that accepts the argument. `main::<F>` accepts the box made above, and may run on any
        // thread, because `F` is `Send` and borrows nothing.
        let error = without_signals(|| unsafe {
            libc::pthread_create(thread.as_mut_ptr(), ptr::null(), main::<F>, work.cast())
        });
        if error != 0 {
            // SAFETY: the call needs the box that `into_raw` leaked. No thread was started, so no
            // other code has it.
            drop(unsafe { Box::from_raw(work) });
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: the value must be initialised. The call succeeded, so it has written the value.
        Ok(Self(unsafe { thread.assume_init() }))
    }

    /// Waits for the end of the thread.
    pub fn join(self) {
        // SAFETY: the call needs a thread that was neither joined nor detached. Both consume the
        // only handle.
        unsafe { libc::pthread_join(self.0, ptr::null_mut()) };
    }

    /// Lets the thread free its stack when it ends.
    pub fn detach(self) {
        // SAFETY: the call needs a thread that was neither joined nor detached. Both consume the
        // only handle.
        unsafe { libc::pthread_detach(self.0) };
    }

    /// Tells whether the caller runs on this thread.
    #[must_use]
    pub fn is_current(&self) -> bool {
        // SAFETY: the call has no preconditions.
        self.0 == unsafe { libc::pthread_self() }
    }
}

extern "C" fn main<F: FnOnce()>(work: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the call needs the box that `into_raw` leaked. `spawn` made it with this type, for
    // this call alone.
    let (name, f) = *unsafe { Box::from_raw(work.cast::<(&'static CStr, F)>()) };
    // SAFETY: the call needs a string that ends in a zero byte, as a `CStr` does.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    // The panic hook has already reported the panic, if there was one.
    drop(catch_unwind(AssertUnwindSafe(f)));
    ptr::null_mut()
}

/// Runs `f` with all signals blocked. A thread that `f` starts inherits the mask: the program's
/// handlers never run on that thread, and it receives no signal that the program waits for.
pub fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    let _held = Blocked::new();
    f()
}

/// Blocks this thread's signals as long as this value lives. The value cannot leave its thread.
pub(super) struct Blocked(libc::sigset_t, PhantomData<*mut ()>);

impl Blocked {
    pub(super) fn new() -> Self {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the call needs room for a set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: the call needs an initialised set, which the line above made, and room for the
        // old one.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: the set must be initialised. The call above has written it.
        Self(unsafe { before.assume_init() }, PhantomData)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the call needs an initialised set, which is this thread's old mask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}

/// Defers `pthread_cancel` until the value is dropped. Cancellation unwinds the thread, and a
/// function of Rust that C has called may not be unwound. The system calls that wait for threads,
/// read files or close descriptors are cancellation points.
#[must_use]
#[derive(Debug)]
pub struct Uncancelled(libc::c_int, PhantomData<*mut ()>);

impl Uncancelled {
    /// Begins to defer cancellation of the calling thread. The value cannot leave this thread.
    pub fn enter() -> Self {
        /// `PTHREAD_CANCEL_DISABLE` of glibc and musl.
        const DISABLE: libc::c_int = 1;
        let mut before = 0;
        // SAFETY: the call writes to `before`, a local variable.
        unsafe { pthread_setcancelstate(DISABLE, &raw mut before) };
        Self(before, PhantomData)
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        // SAFETY: `self.0` is a state that `enter` has read, and the second argument may be null on
        // Linux.
        unsafe { pthread_setcancelstate(self.0, ptr::null_mut()) };
    }
}

unsafe extern "C" {
    // Not in `libc` for Linux.
    fn pthread_setcancelstate(state: libc::c_int, before: *mut libc::c_int) -> libc::c_int;
}
