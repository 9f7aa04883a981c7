//! The parts of the tests that depend on the processor.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::{BREAKPOINT, jump_to, munmap};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{BREAKPOINT, jump_to, munmap};
