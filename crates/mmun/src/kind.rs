//! The kinds of lines in a trace: the one list of them.

/// Makes the enum, its names, and the look-up of a kind by its name.
macro_rules! kinds {
    ($($kind:ident $name:literal,)*) => {
        /// The kind of a line.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum LineKind {
            $($kind,)*
        }

        impl LineKind {
            /// The value of the key `kind`.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(LineKind::$kind => $name,)*
                }
            }

            /// `None` for a kind that this version does not know.
            pub(crate) fn named(name: &str) -> Option<LineKind> {
                match name {
                    $($name => Some(LineKind::$kind),)*
                    _ => None,
                }
            }

            #[cfg(test)]
            const NAMES: &[&str] = &[$($name,)*];
        }
    };
}

kinds! {
    MmNew "mm_new",
    Get "get",
    Put "put",
    Free "free",
    MmRelease "mm_release",
    Start "start",
    End "end",
    Map "map",
    Fork "fork",
    Exec "exec",
    Exit "exit",
    Detach "detach",
    Stack "stack",
    Summary "summary",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_lists_the_kinds_and_the_help_explains_them() {
        // The published package has no `docs`.
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/trace-json.md");
        if let Ok(page) = std::fs::read_to_string(page) {
            let row = page.lines().find(|line| line.starts_with("| `kind` |"));
            let documented: Vec<&str> = row.unwrap().split('`').skip(3).step_by(2).collect();
            assert_eq!(documented, LineKind::NAMES);
        }
        let help = crate::record::HELP.lines();
        let columns = help.filter_map(|line| line.strip_prefix("  ")?.split("  ").next());
        let explained: Vec<&str> = columns.flat_map(|column| column.split(", ")).collect();
        for name in LineKind::NAMES {
            assert_eq!(LineKind::named(name).unwrap().name(), *name);
            assert!(explained.contains(name), "{name}");
        }
        assert_eq!(LineKind::named("later"), None);
    }
}
