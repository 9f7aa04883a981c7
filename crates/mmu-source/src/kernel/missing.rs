//! What can be missing, and the command that provides it.

use crate::Error;
use std::os::unix::fs::MetadataExt;
use std::{fs, io};

/// The command that starts a broker, which gives an ordinary user the source without privileges.
/// The command needs root.
pub const BROKER: &str = "sudo mmun broker --group \"$(id -gn)\"";

pub(super) fn unavailable(missing: String, remedy: &str) -> Error {
    Error::Unavailable {
        source: "kernel",
        missing,
        remedy: remedy.to_owned(),
        instead: None,
    }
}

/// For the lack of a right, which `grant` gives to this program or user. Where a broker can serve,
/// the first advice is the broker.
fn without_right(missing: String, grant: &str) -> Error {
    // What the resolver needs: see `programs::offsets`.
    let has_broker = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
        && fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false);
    if !has_broker {
        return unavailable(missing, grant);
    }
    Error::Unavailable {
        source: "kernel",
        missing,
        remedy: BROKER.to_owned(),
        instead: Some(grant.to_owned()),
    }
}

fn exhausted(error: &io::Error) -> Option<Error> {
    crate::error::exhausted(error).map(|(missing, remedy)| unavailable(missing, &remedy))
}

/// Turns the failure of a call whose limit was reached into the lack of what is limited.
pub(super) fn of_exhaustion(error: Error) -> Error {
    match error {
        Error::Kernel { call, source, .. } if call != "mmap" => match exhausted(&source) {
            Some(lack) => lack,
            None => super::kernel_error(call, source),
        },
        error => error,
    }
}

pub(super) fn kvm_missing(error: &io::Error) -> Error {
    if let Some(lack) = exhausted(error) {
        return lack;
    }
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => match fs::metadata("/dev/kvm") {
            Ok(device) => may_not_open(error, &Device::of(&device)),
            Err(_) => may_not_open(
                error,
                &Device {
                    owner: 0,
                    group: 0,
                    mode: 0,
                    group_name: None,
                },
            ),
        },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => unavailable(
            format!(
                "/dev/kvm: {error}; hardware virtualisation must be on, in a virtual machine nested"
            ),
            match cfg!(target_arch = "x86_64") {
                true => "sudo modprobe -a kvm_intel kvm_amd",
                false => "sudo dmesg | grep -i kvm",
            },
        ),
        _ => unavailable(
            format!("a virtual machine of KVM: {error}"),
            "sudo dmesg | grep -i kvm",
        ),
    }
}

/// The owner and the mode of `/dev/kvm`.
struct Device {
    owner: u32,
    group: u32,
    mode: u32,
    group_name: Option<String>,
}

impl Device {
    fn of(device: &fs::Metadata) -> Device {
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        let (owner, group) = (device.uid(), device.gid());
        Device {
            owner,
            group,
            mode: device.mode() & 0o777,
            group_name: group_name(&groups, group),
        }
    }
}

/// Returns the name of a group. The fields of `/etc/group` are name, password, group id and
/// members.
fn group_name(groups: &str, number: u32) -> Option<String> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    fields.find_map(|mut line| {
        let name = line.next()?;
        (line.nth(1)?.parse() == Ok(number)).then(|| name.to_owned())
    })
}

/// Explains why `/dev/kvm` cannot be opened. After `EPERM`, the container must be given the device.
/// Otherwise, if the device's group may open it, has a name and is not root's, joining that group
/// helps. In all other cases the device needs an access control entry for the user.
fn may_not_open(error: &io::Error, device: &Device) -> Error {
    let Device {
        owner,
        group,
        mode,
        group_name,
    } = device;
    let name = group_name.clone().unwrap_or_else(|| group.to_string());
    let what = format!(
        "the right to open /dev/kvm, owner {owner}, group {name}, mode {mode:04o}: {error}"
    );
    match group_name {
        // The kernel returns `EPERM` before it checks the file's mode: the device rules of a
        // container forbid the access.
        _ if error.raw_os_error() == Some(libc::EPERM) => unavailable(
            what,
            "docker run --device /dev/kvm, or what that is where this container is started",
        ),
        Some(name) if mode & 0o060 == 0o060 && *group != 0 => without_right(
            format!("{what}; a new group counts from the next login on"),
            &format!("sudo usermod -aG {name} $(id -un)"),
        ),
        _ => without_right(what, "sudo setfacl -m u:$(id -un):rw /dev/kvm"),
    }
}

