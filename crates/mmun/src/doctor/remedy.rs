//! Commands that grant a source its rights.
//!
//! A source's error suggests to set capabilities on the program that uses it. Capabilities on
//! `mmun` itself would be lent to every user of the machine. So this module suggests to set them on
//! a copy, which only one group may execute. For the source `kernel` it suggests the broker first,
//! because the broker lends only what the source needs.

use std::fs;

use super::Lack;

const NOTE: &str = "the copy lends these rights to all who may execute it, in 'doctor' and 'coverage' only; see SECURITY.md";

/// A lack, with commands for `mmun` instead of those for any program.
pub(super) fn lack(source: &str, missing: String, remedy: &str) -> Lack {
    let has_broker = source == "kernel" && IS_FOR_BROKERS && fs::exists(BTF).unwrap_or(false);
    let (remedy, instead, note) = match capabilities(remedy) {
        None => (Some(remedy.to_owned()), None, None),
        Some(names) if has_broker => (Some(broker()), Some(copy(source, names)), Some(NOTE)),
        Some(names) => (Some(copy(source, names)), None, Some(NOTE)),
    };
    Lack {
        missing,
        remedy: remedy.filter(|remedy| !remedy.is_empty()),
        instead,
        note,
    }
}

/// Whether a broker can serve on this processor.
const IS_FOR_BROKERS: bool = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));

/// The kernel's BTF, which the broker reads.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The capabilities that a command would set on this program; `None` if it is no such command.
fn capabilities(remedy: &str) -> Option<&str> {
    let (names, _) = remedy.strip_prefix("sudo setcap ")?.split_once("+ep ")?;
    Some(names)
}

/// The command of a broker in the background, so that the rest of the command line runs as well.
fn broker() -> String {
    format!("sudo -b {} broker --group \"$(id -gn)\"", own())
}

/// The commands for a copy of `mmun`. Each source needs its own copy, because `setcap` replaces a
/// file's capabilities.
fn copy(source: &str, names: &str) -> String {
    let copy = format!("/usr/local/bin/mmun-{source}");
    let install = format!("sudo install -m 0750 -g \"$(id -gn)\" {} {copy}", own());
    format!("{install} && sudo setcap {names}+ep {copy}")
}

/// This program, quoted for a shell.
fn own() -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "mmun".into());
    format!("'{}'", program.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_go_to_a_copy_for_one_group() {
        let found = lack(
            "uffd",
            "a right".into(),
            "sudo setcap cap_sys_ptrace+ep '/a b'",
        );
        let remedy = found.remedy.unwrap();
        assert!(
            remedy.starts_with("sudo install -m 0750 -g \"$(id -gn)\" '"),
            "{remedy}"
        );
        assert!(
            remedy.ends_with(" && sudo setcap cap_sys_ptrace+ep /usr/local/bin/mmun-uffd"),
            "{remedy}"
        );
        assert!(found.note.is_some_and(|note| note.contains("SECURITY.md")));
    }

    #[test]
    fn other_commands_stay_as_they_are() {
        let found = lack("kernel", "a module".into(), "sudo modprobe kvm");
        assert_eq!(found.remedy.as_deref(), Some("sudo modprobe kvm"));
        assert_eq!((found.instead, found.note), (None, None));
        assert_eq!(lack("kernel", "all".into(), "").remedy, None);
    }
}
