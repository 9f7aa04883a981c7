//! Waiting until every change under way is over.
//!
//! The tracepoint marks the *start* of a change. If a thread translates between the start and the
//! change itself, it gets the old translation with the new generation, and no count of starts can
//! show that. So a thread that fills an entry waits first.
//!
//! KVM counts the changes under way for each machine, but its tracepoint fires *before* that count
//! goes up. So with one machine, "I have seen the generation, and the count is zero" proves
//! nothing. Two machines make the order known. The kernel calls the newest notifier first. If A is
//! the older machine and B the newer one, one change consists of these steps, in this order:
//!
//! ```text
//!   B: tracepoint   B: count +1   A: tracepoint   A: count +1   page tables   B: count -1   A: count -1
//!                   └──────────────── B's count is above zero ────────────────┘
//! ```
//!
//! * **A wait.** If the caller has seen A's event, B's count went up before that event: once the
//!   count is zero, that change is over. If the caller has not seen A's event, that event is still
//!   to come, before the page tables change, and the caller's next load of the generation sees it.
//! * **An event of another address space.** At A's tracepoint B's count is above zero because of
//!   this very change. So if an event finds the count at zero, there are two cases. Either the
//!   event belongs to another address space. Or it is the event of a change of this address space
//!   at B's tracepoint, and that change will pass A's tracepoint as well. In both cases the program
//!   need neither count the event nor note it in `dirty`. So while B exists, a process that
//!   discards memory in a loop causes no records in other processes.
//!
//! Only a BPF program can read the count, and the caller has no descriptor to run one with, because
//! all descriptors are in the vault (`vault.rs`). So the caller *makes an event*: it discards a
//! page that has no content, and the program at the tracepoint answers. Such an event is called a
//! question. The question is whether any change is under way.
//!
//! ```text
//!   caller   asked = n          madvise(scratch)              answered == n ?  over : ask again
//!   program                     └─ if (B's count == 0) answered = asked
//! ```
//!
//! At A's tracepoint the question itself is under way and B counts it, so the question is answered
//! at B's tracepoint or not at all.
//!
//! If the count was not zero in any of [`POLLS`] questions, the vault makes another machine, which
//! replaces B. To register the machine's notifier, the kernel takes every lock that a change of
//! this address space needs (`mm_take_all_locks`), so no change is under way then. The vault also
//! makes a machine if the count cannot be read, and on every processor except x86-64 and aarch64:
//! on the other processors it is not proven that the count goes down only after the stores to the
//! page tables are visible.
//!
//! B costs each change some 0.35 us, so it is closed after a time without waits. Before the close,
//! the word with the address of B's count is cleared. Unregistering B waits for every call of its
//! notifier that is in progress (`synchronize_srcu`). So no program reads the count of a closed
//! machine.
//!
//! # If the range is already armed
//! A change of an armed range increments the generation. So if the caller's range was armed before,
//! and no event has hit an armed range since the last wait began, the caller need not wait: changes
//! of other ranges do not matter to it. `over` is the generation that the last wait loaded before
//! its first question.
//!
//! # If only the caller changes memory
//! The caller's own changes are over: a change ends before the system call or the page fault that
//! makes it, and the caller is in neither. So the program notes who made the events since the last
//! wait. If only the caller did, nothing is under way, and the caller need not wait. So a program
//! with one thread, which maps, registers and unmaps, never waits, and needs no B.
//!
//! The note is the thread's *mark*, its id in the kernel's initial pid namespace. A thread cannot
//! ask for that id, but the program writes the id when it answers the thread's question. In this
//! process no event but a question starts at the scratch page, because that page never has content,
//! and only the holder of the lock asks. Another process may have a page at the same address. If an
//! event of that process answers the question, the program writes 0 as the mark. So the thread that
//! has asked may learn no mark, but never another thread's.
//!
//! Threads of other processes have no mark. They can change this address space: the child of a
//! `vfork`, a reclaiming task. So can kernel threads and the workers of an io_uring, which have ids
//! of their own.
//!
//! # Sharing
//! `dirty` says whether an event has happened since the last wait: [`QUIET`] if not, [`WAITING`]
//! while a thread waits, a thread's mark if only that thread made events, otherwise [`MANY`]. An
//! event of any thread replaces [`WAITING`] by [`MANY`]: a change that is older than the wait
//! may be under way, and its event noted nothing that is left. So a mark follows [`QUIET`] only,
//! and [`QUIET`] is stored only when all older changes are over. Waits are numbered. If a thread
//! holds the lock and finds that a wait has ended which began after the thread's own call, the
//! thread need not wait.
//!
//! # Source
//! `virt/kvm/kvm_main.c`, `mm/mmu_notifier.c`, Linux 6.12 and 6.18.

