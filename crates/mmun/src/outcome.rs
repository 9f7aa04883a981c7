//! How `mmun` ends: with an exit status, or by a signal, as the program that it ran did.

use mmu_source::process::ExitStatus;

use crate::sys;

/// An exit code, or a signal to die of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exit(i32),
    Signal(i32),
}

/// The program itself failed.
pub(crate) const FAILED: Outcome = Outcome::Exit(125);
/// The traced program exists but cannot be run.
pub(crate) const NOT_EXECUTABLE: Outcome = Outcome::Exit(126);
/// There is no such program.
pub(crate) const NOT_FOUND: Outcome = Outcome::Exit(127);

impl Outcome {
    /// Ends this process.
    pub(crate) fn end(self) -> ! {
        match self {
            Outcome::Exit(code) => std::process::exit(code),
            Outcome::Signal(signal) => sys::die_of(signal),
        }
    }

    /// For the pipe from the tracer to the front.
    pub(crate) fn to_bytes(self) -> [u8; 5] {
        let (kind, value) = match self {
            Outcome::Exit(code) => (0, code),
            Outcome::Signal(signal) => (1, signal),
        };
        let [a, b, c, d] = value.to_le_bytes();
        [kind, a, b, c, d]
    }

    pub(crate) fn from_bytes([kind, a, b, c, d]: [u8; 5]) -> Outcome {
        let value = i32::from_le_bytes([a, b, c, d]);
        if kind == 0 {
            Outcome::Exit(value)
        } else {
            Outcome::Signal(value)
        }
    }
}

impl From<ExitStatus> for Outcome {
    fn from(status: ExitStatus) -> Outcome {
        match status {
            ExitStatus::Code(code) => Outcome::Exit(code),
            ExitStatus::Signal(signal) => Outcome::Signal(signal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_survives_the_pipe() {
        for outcome in [
            Outcome::Exit(0),
            Outcome::Exit(255),
            Outcome::Signal(9),
            Outcome::Signal(64),
        ] {
            assert_eq!(Outcome::from_bytes(outcome.to_bytes()), outcome);
        }
    }
}
