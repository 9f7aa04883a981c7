//! What the vault holds: descriptors, virtual machines that are never run, and the thread that
//! listens to the ring.

use super::programs::{Programs, Role};
use super::sys;
use super::{Inner, kernel_error};
use crate::Error;
use crate::vault::Letterbox;
use srcu::Thread;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The virtual machines: see `wait.rs`. Dropping it closes everything.
#[derive(Debug)]
pub(super) struct Machines {
    listener: Option<Listener>,
    pub(super) programs: Programs,
    live: Option<Live>,
    later: Letterbox<Self>,
}

/// What makes the kernel tell. None in a rehearsal.
#[derive(Debug)]
struct Live {
    kvm: OwnedFd,
    b: Option<OwnedFd>,
    a: OwnedFd,
    _attached: OwnedFd,
}

#[derive(Debug)]
struct Listener {
    stop: OwnedFd,
    thread: Thread,
}

impl Machines {
    /// Attaches the program and makes machine A, if there is `/dev/kvm`.
    pub(super) fn new(programs: Programs, kvm: Option<OwnedFd>, later: Letterbox<Self>) -> Result<Self, Error> {
        let live = match kvm {
            Some(kvm) => {
                let attached = programs.attach().map_err(|error| super::probe::tracepoint_missing(&error))?;
                let a = create_vm(&kvm)?;
                Some(Live { kvm, b: None, a, _attached: attached })
            }
            None => None,
        };
        Ok(Self { listener: None, programs, live, later })
    }

    /// Starts the thread that listens, in this thread's descriptor table.
    pub(super) fn listen(&mut self, inner: &Arc<Inner>, ring: OwnedFd) -> Result<(), Error> {
        let stop = crate::wait::event_fd().map_err(|error| kernel_error("eventfd", error))?;
        let stopped = stop.try_clone().map_err(|error| kernel_error("dup", error))?;
        let (inner, vault) = (Arc::clone(inner), self.later.clone());
        let private = self.live.is_some().then(|| self.programs.private()).transpose();
        let private = private.map_err(|error| kernel_error("dup", error))?;
        let listen = move || super::listen::listen(&inner, &ring, &stopped, private, &vault);
        let thread = Thread::spawn(c"mmu-listen", listen).map_err(|error| kernel_error("start of a thread", error))?;
        self.listener = Some(Listener { stop, thread });
        Ok(())
    }

    pub(super) fn set_resolver(&mut self, resolver: OwnedFd) {
        self.programs.set_resolver(resolver);
        if let Some(live) = &self.live {
            self.programs.show(live.a.as_fd(), Role::Space);
        }
    }

    /// Makes a machine, which proves that no change is under way, and has it take B's place if its
    /// count can be found.
    pub(super) fn renew_b(&mut self) -> Result<bool, Error> {
        let Some(live) = &mut self.live else { return Ok(false) };
        let made = create_vm(&live.kvm)?;
        if self.programs.show(made.as_fd(), Role::B) {
            let before = live.b.replace(made);
            // Closing takes up to some milliseconds: after the answer.
            self.later.post(move |_| drop(before));
            return Ok(true);
        }
        self.later.post(move |_| drop(made));
        self.forget_b();
        Ok(self.has_b())
    }

    /// Closes B, after the program has forgotten it.
    fn forget_b(&mut self) {
        let Some(live) = &mut self.live else { return };
        // If even this fails the program goes on reading B's count, so B has to stay.
        if live.b.is_some() && self.programs.forget_b() {
            let b = live.b.take();
            self.later.post(move |_| drop(b));
        }
    }

    /// Closes B if nobody has waited since there were so many waits.
    pub(super) fn close_idle_b(&mut self, inner: &Inner, begun: u64) {
        inner.waits.change_b(|| {
            if inner.waits.begun() == begun {
                self.forget_b();
            }
            self.has_b()
        });
    }

    /// Makes B if there is none, unasked.
    pub(super) fn make_b(&mut self, inner: &Inner) {
        inner.waits.change_b(|| self.has_b() || self.renew_b().unwrap_or(false));
    }

    fn has_b(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.b.is_some())
    }

    /// How often the program was not run when it should have been.
    pub(super) fn missed_runs(&self) -> u64 {
        self.programs.missed_runs()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        if let Some(Listener { stop, thread }) = self.listener.take() {
            crate::wait::wake(stop.as_fd());
            thread.join();
        }
    }
}

fn create_vm(kvm: &OwnedFd) -> Result<OwnedFd, Error> {
    sys::create_vm(kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))
}