use super::busy::Flag;
use super::layout::dirty::{MANY, QUIET, WAITING};
use super::layout::header;
use super::machine::Machines;
use super::sys::{self, Scratch, Shared};
use crate::Error;
use crate::vault::Vault;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// How often the count is polled before a machine is made, and how many of these polls are without
/// a pause. Measured with 8 threads that fill and 8 that map, on two processors: 100 polls without
/// a pause made a machine in one wait of 68; 300 polls with pauses, in one of 995.
const POLLS: u32 = 300;
const SPINS: u32 = 100;

srcu::thread_word! {
    /// The mark of this thread, or 0 if it is not known.
    static MARK: u64 = 0;
    /// The source that told the mark. The child of a fork inherits the parent's words, and has
    /// another source.
    static MARKED_BY: u64 = 0;
}

/// The state of the waits.
#[derive(Debug)]
pub(super) struct Waits {
    /// Identifies the address space: see `Inner::id`.
    id: u64,
    pub(super) scratch: Scratch,
    /// The number of the last wait that has begun. Only the holder of the lock writes it.
    begun: AtomicU64,
    /// Whether there is a machine B whose count the program reads. Only the holder of the lock
    /// writes it.
    has_b: AtomicBool,
    /// All changes that A's events counted up to this generation are over. Only the holder of the
    /// lock writes it.
    over: AtomicU64,
    /// The number of machines that were made because the count was never zero or cannot be read.
    /// Only the holder of the lock writes it.
    machines: AtomicU64,
    state: Mutex<State>,
}

/// The held lock.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    // After the guard, so that its drop clears the flag only when the lock is free.
    _waiting: Flag,
}

#[derive(Debug, Default)]
struct State {
    asked: u64,
    /// The number of the last wait that succeeded.
    ended: u64,
}

