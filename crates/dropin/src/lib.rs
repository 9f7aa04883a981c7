//! `libmmun_dropin.so`: registration caches of UCX and libfabric that cannot go stale, in programs
//! that were not compiled for it.
//!
//! ```text
//! LD_PRELOAD=/usr/lib/libmmun_dropin.so ./application
//! ```
//!
//! The library does nothing until the program calls `ucm_set_event_handler` (UCX's registration
//! caches do), `fi_getinfo` or `fi_fabric`. These three, and `ucs_rcache_get`, it defines itself
//! and hands on to the real ones.
//!
//! * **UCX** is told of memory that is about to change through `ucm_vm_munmap`, as an external
//!   source of events; it does not patch libc then. Up to 1.13 every look-up of its cache passes
//!   `ucs_rcache_get`, and the `kernel` source is asked there.
//! * **libfabric** gets a memory monitor through its public import. Each hit of its cache asks that
//!   monitor whether the registration is still valid.
//!
//! `docs/adopt.md` is for the person who uses it. The environment:
//!
//! | variable | value |
//! | --- | --- |
//! | `MMUN` | `auto` (the default: both sources, or `hook` where `kernel` does not work), `hook`, `kernel`, `both`, `off` |
//! | `MMUN_REPORT` | a file that the report is appended to when the process exits; `-` is standard error; a name that ends in `/` is a directory with one file a process |
//! | `MMUN_STRICT` | `1`: a process whose sources are not complete exits with 125 at its first use |
//!
//! # Safety
//! Everything that is `unsafe` here is one of three things: a call of a function of the other
//! library, by the type that its public header or its exported symbol has had in all versions that
//! `docs/adopt.md` names; access to the structures that the two sides share (`libfabric::abi`); or
//! a system call. A panic never leaves the library: it aborts the process, because a registration
//! cache that has lost an invalidation would corrupt data.

#![deny(unsafe_code)]

mod counts;
mod first;
mod found;
mod libfabric;
mod place;
mod ranges;
mod reaper;
mod report;
mod say;
mod settings;
mod space;
mod ucx;
