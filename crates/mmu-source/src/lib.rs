//! Sources of address-space changes for [`mmu_notifier`].
//!
//! A source detects changes of an address space. For each change it opens an invalidation bracket
//! on the [`mmu_notifier::Mm`] of that address space. [`current`] is the address space of this
//! process.
//!
//! # Which source do I need?
//! | you want to know | source | needs |
//! | --- | --- | --- |
//! | every change of this process's memory, whatever its cause: for a cache that must never be stale | [`kernel`]; also [`hook`] if callbacks must run before the program's own calls | `/dev/kvm`, CAP_BPF and CAP_PERFMON; or a running `mmun broker` |
//! | what this process does through libc, before it happens, without privileges | [`hook`] | x86-64 or aarch64, with glibc |
//! | what this process does to a few ranges, soon afterwards | [`uffd`] | CAP_SYS_PTRACE, Linux 6.7 |
//! | what other processes do | [`process`] | the right to trace them, x86-64 or aarch64 |
//! | whether one range has changed since a given moment, even under a lock or inside `free` | [`Watch`] | [`kernel`] or [`hook`] |
//!
//! [`SOURCES`] lists for each source what it sees, when it notifies subscribers, and what it
//! misses. Each source is a feature of this crate, and all are on by default.
//!
//! # One example of each
//! `kernel`: a watch says whether a range has changed since the watch was made.
#![cfg_attr(feature = "kernel", doc = "```no_run")]
#![cfg_attr(not(feature = "kernel"), doc = "```ignore")]
//! # use mmu_notifier::{Va, VaRange};
//! let kernel = mmu_source::kernel::Kernel::start()?;
//! let range = VaRange::covering(Va::new(0x7000_0000), 1 << 20)?;
//! let watch = kernel.watch(range)?; // First the watch, then the translation.
//! assert!(watch.is_valid()); // At each use: no callback, no lock, no allocation.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `hook`: while the hook is installed, subscribers of [`current`] are called before and after each
//! memory call.
#![cfg_attr(
    all(
        feature = "hook",
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_env = "gnu"
    ),
    doc = "```"
)]
#![cfg_attr(
    not(all(
        feature = "hook",
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_env = "gnu"
    )),
    doc = "```ignore"
)]
//! # use mmu_notifier::{InvalidateRange, Notifier, Registration};
//! # use std::sync::atomic::{AtomicU64, Ordering};
//! #[derive(Default)]
//! struct Changes(AtomicU64);
//! impl Notifier for Changes {
//!     fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
//!         self.0.fetch_add(1, Ordering::Relaxed); // May not allocate: it may be inside `free`.
//!     }
//! }
//! let mm = mmu_source::current();
//! let changes = Registration::new(&mm, Changes::default())?;
//! let hook = mmu_source::hook::Hook::install()?;
//! drop(vec![0_u8; 64 << 20]); // libc unmaps it.
//! assert!(changes.0.load(Ordering::Relaxed) > 0);
//! # drop(hook);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `uffd`: the program arms ranges. Subscribers of [`current`] are called on a thread of the
//! source.
#![cfg_attr(feature = "uffd", doc = "```no_run")]
#![cfg_attr(not(feature = "uffd"), doc = "```ignore")]
//! # use mmu_notifier::{Va, VaRange};
//! let uffd = mmu_source::uffd::Uffd::start()?;
//! let range = VaRange::covering(Va::new(0x7000_0000), 1 << 20)?;
//! let armed = uffd.arm(range)?; // Armed until dropped.
//! uffd.settle()?; // Subscribers now know of every call that has returned.
//! # drop(armed);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `process`: a tracer runs a program and opens a bracket around each of its memory calls. The
//! example is on the front page of [`process`].

#![deny(unsafe_code)]
#![cfg_attr(
    not(all(
        feature = "hook",
        feature = "kernel",
        feature = "process",
        feature = "uffd"
    )),
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
#[cfg(any(feature = "hook", feature = "process"))]
#[cfg_attr(
    not(feature = "process"),
    allow(unreachable_pub, reason = "public in `process`")
)]
mod procfs;
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

#[doc(hidden)]
pub use current_mm::prepare;
pub use current_mm::{current, current_if_made, current_ref};
pub use error::Error;
pub use sources::{SOURCES, SourceInfo};
pub use watch::Watch;

/// The example of the crate's README must run.
#[cfg(all(
    doctest,
    feature = "hook",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_os = "linux",
    target_env = "gnu"
))]
#[doc = include_str!("../README.md")]
struct Readme;
