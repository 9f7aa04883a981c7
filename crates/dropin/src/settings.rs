//! The settings from the environment.

use crate::first::First;

/// Which sources to use: `MMUN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Both sources, or the one that works.
    Auto,
    Hook,
    Kernel,
    /// Both sources, or none.
    Both,
    Off,
}

impl Choice {
    const NAMES: [(&'static str, Choice); 5] = [
        ("auto", Choice::Auto),
        ("hook", Choice::Hook),
        ("kernel", Choice::Kernel),
        ("both", Choice::Both),
        ("off", Choice::Off),
    ];

    fn named(name: &str) -> Option<Choice> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, choice)| *choice)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, choice)| *choice == self)
            .map_or("auto", |(name, _)| name)
    }

    pub(crate) fn wants_hook(self) -> bool {
        matches!(self, Choice::Auto | Choice::Hook | Choice::Both)
    }

    pub(crate) fn wants_kernel(self) -> bool {
        matches!(self, Choice::Auto | Choice::Kernel | Choice::Both)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) choice: Choice,
    /// End the process at its first use of a library if the sources could miss a change.
    pub(crate) strict: bool,
    pub(crate) report: Option<String>,
}

impl Settings {
    /// Reads the environment. An unknown value is reported, and replaced by `auto` or by 1.
    fn read(get: impl Fn(&str) -> Option<String>, mut complain: impl FnMut(&str)) -> Settings {
        let choice = match get("MMUN").filter(|value| !value.is_empty()) {
            None => Choice::Auto,
            Some(value) => Choice::named(&value).unwrap_or_else(|| {
                complain(&format!(
                    "MMUN={value}: not auto, hook, kernel, both or off; using auto"
                ));
                Choice::Auto
            }),
        };
        let strict = match get("MMUN_STRICT").as_deref() {
            None | Some("" | "0") => false,
            Some("1") => true,
            Some(value) => {
                // A user who sets the variable wants strictness, so an unknown value turns it on.
                complain(&format!("MMUN_STRICT={value}: not 0 or 1; using 1"));
                true
            }
        };
        Settings {
            choice,
            strict,
            report: get("MMUN_REPORT").filter(|value| !value.is_empty()),
        }
    }
}

/// The settings of this process, read at the first use of UCX or libfabric.
pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: First<Settings> = First::new();
    SETTINGS.get_or_make(|| {
        let get =
            |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Settings::read(get, crate::say::complain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[(&str, &str)]) -> (Settings, Vec<String>) {
        let mut complaints = Vec::new();
        let get = |name: &str| {
            values
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        (
            Settings::read(get, |line| complaints.push(line.to_owned())),
            complaints,
        )
    }

    #[test]
    fn every_choice_has_its_name() {
        for (name, choice) in Choice::NAMES {
            let (settings, complaints) = read(&[("MMUN", name)]);
            assert_eq!(
                (settings.choice, settings.choice.name(), complaints.len()),
                (choice, name, 0)
            );
        }
        assert_eq!(read(&[]).0.choice, Choice::Auto);
        assert_eq!(read(&[("MMUN", "")]).0.choice, Choice::Auto);
    }

    #[test]
    fn an_unknown_value_is_reported_in_one_line() {
        let (settings, complaints) = read(&[("MMUN", "kernle"), ("MMUN_STRICT", "yes")]);
        assert_eq!((settings.choice, settings.strict), (Choice::Auto, true));
        assert_eq!(complaints.len(), 2);
        assert!(
            complaints.iter().all(|line| !line.contains('\n')),
            "{complaints:?}"
        );
    }
}
