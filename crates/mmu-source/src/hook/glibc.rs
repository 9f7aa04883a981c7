//! The hook for glibc: what is patched, how, and what runs in the place of a call.

mod code_pages;
mod handler;
mod install;
mod module;
mod own_process;
mod plan;
mod raw;
mod starts;
mod x86_64;

pub(in crate::hook) use install::{install, probe, remove, status};
use x86_64 as machine;
