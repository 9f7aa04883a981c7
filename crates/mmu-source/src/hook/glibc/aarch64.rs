//! The aarch64 part of the hook: glibc's code, branches, and the registers that a call preserves.
//!
//! Every instruction has four bytes, including `svc #0`. So the branch to the trampoline replaces
//! the `svc` itself, and no other instruction has to move. The trampoline finds the number of the
//! call in `x8`. The scan examines the instructions before a `svc` only to decide whether the `svc`
//! makes a hooked call.

#[cfg(target_arch = "aarch64")]
mod call_handler;
#[cfg(target_arch = "aarch64")]
mod protection;
mod scan;
#[cfg(target_arch = "aarch64")]
mod synchronize;
mod trampoline;

#[cfg(target_arch = "aarch64")]
pub(super) use protection::Protections;
pub(super) use scan::{Code64, Found};
#[cfg(target_arch = "aarch64")]
pub(super) use synchronize::synchronize_code;
pub(super) use trampoline::{Foreign, SLOT, branch};

/// The size of a patch: one branch.
pub(super) const PATCH: usize = 4;
/// A branch reaches 128 MiB in either direction. The margin is for the length of the code itself.
pub(super) const REACH: u64 = (1 << 27) - (1 << 20);
/// `brk #5`, which the kernel writes for uprobes.
pub(super) const BREAKPOINT: [u8; 4] = 0xd420_00a0_u32.to_le_bytes();

/// Returns the trampoline of a site, to be placed at the address `at`.
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

/// Returns the trampoline for a function whose entry another program has patched with a jump. The
/// trampoline calls the target of that jump.
#[cfg(target_arch = "aarch64")]
pub(super) fn chain(number: u32, foreign: Foreign) -> Vec<u8> {
    trampoline::of_function(number, call_handler::function as *const () as u64, foreign)
}
