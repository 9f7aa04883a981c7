//! The hook source on this process itself.

#![cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_os = "linux",
    target_env = "gnu"
))]

mod allocator;
mod callback_heap;
mod callbacks;
mod calls;
mod child;
mod foreign;
mod forks;
mod inside;
#[cfg(target_arch = "aarch64")]
mod landing_pads;
mod late;
mod load;
mod log;
mod machine;
mod pages;
mod programs;
mod torture;

/// No callback of these tests may use the heap.
#[global_allocator]
static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
