//! Sleepable read-copy-update (SRCU) for userspace. Readers cost a few plain instructions and may
//! sleep. Updaters wait for the readers that could still hold an unlinked object, and never for an
//! endless stream of later ones. Callbacks run promptly, and a barrier waits for them.
//!
//! ```
//! use srcu::Srcu;
//! use std::sync::atomic::{AtomicPtr, Ordering};
//!
//! struct Config { workers: usize, greeting: String }
//!
//! static SRCU: Srcu = Srcu::new();
//! static CONFIG: AtomicPtr<Config> = AtomicPtr::new(std::ptr::null_mut());
//!
//! /// Runs `f` with the current configuration. `f` may sleep: that only delays frees.
//! fn with_config<R>(f: impl FnOnce(&Config) -> R) -> Option<R> {
//!     let _section = SRCU.read_lock();
//!     // SAFETY: A version is freed a grace period after it was replaced, and this section is still open.
//!     let config = unsafe { CONFIG.load(Ordering::Acquire).as_ref()? };
//!     Some(f(config))
//! }
//!
//! fn replace_config(new: Config) {
//!     let old = CONFIG.swap(Box::into_raw(Box::new(new)), Ordering::AcqRel);
//!     if !old.is_null() {
//!         // SAFETY: `old` came from `Box::into_raw`, and after the swap only this thread owns it.
//!         let old = unsafe { Box::from_raw(old) };
//!         // Readers may still use `old`. Drop it when they are done:
//!         SRCU.call(move || drop(old));
//!     }
//! }
//!
//! replace_config(Config { workers: 1, greeting: "hello".into() });
//! std::thread::scope(|scope| {
//!     scope.spawn(|| with_config(|config| {
//!         std::thread::sleep(std::time::Duration::from_millis(5)); // Sleeping is fine.
//!         assert_eq!(config.greeting.len(), 5); // Still valid, although it may have been replaced.
//!     }));
//!     replace_config(Config { workers: 2, greeting: "howdy".into() });
//! });
//! assert_eq!(with_config(|config| config.workers), Some(2));
//! SRCU.barrier().unwrap(); // Every replaced version has been dropped.
//! # drop(unsafe { Box::from_raw(CONFIG.swap(std::ptr::null_mut(), Ordering::AcqRel)) });
//! ```
//!
//! # What a grace period is
//!
//! A reader brackets its use of shared data with a *section*. An updater first *unlinks* an object,
//! so that no new section can find it. The updater then waits for a *grace period*: until all
//! sections that began before the unlinking have ended. Sections that begin later cannot reach the
//! object, so the updater need not wait for them. So the wait ends although there are always
//! readers. Then the object can be freed.
//!
//! Each [`Srcu`] is a *domain* of its own. A reader that sleeps for an hour delays the grace
//! periods of its domain for an hour, and those of no other domain. So a program can afford readers
//! that sleep, if it has many domains instead of one.
//!
//! # Which call
//!
//! | you want | call | waits |
//! | --- | --- | --- |
//! | to read | [`Srcu::read_lock`]; in a hot loop a [`Reader`] | never |
//! | to read here and end elsewhere (a task, a request) | [`Srcu::down_read`] | never |
//! | to free something now, and can wait | [`Srcu::synchronize`] | for earlier sections |
//! | to free something and cannot wait | [`Srcu::call`] | never |
//! | the same without allocating | [`Srcu::prepare`] once, then [`Srcu::call_raw`] | never |
//! | to check later if earlier sections have ended | [`Srcu::start_poll`], [`Srcu::poll`] | never |
//! | all callbacks so far to have returned (before unloading code, in tests) | [`Srcu::barrier`] | for these callbacks |
//! | no callback left, not even those that callbacks queue | [`Srcu::drain_until_idle`] | for these callbacks |
//!
//! `synchronize` is not a `barrier`: when `synchronize` returns, callbacks that were queued long
//! before may not have run yet. `barrier` is not a `synchronize`: if no callback is queued,
//! `barrier` returns at once.
//!
//! A call that would wait for its own thread returns [`WouldDeadlock`] instead of hanging. Such
//! calls are `synchronize` inside a section or callback of the same domain, and `barrier` or
//! `drain_until_idle` inside a section of the same domain or in any callback. Two deadlocks are not
//! detected. In the first, a thread waits while it holds a [`SendGuard`], which belongs to no
//! thread. The second is a cycle through *other* domains or locks: a section of A waits for B, and
//! a section of B waits for A.
//!
//! # Callbacks
//!
//! One thread runs the callbacks of all domains. The first `call`, `call_raw`, `start_poll` or
//! `prepare` starts this thread. The thread sleeps until some domain can advance. The reader that
//! ends the last section of a grace period wakes the thread, so a callback runs microseconds later.
//! A domain whose reader is stuck delays no other domain. A callback that blocks delays the
//! callbacks of all domains. A panic in a callback is caught and counted.
//!
//! # When not to use it
//!
//! | | `srcu` | crossbeam-epoch | seize | arc-swap | liburcu |
//! | --- | --- | --- | --- | --- | --- |
//! | readers may sleep | yes | holds up all garbage | holds up its collector | yes | holds up all (one domain) |
//! | domains | any number, a word each | per collector | per collector | per value | one for the process |
//! | cost of a reader | two counters | a fence | a fence or a store | two locked operations | two counters |
//! | wait for readers | `synchronize` | no | no | no | `synchronize_rcu` |
//! | callback when | microseconds after the last reader | some later `pin` | some later retire or leave | at once (counted) | within 10 ms |
//! | barrier | yes | no | no | not needed | `rcu_barrier` |
//! | platforms | Linux | all | all | all | Unix |
//!
//! Use arc-swap for one value that is replaced as a whole: it is safe code and needs no thread. Use
//! crossbeam-epoch or seize for lock-free containers whose readers are short and whose garbage may
//! wait. Use a lock if writes are not rare. Use this crate if readers sleep or call other code, if
//! it matters *when* an object is freed, or if a thread must be able to wait for that.
//!
//! # Limits
//!
//! Linux only. Not for signal handlers. The docs of [`Srcu`] say what the child of a `fork` can do.
//! If the environment variable `SRCU_NO_MEMBARRIER` is set when the first domain is used, readers
//! use real fences. Readers also use real fences if the kernel refuses `membarrier`, or if the
//! processor is not x86-64, aarch64 or riscv64. If a seccomp filter forbids `membarrier` only
//! *later*, the next grace period aborts the process.
#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!("srcu is built on futexes, robust mutexes and membarrier, and so needs Linux");

#[macro_use]
mod word;

mod error;
mod guard;
#[expect(unsafe_code, reason = "all of it is here, but for `Srcu::call_raw`")]
mod raw;
mod srcu;
mod sync;

pub use error::WouldDeadlock;
pub use guard::{Guard, Reader, SendGuard};
/// For `thread_word!`: a crate that declares words need not depend on `loom` itself.
#[cfg(mmun_loom)]
#[doc(hidden)]
pub use loom;
pub use raw::callback::Head;
pub use raw::current::is_reclaimer;
#[cfg(not(mmun_loom))]
#[doc(hidden)]
pub use raw::ids::{thread_number, thread_numbers};
#[cfg(not(mmun_loom))]
pub use raw::process::forks;
#[doc(hidden)]
pub use raw::reclaimer::reclaim_here;
#[cfg(not(mmun_loom))]
#[doc(hidden)]
pub use raw::reclaimer::reclaimer_sleeps;
pub use raw::run::set_callback_panic_hook;
#[doc(hidden)]
pub use raw::thread::{Thread, Uncancelled, without_signals};
pub use srcu::{Cookie, Srcu};
/// For the models of the crates that build on this one.
#[doc(hidden)]
pub use sync::mutant;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
