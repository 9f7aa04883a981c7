//! The x86-64 part of the hook: glibc's code, jumps, and the registers that a call preserves.

mod call_handler;
mod scan;
mod trampoline;

pub(super) use scan::{Code64, Found, PATCH};
pub(super) use trampoline::{Foreign, SLOT, branch, chain, trampoline};

/// A near jump reaches 2 GiB in either direction. The margin is for the length of the code itself.
pub(super) const REACH: u64 = (1 << 31) - (1 << 20);
/// `int3`.
pub(super) const BREAKPOINT: [u8; 1] = [0xcc];

/// The protection of pages of code, which is the same for all.
#[derive(Debug)]
pub(super) struct Protections;

impl Protections {
    pub(super) fn read_if(_: bool) -> Self {
        Self
    }

    pub(super) fn at(&self, _: u64) -> i32 {
        libc::PROT_READ | libc::PROT_EXEC
    }
}

/// Does nothing: on this processor instruction caches are coherent with stores.
///
/// # Safety
/// The function has no preconditions on this processor.
#[allow(unsafe_code, reason = "it has a duty on other processors")]
pub(super) unsafe fn synchronize_code(_: u64, _: u64) {}
