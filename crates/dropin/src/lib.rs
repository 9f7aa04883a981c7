//! `libmmun_dropin.so`: registration caches of UCX and libfabric that cannot go stale, in programs
//! that were not compiled for it.
//!
//! ```text
//! LD_PRELOAD=/usr/lib/libmmun_dropin.so ./application
//! ```
//!
//! When it is loaded, the library registers the process for `membarrier`, by two system calls,
//! and handlers for forks, which do nothing as long as UCX is not used. It does nothing else
//! until the program calls `ucm_set_event_handler` (UCX's registration caches do), `fi_getinfo`
//! or `fi_fabric`. The library defines these three functions itself, and those by which UCX
//! patches libc, and makes, searches, fills and destroys a cache. It passes each call on to the
//! real function; that by which UCX patches libc only without the `hook`.
//!
//! * **UCX**: if the `hook` is to run, the library keeps UCX from patching libc at load
//!   (`ucm_mmap_init`). It announces itself as an external source of events, so that UCX does not
//!   patch later either. It reports memory that is about to change through `ucm_vm_munmap`. Every
//!   look-up of a cache calls `ucs_rcache_get` or `ucs_pgtable_lookup`, in which the library first
//!   waits until the `kernel` source has reported all changes.
//! * **libfabric**: the library imports a memory monitor through libfabric's public API. Each hit
//!   of the cache asks that monitor whether the registration is still valid.
//!
//! `docs/adopt.md` is the user's guide. The environment:
//!
//! | variable | value |
//! | --- | --- |
//! | `MMUN` | `auto` (default: both, or the source that works), `hook`, `kernel`, `both`, `off` |
//! | `MMUN_REPORT` | file for the report; `-`: standard error; `DIR/`: one file a process |
//! | `MMUN_STRICT` | `1`: exits with 125 at the first use if a change could be missed or the library is not protected |
//!
//! # Safety
//! Each `unsafe` block is of one of four kinds:
//! * a call of a function of the other library, or the cast of its address, with a type that has
//!   been the same in all versions that `docs/adopt.md` names;
//! * an access to structures that both libraries share (`libfabric::abi`);
//! * an access through a pointer that is published once and never freed (`first`, `space`);
//! * a call of libc, or a system call.
//!
//! A panic never leaves the library: it aborts the process, because a registration cache that has
//! lost an invalidation would corrupt data.

#![deny(unsafe_code)]

mod at_load;
mod counts;
mod first;
mod found;
mod late;
mod libfabric;
mod place;
mod ranges;
mod reaper;
mod report;
mod say;
mod settings;
mod space;
mod strict;
mod ucx;
mod wait;
