//! The process source against real processes.

mod attach;
mod calls;
mod check;
mod death;
mod life;
mod log;
mod spawn;
