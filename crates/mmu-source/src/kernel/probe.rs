//! What the source finds on this machine, and how it says what is missing.

use super::programs::Programs;
use super::sys;
use crate::Error;
use std::io;
use std::os::fd::AsFd;

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// How the source hears: `raw_tracepoint kvm_unmap_hva_range`.
    pub through: &'static str,
}

/// Tells whether the source would start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] with the first thing that is missing, and the command that would grant it.
pub fn probe() -> Result<Features, Error> {
    let kvm = sys::open_kvm().map_err(|error| kvm_missing(&error))?;
    sys::create_vm(kvm.as_fd()).map_err(|error| kvm_missing(&error))?;
    let (_, programs) = Programs::make(4096).map_err(|error| bpf_missing(&error))?;
    programs.attach().map_err(|error| tracepoint_missing(&error))?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Features { release: release.trim().to_owned(), through: "raw_tracepoint kvm_unmap_hva_range" })
}

fn unavailable(missing: String, remedy: &str) -> Error {
    Error::Unavailable { source: "kernel", missing, remedy: remedy.to_owned() }
}

pub(super) fn kvm_missing(error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            unavailable(format!("the right to open /dev/kvm: {error}"), "sudo usermod -aG kvm \"$USER\"")
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => unavailable(
            format!("/dev/kvm: {error}; hardware virtualisation must be on, in a virtual machine nested"),
            "sudo modprobe -a kvm_intel kvm_amd",
        ),
        _ => unavailable(format!("a virtual machine of KVM: {error}"), "sudo dmesg | grep -i kvm"),
    }
}

pub(super) fn bpf_missing(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            unavailable(format!("CAP_BPF and CAP_PERFMON: {error}"), &crate::error::setcap("cap_bpf,cap_perfmon"))
        }
        _ => unavailable(format!("BPF as of Linux 5.12: {error}"), "uname -r"),
    }
}

pub(super) fn tracepoint_missing(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => bpf_missing(error),
        _ => unavailable(format!("the tracepoint kvm:kvm_unmap_hva_range: {error}"), "sudo modprobe kvm"),
    }
}
