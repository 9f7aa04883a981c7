//! The invalidation events a user can name, and sets of them.

use std::str::FromStr;

use mmu_notifier::Event;

/// The names of all events, in the order of their numbers here.
pub(crate) const NAMES: [&str; 8] =
    ["unmap", "clear", "protection_vma", "protection_page", "soft_dirty", "release", "migrate", "exclusive"];

/// Position of `event` in [`NAMES`]; `None` for one that this version of the program does not know.
pub(crate) fn number(event: Event) -> Option<usize> {
    Some(match event {
        Event::Unmap => 0,
        Event::Clear => 1,
        Event::ProtectionVma => 2,
        Event::ProtectionPage => 3,
        Event::SoftDirty => 4,
        Event::Release(_) => 5,
        Event::Migrate { .. } => 6,
        Event::Exclusive { .. } => 7,
        _ => return None,
    })
}

/// Which events to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventSet(u8);

impl EventSet {
    pub(crate) const ALL: EventSet = EventSet(!0);

    pub(crate) fn contains(self, number: usize) -> bool {
        self.0 & (1 << number) != 0
    }
}

impl FromStr for EventSet {
    type Err = String;

    /// Reads `unmap,clear`, or `!unmap,clear` for all but these.
    fn from_str(text: &str) -> Result<EventSet, String> {
        let (negated, names) = match text.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut set = 0;
        for name in names.split(',') {
            let number = NAMES.iter().position(|known| *known == name);
            let number =
                number.ok_or_else(|| format!("unknown event {name:?}; the events are {}", NAMES.join(", ")))?;
            set |= 1 << number;
        }
        Ok(EventSet(if negated { !set } else { set }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_exactly_its_events() {
        let set: EventSet = "unmap,migrate".parse().unwrap();
        let chosen: Vec<_> =
            NAMES.iter().enumerate().filter(|(n, _)| set.contains(*n)).map(|(_, name)| *name).collect();
        assert_eq!(chosen, ["unmap", "migrate"]);
    }

    #[test]
    fn an_exclamation_mark_means_all_but() {
        let set: EventSet = "!clear".parse().unwrap();
        assert!(!set.contains(1) && set.contains(0) && set.contains(7));
    }

    #[test]
    fn an_unknown_or_empty_name_lists_the_known_ones() {
        for text in ["unmap,foo", "", "unmap,", "!", "Unmap"] {
            let error = text.parse::<EventSet>().unwrap_err();
            assert!(error.contains("protection_vma"), "{text}: {error}");
        }
    }

    #[test]
    fn numbers_and_names_agree_with_the_core() {
        for event in [Event::Unmap, Event::Clear, Event::ProtectionVma, Event::ProtectionPage, Event::SoftDirty] {
            assert_eq!(NAMES[number(event).unwrap()], event.name());
        }
        assert_eq!(NAMES[number(Event::Migrate { owner: None }).unwrap()], "migrate");
        assert_eq!(NAMES[number(Event::Exclusive { owner: None }).unwrap()], "exclusive");
    }
}
