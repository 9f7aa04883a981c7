//! Sleepable read-copy-update (SRCU) for userspace.
#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!("srcu is built on futexes, robust mutexes and membarrier, and so needs Linux");

mod error;
mod grace;
mod guard;
#[expect(unsafe_code, reason = "all of it is here, and only here")]
mod raw;
mod srcu;
mod sync;

pub use error::WouldDeadlock;
pub use guard::{Guard, Reader, SendGuard};
pub use raw::callback::{Head, set_callback_panic_hook};
pub use srcu::{Cookie, Srcu};
