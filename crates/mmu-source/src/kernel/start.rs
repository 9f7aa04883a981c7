//! Starting the source, once for each address space.

use super::filter::{PART, Tables};
use super::intake::Intake;
use super::machine::Machines;
use super::program::header;
use super::programs::{Programs, SharedMaps};
use super::ring::Ring;
use super::sys::{self, ProgressPage, Shared};
use super::wait::Waits;
use super::{Inner, Kernel, kernel_error};
use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{mark, marks, running};
use crate::vault::Vault;
use srcu::Thread;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;

/// The size of the ring in bytes: 8,192 records of 32 bytes.
const RING: usize = 256 << 10;
/// The generation before the first event. Not zero: see [`sys::Progress`].
const FIRST: u64 = 1;

impl Kernel {
    /// Starts the source, or returns the one that runs already.
    ///
    /// It opens `/dev/kvm`, makes a virtual machine that is never run, loads BPF programs, and starts three threads that
    /// sleep until there is something to do. Some 9 MiB of kernel memory. None of its descriptors is in the program's table.
    ///
    /// # Blocking
    /// For some milliseconds at first.
    /// # Errors
    /// [`Error::Unavailable`] if the machine or the rights are lacking, with what is missing and the command that would grant it.
    pub fn start() -> Result<Arc<Self>, Error> {
        running(&marks().kernel, |mark| Self::make(mark, RING, true))
    }

    /// The source without the kernel's events: [`inject`](Self::inject) is all that happens. For tests and measurements.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    #[doc(hidden)]
    pub fn rehearse(ring: usize) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self::make(mark(), ring, false)?))
    }

    /// Runs the BPF program once, as if the kernel were about to change these addresses.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the kernel cannot run such programs by hand (before 5.10).
    #[doc(hidden)]
    pub fn inject(&self, start: u64, end: u64) -> Result<(), Error> {
        self.rehearsal(move |inject| inject(start, end))
    }

    /// Runs `f` where the BPF program can be run by hand, with a function that does.
    ///
    /// # Errors
    /// As [`inject`](Self::inject).
    #[doc(hidden)]
    pub fn rehearsal<R: Send + 'static>(
        &self,
        f: impl FnOnce(&dyn Fn(u64, u64) -> Result<(), Error>) -> R + Send + 'static,
    ) -> R {
        self.vault().run(|machines| {
            f(&|start, end| {
                let injected = machines.programs.inject(start, end);
                injected.map_err(|error| kernel_error("BPF_PROG_TEST_RUN", error))
            })
        })
    }

    fn make(id: u64, ring: usize, with_kvm: bool) -> Result<Self, Error> {
        // The callbacks' address space is there before there is anything to tell.
        current_ref();
        let (tell, told) = mpsc::channel();
        let vault = Vault::open(c"mmu-vault", kernel_error, move |letterbox| {
            let open_kvm = || sys::open_kvm().map_err(|error| super::probe::kvm_missing(&error));
            let kvm: Option<OwnedFd> = with_kvm.then(open_kvm).transpose()?;
            let (maps, programs) = Programs::make(ring).map_err(|error| super::probe::bpf_missing(&error))?;
            let inner = Arc::new(Inner::map(id, &maps, ring)?);
            let mut machines = Machines::new(programs, kvm, letterbox.clone())?;
            machines.listen(&inner, maps.ring)?;
            let _ = tell.send(inner);
            Ok(machines)
        })?;
        let inner = told.recv().expect("the vault has made it");
        let teller = Arc::clone(&inner);
        let tell = move || {
            let _ = teller.teller.set(thread::current());
            teller.tell();
        };
        Thread::spawn(c"mmu-kernel", tell).map_err(|error| kernel_error("start of a thread", error))?.detach();
        inner.teller.wait();
        Ok(Self { inner, vault: Some(vault) })
    }
}

impl Inner {
    fn map(id: u64, maps: &SharedMaps, ring: usize) -> Result<Self, Error> {
        let mapped = |error| kernel_error("mmap", error);
        let header = Shared::map(maps.header.as_fd(), 0, header::BYTES, true).map_err(mapped)?;
        header.u64(header::GENERATION).store(FIRST, Ordering::Relaxed);
        let part = |map: &OwnedFd| Shared::map(map.as_fd(), 0, PART, true).map_err(mapped);
        let tables = Tables { sum: part(&maps.sum)?, own: part(&maps.own)? };
        let ring = Ring::new(maps.ring.as_fd(), ring).map_err(mapped)?;
        let waits = Waits::new(&header).map_err(mapped)?;
        Ok(Self {
            id,
            alive: &marks().alive,
            header,
            tables,
            progress: ProgressPage::map(FIRST).map_err(mapped)?,
            intake: Mutex::new(Intake::new(ring, FIRST)),
            handing: Mutex::new(()),
            waits,
            stop: AtomicBool::new(false),
            teller: OnceLock::new(),
            missed: AtomicU64::new(0),
        })
    }
}
