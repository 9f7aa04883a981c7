//! The unsafe code of the crate, in small modules. The rest of the crate is `deny(unsafe_code)`,
//! except `Srcu::call_raw` and its kin, whose callers give the memory.
//!
//! # Safety
//! Three facts carry nearly every block below.
//!
//! 1. A [`state::State`] lives in pages that are never unmapped. It is recycled when its count
//!    reaches zero; the count covers the `Srcu` handle, the place in the reclaimer's inbox and the
//!    batch being worked on.
//! 2. Guards borrow the `Srcu`, so no thread is in a section, or still leaving one, when the handle
//!    goes.
//! 3. A slot is written by one thread: the one whose robust mutex in [`ids`] the kernel has not yet
//!    seen die.

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
#[cfg(not(mmun_loom))]
mod place;
pub(crate) mod reclaimer;
pub(crate) mod run;
pub(crate) mod slot;
pub(crate) mod state;
#[cfg_attr(mmun_loom, path = "raw/table_loom.rs")]
pub(crate) mod table;
pub(crate) mod thread;

/// Ends the process with one line on stderr; allocates nothing, since it may be called inside an
/// allocator.
#[cfg(not(mmun_loom))]
#[cold]
fn die(why: &'static str) -> ! {
    for text in ["srcu: ", why, "\n"] {
        // SAFETY: `write` needs a readable buffer of that length: the bytes of a `str`.
        unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    }
    std::process::abort()
}
