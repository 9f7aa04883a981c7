//! The hook for glibc: what it patches, how, and what runs in place of a call.
//!
//! Each processor architecture has a folder: how glibc makes a call, what a patch looks like, and
//! which registers a call preserves.

#[macro_use]
mod naked;

#[cfg_attr(
    not(target_arch = "aarch64"),
    allow(dead_code, unused_imports, reason = "its tests run on any processor")
)]
#[cfg(any(target_arch = "aarch64", test))]
mod aarch64;
mod arena;
mod code_pages;
mod handler;
mod install;
mod module;
mod own_process;
mod plan;
mod raw;
mod starts;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as machine;
pub(in crate::hook) use install::{install, probe, remove, status};
#[cfg(target_arch = "x86_64")]
use x86_64 as machine;
