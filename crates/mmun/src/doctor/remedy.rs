//! Commands that grant a source its rights.
//!
//! A source's error suggests to set capabilities on the program that uses it. Capabilities on
//! `mmun` itself would be lent to every user of the machine. So this module suggests to set them on
//! a copy, which only one group may execute. It suggests to start the broker from this program, in
//! the background.

use mmu_source::kernel::BROKER;

use super::Lack;

const NOTE: &str = "the copy lends these rights to all who may execute it, in 'doctor' and 'coverage' only; see SECURITY.md";

/// A lack, with commands for `mmun` instead of those for any program.
pub(super) fn lack(source: &str, missing: String, (remedy, instead): (&str, Option<&str>)) -> Lack {
    let own = |command: &str| match capabilities(command) {
        Some(names) => copy(source, names),
        None if command == BROKER => broker(),
        None => command.to_owned(),
    };
    let has_capabilities = |command| capabilities(command).is_some();
    Lack {
        missing,
        remedy: Some(own(remedy)).filter(|remedy| !remedy.is_empty()),
        instead: instead.map(own),
        note: [Some(remedy), instead]
            .into_iter()
            .flatten()
            .any(has_capabilities)
            .then_some(NOTE),
    }
}

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
            ("sudo setcap cap_sys_ptrace+ep '/a b'", None),
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
        let found = lack("kernel", "a module".into(), ("sudo modprobe kvm", None));
        assert_eq!(found.remedy.as_deref(), Some("sudo modprobe kvm"));
        assert_eq!((found.instead, found.note), (None, None));
        assert_eq!(lack("kernel", "all".into(), ("", None)).remedy, None);
    }

    #[test]
    fn the_broker_comes_first_and_the_right_second() {
        for (grant, is_noted) in [("sudo setcap cap_bpf+ep 'a'", true), ("sudo true", false)] {
            let found = lack("kernel", "a right".into(), (BROKER, Some(grant)));
            assert!(
                found
                    .remedy
                    .unwrap()
                    .ends_with(" broker --group \"$(id -gn)\"")
            );
            let instead = found.instead.unwrap();
            assert_eq!(instead == grant, !is_noted, "{instead}");
            assert_eq!(found.note.is_some(), is_noted);
        }
    }
}
