//! `libmmun`: the functions behind the C headers in `include/mmun`; the headers document them.
//!
//! # Safety
//! Every exported function trusts its caller where C cannot express a rule. The headers demand
//! these promises of the caller, and the `SAFETY` comments name them:
//!
//! * *Pointers*: a pointer is null, or points to live memory of its type. No other thread writes to
//!   that memory during the call.
//! * *Handles*: a handle of `mmun.h` is null or open. No thread closes it during the call.
//! * *Address spaces*: `mm` is null or the bits of a handle that the caller holds. Where the header
//!   demands a user, the caller holds a user.
//! * *Objects*: a notifier, interval or range is in the state that the header demands, for example
//!   registered, and does not move.
//! * *Callbacks*: a function in a table is null or follows its prototype. It may run on any thread,
//!   in parallel with itself, with the object or context that the program has given.
//!
//! The functions check null pointers, bounds, states, and whether they would wait for their own
//! thread. A panic in this library is a bug and ends the process with a message, as does a C++
//! exception that leaves a callback.

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
