//! Finds out whether this machine supports the source.

use super::machine::Keeper;
use super::missing::bpf_missing;
use super::program::Audience;
use super::programs::{Programs, may_skip};
use super::sys;
use crate::Error;
use crate::page;
use std::os::fd::AsFd;

/// What [`probe`] found out about this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// Where the source gets its events: `raw_tracepoint kvm_unmap_hva_range`, followed by ` of a
    /// broker` if a broker loads the program.
    pub through: &'static str,
    /// Whether this kernel may skip the program if the processor is already running it (Linux 7.0).
    /// The kernel counts skipped runs, and within a second after one the source invalidates the
    /// whole address space. Until then the source does not know of a change during the skipped run.
    pub may_skip: bool,
}

/// Tells whether the source could start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] for the first requirement that is missing, with the command that provides
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

/// Like [`probe`], but if KVM is missing, also reports what the BPF programs lack.
///
/// # Errors
/// One [`Error::Unavailable`] for each missing requirement, at least one.
pub fn probe_all() -> Result<Features, Vec<Error>> {
    let first = match probe() {
        Ok(features) => return Ok(features),
        Err(error) => error,
    };
    let mut errors = vec![first];
    // `probe` opens `/dev/kvm` first. If that failed, `probe` did not try the programs.
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
