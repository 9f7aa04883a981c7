//! The errors of a device and of its registrar.

use std::{fmt, io};

/// Why memory could not be registered.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// `ibv_reg_mr` failed.
    Register {
        /// The error of `ibv_reg_mr`.
        source: io::Error,
    },
    /// The device's capabilities could not be read.
    Query {
        /// The error of `ibv_query_device_ex`.
        source: io::Error,
    },
    /// The access flags have remote writes or atomics without local writes.
    Access,
    /// The access flags have on-demand paging, and the device does not.
    OnDemand,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Register { source } => match source.raw_os_error() {
                Some(12) => "ibv_reg_mr: no memory; the limit of locked memory may be reached ('ulimit -l' shows it)",
                Some(14) => "ibv_reg_mr: not all of the range is mapped, or not for writing",
                _ => "ibv_reg_mr failed",
            },
            Self::Query { .. } => "ibv_query_device_ex failed",
            Self::Access => "remote writes and atomics need Access::LocalWrite too",
            Self::OnDemand => "the device has no on-demand paging; 'ibv_devinfo -v' shows what it has",
        })
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Register { source } | Self::Query { source } => Some(source),
            Self::Access | Self::OnDemand => None,
        }
    }
}
