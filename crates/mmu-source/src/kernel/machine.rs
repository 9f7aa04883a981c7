//! The content of the vault: descriptors, virtual machines that are never run, and the listener.

use super::broker::Session;
use super::broker::message::Request;
use super::programs::Programs;
use super::resolver::Role;
use super::sys;
use super::{Inner, kernel_error};
use crate::Error;
use crate::vault::Letterbox;
use srcu::Thread;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The virtual machines: see `wait.rs`. Dropping this value closes all of them, except those that
/// [`renew_b`](Self::renew_b) has leaked.
pub(super) struct Machines {
    listener: Option<Listener>,
    keeper: Keeper,
    live: Option<Live>,
    later: Letterbox<Self>,
    /// Whether the program could not read the count of the last machine that was made as B. Then
    /// only a wait makes another one.
    is_vain: bool,
    /// When a loss was last reported because the number of skipped runs was unknown.
    unknown: Option<Instant>,
}

/// How often a loss is reported while the number of skipped runs is unknown. An idle source
/// requests that number at the same interval.
const UNKNOWN: Duration = Duration::from_secs(1);

/// The owner of the programs: this process, or a broker.
#[derive(Debug)]
pub(super) enum Keeper {
    Own(Programs),
    Broker(Session),
}

/// The descriptors that make the kernel send events. A rehearsal has none.
#[derive(Debug)]
pub(super) struct Live {
    kvm: OwnedFd,
    b: Option<OwnedFd>,
    a: OwnedFd,
    _attached: OwnedFd,
}

struct Listener {
    inner: Arc<Inner>,
    /// Wakes the listener, when machine B is made or when the listener must stop.
    nudge: OwnedFd,
    thread: Thread,
}

impl Live {
    pub(super) fn new(kvm: OwnedFd, a: OwnedFd, attached: OwnedFd) -> Self {
        Self {
            kvm,
            b: None,
            a,
            _attached: attached,
        }
    }
}

impl Keeper {
    /// Makes the program read the count of `machine`. Returns whether the program does so, or
    /// `None` if this is unknown.
    fn show_b(&self, machine: BorrowedFd<'_>) -> Option<bool> {
        match self {
            Self::Own(programs) => Some(programs.show(machine, Role::B)),
            // A broker that has stopped answering cannot make the program read the count.
            Self::Broker(session) if session.is_silent() => Some(false),
            Self::Broker(session) => session
                .ask(Request::Count, Some(machine))
                .map(|found| found == 1),
        }
    }

    fn forget_b(&self) -> bool {
        match self {
            Self::Own(programs) => programs.forget_b(),
            Self::Broker(session) => session.ask(Request::Forget, None) == Some(1),
        }
    }
}

impl Machines {
    pub(super) fn new(keeper: Keeper, live: Option<Live>, later: Letterbox<Self>) -> Self {
        Self {
            listener: None,
            keeper,
            live,
            later,
            is_vain: false,
            unknown: None,
        }
    }

    /// Takes over the listener, which learns of machine B and ends before the machines are closed.
    pub(super) fn set_listener(&mut self, inner: Arc<Inner>, nudge: OwnedFd, thread: Thread) {
        self.listener = Some(Listener {
            inner,
            nudge,
            thread,
        });
    }

    /// Returns the words that only programs see, if this source is live and has the programs
    /// itself.
    pub(super) fn private(&self) -> io::Result<Option<OwnedFd>> {
        match (&self.keeper, &self.live) {
            (Keeper::Own(programs), Some(_)) => programs.private().map(Some),
            _ => Ok(None),
        }
    }

    pub(super) fn letterbox(&self) -> Letterbox<Self> {
        self.later.clone()
    }

    pub(super) fn set_resolver(&mut self, resolver: OwnedFd) {
        if let (Keeper::Own(programs), Some(live)) = (&mut self.keeper, &self.live) {
            programs.set_resolver(resolver);
            programs.show(live.a.as_fd(), Role::Own);
            self.is_vain = false;
        }
    }

