//! What the vault holds: descriptors, virtual machines that are never run, and the thread that
//! listens to the ring.

use super::program::{self, Maps, header, private};
use super::resolver::{self, Offsets};
use super::sys::{self, Kind, Map};
use super::{Inner, filter, kernel_error};
use crate::Error;
use crate::vault::Letterbox;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// The descriptors of one source.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) header: OwnedFd,
    pub(super) private: OwnedFd,
    pub(super) sum: OwnedFd,
    pub(super) own: OwnedFd,
    pub(super) ring: OwnedFd,
    pub(super) program: OwnedFd,
}

impl Parts {
    /// Makes maps and loads the program over them.
    pub(super) fn make(ring: usize) -> io::Result<Self> {
        let value = |bytes: usize| sys::create_map(Map::Value { bytes: bytes as u32 });
        let header = value(header::BYTES)?;
        let (sum, own) = (value(filter::PART)?, value(filter::PART)?);
        let private = sys::create_map(Map::Private { bytes: private::BYTES as u32 })?;
        let ring = sys::create_map(Map::Ring { bytes: ring as u32 })?;
        let maps = Maps {
            header: header.as_fd(),
            private: private.as_fd(),
            sum: sum.as_fd(),
            own: own.as_fd(),
            ring: ring.as_fd(),
        };
        let program = load(maps)?;
        Ok(Self { header, private, sum, own, ring, program })
    }
}

/// Loads the program, without the right to read kernel memory if the kernel refuses that alone.
fn load(maps: Maps<'_>) -> io::Result<OwnedFd> {
    let load = |peek| sys::load_program(Kind::RawTracepoint, &program::build(maps, peek));
    load(true).or_else(|error| if error.kind() == io::ErrorKind::PermissionDenied { Err(error) } else { load(false) })
}

/// The virtual machines: see `wait.rs`. Dropping it closes everything.
#[derive(Debug)]
pub(super) struct Machines {
    listener: Option<Listener>,
    pub(super) parts: Parts,
    /// Finds a machine's count. It is loaded by the listener, after the start.
    resolver: Option<OwnedFd>,
    live: Option<Live>,
    later: Letterbox<Self>,
}

/// What makes the kernel tell. None in a rehearsal.
#[derive(Debug)]
struct Live {
    kvm: OwnedFd,
    b: Option<OwnedFd>,
    _a: OwnedFd,
    _attached: OwnedFd,
}

#[derive(Debug)]
struct Listener {
    stop: OwnedFd,
    thread: JoinHandle<()>,
}

impl Machines {
    /// Attaches the program and makes machine A, if there is `/dev/kvm`.
    pub(super) fn new(parts: Parts, kvm: Option<OwnedFd>, later: Letterbox<Self>) -> Result<Self, Error> {
        let live = match kvm {
            Some(kvm) => {
                let attached = sys::attach(parts.program.as_fd(), c"kvm_unmap_hva_range")
                    .map_err(|error| super::probe::tracepoint_missing(&error))?;
                let a = create_vm(&kvm)?;
                Some(Live { kvm, b: None, _a: a, _attached: attached })
            }
            None => None,
        };
        Ok(Self { listener: None, parts, resolver: None, live, later })
    }

    /// Starts the thread that listens, in this thread's descriptor table.
    pub(super) fn listen(&mut self, inner: &Arc<Inner>) -> Result<(), Error> {
        let (stop, ring) = (sys::event_fd(), self.parts.ring.try_clone());
        let stop = stop.map_err(|error| kernel_error("eventfd", error))?;
        let ring = ring.map_err(|error| kernel_error("dup", error))?;
        let stopped = stop.try_clone().map_err(|error| kernel_error("dup", error))?;
        let (inner, vault) = (Arc::clone(inner), self.later.clone());
        let private = self.live.is_some().then(|| self.parts.private.try_clone()).transpose();
        let private = private.map_err(|error| kernel_error("dup", error))?;
        let thread = std::thread::Builder::new()
            .name("mmu-listen".to_owned())
            .spawn(move || super::listen::listen(&inner, &ring, &stopped, private, &vault))
            .map_err(|error| kernel_error("start of a thread", error))?;
        self.listener = Some(Listener { stop, thread });
        Ok(())
    }

    pub(super) fn set_resolver(&mut self, resolver: OwnedFd) {
        self.resolver = Some(resolver);
    }

    /// Makes a machine, which proves that no change is under way, and has it take B's place if its
    /// count can be found.
    pub(super) fn renew_b(&mut self) -> Result<bool, Error> {
        let Some(live) = &mut self.live else { return Ok(false) };
        let made = create_vm(&live.kvm)?;
        let is_found = |resolver: &OwnedFd| {
            sys::run_program(resolver.as_fd(), [made.as_raw_fd() as u64, 0]).is_ok_and(|refused| refused == 0)
        };
        if self.resolver.as_ref().is_some_and(is_found) {
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
        let (Some(resolver), Some(live)) = (&self.resolver, &mut self.live) else { return };
        // If even this fails the program goes on reading B's count, so B has to stay.
        if live.b.is_some() && sys::run_program(resolver.as_fd(), [resolver::NONE, 0]).is_ok() {
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
        sys::missed_runs(self.parts.program.as_fd()).unwrap_or(0)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        if let Some(Listener { stop, thread }) = self.listener.take() {
            sys::wake(stop.as_fd());
            let _ = thread.join();
        }
    }
}

fn create_vm(kvm: &OwnedFd) -> Result<OwnedFd, Error> {
    sys::create_vm(kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))
}

/// Loads the program that finds counts, where that is of use.
pub(super) fn load_resolver(private: &OwnedFd) -> Option<OwnedFd> {
    // Elsewhere it is not shown that the count goes down after the stores to the page tables are
    // seen.
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let code = resolver::build(private.as_fd(), Offsets::of_this_kernel()?);
    sys::load_program(Kind::Syscall, &code).ok()
}
