//! The unsafe code of the crate, in small modules. The rest of the crate is `deny(unsafe_code)`,
//! except `Srcu::call_raw` and `Srcu::call_raw_dropping`, whose callers provide the memory, and the
//! macros of `word`.
//!
//! # Safety
//! Nearly every unsafe block of these modules relies on three facts.
//!
//! 1. A [`state::State`] lies in a page that is never unmapped. A state is recycled when its
//!    reference count reaches zero. The `Srcu` handle, the reclaimer's inbox or turn, a batch that
//!    is not empty and a running `call_raw_dropping` each hold one count.
//! 2. Guards borrow the `Srcu`. So when the handle is dropped, no thread is in a section or still
//!    leaving one.
//! 3. Only one thread writes a slot: the thread that holds the slot's robust mutex in [`ids`],
//!    until the kernel marks that owner as dead. (In a forked child, which has one thread, that
//!    thread ends the sections of the threads that exist only in the parent.)

pub(crate) mod barrier;
pub(crate) mod callback;
pub(crate) mod current;
pub(crate) mod event;
#[cfg(not(mmun_loom))]
pub(crate) mod fork;
#[deny(unsafe_code)]
mod grace;
pub(crate) mod handle;
#[cfg(not(mmun_loom))]
pub(crate) mod ids;
pub(crate) mod lock;
#[cfg(not(mmun_loom))]
mod pages;
#[cfg(not(any(mmun_loom, miri)))]
mod pin;
#[cfg(not(mmun_loom))]
mod place;
#[cfg(not(mmun_loom))]
pub(crate) mod process;
pub(crate) mod reclaimer;
pub(crate) mod run;
pub(crate) mod slot;
pub(crate) mod state;
#[cfg_attr(mmun_loom, path = "raw/table_loom.rs")]
pub(crate) mod table;
pub(crate) mod thread;

/// Ends the process with one line on stderr. Allocates nothing, because the caller may be inside an
/// allocator.
#[cfg(not(mmun_loom))]
#[cold]
fn die(why: &'static str) -> ! {
    for text in ["srcu: ", why, "\n"] {
        // SAFETY: `write` needs a buffer that is readable for `len` bytes, as that of a `str` is.
        unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    }
    std::process::abort()
}
