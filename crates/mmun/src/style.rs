//! Colour on standard output: only on a terminal, and not if the user does not want it.

use std::fmt::Display;
use std::io::{self, IsTerminal};

/// Whether to write colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Colored,
}

/// How a piece of text is emphasized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Bold,
    Dim,
    Good,
    Fair,
    Bad,
}

impl Style {
    pub(crate) fn of_stdout() -> Style {
        if io::stdout().is_terminal() && is_wanted() {
            Style::Colored
        } else {
            Style::Plain
        }
    }

    pub(crate) fn paint(self, mark: Mark, text: impl Display) -> String {
        let code = match mark {
            _ if self == Style::Plain => return text.to_string(),
            Mark::Bold => 1,
            Mark::Dim => 2,
            Mark::Good => 32,
            Mark::Fair => 33,
            Mark::Bad => 31,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Whether the environment allows colours: `NO_COLOR` is unset or empty, and `TERM` is not `dumb`.
pub(crate) fn is_wanted() -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|terminal| terminal != "dumb")
}
