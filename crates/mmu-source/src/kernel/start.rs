//! Starting the source, once for each address space.

use super::drain::Drainer;
use super::filter::{PART, Tables};
use super::program::{self, Maps, header};
use super::ring::Ring;
use super::sys::{self, Map, Shared};
use super::{Inner, Kernel, Machine, kernel_error};
use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{mark, marks, running};
use crate::signals;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;

/// The size of the ring in bytes: 8,192 records of 32 bytes.
const RING: usize = 256 << 10;

impl Kernel {
    /// Starts the source, or returns the one that runs already.
    ///
    /// It opens `/dev/kvm`, makes a virtual machine that is never run, loads a BPF program, and starts a thread that sleeps until there is
    /// something to hand on. Some 9 MiB of kernel memory.
    ///
    /// # Blocking
    /// For some milliseconds at first.
    /// # Errors
    /// [`Error::Unavailable`] if the machine or the rights are lacking, with what is missing and the command that would grant it.
    pub fn start() -> Result<Arc<Self>, Error> {
        running(&marks().kernel, |mark| {
            let kvm = sys::open_kvm().map_err(|error| super::probe::kvm_missing(&error))?;
            Self::make(mark, RING, Some(kvm))
        })
    }

    /// The source without the kernel's events: [`inject`](Self::inject) is all that happens. For tests and measurements.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    #[doc(hidden)]
    pub fn rehearse(ring: usize) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self::make(mark(), ring, None)?))
    }

    /// Runs the BPF program once, as if the kernel were about to change these addresses.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the kernel cannot run such programs by hand (before 5.10).
    #[doc(hidden)]
    pub fn inject(&self, start: u64, end: u64) -> Result<(), Error> {
        sys::run_program(self.inner.program.as_fd(), [start, end])
            .map_err(|error| kernel_error("BPF_PROG_TEST_RUN", error))
    }

    /// The descriptor of the BPF program, for measurements.
    #[doc(hidden)]
    #[must_use]
    pub fn program(&self) -> BorrowedFd<'_> {
        self.inner.program.as_fd()
    }

    fn make(id: u64, ring: usize, kvm: Option<OwnedFd>) -> Result<Self, Error> {
        // The callbacks' address space is there before there is anything to tell.
        current_ref();
        let bpf = |error: io::Error| super::probe::bpf_missing(&error);
        let header_map = sys::create_map(Map::Value { bytes: header::BYTES as u32 }).map_err(bpf)?;
        let part = || sys::create_map(Map::Value { bytes: PART as u32 }).map_err(bpf);
        let (sum, own) = (part()?, part()?);
        let ring = Ring::new(ring).map_err(bpf)?;
        let code =
            program::build(Maps { header: header_map.as_fd(), sum: sum.as_fd(), own: own.as_fd(), ring: ring.map() });
        let program = sys::load_program(&code).map_err(bpf)?;
        let mapped = |error| kernel_error("mmap of a BPF map", error);
        let header = Shared::map(header_map.as_fd(), 0, header::BYTES, true).map_err(mapped)?;
        let part = |map: &OwnedFd| Shared::map(map.as_fd(), 0, PART, true).map_err(mapped);
        let tables = Tables { sum: part(&sum)?, own: part(&own)? };
        let machine = match kvm {
            Some(kvm) => {
                let attached = sys::attach(program.as_fd(), c"kvm_unmap_hva_range")
                    .map_err(|error| super::probe::tracepoint_missing(&error))?;
                let vm = sys::create_vm(kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))?;
                Some(Machine { kvm, _vm: vm, _attached: attached })
            }
            None => None,
        };
        let ring_fd = ring.map().try_clone_to_owned().map_err(|error| kernel_error("dup", error))?;
        let inner = Arc::new(Inner {
            id,
            alive: &marks().alive,
            header,
            tables,
            drainer: Mutex::new(Drainer::new(ring)),
            ring: ring_fd,
            stop: sys::event_fd().map_err(|error| kernel_error("eventfd", error))?,
            handled: AtomicU64::new(0),
            quiet: AtomicU64::new(0),
            machine,
            program,
        });
        let served = Arc::clone(&inner);
        let thread =
            signals::without(|| thread::Builder::new().name("mmu-kernel".to_owned()).spawn(move || served.serve()))
                .map_err(|error| kernel_error("start of a thread", error))?;
        Ok(Self { inner, thread: Some(thread) })
    }
}
