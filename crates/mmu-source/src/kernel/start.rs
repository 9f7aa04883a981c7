//! Starts the source, once for each address space.

use super::broker;
use super::filter::{PART, Tables};
use super::intake::Intake;
use super::layout::{RING, header};
use super::listen;
use super::machine::{Keeper, Live, Machines};
use super::missing;
use super::program::Audience;
use super::programs::{Programs, SharedMaps};
use super::ring::Ring;
use super::sys::{self, ProgressPage, Scratch, Shared};
use super::wait::Waits;
use super::{Inner, Kernel, kernel_error};
use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{mark, marks, running, try_marks};
use crate::queue::Queue;
use crate::vault::Vault;
use srcu::Thread;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

/// The generation before the first event, which must not be zero: see [`sys::Progress`].
const FIRST: u64 = 1;

impl Kernel {
    /// Starts the source, or returns it if it is already running.
    ///
    /// The source opens `/dev/kvm`, makes a virtual machine that is never run, loads BPF programs,
    /// and starts three threads that sleep until there is work. Without the privileges for this, it
    /// gets the device and the programs from a broker. The source uses some 5 MiB of kernel memory.
    /// None of its descriptors is in the program's table.
    ///
    /// # Blocking
    /// The first call takes some milliseconds.
    /// # Errors
    /// [`Error::Unavailable`] if the machine, the privileges or the limit of descriptors do not
    /// suffice. The error names the missing requirement, and a command that provides it.
    /// [`Error::Kernel`] if a thread cannot be started or memory cannot be mapped.
    pub fn start() -> Result<Arc<Self>, Error> {
        running(&try_marks()?.kernel, |mark| Self::make(mark, RING, true))
            .map_err(missing::of_exhaustion)
    }

    /// Starts a source that gets no events from the kernel, only those of [`inject`](Self::inject).
    /// For tests and measurements.
    ///
    /// # Errors
    /// The errors of [`start`](Self::start).
    #[doc(hidden)]
    pub fn rehearse(ring: usize) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self::make(mark(), ring, false)?))
    }

    /// Runs the BPF program once, as if the kernel were about to change these addresses.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the kernel cannot run such programs on request (before 5.10), or if a
    /// broker has loaded the program.
    #[doc(hidden)]
    pub fn inject(&self, start: u64, end: u64) -> Result<(), Error> {
        self.rehearsal(move |inject| inject(start, end))
    }

    /// Runs `f` on a thread that can run the BPF program on request. Passes `f` a function that
    /// runs the program.
    ///
    /// # Errors
    /// The function that `f` gets returns the errors of [`inject`](Self::inject).
    #[doc(hidden)]
    pub fn rehearsal<R: Send + 'static>(
        &self,
        f: impl FnOnce(&dyn Fn(u64, u64) -> Result<(), Error>) -> R + Send + 'static,
    ) -> R {
        self.vault().run(|machines| {
            f(&|start, end| {
                // The client of a broker has no access to its program.
                let programs = machines.programs().ok_or(io::ErrorKind::PermissionDenied);
                let injected = programs
                    .map_err(io::Error::from)
                    .and_then(|programs| programs.inject(start, end));
                injected.map_err(|error| kernel_error("BPF_PROG_TEST_RUN", error))
            })
        })
    }

    fn make(id: u64, ring: usize, with_kvm: bool) -> Result<Self, Error> {
        // Make the callbacks' address space before there can be an event.
        current_ref();
        let made = Arc::new(OnceLock::new());
        let told = Arc::clone(&made);
        let vault = Vault::open(c"mmu-vault", kernel_error, move |letterbox| {
            let (maps, keeper, live) = outfit(ring, with_kvm)?;
            let is_brokered = matches!(keeper, Keeper::Broker(_));
            let inner = Arc::new(Inner::map(id, &maps, ring)?);
            if is_brokered && !inner.hears()? {
                let lack = missing::unavailable(
                    "the right to load BPF programs".to_owned(),
                    missing::BROKER,
                );
                return Err(broker_refuses(lack, "its program does not tell of changes"));
            }
            let mut machines = Machines::new(keeper, live, letterbox.clone());
            listen::start(&mut machines, &inner, maps.ring)?;
            let _ = told.set(inner);
            Ok(machines)
        })?;
        let inner = Arc::clone(made.get().expect("the vault has made it"));
        let teller = Arc::clone(&inner);
        let started = Queue::new();
        let start = Arc::clone(&started);
        let tell = move || {
            let _ = teller.teller.set(thread::current());
            started.push(());
            teller.tell();
        };
        Thread::spawn(c"mmu-kernel", tell)
            .map_err(|error| kernel_error("start of a thread", error))?
            .detach();
        start.pop();
        Ok(Self {
            inner,
            vault: Some(vault),
        })
    }
}

