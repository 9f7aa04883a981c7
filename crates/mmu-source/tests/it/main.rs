//! The sources against the real kernel.
#![allow(clippy::incompatible_msrv, reason = "tests take the newest compiler")]

#[cfg(feature = "process")]
mod again;
#[cfg(feature = "process")]
mod attach;
#[cfg(feature = "process")]
mod calls;
#[cfg(feature = "process")]
mod check;
#[cfg(feature = "process")]
mod death;
#[cfg(feature = "process")]
mod hidden;
#[cfg(feature = "kernel")]
mod kernel;
#[cfg(feature = "kernel")]
mod kernel_life;
#[cfg(feature = "process")]
mod life;
#[cfg(feature = "process")]
mod log;
#[cfg(any(feature = "kernel", feature = "uffd"))]
#[cfg_attr(
    not(feature = "kernel"),
    allow(dead_code, reason = "each source uses its part")
)]
mod memory;
#[cfg(feature = "process")]
mod space;
#[cfg(feature = "process")]
mod spawn;
#[cfg(feature = "process")]
mod stop;
#[cfg(feature = "uffd")]
mod uffd;
