//! The sources against the real kernel.

mod attach;
mod calls;
mod check;
mod death;
mod life;
mod log;
mod space;
mod spawn;
