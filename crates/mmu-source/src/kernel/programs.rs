//! The maps and the BPF programs of one source.

use super::filter;
use super::layout::{header, private};
use super::program::{self, Audience, Maps};
use super::resolver::{self, Offsets, Role};
use super::sys::{self, Kind, Map};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The maps that user space maps as well.
#[derive(Debug)]
pub(super) struct SharedMaps {
    pub(super) header: OwnedFd,
    pub(super) sum: OwnedFd,
    pub(super) own: OwnedFd,
    pub(super) ring: OwnedFd,
}

/// The programs, and the map with the words that only the programs see.
#[derive(Debug)]
pub(super) struct Programs {
    private: OwnedFd,
    tracepoint: OwnedFd,
    /// The program that finds a machine's count. `None` until it is loaded, and for ever if this
    /// processor or this kernel does not support it.
    resolver: Option<OwnedFd>,
}

impl SharedMaps {
    fn make(ring: usize) -> io::Result<Self> {
        let value = |bytes: usize| {
            sys::create_map(Map::Value {
                bytes: bytes as u32,
            })
        };
        Ok(Self {
            header: value(header::BYTES)?,
            sum: value(filter::PART)?,
            own: value(filter::PART)?,
            ring: sys::create_map(Map::Ring { bytes: ring as u32 })?,
        })
    }
}

impl Programs {
    /// Makes the maps, with a ring of `ring` bytes, and loads the tracepoint's program for them.
    pub(super) fn make(ring: usize, audience: Audience) -> io::Result<(SharedMaps, Self)> {
        let shared = SharedMaps::make(ring)?;
        let private = sys::create_map(Map::Private {
            bytes: private::BYTES as u32,
        })?;
        let maps = Maps {
            header: shared.header.as_fd(),
            private: private.as_fd(),
            sum: shared.sum.as_fd(),
            own: shared.own.as_fd(),
            ring: shared.ring.as_fd(),
        };
        let tracepoint = load(maps, audience)?;
        Ok((
            shared,
            Self {
                private,
                tracepoint,
                resolver: None,
            },
        ))
    }

    /// Attaches the program to the tracepoint, for as long as the returned descriptor is open.
    pub(super) fn attach(&self) -> io::Result<OwnedFd> {
        sys::attach(self.tracepoint.as_fd(), sys::TRACEPOINT)
    }

    /// Runs the tracepoint's program once, on this thread, with these arguments.
    pub(super) fn inject(&self, start: u64, end: u64) -> io::Result<()> {
        sys::run_program(self.tracepoint.as_fd(), [start, end]).map(drop)
    }

    /// Returns how often the kernel skipped the tracepoint's program.
    pub(super) fn missed_runs(&self) -> io::Result<u64> {
        sys::missed_runs(self.tracepoint.as_fd())
    }

    /// Returns another descriptor of the map that only programs see, for [`load_resolver`].
    pub(super) fn private(&self) -> io::Result<OwnedFd> {
        self.private.try_clone()
    }

    pub(super) fn set_resolver(&mut self, resolver: OwnedFd) {
        self.resolver = Some(resolver);
    }

    /// Makes a machine known to the programs. Returns false if the machine cannot be found in the
    /// kernel, if the descriptor is not a machine, if the machine is of another address space, or
    /// if no resolver is loaded.
    pub(super) fn show(&self, machine: BorrowedFd<'_>, role: Role) -> bool {
        self.resolve(machine.as_raw_fd() as u64, role) == Some(0)
    }

    /// Makes the programs read no machine's count any more. Returns false if they may still read
    /// one.
    pub(super) fn forget_b(&self) -> bool {
        self.resolver.is_none() || self.resolve(resolver::NONE, Role::B).is_some()
    }

    /// Makes the programs forget every machine and address space. Returns false if they may still
    /// know one.
    pub(super) fn forget_all(&self) -> bool {
        self.resolver.is_none() || self.resolve(resolver::NONE, Role::Space).is_some()
    }

    /// Returns the kernel's id of the tracepoint's program.
    pub(super) fn number(&self) -> io::Result<u32> {
        sys::number(self.tracepoint.as_fd())
    }

    fn resolve(&self, descriptor: u64, role: Role) -> Option<u32> {
        sys::run_program(self.resolver.as_ref()?.as_fd(), [descriptor, role as u64]).ok()
    }
}

/// Loads the program. If the kernel refuses this process's own program for another reason than a
/// missing privilege, the reason may be that the program reads kernel memory. Then loads a variant
/// that does not.
fn load(maps: Maps<'_>, audience: Audience) -> io::Result<OwnedFd> {
    let load = |audience| sys::load_program(Kind::RawTracepoint, &program::build(maps, audience));
    load(audience).or_else(|error| match audience {
        Audience::Own { peek: true } if error.kind() != io::ErrorKind::PermissionDenied => {
            load(Audience::Own { peek: false })
        }
        _ => Err(error),
    })
}

/// Loads the program that finds machines.
pub(super) fn load_resolver(private: &OwnedFd, offsets: Offsets) -> io::Result<OwnedFd> {
    sys::load_program(Kind::Syscall, &resolver::build(private.as_fd(), offsets))
}

/// Returns the offsets that the resolver needs, if the resolver is of use on this processor and the
/// kernel's BTF has these offsets.
pub(super) fn offsets() -> Option<Offsets> {
    // `docs/ordering.md` has the argument for these two processors. On others it is not proven that
    // the count goes down only after the stores to the page tables are visible.
    if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        Offsets::of_this_kernel()
    } else {
        None
    }
}

/// Tells whether a kernel of this release can be preempted while it runs a program at a tracepoint.
/// If another task then reaches the tracepoint on the same processor, the kernel skips the program.
/// True also for a release that cannot be parsed.
pub(super) fn may_skip(release: &str) -> bool {
    let major = release
        .split('.')
        .next()
        .and_then(|major| major.parse::<u32>().ok());
    major.is_none_or(|major| major >= 7)
}

/// [`may_skip`] of the kernel that runs.
pub(super) fn this_kernel_may_skip() -> bool {
    may_skip(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_may_skip_the_program_are_known_by_their_release() {
        assert_eq!(
            ["6.18.2-amd64", "7.0.0-rc1", "12.1", "", "x"].map(may_skip),
            [false, true, true, true, true]
        );
    }
}
