//! The sources against the real kernel.

mod attach;
mod calls;
mod check;
mod death;
mod kernel;
mod kernel_life;
mod life;
mod log;
mod memory;
mod space;
mod spawn;
mod stop;
mod uffd;
