//! The registers of a stopped task, one file for each architecture.

#[cfg(target_arch = "aarch64")]
#[path = "registers/aarch64.rs"]
mod machine;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "registers/elsewhere.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "registers/x86_64.rs"]
mod machine;

pub(in super::super) use machine::{registers, skip_call};
