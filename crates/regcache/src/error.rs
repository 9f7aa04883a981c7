//! The reasons why a caller gets no lease.

use mmu_notifier::{GetError, VaRange};
use std::{fmt, io};

/// Why there is no lease, or no cache. `E` is the registrar's own error.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error<E> {
    /// The range is not mapped, or only in part.
    NotMapped {
        /// The requested range.
        range: VaRange,
        /// The registrar's error.
        source: E,
    },
    /// The registrar cannot register more, and the cache has evicted the regions that it could
    /// evict.
    LimitReached {
        /// The requested range.
        range: VaRange,
        /// The number of regions that were evicted to make room.
        evicted: u64,
        /// The registrar's last error.
        source: E,
    },
    /// The registrar failed for another reason.
    Registrar {
        /// The range that the cache tried to register.
        range: VaRange,
        /// The registrar's error.
        source: E,
    },
    /// The cache has reached a limit of its [`Options`](crate::Options), and every registered
    /// region is leased.
    Full {
        /// The requested range.
        range: VaRange,
        /// The number of registered regions.
        regions: u32,
        /// The number of registered bytes.
        bytes: u64,
    },
    /// The range is larger than [`Options::max_bytes`](crate::Options::max_bytes).
    TooLarge {
        /// The requested range.
        range: VaRange,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The address space has exited.
    Exited,
    /// This process is the child of a fork, and the cache or the device belongs to the parent. The
    /// child must make its own device and open a cache for its own address space.
    Forked,
    /// The request would wait for its own thread, which is already working on the cache. The
    /// request comes from a signal handler that has interrupted that work, or from the registrar or
    /// a callback in the middle of that work. The request needs the result of that work, or a
    /// larger table while the work may be allocating one. Try again after the work has ended.
    WouldDeadlock,
    /// The kernel source cannot report which memory has changed.
    #[cfg(feature = "kernel")]
    Source {
        /// The error of the source.
        source: mmu_source::Error,
    },
    /// The cache could not be opened.
    Open {
        /// The error of the core or of the kernel.
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

/// An error inside the slow path: a tag and one word, which compilers keep in registers. Only
/// errors of the registrar or of the kernel source are boxed. All other refusals must not allocate,
/// because the caller may be a signal handler or a callback that has interrupted the allocator.
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