/// The first kernel version with everything that the tracepoint's program needs. The BPF compiler
/// for aarch64 has the atomic instructions later than the one for x86-64. The resolver needs Linux
/// 5.14, but the source also runs without the resolver.
const ENOUGH: (u32, u32) = if cfg!(target_arch = "aarch64") {
    (5, 18)
} else {
    (5, 12)
};

/// Explains that the kernel is too old, if it is. Then neither a privilege nor a module helps,
/// whatever error the kernel returned. For example, a kernel before 5.11 charges maps to
/// `RLIMIT_MEMLOCK`, and returns `EPERM` even to root if that limit is too low.
fn too_old(error: &io::Error, release: &str, enough: (u32, u32)) -> Option<Error> {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    let missing = || {
        format!(
            "BPF as of Linux {}.{}, and this is {}: {error}",
            enough.0,
            enough.1,
            release.trim()
        )
    };
    (version < enough).then(|| unavailable(missing(), "uname -r"))
}

fn too_old_here(error: &io::Error) -> Option<Error> {
    too_old(
        error,
        &fs::read_to_string("/proc/sys/kernel/osrelease").ok()?,
        ENOUGH,
    )
}

pub(super) fn bpf_missing(error: &io::Error) -> Error {
    if let Some(lack) = exhausted(error).or_else(|| too_old_here(error)) {
        return lack;
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let missing = format!("CAP_BPF and CAP_PERFMON: {error}");
            without_right(missing, &crate::error::setcap("cap_bpf,cap_perfmon"))
        }
        _ => unavailable(
            format!("the programs that listen (BPF): {error}"),
            "sudo dmesg | tail",
        ),
    }
}

/// Explains what a broker needs and the kernel lacks.
pub(super) fn description_missing() -> Error {
    let missing = "x86-64 or aarch64, and the kernel's description of itself and of KVM (CONFIG_DEBUG_INFO_BTF, Linux 5.15)";
    unavailable(missing.to_owned(), "ls -l /sys/kernel/btf")
}

pub(super) fn tracepoint_missing(error: &io::Error) -> Error {
    if let Some(lack) = exhausted(error).or_else(|| too_old_here(error)) {
        return lack;
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => bpf_missing(error),
        _ => unavailable(
            format!("the tracepoint kvm:kvm_unmap_hva_range: {error}"),
            "sudo modprobe kvm",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remedy(errno: i32, device: &Device) -> String {
        match may_not_open(&io::Error::from_raw_os_error(errno), device) {
            Error::Unavailable {
                remedy, instead, ..
            } => instead.unwrap_or(remedy),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_remedy_depends_on_the_owner_of_the_device() {
        let kvm = || Device {
            owner: 0,
            group: 104,
            mode: 0o660,
            group_name: Some("kvm".into()),
        };
        assert_eq!(
            remedy(libc::EACCES, &kvm()),
            "sudo usermod -aG kvm $(id -un)"
        );
        // A group that may not open the device, or root's group.
        let alone = "sudo setfacl -m u:$(id -un):rw /dev/kvm";
        assert_eq!(
            remedy(
                libc::EACCES,
                &Device {
                    mode: 0o600,
                    ..kvm()
                }
            ),
            alone
        );
        assert_eq!(
            remedy(
                libc::EACCES,
                &Device {
                    group: 0,
                    group_name: Some("root".into()),
                    ..kvm()
                }
            ),
            alone
        );
        assert_eq!(
            remedy(
                libc::EACCES,
                &Device {
                    group_name: None,
                    ..kvm()
                }
            ),
            alone
        );
        assert!(remedy(libc::EPERM, &kvm()).contains("--device /dev/kvm"));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_the_reason() {
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        let lack = too_old(&refused, "5.10.0-39-amd64\n", (5, 12))
            .expect("it is too old")
            .to_string();
        assert!(
            lack.contains("Linux 5.12, and this is 5.10.0-39-amd64: Operation not permitted"),
            "{lack}"
        );
        for enough in ["5.12.0", "6.1.0-50-amd64", "7.3.4+deb13-amd64", "unknown"] {
            assert!(too_old(&refused, enough, (5, 12)).is_none(), "{enough}");
        }
        let lack = too_old(&refused, "5.15.0-arm64", (5, 18)).expect("it is too old");
        assert!(lack.to_string().contains("Linux 5.18"), "{lack}");
    }

    #[test]
    fn a_group_is_found_by_its_number() {
        let groups = "root:x:0:\nkvm:x:104:a,b\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 10), None);
    }
}