    /// Makes a machine, which proves that no change is under way. If the program can read the new
    /// machine's count, the machine replaces B. If the program cannot, it is made to forget B's
    /// count as well. A rehearsal makes no machine.
    pub(super) fn renew_b(&mut self) -> Result<(), Error> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        let made = create_vm(&live.kvm)?;
        let is_shown = self.keeper.show_b(made.as_fd());
        self.is_vain = is_shown != Some(true);
        match is_shown {
            Some(true) => {
                let before = live.b.replace(made);
                self.tell_b();
                // Closing takes up to some milliseconds, so the close happens after the answer.
                self.later.post(move |_| drop(before));
            }
            Some(false) => {
                self.later.post(move |_| drop(made));
                self.forget_b();
            }
            // The broker is late or has ended. The broker's program may read this machine's count
            // now or later, so the machine must stay open as long as the vault.
            None => std::mem::forget(made),
        }
        Ok(())
    }

    /// Informs the waiting threads and the listener whether there is a machine B.
    fn tell_b(&self) {
        let Some(Listener { inner, nudge, .. }) = &self.listener else {
            return;
        };
        let had_b = inner.waits.has_b();
        inner.waits.set_has_b(self.has_b());
        if !had_b {
            crate::wait::wake(nudge.as_fd());
        }
    }

    /// Makes the program forget B, then closes B.
    fn forget_b(&mut self) {
        let Some(live) = &mut self.live else { return };
        // If the program cannot be made to forget B, it still reads B's count. Then B must stay
        // open.
        if live.b.is_some() && self.keeper.forget_b() {
            let b = live.b.take();
            self.tell_b();
            self.later.post(move |_| drop(b));
        }
    }

    /// Closes B if no wait has begun since wait number `begun`.
    pub(super) fn close_idle_b(&mut self, inner: &Inner, begun: u64) {
        inner.waits.change_b(|| {
            if inner.waits.begun() == begun {
                self.forget_b();
            }
        });
    }

    /// Makes B, without a request, if there is none, unless the program could not read the count of
    /// the last one: each machine stops all changes of this address space for a moment.
    pub(super) fn make_b(&mut self, inner: &Inner) {
        inner.waits.change_b(|| {
            if !self.has_b() && !self.is_vain {
                // If this fails, the only harm is needless records.
                let _ = self.renew_b();
            }
        });
    }

    fn has_b(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.b.is_some())
    }

    /// Reports a loss if the kernel has skipped the program since the last report. If the number of
    /// skipped runs is unknown, reports a loss at most once in [`UNKNOWN`], and only if the kernel
    /// can skip runs by its release (`may_skip`).
    pub(super) fn look_for_missed_runs(&mut self, inner: &Inner, may_skip: bool) {
        match self.missed_runs() {
            Some(missed) => inner.note_missed(missed),
            None if may_skip && self.unknown.is_none_or(|told| told.elapsed() >= UNKNOWN) => {
                self.unknown = Some(Instant::now());
                inner.note_loss();
            }
            None => {}
        }
    }

    /// Returns how often the kernel skipped the program. Returns `None` if the number cannot be
    /// read, for example because the broker has ended.
    pub(super) fn missed_runs(&self) -> Option<u64> {
        match &self.keeper {
            Keeper::Own(programs) => programs.missed_runs().ok(),
            Keeper::Broker(session) => session.ask(Request::Missed, None),
        }
    }

    /// Returns the programs, if this source has them itself.
    pub(super) fn programs(&self) -> Option<&Programs> {
        match &self.keeper {
            Keeper::Own(programs) => Some(programs),
            Keeper::Broker(_) => None,
        }
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        if let Some(Listener {
            inner,
            nudge,
            thread,
        }) = self.listener.take()
        {
            // ORDER(source-stop): Release, as in the drop of `Kernel`. That drop has already set
            // the flag, unless the `Kernel` could not be made.
            inner.stop.store(true, Ordering::Release);
            crate::wait::wake(nudge.as_fd());
            thread.join();
        }
    }
}

fn create_vm(kvm: &OwnedFd) -> Result<OwnedFd, Error> {
    sys::create_vm(kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))
}
