//! What the source finds on this machine, and how it says what is missing.

use super::machine::Keeper;
use super::program::Audience;
use super::programs::Programs;
use super::sys;
use crate::Error;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// How the source hears: `raw_tracepoint kvm_unmap_hva_range`.
    pub through: &'static str,
    /// Whether this kernel may skip the program, if the processor is in the middle of it (Linux 7.0). What was skipped is counted, and
    /// everything invalidated, within a second: until then a change of that time is not known.
    pub may_skip: bool,
}

/// Tells whether the source would start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] with the first thing that is missing, and the command that would grant it.
pub fn probe() -> Result<Features, Error> {
    let through = match super::start::outfit(4096, true)?.1 {
        Keeper::Own(_) => "raw_tracepoint kvm_unmap_hva_range",
        Keeper::Broker(_) => "raw_tracepoint kvm_unmap_hva_range of a broker",
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let may_skip = may_skip(&release);
    Ok(Features { release: release.trim().to_owned(), through, may_skip })
}

/// Whether a kernel of this release runs programs at tracepoints preemptibly, and skips one that the
/// processor is in the middle of.
pub(super) fn may_skip(release: &str) -> bool {
    let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
    // What is not known is taken for the worse.
    major.is_none_or(|major| major >= 7)
}

/// Nothing here, nor a broker that would help.
pub(super) fn broker_refuses(lack: Error, why: &str) -> Error {
    let path = super::broker::path();
    match lack {
        Error::Unavailable { missing, remedy, .. } => {
            unavailable(format!("{missing}; the broker at {} cannot help: {why}", path.display()), &remedy)
        }
        other => other,
    }
}

/// Grants all that a user lacks, if root types it.
pub(super) const BROKER: &str = "sudo mmun broker --group \"$(id -gn)\"";

pub(super) fn unavailable(missing: String, remedy: &str) -> Error {
    Error::Unavailable { source: "kernel", missing, remedy: remedy.to_owned() }
}

pub(super) fn kvm_missing(error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => match std::fs::metadata("/dev/kvm") {
            Ok(device) => may_not_open(error, &Device::of(&device)),
            Err(_) => may_not_open(error, &Device { owner: 0, group: 0, mode: 0, group_name: None }),
        },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => unavailable(
            format!("/dev/kvm: {error}; hardware virtualisation must be on, in a virtual machine nested"),
            "sudo modprobe -a kvm_intel kvm_amd",
        ),
        _ => unavailable(format!("a virtual machine of KVM: {error}"), "sudo dmesg | grep -i kvm"),
    }
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
    if sys::open_kvm().and_then(|kvm| sys::create_vm(kvm.as_fd())).is_err() {
        errors.extend(Programs::make(4096, Audience::Own { peek: true }).err().map(|error| bpf_missing(&error)));
    }
    Err(errors)
}

/// Whom `/dev/kvm` belongs to.
struct Device {
    owner: u32,
    group: u32,
    mode: u32,
    group_name: Option<String>,
}

impl Device {
    fn of(device: &std::fs::Metadata) -> Device {
        let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
        let (owner, group) = (device.uid(), device.gid());
        Device { owner, group, mode: device.mode() & 0o777, group_name: group_name(&groups, group) }
    }
}

/// The lines of `/etc/group` are name, password, number and members.
fn group_name(groups: &str, number: u32) -> Option<String> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    fields.find_map(|mut line| {
        let name = line.next()?;
        (line.nth(1)?.parse() == Ok(number)).then(|| name.to_owned())
    })
}

/// The right is that of a group, if one may and it is not that of the superuser; else only the device's mode can give it.
fn may_not_open(error: &io::Error, device: &Device) -> Error {
    let Device { owner, group, mode, group_name } = device;
    let name = group_name.clone().unwrap_or_else(|| group.to_string());
    let what = format!("the right to open /dev/kvm, owner {owner}, group {name}, mode {mode:04o}: {error}");
    match group_name {
        // The kernel's answer where the file's mode was not asked: the devices of a container.
        _ if error.raw_os_error() == Some(libc::EPERM) => {
            unavailable(what, "docker run --device /dev/kvm, or what that is where this container is started")
        }
        Some(name) if mode & 0o060 == 0o060 && *group != 0 => unavailable(
            format!("{what}; a new group counts from the next login on"),
            &format!("sudo usermod -aG {name} $(id -un)"),
        ),
        _ => unavailable(what, "sudo setfacl -m u:$(id -un):rw /dev/kvm"),
    }
}

pub(super) fn bpf_missing(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let missing = format!("CAP_BPF and CAP_PERFMON, or a broker ({BROKER}): {error}");
            unavailable(missing, &crate::error::setcap("cap_bpf,cap_perfmon"))
        }
        _ => unavailable(format!("BPF as of Linux 5.12: {error}"), "uname -r"),
    }
}

/// What a broker cannot do without.
pub(super) fn description_missing() -> Error {
    let missing = "x86-64, and the kernel's description of itself and of KVM (CONFIG_DEBUG_INFO_BTF, Linux 5.15)";
    unavailable(missing.to_owned(), "ls -l /sys/kernel/btf")
}

pub(super) fn tracepoint_missing(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => bpf_missing(error),
        _ => unavailable(format!("the tracepoint kvm:kvm_unmap_hva_range: {error}"), "sudo modprobe kvm"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remedy(errno: i32, device: &Device) -> String {
        match may_not_open(&io::Error::from_raw_os_error(errno), device) {
            Error::Unavailable { remedy, .. } => remedy,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_helps_follows_from_whom_the_device_belongs_to() {
        let kvm = || Device { owner: 0, group: 104, mode: 0o660, group_name: Some("kvm".into()) };
        assert_eq!(remedy(libc::EACCES, &kvm()), "sudo usermod -aG kvm $(id -un)");
        // A group that may not, or that is the superuser's.
        let alone = "sudo setfacl -m u:$(id -un):rw /dev/kvm";
        assert_eq!(remedy(libc::EACCES, &Device { mode: 0o600, ..kvm() }), alone);
        assert_eq!(remedy(libc::EACCES, &Device { group: 0, group_name: Some("root".into()), ..kvm() }), alone);
        assert_eq!(remedy(libc::EACCES, &Device { group_name: None, ..kvm() }), alone);
        assert!(remedy(libc::EPERM, &kvm()).contains("--device /dev/kvm"));
    }

    #[test]
    fn a_group_is_found_by_its_number() {
        let groups = "root:x:0:\nkvm:x:104:a,b\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 10), None);
    }

    #[test]
    fn kernels_that_may_skip_the_program_are_known_by_their_release() {
        assert_eq!(["6.18.2-amd64", "7.0.0-rc1", "12.1", "", "x"].map(may_skip), [false, true, true, true, true]);
    }
}
