//! Waiting until every change under way is over.
//!
//! The tracepoint tells the *start* of a change. What is translated between the start and the
//! change itself is the old translation with the new generation, and no count of starts can show
//! that. So a thread that fills an entry waits first.
//!
//! KVM counts the changes under way for each machine, but its tracepoint fires *before* that count
//! goes up: on one machine "the generation has been seen, and the count is zero" proves nothing.
//! Two machines put the two in order. The kernel calls the newest notifier first, so if A is the
//! older machine and B the newer, one change is, in this order:
//!
//! ```text
//!   B: tracepoint   B: count +1   A: tracepoint   A: count +1   page tables   B: count -1   A: count -1
//!                   └──────────────── B's count is above zero ────────────────┘
//! ```
//!
//! * **A wait.** If the caller has seen A's event, B's count went up before: once it is zero, the
//!   change is over. If not, A's event is still to come, before the page tables change, and the
//!   caller's next look at the generation sees it.
//! * **An event of another address space.** At A's tracepoint B's count is above zero, because of
//!   this very change. So an event that finds it at zero is not ours (or is ours and at B's
//!   tracepoint, with A's to come), and the program need not count it. Another process that
//!   discards memory in a loop costs this one nothing.
//!
//! Only a BPF program can read the count, and no descriptor of ours is in the caller's reach
//! (`vault.rs`). So the caller *makes an event*: it discards a page that has no content, and the
//! program at the tracepoint answers.
//!
//! ```text
//!   caller   asked = n          madvise(scratch)              answered == n ?  over : ask again
//!   program                     └─ if (B's count == 0) answered = asked
//! ```
//!
//! At A's tracepoint the question itself counts, so it is answered at B's or not at all. If after
//! [`POLLS`] questions the count was never found at zero, the vault makes another machine, which
//! takes B's place: a new notifier is registered under every lock that a change of this address
//! space needs (`mm_take_all_locks`), so none is under way then. The same is done where the count
//! cannot be read, or where it is not shown that the count goes down after the page tables' stores
//! are seen (any processor but x86-64).
//!
//! B costs each change some 0.35 us, and is closed after a while without waits. The word
//! with the address of B's count is cleared before, and unregistering B waits for every start that
//! is being told (`synchronize_srcu`): no program reads the count of a machine that is gone.
//!
//! # Whose range is armed already
//! A change of an armed range is counted in the generation. So a caller whose range was armed
//! before needs no wait if no event has hit an armed range since the last wait began: what the
//! others change does not concern it. `over` is the generation that a wait has found before it
//! asked.
//!
//! # Sharing
//! `dirty` says whether there was any event since the last wait: 0 if not, 1 if there was, 2 while
//! a thread waits. Waits have numbers. A thread that finds, under the lock, that a wait has ended
//! which began after its own call need not wait.
//!
//! # Source
//! `virt/kvm/kvm_main.c`, `mm/mmu_notifier.c`, Linux 6.12 and 6.18.

use super::busy::Flag;
use super::layout::header;
use super::machine::Machines;
use super::sys::{self, Scratch, Shared};
use crate::Error;
use crate::vault::Vault;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// How often the count is looked at before a machine is made, and how often of these without a
/// pause. With 8 threads that fill and 8 that map on two processors, 100 looks without a pause made
/// a machine for one wait in 68, 300 with pauses for one in 995.
const POLLS: u32 = 300;
const SPINS: u32 = 100;

/// What the program finds in `dirty`.
const QUIET: u64 = 0;
const DIRTY: u64 = 1;
const WAITING: u64 = 2;

/// The state of the waits.
#[derive(Debug)]
pub(super) struct Waits {
    scratch: Scratch,
    /// The number of the last wait that has begun. Written under the lock.
    begun: AtomicU64,
    /// Whether there is a machine B whose count the program reads. Written under the lock.
    has_b: AtomicBool,
    /// Changes that were counted up to this generation, by A's event, are over. Written under the
    /// lock.
    over: AtomicU64,
    /// Machines that were made because the count was never zero, or for want of a count. Written
    /// under the lock.
    machines: AtomicU64,
    state: Mutex<State>,
}

/// The lock, held.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    // Dropped second: the flag stays until the lock is free.
    _waiting: Flag,
}

#[derive(Debug, Default)]
struct State {
    asked: u64,
    /// The number of the last wait that has ended well.
    ended: u64,
}

