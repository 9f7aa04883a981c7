//! What the hook has to know of aarch64: glibc's code, branches, and the registers that a call
//! keeps.
//!
//! Every instruction has four bytes, `svc #0` too, so the branch to the trampoline takes the place
//! of the `svc` itself, and nothing has to be moved. The number of the call is in `x8` then: the
//! trampoline looks there, and what stood before the `svc` only says which places are worth a
//! patch.

#[cfg(target_arch = "aarch64")]
mod call_handler;
#[cfg(target_arch = "aarch64")]
mod protection;
mod scan;
#[cfg(target_arch = "aarch64")]
mod synchronize;
mod trampoline;

#[cfg(target_arch = "aarch64")]
pub(super) use protection::protection;
pub(super) use scan::{Code64, Found};
#[cfg(target_arch = "aarch64")]
pub(super) use synchronize::synchronize_code;
pub(super) use trampoline::{Foreign, SLOT, branch};

/// As many bytes are replaced, by a branch.
pub(super) const PATCH: usize = 4;
/// A branch goes 128 MiB either way; a little is left for the code itself.
pub(super) const REACH: u64 = (1 << 27) - (1 << 20);
/// `brk #5`, the kernel's for uprobes.
pub(super) const BREAKPOINT: [u8; 4] = 0xd420_00a0_u32.to_le_bytes();

/// Returns the trampoline for a site, which will stand at `at`.
#[cfg(target_arch = "aarch64")]
pub(super) fn trampoline(at: u64, found: &Found, _: Code64<'_>) -> Option<Vec<u8>> {
    let table = std::ptr::from_ref(&super::handler::IS_HOOKED).expose_provenance() as u64;
    trampoline::of_call(
        at,
        call_handler::call as *const () as u64,
        table,
        found.resume(),
    )
}

/// Returns the trampoline for the entry of a function that another program has put a jump at: it
/// calls what they jump to.
#[cfg(target_arch = "aarch64")]
pub(super) fn chain(number: u32, foreign: Foreign) -> Vec<u8> {
    trampoline::of_function(number, call_handler::function as *const () as u64, foreign)
}