impl Waits {
    pub(super) fn new(id: u64, header: &Shared) -> std::io::Result<Self> {
        let scratch = Scratch::map()?;
        // Events set `dirty` only after the first range is armed. So `dirty` is set from the start,
        // and stays set until then.
        header
            .u64(header::DIRTY)
            .store(MANY as u64, Ordering::Relaxed);
        header
            .u64(header::SCRATCH)
            .store(scratch.address(), Ordering::Relaxed);
        Ok(Self {
            id,
            scratch,
            begun: AtomicU64::new(0),
            has_b: AtomicBool::new(false),
            over: AtomicU64::new(0),
            machines: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// Takes the lock. Returns `None` in a signal handler that has interrupted this thread while it
    /// held the lock or waited for it.
    pub(super) fn lock(&self) -> Option<Locked<'_>> {
        let waiting = Flag::set(Flag::WAITING)?;
        Some(Locked {
            state: self.state.lock().unwrap_or_else(PoisonError::into_inner),
            _waiting: waiting,
        })
    }

    /// Waits until every change is over that was counted up to a generation which the caller has
    /// seen. That is enough for a range that was armed before.
    pub(super) fn wait_for(
        &self,
        generation: u64,
        header: &Shared,
        vault: &Vault<Machines>,
    ) -> Result<(), Error> {
        // ORDER(source-quiet): Acquire: the changes up to `over` are over for this thread too.
        // Partner: the store in `wait`.
        if self.over.load(Ordering::Acquire) >= generation {
            return Ok(());
        }
        self.wait(header, vault)
    }

    /// Waits until every change that began before the call is over.
    pub(super) fn wait(&self, header: &Shared, vault: &Vault<Machines>) -> Result<(), Error> {
        let dirty = header.u64(header::DIRTY);
        // ORDER(source-quiet): Acquire: the changes before the last wait are over for this thread
        // too. Partner: the exchange below. This load comes after the fence of `arm`:
        // ORDER(source-arm).
        let since = dirty.load(Ordering::Acquire);
        if since == QUIET as u64 || self.is_own(since) {
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
        // Before the first range is armed, events do not set `dirty`. A wait in that time leaves it
        // at `MANY`, which no event replaces: a change that begins unseen after this wait may still
        // be under way when the first range is armed.
        let is_on = header.u64(header::ON).load(Ordering::Relaxed) != 0;
        if is_on {
            dirty.store(WAITING as u64, Ordering::Relaxed);
        }
        // ORDER(source-generation): Acquire, like every load of the generation: the question comes
        // after this load.
        let generation = header.u64(header::GENERATION).load(Ordering::Acquire);
        // ORDER(source-wait): full fence between the accesses to `begun`, `ON` and `dirty` and the
        // program's load of the count. The fence has two partners. First, the program, which loads
        // `dirty` after its change has raised B's count, with a full barrier between: if that load
        // comes before the store of WAITING, the program does not set `dirty` again, but the count
        // shows the change. Second, the fence of `arm` before the ticket: a thread that relies on
        // this wait has added its range before.
        fence(Ordering::SeqCst);
        if !self.is_over(state, header) {
            // If the vault fails, a change that is older than this wait may still be under way.
            vault
                .run(Machines::renew_b)
                .inspect_err(|_| dirty.store(MANY as u64, Ordering::Relaxed))?;
            self.machines.fetch_add(1, Ordering::Relaxed);
        }
        state.ended = number;
        // ORDER(source-quiet): Release, after the wait. Partner: the load in `wait_for`.
        self.over.store(generation, Ordering::Release);
        // ORDER(source-quiet): Release, after the wait. Partner: the load above. If the exchange
        // fails, an event happened meanwhile.
        if is_on {
            let _ = dirty.compare_exchange(
                WAITING as u64,
                QUIET as u64,
                Ordering::Release,
                Ordering::Relaxed,
            );
        }
        Ok(())
    }

    /// Tells whether only the calling thread has made events since the last wait.
    fn is_own(&self, dirty: u64) -> bool {
        // ORDER(source-own): the calling thread is in no system call and no page fault, so its own
        // changes are over. Partner: the mark in the program, which runs in the thread that makes
        // the change.
        dirty > WAITING as u64 && MARKED_BY.get() == self.id && MARK.get() == dirty
    }

    /// Asks the program until it answers that nothing is under way. Returns false if there is no
    /// machine B, or if none of [`POLLS`] questions is answered.
    fn is_over(&self, state: &mut State, header: &Shared) -> bool {
        if !self.has_b.load(Ordering::Relaxed) {
            return false;
        }
        (0..POLLS).any(|poll| {
            if poll >= SPINS {
                // A thread in the middle of a change may need the processor.
                crate::wait::pause();
            }
            state.asked += 1;
            // ORDER(source-question): Relaxed: the question comes after this store in this thread.
            // Partner: the program's fence after its load.
            header
                .u64(header::ASKED)
                .store(state.asked, Ordering::Relaxed);
            sys::ask(&self.scratch);
            // ORDER(source-quiet): Acquire: the changes that were under way are over for this
            // thread too. Partner: the program's load of the count, before its store.
            let is_over = header.u64(header::ANSWERED).load(Ordering::Acquire) == state.asked;
            if is_over {
                // ORDER(source-asker): Relaxed, after the Acquire load of the answer, so this is
                // the mark of this thread, or 0 from another process. Partner: the program's fence
                // between the stores of asker and answer.
                MARK.set(header.u64(header::ASKER).load(Ordering::Relaxed));
                MARKED_BY.set(self.id);
            }
            is_over
        })
    }

    /// Returns the number of waits, and the number of machines that were made for them.
    pub(super) fn counts(&self) -> (u64, u64) {
        (
            self.begun.load(Ordering::Relaxed),
            self.machines.load(Ordering::Relaxed),
        )
    }

    pub(super) fn has_b(&self) -> bool {
        self.has_b.load(Ordering::Relaxed)
    }

    /// Records whether there is a machine B. The lock must be held: in [`change_b`](Self::change_b)
    /// the vault holds it, otherwise the thread that waits for the vault.
    pub(super) fn set_has_b(&self, has_b: bool) {
        self.has_b.store(has_b, Ordering::Relaxed);
    }

    /// Returns how many waits have begun.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Runs `f`, which changes machine B, unless another thread holds the lock. That thread may be
    /// waiting for the vault, whose thread is the caller.
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
