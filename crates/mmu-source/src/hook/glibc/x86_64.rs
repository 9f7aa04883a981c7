//! What the hook has to know of x86-64: glibc's code, jumps, and the registers that a call keeps.

mod call_handler;
mod scan;
mod trampoline;

pub(super) use call_handler::{function, stub};
pub(super) use scan::{Code64, Found, PATCH};
pub(super) use trampoline::{Arena, Foreign};
