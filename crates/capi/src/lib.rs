//! `libmmun`: the functions behind the C headers in `include/mmun`; the headers document them.
//!
//! # Safety
//! Every exported function trusts its caller where C cannot express a rule: pointers are null or
//! valid, objects are in the state that the header demands. The functions check what they can: null
//! pointers, bounds, states, self-deadlock. A panic in this library is a bug and ends the process
//! with a message, as does a C++ exception that leaves a callback.

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

// Used by both headers.
mod args;
mod border;
pub mod error;
mod layout;

pub use interval::*;
pub use mm::*;
pub use notifier::*;
pub use range::*;
