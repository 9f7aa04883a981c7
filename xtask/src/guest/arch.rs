//! The kinds of machines that are emulated, a file for each.

mod aarch64;
mod x86_64;

use super::kernel::Series;
use super::machine::Accelerator;
use std::path::PathBuf;

/// A kind of machine.
pub(crate) struct Arch {
    /// As the command line has it.
    pub(crate) name: &'static str,
    /// What Debian calls it.
    pub(crate) debian: &'static str,
    pub(crate) triple: &'static str,
    pub(crate) emulator: &'static str,
    /// From the oldest to the newest.
    pub(crate) series: &'static [Series],
    /// The kernel that is taken if none is named.
    pub(crate) default: &'static str,
    /// What runs if nothing else is asked for, for each change: a label, which is a column of the
    /// table, and the arguments of Cargo. `docs/kernels.md` says what is left out, and why.
    pub(crate) standard: &'static [(&'static str, &'static str)],
    /// What runs besides to write the table: it takes too long for each change.
    pub(crate) more: &'static [(&'static str, &'static str)],
    /// A program, or a file if it has a folder, and the package of Debian that it comes in.
    pub(crate) needed: &'static [(&'static str, &'static str)],
    /// The arguments that say what board and what processors.
    pub(crate) board: fn(Accelerator) -> Vec<String>,
    /// The kernel's parameters that only this kind has.
    pub(crate) parameters: &'static str,
    /// The arguments for the serial line to the host, and its name inside, but for where it leads.
    pub(crate) line: (&'static [&'static str], &'static str),
    /// The packages of the tools that build for it, and those of its root folder, where neither are
    /// the host's.
    pub(crate) foreign: Option<&'static Foreign>,
}

/// What a machine has that is not of the host's kind.
pub(crate) struct Foreign {
    pub(crate) tools: &'static [&'static str],
    pub(crate) root: &'static [&'static str],
}

pub(crate) const ALL: &[&Arch] = &[&x86_64::ARCH, &aarch64::ARCH];

impl Arch {
    pub(crate) fn series(&self, name: &str) -> Option<&'static Series> {
        self.series.iter().find(|series| series.name == name)
    }

    /// What stands in the first column of the table.
    pub(crate) fn row(&self, series: &str) -> String {
        if self.foreign.is_some() {
            format!("{}, {series}", self.name)
        } else {
            series.to_owned()
        }
    }
}

/// Where what is foreign lies: the tools, and the guest's root folder.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    pub(crate) tools: PathBuf,
    pub(crate) root: PathBuf,
}
