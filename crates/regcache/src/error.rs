//! Why there is no lease.

use mmu_notifier::{GetError, VaRange};
use std::{fmt, io};

/// Why there is no lease, or no cache. `E` is the registrar's own error.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error<E> {
    /// The range is not mapped, or not all of it.
    NotMapped {
        /// What was asked for.
        range: VaRange,
        /// What the registrar said.
        source: E,
    },
    /// The registrar cannot register more, also after something was evicted.
    LimitReached {
        /// What was asked for.
        range: VaRange,
        /// How many regions were evicted to make room.
        evicted: u64,
        /// What the registrar said the second time.
        source: E,
    },
    /// The registrar failed for another reason.
    Registrar {
        /// What was to be registered.
        range: VaRange,
        /// What the registrar said.
        source: E,
    },
    /// The cache's own limits are reached, and all that is registered is leased.
    Full {
        /// What was asked for.
        range: VaRange,
        /// Regions that are registered.
        regions: u32,
        /// Bytes that are registered.
        bytes: u64,
    },
    /// The range is larger than the limit of the cache.
    TooLarge {
        /// What was asked for.
        range: VaRange,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The address space has ended.
    Exited,
    /// This process is the child of a fork and the cache or the device is its parent's. Make a
    /// device here, and open a cache of it for the child's own address space.
    Forked,
    /// The call would wait for its own thread: it comes from a signal handler that interrupted this
    /// thread's work on the cache, or from the registrar or a callback in the middle of that work.
    /// It needs what that work is at, or a larger table, which may be what is being allocated. Try
    /// again after that has returned.
    WouldDeadlock,
    /// The source of changes cannot say what has changed.
    #[cfg(feature = "kernel")]
    Source {
        /// What the source says.
        source: mmu_source::Error,
    },
    /// The cache could not be opened.
    Open {
        /// What the core or the kernel said.
        source: GetError<io::Error>,
    },
}

impl<E> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMapped { range, .. } => write!(f, "register {range}: not all of it is mapped"),
            Self::LimitReached { range, evicted, .. } => {
                write!(
                    f,
                    "register {range}: the limit is reached, also after {evicted} regions were evicted (RLIMIT_MEMLOCK?)"
                )
            }
            Self::Registrar { range, .. } => write!(f, "register {range}: the registrar failed"),
            Self::Full { range, regions, bytes } => {
                write!(f, "register {range}: the cache is full, with {regions} regions of {bytes} bytes in use")
            }
            Self::TooLarge { range, limit } => {
                write!(f, "register {range}: larger than the cache's limit of {limit} bytes")
            }
            Self::Exited => f.write_str("the address space has ended"),
            Self::Forked => f.write_str("the cache was inherited over a fork: open one for this process"),
            Self::WouldDeadlock => f.write_str(
                "wait for this thread's own work on the cache: try again when the signal handler or registrar has returned",
            ),
            #[cfg(feature = "kernel")]
            Self::Source { .. } => f.write_str("the source cannot say what has changed"),
            Self::Open { .. } => f.write_str("open a registration cache"),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for Error<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotMapped { source, .. }
            | Self::LimitReached { source, .. }
            | Self::Registrar { source, .. } => Some(source),
            #[cfg(feature = "kernel")]
            Self::Source { source } => Some(source),
            Self::Open { source } => Some(source),
            Self::Full { .. }
            | Self::TooLarge { .. }
            | Self::Exited
            | Self::Forked
            | Self::WouldDeadlock => None,
        }
    }
}

/// An error on its way through the slow path: a number and a word, which compilers keep in
/// registers. Only what the registrar or the kernel has said is in a box: all other refusals may be
/// met in a signal handler or a callback that has interrupted the allocator.
#[derive(Debug)]
pub(crate) enum Refusal<E> {
    WouldDeadlock,
    #[cfg(feature = "kernel")]
    InCallback,
    Forked,
    Exited,
    TooLarge,
    Full,
    Other(Box<Error<E>>),
}

impl<E> From<Error<E>> for Refusal<E> {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::WouldDeadlock => Self::WouldDeadlock,
            #[cfg(feature = "kernel")]
            Error::Source {
                source: mmu_source::Error::InCallback { .. },
            } => Self::InCallback,
            Error::Forked => Self::Forked,
            Error::Exited => Self::Exited,
            error => Self::Other(Box::new(error)),
        }
    }
}
