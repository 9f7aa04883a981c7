//! The report of one child, and its form as a line.

/// When a source reported a change. In the report of a library's cache, `Missed` means that the
/// registration was stale, and `Before` that it was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Before,
    After,
    Missed,
    /// The operation or the source does not work here.
    NotAvailable,
}

impl Seen {
    pub(crate) const ALL: [Seen; 4] = [Seen::Before, Seen::After, Seen::Missed, Seen::NotAvailable];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Seen::Before => "before",
            Seen::After => "after",
            Seen::Missed => "missed",
            Seen::NotAvailable => "n/a",
        }
    }
}

/// One cell of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) seen: Seen,
    /// Whether the translation changed.
    pub(crate) changed: bool,
    /// Why the cell is not available, in one line; empty otherwise.
    pub(crate) reason: String,
    /// Whether the child hung, died, or could not run the cell.
    pub(crate) broken: bool,
}

impl Report {
    pub(crate) fn unavailable(reason: impl Into<String>) -> Report {
        Report {
            seen: Seen::NotAvailable,
            changed: false,
            reason: reason.into(),
            broken: false,
        }
    }

    pub(crate) fn broken(reason: impl Into<String>) -> Report {
        Report {
            broken: true,
            ..Report::unavailable(reason)
        }
    }

    pub(crate) fn told(seen: Seen, changed: bool) -> Report {
        Report {
            seen,
            changed,
            reason: String::new(),
            broken: false,
        }
    }

    /// One line: when the change was seen, whether the translation changed, whether the child is
    /// broken, and the reason.
    pub(crate) fn to_line(&self) -> String {
        format!(
            "{} {} {} {}\n",
            self.seen.name(),
            self.changed,
            self.broken,
            self.reason.replace('\n', " ")
        )
    }

    /// `None` if `line` is not a line of [`Report::to_line`].
    pub(crate) fn from_line(line: &str) -> Option<Report> {
        let mut words = line.strip_suffix('\n')?.splitn(4, ' ');
        let seen = words.next()?;
        let seen = Seen::ALL.into_iter().find(|known| known.name() == seen)?;
        let changed = words.next()?.parse().ok()?;
        let broken = words.next()?.parse().ok()?;
        Some(Report {
            seen,
            changed,
            broken,
            reason: words.next()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_its_line() {
        let reports = [
            Report::told(Seen::Before, true),
            Report::told(Seen::Missed, false),
            Report::unavailable("there is no swap space"),
            Report::broken("died"),
        ];
        for report in reports {
            assert_eq!(Report::from_line(&report.to_line()), Some(report));
        }
        assert_eq!(Report::from_line("before true false "), None);
        assert_eq!(Report::from_line("perhaps true false \n"), None);
    }
}
