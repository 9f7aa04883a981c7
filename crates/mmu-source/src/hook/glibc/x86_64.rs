//! What the hook has to know of x86-64: glibc's code, jumps, and the registers that a call keeps.

mod call_handler;
mod scan;
mod trampoline;

pub(super) use scan::{Code64, Found, PATCH};
pub(super) use trampoline::{Foreign, SLOT, branch, chain, trampoline};

/// A near jump goes 2 GiB either way; a little is left for the code itself.
pub(super) const REACH: u64 = (1 << 31) - (1 << 20);
/// `int3`.
pub(super) const BREAKPOINT: [u8; 1] = [0xcc];

/// Returns the protection of a page of code.
pub(super) fn protection(_: u64) -> i32 {
    libc::PROT_READ | libc::PROT_EXEC
}

/// Instruction caches see stores on this processor: there is nothing to do.
///
/// # Safety
/// None is needed here.
#[allow(unsafe_code, reason = "it has a duty on other processors")]
pub(super) unsafe fn synchronize_code(_: u64, _: u64) {}
