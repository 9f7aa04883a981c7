//! Sleepable read-copy-update (SRCU) for userspace: readers that cost a few plain instructions and may sleep, updaters that
//! wait for just those readers that could still hold what they unlinked, prompt callbacks, and a barrier.
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
//! /// Runs `f` with the present configuration. `f` may sleep; nobody waits for it but whoever frees this very version.
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
//!         // SAFETY: It came from `Box::into_raw` above, and the swap gave it to us alone.
//!         let old = unsafe { Box::from_raw(old) };
//!         // Not now: readers may be looking at it. When they are done:
//!         SRCU.call(move || drop(old));
//!     }
//! }
//!
//! replace_config(Config { workers: 1, greeting: "hello".into() });
//! std::thread::scope(|scope| {
//!     scope.spawn(|| with_config(|config| {
//!         std::thread::sleep(std::time::Duration::from_millis(5)); // Sleeping is fine.
//!         assert_eq!(config.greeting.len(), 5); // Still there, whatever happened meanwhile.
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
//! A reader brackets its use of shared data with a *section*. An updater first *unlinks* an object, so that no new section can find
//! it, and then waits until all sections that began before have ended: a *grace period*. Sections that begin later cannot
//! have the object and are not waited for, so the wait ends although there are always readers. Then the object can be freed.
//!
//! Each [`Srcu`] is a *domain* of its own. A reader that sleeps for an hour holds up the grace periods of its domain for an hour, and
//! nobody else's. That is what makes sleeping readers affordable, and the reason to have many domains rather than one.
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
//! | to look again later | [`Srcu::start_poll`], [`Srcu::poll`] | never |
//! | all callbacks so far to have returned (before unloading code, in tests) | [`Srcu::barrier`] | for them |
//! | no callback left, not even those that callbacks queue | [`Srcu::drain_until_idle`] | for them |
//!
//! `synchronize` is no `barrier`: after it, callbacks queued long before may still be about to run. `barrier` is no `synchronize`: with
//! nothing queued it returns at once.
//!
//! A wait for oneself (`synchronize` in one's own section or callback, `barrier` in any callback) is [`WouldDeadlock`], not a hang.
//! The exceptions are the holder of a [`SendGuard`], which belongs to no thread, and a wait that goes round through *other* domains or
//! locks: a section of A that waits for B, and a section of B that waits for A.
//!
//! # Callbacks
//!
//! One thread, started by the first `call` or `prepare`, runs the callbacks of all domains. It sleeps unless some domain can move, and
//! is woken by the very reader that ends the last section waited for, so a callback runs microseconds later. A domain
//! whose reader is stuck delays no other. A callback that blocks delays all. A panic in one is caught and counted.
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
//! Take arc-swap for one value that is replaced as a whole: it is safe code and needs no thread. Take crossbeam-epoch or seize for
//! lock-free containers whose readers are short and whose garbage may wait. Take a lock if writes are not rare. Take this crate if
//! readers sleep or call out, if it matters *when* something is freed, or if somebody must be able to wait for that.
//!
//! # Limits
//!
//! Linux only. Not for signal handlers. [`Srcu`] says what happens in the child of a `fork`. With the environment variable
//! `SRCU_NO_MEMBARRIER` set when the first domain is used, readers use real fences, as they do where the kernel refuses
//! `membarrier`; a seccomp filter that forbids it *later* aborts the process at the next grace period.
#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!("srcu is built on futexes, robust mutexes and membarrier, and so needs Linux");

#[macro_use]
mod word;

mod error;
mod grace;
mod guard;
#[expect(unsafe_code, reason = "all of it is here, and only here")]
mod raw;
mod srcu;
mod sync;

pub use error::WouldDeadlock;
pub use guard::{Guard, Reader, SendGuard};
pub use raw::callback::{Head, set_callback_panic_hook};
pub use raw::current::is_reclaimer;
#[cfg(not(mmun_loom))]
pub use raw::fork::forks;
#[doc(hidden)]
pub use raw::thread::Thread;
pub use srcu::{Cookie, Srcu};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
