//! What the source finds on this machine.

use super::machine::Keeper;
use super::missing::bpf_missing;
use super::program::Audience;
use super::programs::{Programs, may_skip};
use super::sys;
use crate::Error;
use crate::page;
use std::os::fd::AsFd;

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// How the source hears: `raw_tracepoint kvm_unmap_hva_range`.
    pub through: &'static str,
    /// Whether this kernel may skip the program, if the processor is in the middle of it (Linux
    /// 7.0). What was skipped is counted, and everything invalidated, within a second: until then a
    /// change of that time is not known.
    pub may_skip: bool,
}

/// Tells whether the source would start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] with the first thing that is missing, and the command that would grant
/// it.
pub fn probe() -> Result<Features, Error> {
    let through = match super::start::outfit(page::size() as usize, true)?.1 {
        Keeper::Own(_) => "raw_tracepoint kvm_unmap_hva_range",
        Keeper::Broker(_) => "raw_tracepoint kvm_unmap_hva_range of a broker",
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let may_skip = may_skip(&release);
    Ok(Features {
        release: release.trim().to_owned(),
        through,
        may_skip,
    })
}

/// As [`probe`], with everything that is missing.
///
/// # Errors
/// One [`Error::Unavailable`] for each thing, at least one.
pub fn probe_all() -> Result<Features, Vec<Error>> {
    let first = match probe() {
        Ok(features) => return Ok(features),
        Err(error) => error,
    };
    let mut errors = vec![first];
    // The virtual machine is asked for first: without one, the rest was not looked at.
    if sys::open_kvm()
        .and_then(|kvm| sys::create_vm(kvm.as_fd()))
        .is_err()
    {
        errors.extend(
            Programs::make(page::size() as usize, Audience::Own { peek: true })
                .err()
                .map(|error| bpf_missing(&error)),
        );
    }
    Err(errors)
}
