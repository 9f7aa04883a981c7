//! `libmmun`: the functions behind the C headers in `include/mmun`, which are their documentation.
//!
//! # Safety
//! Every exported function trusts its caller as far as C cannot say it: pointers are null or valid,
//! objects are what the header says. What can be checked is: null pointers, bounds, states, waits
//! for oneself. A panic in this library is a bug and ends the process with a message; a C++
//! exception that leaves a callback does, too.

// mmu_notifier.h
mod interval;
mod mm;
mod notifier;
mod range;

// mmun.h
mod fills;
pub mod regcache;
pub mod sources;
pub mod subscription;
pub mod watch;

// Both of them.
mod args;
mod border;
pub mod error;
mod layout;

pub use interval::*;
pub use mm::*;
pub use notifier::*;
pub use range::*;
