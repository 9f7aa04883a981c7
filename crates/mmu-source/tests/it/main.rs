//! The sources against the real kernel.

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
