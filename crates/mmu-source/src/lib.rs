//! Sources of address-space changes for [`mmu_notifier`].
//!
//! A source watches somebody's system calls and opens an invalidation bracket on the right
//! [`mmu_notifier::Mm`] around each one that changes a translation. What each source sees, when it
//! tells and what it misses stands in [`SOURCES`], at length in `docs/sources.md`.
//!
//! [`current`] is this process's own address space.
//!
//! * [`hook`]: this process's own memory calls, by patching libc.
//! * [`kernel`]: everything that changes a translation of this process, through KVM's notifier and
//!   a BPF program.
//! * [`process`]: other processes, through ptrace and a seccomp filter.
//! * [`uffd`]: armed ranges of this process, through userfaultfd.
//!
//! [`Watch`] answers one question about one range, whatever the source: has it been touched since?

#![deny(unsafe_code)]
#![cfg_attr(
    not(all(feature = "hook", feature = "kernel", feature = "process", feature = "uffd")),
    allow(
        dead_code,
        unused_imports,
        rustdoc::broken_intra_doc_links,
        reason = "each source uses a part of what lies below all of them"
    )
)]

mod current_mm;
mod error;
#[cfg(any(feature = "kernel", feature = "process"))]
mod fields;
mod fork;
#[cfg(feature = "hook")]
pub mod hook;
#[cfg(feature = "kernel")]
pub mod kernel;
#[cfg(any(feature = "hook", feature = "process"))]
mod maps;
mod page;
#[cfg(feature = "process")]
pub mod process;
mod queue;
mod ranges;
mod sources;
#[cfg(test)]
mod testkit;
#[cfg(feature = "uffd")]
pub mod uffd;
#[cfg(any(feature = "kernel", feature = "uffd"))]
mod vault;
mod wait;
mod watch;
mod watch_table;

pub use current_mm::{current, current_if_made, current_ref};
pub use error::Error;
pub use sources::{SOURCES, SourceInfo};
pub use watch::Watch;

/// The example of the crate's README must run.
#[cfg(all(doctest, feature = "hook", target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
#[doc = include_str!("../README.md")]
struct Readme;
