//! The sources against the real kernel.
#![allow(clippy::incompatible_msrv, reason = "tests take the newest compiler")]

mod again;
mod attach;
mod calls;
mod check;
mod death;
mod hidden;
mod kernel;
mod kernel_life;
mod life;
mod log;
mod memory;
mod space;
mod spawn;
mod stop;
mod uffd;
