//! The invalidation events a user can name, and sets of them.

use std::ffi::OsStr;
use std::str::FromStr;

use clap::builder::{PossibleValue, TypedValueParser};
use mmu_notifier::Event;

/// The names of all events. The index of a name is the event's number in this program.
pub(crate) const NAMES: [&str; 8] = [
    "unmap",
    "clear",
    "protection_vma",
    "protection_page",
    "soft_dirty",
    "release",
    "migrate",
    "exclusive",
];

/// The positions of some of these names.
pub(crate) const UNMAP: usize = 0;
pub(crate) const CLEAR: usize = 1;
pub(crate) const RELEASE: usize = 5;

/// Position of `event` in [`NAMES`]; `None` for one that this version of the program does not know.
pub(crate) fn number(event: Event) -> Option<usize> {
    Some(match event {
        Event::Unmap => UNMAP,
        Event::Clear => CLEAR,
        Event::ProtectionVma => 2,
        Event::ProtectionPage => 3,
        Event::SoftDirty => 4,
        Event::Release(_) => RELEASE,
        Event::Migrate { .. } => 6,
        Event::Exclusive { .. } => 7,
        _ => return None,
    })
}

/// Which events to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventSet(u8);

impl Default for EventSet {
    fn default() -> EventSet {
        EventSet::ALL
    }
}

impl EventSet {
    pub(crate) const ALL: EventSet = EventSet(!0);

    /// The events of all options together: those that some option names (all events if no option
    /// names any), without those that an option excludes.
    pub(crate) fn of(options: &[Events]) -> EventSet {
        let mut only = None;
        let mut excluded = 0;
        for option in options {
            match *option {
                Events::Only(set) => only = Some(only.unwrap_or(0) | set),
                Events::AllBut(set) => excluded |= set,
            }
        }
        EventSet(only.unwrap_or(EventSet::ALL.0) & !excluded)
    }

    pub(crate) fn contains(self, number: usize) -> bool {
        self.0 & (1 << number) != 0
    }
}

/// The events of one option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Events {
    Only(u8),
    AllBut(u8),
}

impl FromStr for Events {
    type Err = String;

    /// Reads `unmap,clear`, or `!unmap,clear` for all but these.
    fn from_str(text: &str) -> Result<Events, String> {
        let (excluded, names) = match text.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut set = 0;
        for name in names.split(',') {
            let number = NAMES
                .iter()
                .position(|known| *known == name)
                .ok_or_else(|| unknown(name))?;
            set |= 1 << number;
        }
        Ok(if excluded {
            Events::AllBut(set)
        } else {
            Events::Only(set)
        })
    }
}

fn unknown(name: &str) -> String {
    let hint = match meant(name) {
        Some(known) => format!("did you mean {known}? "),
        None => String::new(),
    };
    format!(
        "unknown event {name:?}; {hint}The events are {}",
        NAMES.join(", ")
    )
}

/// The event that a user may mean by a word. The word may be a system call that causes the event,
/// a part of the event's name, or a longer word that contains the name.
fn meant(word: &str) -> Option<&'static str> {
    let word = word.to_lowercase();
    let of_call = match word.as_str() {
        "mmap" | "mremap" | "brk" | "shmat" | "shmdt" | "remap_file_pages" | "process_mrelease" => {
            Some("unmap")
        }
        "madvise" | "process_madvise" => Some("clear"),
        "mprotect" | "pkey_mprotect" => Some("protection_vma"),
        "fork" | "vfork" | "clone" | "clone3" => Some("protection_page"),
        "mbind" | "move_pages" => Some("migrate"),
        _ => None,
    };
    let is_part =
        |known: &&&str| word.len() > 2 && (known.contains(word.as_str()) || word.contains(**known));
    of_call.or_else(|| NAMES.iter().find(is_part).copied())
}

/// Parses the option, and gives the names to the shell completions.
#[derive(Clone, Debug)]
pub(crate) struct EventsParser;

impl TypedValueParser for EventsParser {
    type Value = Events;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Events, clap::Error> {
        let parse: fn(&str) -> Result<Events, String> = str::parse;
        parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(NAMES.iter().map(|name| PossibleValue::new(*name))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(options: &[&str]) -> Vec<&'static str> {
        let options: Vec<Events> = options
            .iter()
            .map(|option| option.parse().unwrap())
            .collect();
        let set = EventSet::of(&options);
        NAMES
            .iter()
            .enumerate()
            .filter(|(number, _)| set.contains(*number))
            .map(|(_, name)| *name)
            .collect()
    }

    #[test]
    fn a_list_names_exactly_its_events_and_none_names_all() {
        assert_eq!(set(&["unmap,migrate"]), ["unmap", "migrate"]);
        assert_eq!(set(&[]), NAMES);
    }

    #[test]
    fn an_exclamation_mark_means_all_but() {
        assert_eq!(set(&["!clear"]).len(), NAMES.len() - 1);
    }

    #[test]
    fn repeated_options_add_up_and_exclusions_win() {
        assert_eq!(set(&["unmap", "clear"]), ["unmap", "clear"]);
        assert_eq!(set(&["!unmap", "!clear"]), NAMES[2..]);
        assert_eq!(set(&["!clear", "unmap,clear"]), ["unmap"]);
    }

    #[test]
    fn an_unknown_or_empty_name_lists_the_known_ones() {
        for text in ["unmap,foo", "", "unmap,", "!", "Unmap"] {
            let error = text.parse::<Events>().unwrap_err();
            assert!(error.contains("protection_vma"), "{text}: {error}");
        }
    }

    #[test]
    fn a_call_or_a_part_of_a_name_points_to_its_event() {
        for (word, event) in [
            ("munmap", Some("unmap")),
            ("Unmap", Some("unmap")),
            ("protection", Some("protection_vma")),
            ("mprotect", Some("protection_vma")),
            ("fork", Some("protection_page")),
            ("open", None),
            ("", None),
        ] {
            assert_eq!(meant(word), event, "{word}");
        }
    }

    #[test]
    fn numbers_and_names_agree_with_the_core() {
        for event in [
            Event::Unmap,
            Event::Clear,
            Event::ProtectionVma,
            Event::ProtectionPage,
            Event::SoftDirty,
        ] {
            assert_eq!(NAMES[number(event).unwrap()], event.name());
        }
        assert_eq!(
            NAMES[number(Event::Migrate { owner: None }).unwrap()],
            "migrate"
        );
        assert_eq!(
            NAMES[number(Event::Exclusive { owner: None }).unwrap()],
            "exclusive"
        );
    }
}
