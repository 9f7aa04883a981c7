//! The kinds of machines that `cargo xtask guest` can run, a file for each.

mod aarch64;
mod x86_64;

use super::kernel::Series;
use super::machine::Accelerator;
use std::path::PathBuf;

/// A kind of machine.
pub(crate) struct Arch {
    /// The name on the command line.
    pub(crate) name: &'static str,
    /// Debian's name of the architecture.
    pub(crate) debian: &'static str,
    pub(crate) triple: &'static str,
    pub(crate) emulator: &'static str,
    /// The kernels, from the oldest to the newest.
    pub(crate) series: &'static [Series],
    /// The default kernel.
    pub(crate) default: &'static str,
    /// The commands that run by default, and so for each change. Each has a label, which is a
    /// column of the table, and the arguments of Cargo. `docs/kernels.md` says which tests are left
    /// out, and why.
    pub(crate) standard: &'static [(&'static str, &'static str)],
    /// Further commands for the table. They take too long to run for each change.
    pub(crate) more: &'static [(&'static str, &'static str)],
    /// The programs and files that the host needs, each with its Debian package. A name with a
    /// folder is a file.
    pub(crate) needed: &'static [(&'static str, &'static str)],
    /// Returns the emulator's arguments for the board and the processors.
    pub(crate) board: fn(Accelerator) -> Vec<String>,
    /// The kernel's parameters that only this kind has.
    pub(crate) parameters: &'static str,
    /// The emulator's arguments for the serial line to the host, without the line's destination,
    /// and the name of the line's device in the guest.
    pub(crate) line: (&'static [&'static str], &'static str),
    /// The packages of the build tools and of the root folder, for a machine of another kind than
    /// the host.
    pub(crate) foreign: Option<&'static Foreign>,
}

/// The packages for a machine of another kind than the host.
pub(crate) struct Foreign {
    pub(crate) tools: &'static [&'static str],
    pub(crate) root: &'static [&'static str],
    /// Links in the root folder, each with its target. The packages are unpacked and not installed,
    /// so links that their scripts would make are missing.
    pub(crate) links: &'static [(&'static str, &'static str)],
}

pub(crate) const ALL: &[&Arch] = &[&x86_64::ARCH, &aarch64::ARCH];

impl Arch {
    pub(crate) fn series(&self, name: &str) -> Option<&'static Series> {
        self.series.iter().find(|series| series.name == name)
    }

    /// Returns the name of a kernel in the first column of the table.
    pub(crate) fn row(&self, series: &str) -> String {
        if self.foreign.is_some() {
            format!("{}, {series}", self.name)
        } else {
            series.to_owned()
        }
    }
}

/// The folders of the foreign tools and of the guest's root folder.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    pub(crate) tools: PathBuf,
    pub(crate) root: PathBuf,
}
