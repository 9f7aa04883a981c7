//! What the vault holds: descriptors, virtual machines that are never run, and the thread that
//! listens to the ring.

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

/// The virtual machines: see `wait.rs`. Dropping it closes everything.
pub(super) struct Machines {
    listener: Option<Listener>,
    keeper: Keeper,
    live: Option<Live>,
    later: Letterbox<Self>,
    /// When a loss was told because the number of skipped runs could not be known.
    unknown: Option<Instant>,
}

/// How often a loss is told while the number of skipped runs cannot be known: as often as an idle
/// source asks for that number.
const UNKNOWN: Duration = Duration::from_secs(1);

/// The owner of the programs: this process, or a broker.
#[derive(Debug)]
pub(super) enum Keeper {
    Own(Programs),
    Broker(Session),
}

/// What makes the kernel tell. None in a rehearsal.
#[derive(Debug)]
pub(super) struct Live {
    kvm: OwnedFd,
    b: Option<OwnedFd>,
    a: OwnedFd,
    _attached: OwnedFd,
}

struct Listener {
    inner: Arc<Inner>,
    /// Wakes it: there is a machine B, or it is to stop.
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
    /// Has the program read this machine's count: whether it does, if that is known.
    fn show_b(&self, machine: BorrowedFd<'_>) -> Option<bool> {
        match self {
            Self::Own(programs) => Some(programs.show(machine, Role::B)),
            // A broker that has ended cannot be asked.
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
            unknown: None,
        }
    }

    /// Takes charge of the thread that listens: it is told of machine B, and ends before the
    /// machines do.
    pub(super) fn set_listener(&mut self, inner: Arc<Inner>, nudge: OwnedFd, thread: Thread) {
        self.listener = Some(Listener {
            inner,
            nudge,
            thread,
        });
    }

    /// The words that only programs see, of a source that has the programs itself and is live.
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
            programs.show(live.a.as_fd(), Role::Space);
        }
    }

    /// Makes a machine, which proves that no change is under way, and has it take B's place if its
    /// count can be found.
    pub(super) fn renew_b(&mut self) -> Result<(), Error> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        let made = create_vm(&live.kvm)?;
        match self.keeper.show_b(made.as_fd()) {
            Some(true) => {
                let before = live.b.replace(made);
                self.tell_b();
                // Closing takes up to some milliseconds: after the answer.
                self.later.post(move |_| drop(before));
            }
            Some(false) => {
                self.later.post(move |_| drop(made));
                self.forget_b();
            }
            // A broker that is late, or has ended: its program may read this count or soon will. So
            // the machine stays for as long as the vault.
            None => std::mem::forget(made),
        }
        Ok(())
    }

    /// Tells the waiting threads and the listener whether there is a machine B.
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

    /// Closes B, after the program has forgotten it.
    fn forget_b(&mut self) {
        let Some(live) = &mut self.live else { return };
        // If even this fails, the program still reads B's count, so B has to stay.
        if live.b.is_some() && self.keeper.forget_b() {
            let b = live.b.take();
            self.tell_b();
            self.later.post(move |_| drop(b));
        }
    }

    /// Closes B if no wait has begun since `begun` waits had.
    pub(super) fn close_idle_b(&mut self, inner: &Inner, begun: u64) {
        inner.waits.change_b(|| {
            if inner.waits.begun() == begun {
                self.forget_b();
            }
        });
    }

    /// Makes B if there is none, unasked.
    pub(super) fn make_b(&mut self, inner: &Inner) {
        inner.waits.change_b(|| {
            if !self.has_b() {
                // Without it there are needless records, no more.
                let _ = self.renew_b();
            }
        });
    }

    fn has_b(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.b.is_some())
    }

    /// Has a loss told if the program was not run when it should have been, or if that cannot be
    /// known: then once in [`UNKNOWN`].
    pub(super) fn look_for_missed_runs(&mut self, inner: &Inner) {
        match self.missed_runs() {
            Some(missed) => inner.note_missed(missed),
            None if self.unknown.is_none_or(|told| told.elapsed() >= UNKNOWN) => {
                self.unknown = Some(Instant::now());
                inner.note_loss();
            }
            None => {}
        }
    }

    /// How often the program was not run when it should have been; `None` if the broker that knows
    /// it is gone.
    pub(super) fn missed_runs(&self) -> Option<u64> {
        match &self.keeper {
            Keeper::Own(programs) => programs.missed_runs().ok(),
            Keeper::Broker(session) => session.ask(Request::Missed, None),
        }
    }

    /// The programs, of a source that has them itself.
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
            // ORDER(source-stop): Release, as in the drop of `Kernel`, which has done it already
            // unless that could not be made.
            inner.stop.store(true, Ordering::Release);
            crate::wait::wake(nudge.as_fd());
            thread.join();
        }
    }
}

fn create_vm(kvm: &OwnedFd) -> Result<OwnedFd, Error> {
    sys::create_vm(kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))
}