impl Waits {
    pub(super) fn new(header: &Shared) -> std::io::Result<Self> {
        let scratch = Scratch::map()?;
        // Events before the first wait were not counted.
        header.u64(header::DIRTY).store(DIRTY, Ordering::Relaxed);
        header
            .u64(header::SCRATCH)
            .store(scratch.address(), Ordering::Relaxed);
        Ok(Self {
            scratch,
            begun: AtomicU64::new(0),
            has_b: AtomicBool::new(false),
            over: AtomicU64::new(0),
            machines: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// `None` in a signal handler that has interrupted the holder of the lock.
    pub(super) fn lock(&self) -> Option<Locked<'_>> {
        let waiting = Flag::set(Flag::WAITING)?;
        Some(Locked {
            state: self.state.lock().unwrap_or_else(PoisonError::into_inner),
            _waiting: waiting,
        })
    }

    /// Waits until every change is over that was counted up to a generation which the caller has
    /// seen; enough for a range that was armed before.
    pub(super) fn wait_for(
        &self,
        generation: u64,
        header: &Shared,
        vault: &Vault<Machines>,
    ) -> Result<(), Error> {
        // ORDER(source-quiet): Acquire: those changes are over for this thread too. Partner: the
        // store in `wait`.
        if self.over.load(Ordering::Acquire) >= generation {
            return Ok(());
        }
        self.wait(header, vault)
    }

    /// Waits until every change that had begun before the call is over.
    pub(super) fn wait(&self, header: &Shared, vault: &Vault<Machines>) -> Result<(), Error> {
        let dirty = header.u64(header::DIRTY);
        // ORDER(source-quiet): Acquire: those changes are over for this thread too. Partner: the
        // exchange below. It comes after the fence of `arm`: ORDER(source-arm).
        if dirty.load(Ordering::Acquire) == QUIET {
            return Ok(());
        }
        let ticket = self.begun.load(Ordering::Relaxed);
        let mut locked = self.lock().ok_or(Error::InCallback { source: "kernel" })?;
        let state = &mut *locked.state;
        if state.ended > ticket {
            return Ok(());
        }
        let number = self.begun.load(Ordering::Relaxed) + 1;
        self.begun.store(number, Ordering::Relaxed);
        dirty.store(WAITING, Ordering::Relaxed);
        // ORDER(source-generation): Acquire, as every look: the question comes after it.
        let generation = header.u64(header::GENERATION).load(Ordering::Acquire);
        // ORDER(source-wait): full fence between the two words and the look at the count. Partners:
        // the program's look at `dirty`, which comes after its change has raised B's count (a
        // locked instruction), so that a change that did not set `dirty` again is seen in the
        // count; and the fence of `arm` before the ticket, so that a thread that relies on this
        // wait has entered its range.
        fence(Ordering::SeqCst);
        if !self.is_over(state, header) {
            vault
                .run(Machines::renew_b)
                .inspect_err(|_| dirty.store(DIRTY, Ordering::Relaxed))?;
            self.machines.fetch_add(1, Ordering::Relaxed);
        }
        state.ended = number;
        // ORDER(source-quiet): Release, behind the wait. Partner: the load in `wait_for`.
        self.over.store(generation, Ordering::Release);
        // ORDER(source-quiet): Release, behind the wait. Partner: the load above. If it fails there
        // was an event meanwhile.
        let _ = dirty.compare_exchange(WAITING, QUIET, Ordering::Release, Ordering::Relaxed);
        Ok(())
    }

    /// Asks the program until nothing is under way; false if that does not come to pass.
    fn is_over(&self, state: &mut State, header: &Shared) -> bool {
        if !self.has_b.load(Ordering::Relaxed) {
            return false;
        }
        (0..POLLS).any(|poll| {
            if poll >= SPINS {
                // A thread in the middle of a change may want the processor.
                crate::wait::pause();
            }
            state.asked += 1;
            header
                .u64(header::ASKED)
                .store(state.asked, Ordering::Relaxed);
            sys::ask(&self.scratch);
            // ORDER(source-quiet): Acquire: what was under way is over for this thread. Partner:
            // the program's look at the count, before its store.
            header.u64(header::ANSWERED).load(Ordering::Acquire) == state.asked
        })
    }

    /// How many waits there were, and how many machines were made for them.
    pub(super) fn counts(&self) -> (u64, u64) {
        (
            self.begun.load(Ordering::Relaxed),
            self.machines.load(Ordering::Relaxed),
        )
    }

    pub(super) fn has_b(&self) -> bool {
        self.has_b.load(Ordering::Relaxed)
    }

    /// Says whether there is a machine B. Under the lock, which the vault has in
    /// [`change_b`](Self::change_b), and otherwise the thread that waits for it.
    pub(super) fn set_has_b(&self, has_b: bool) {
        self.has_b.store(has_b, Ordering::Relaxed);
    }

    /// How many waits have begun.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Has `f` change machine B while no thread waits. Not done if one does, because it may be
    /// waiting for the caller, the vault.
    pub(super) fn change_b(&self, f: impl FnOnce()) {
        let state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        f();
        drop(state);
    }
}