/// The parts of a source.
type Outfit = (SharedMaps, Keeper, Option<Live>);

/// Makes the parts of a source. If that fails and `with_kvm` is set, asks a broker for them.
pub(super) fn outfit(ring: usize, with_kvm: bool) -> Result<Outfit, Error> {
    own_outfit(ring, with_kvm).or_else(|lack| match with_kvm.then(broker::join).flatten() {
        Some(Ok(joined)) => {
            let live = Live::new(joined.kvm, joined.a, joined.link);
            Ok((joined.maps, Keeper::Broker(joined.session), Some(live)))
        }
        Some(Err(why)) => Err(broker_refuses(lack, &why)),
        None => Err(lack),
    })
}

/// Returns the error for a process that lacks a privilege and gets no help from a broker.
fn broker_refuses(lack: Error, why: &str) -> Error {
    let path = broker::path();
    match lack {
        Error::Unavailable {
            source,
            missing,
            remedy,
            instead,
        } => Error::Unavailable {
            source,
            missing: format!(
                "{missing}; the broker at {} cannot help: {why}",
                path.display()
            ),
            remedy: match &instead {
                _ if why.contains("--max-clients") => {
                    "sudo mmun broker with a larger --max-clients".to_owned()
                }
                // A second broker cannot listen where the first one does.
                Some(instead) if !why.starts_with(broker::NONE) => instead.clone(),
                _ => remedy,
            },
            instead,
        },
        other => other,
    }
}

fn own_outfit(ring: usize, with_kvm: bool) -> Result<Outfit, Error> {
    let open_kvm = || sys::open_kvm().map_err(|error| missing::kvm_missing(&error));
    let kvm: Option<OwnedFd> = with_kvm.then(open_kvm).transpose()?;
    let audience = Audience::Own { peek: true };
    let (maps, programs) =
        Programs::make(ring, audience).map_err(|error| missing::bpf_missing(&error))?;
    let make_live = |kvm: OwnedFd| {
        let attached = programs
            .attach()
            .map_err(|error| missing::tracepoint_missing(&error))?;
        let a = sys::create_vm(kvm.as_fd()).map_err(|error| missing::kvm_missing(&error))?;
        Ok::<_, Error>(Live::new(kvm, a, attached))
    };
    let live = kvm.map(make_live).transpose()?;
    Ok((maps, Keeper::Own(programs), live))
}

impl Inner {
    /// Makes a change while everything is armed, and tells whether the program has counted it.
    fn hears(&self) -> Result<bool, Error> {
        let page = Scratch::map().map_err(|error| kernel_error("mmap", error))?;
        let before = self.generation();
        let words = [header::ARMED, header::WIDE].map(|word| self.header.u64(word));
        words
            .iter()
            .for_each(|word| word.store(1, Ordering::Relaxed));
        self.header.u64(header::ON).store(1, Ordering::Relaxed);
        sys::ask(&page);
        words
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(self.generation() != before)
    }

    fn map(id: u64, maps: &SharedMaps, ring: usize) -> Result<Self, Error> {
        let mapped = |error| kernel_error("mmap", error);
        let header = Shared::map(maps.header.as_fd(), 0, header::BYTES, true).map_err(mapped)?;
        header
            .u64(header::GENERATION)
            .store(FIRST, Ordering::Relaxed);
        let part = |map: &OwnedFd| Shared::map(map.as_fd(), 0, PART, true).map_err(mapped);
        let tables = Tables {
            sum: part(&maps.sum)?,
            own: part(&maps.own)?,
        };
        let ring = Ring::new(maps.ring.as_fd(), ring).map_err(mapped)?;
        let waits = Waits::new(id, &header).map_err(mapped)?;
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
            has_begun: AtomicBool::new(false),
        })
    }
}
